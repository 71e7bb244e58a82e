"""Labels from the data to the model and back to pictures, by the commands."""

import json
import re
from dataclasses import asdict

import pytest
import torch

from nvae.checkpoint import save_model
from nvae.cli.config import compose_train
from nvae.cli.evaluate import main as evaluate
from nvae.cli.sample import main as sample
from nvae.data.config import load_config
from nvae.data.dataset import ImageData
from nvae.models import NVAE

from .commands import Commands

SMALL = ["data=digits", "model=nvae_tiny"]


@pytest.fixture
def checkpoint(tmp_path):
    config = compose_train([*SMALL, "model.num_classes=10"])
    torch.manual_seed(0)
    model = NVAE(config.model)
    with torch.no_grad():
        for table in model.classes.groups:
            table.normal_()
    save_model(model, tmp_path / "m.ckpt", {"data": asdict(load_config("digits"))})
    return tmp_path / "m.ckpt"


def test_samples_of_classes(tmp_path, monkeypatch, capsys, checkpoint):
    command = Commands(sample, monkeypatch, capsys, tmp_path)
    common = (f"checkpoint={checkpoint}", "seeds=[0,5]")
    command(*common, "class=3", "output=one")
    command(*common, "classes=[7,3]", "temperature=[1.0,0.5]", "npz=true", "output=two")
    command(*common, "classes=all", "guidance=2", "output=all")
    command(*common, "output=none")
    one, two, every, none = (
        {file.name: file.read_bytes() for file in (tmp_path / folder / "t1").iterdir()}
        for folder in ("one", "two", "all", "none")
    )
    assert sorted(one) == ["class3_seed000000.png", "class3_seed000005.png"]
    assert one.items() < two.items()
    assert len(every) == 20
    assert len({*every.values(), *two.values(), *none.values()}) == 26
    assert (tmp_path / "two" / "grid.png").is_file()
    command(f"checkpoint={checkpoint}", "mode=reconstruct", "images=0-2", "output=own")
    command(f"checkpoint={checkpoint}", "mode=reconstruct", "images=0-2", "class=3", "output=given")
    command(f"checkpoint={checkpoint}", "mode=reconstruct", "images=0-2", "data.test_size=0",
            "data.train_size=1697", "output=of_valid")  # fmt: skip
    own, given = (tmp_path / name / "reconstructions.png" for name in ("own", "given"))
    assert own.read_bytes() != given.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["class=10"], "class names 10; the model knows 0 to 9"),
        (["guidance=2"], "guidance=2 leads to a class"),
        (["classes=all", "mode=traverse"], "takes one class"),
        (["classes=[1,2]", "mode=interpolate"], "takes one class"),
        (["class=shoe"], "no number or range"),
    ],
)
def test_classes_that_cannot_be(tmp_path, monkeypatch, capsys, checkpoint, arguments, message):
    command = Commands(sample, monkeypatch, capsys, tmp_path)
    error = command.fails(f"checkpoint={checkpoint}", *arguments)
    assert re.search(message, error), error
    assert [file.name for file in tmp_path.iterdir()] == ["m.ckpt"]


def test_likelihood_given_the_class_and_without(tmp_path, monkeypatch, capsys, checkpoint):
    command = Commands(evaluate, monkeypatch, capsys, tmp_path)
    found, printed = [], []
    for setting in ("labels=true", "labels=false", "data.labels=false"):
        printed.append(
            command(
                f"checkpoint={checkpoint}", setting, "importance_samples=[]",
                "output=found.json", "overwrite=true", "max_images=20",
            )
        )  # fmt: skip
        found.append(json.loads((tmp_path / "found.json").read_text()))
    told, untold, without = found
    assert told["protocol"]["labels"] is True
    assert len(told["protocol"]["labels_sha256"]) == 64
    assert told["result"]["negative_elbo"] != untold["result"]["negative_elbo"]
    # where the data has none, the protocol must not claim that the model was told some
    assert without["protocol"] == untold["protocol"]
    assert without["protocol"]["labels"] is False
    assert without["result"] == untold["result"]
    assert ["has no labels" in each for each in printed] == [False, False, True]


def test_a_model_with_classes_asks_for_labels():
    assert compose_train(SMALL).data.labels == "auto"
    assert compose_train([*SMALL, "model.num_classes=10"]).data.labels is True
    with pytest.raises(ValueError, match=r"data\.labels=false passes over them"):
        compose_train([*SMALL, "model.num_classes=10", "data.labels=false"])
    data = ImageData(compose_train([*SMALL, "model.num_classes=10"]).data)
    data.setup()
    data.check_classes(10)
    with pytest.raises(ValueError, match="has 10 classes, and the model knows 3"):
        data.check_classes(3)
