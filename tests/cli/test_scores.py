"""evaluate.py mode=scores as a user calls it."""

import csv
import json
import os
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from nvae.cli import evaluate as evaluate_module
from nvae.cli.checkpoint_data import open_checkpoint
from nvae.cli.evaluate_config import _OF_MODE, EvaluateConfig
from nvae.cli.score_sets import ImageSet, converted, known_data, open_other
from nvae.data import DataConfig
from nvae.data.dataset import ImageData
from nvae.evaluation import RecordStore
from nvae.scores import Synthetic
from tests.training.ranks import free_port

from .checkpoints import DATA, write_checkpoint

SCORES = ("mode=scores", "importance_samples=[2]", "maps=0", "typicality_images=8")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_scores_of_a_split_and_of_what_does_not_belong(evaluate, checkpoint, tmp_path):
    printed = evaluate(
        f"checkpoint={checkpoint}", "mode=scores", "importance_samples=[2,3]", "maps=2",
        "typicality_images=8", "against=[digits,inverted,noise]", "max_images=10", "bootstrap=5",
        "output=out/s.json", "ratio_samples=2",
    )  # fmt: skip
    evaluate(f"checkpoint={checkpoint}", "importance_samples=[2,3]", "max_images=10",
             "output=likelihood.json")  # fmt: skip
    likelihood = json.loads((tmp_path / "likelihood.json").read_text())["result"]
    found = json.loads((tmp_path / "out" / "s.json").read_text())
    result, protocol = found["result"], found["protocol"]
    rows = rows_of(tmp_path / "out" / "s.csv")
    assert [int(row["index"]) for row in rows] == list(range(10))
    elbo = np.array([float(row["negative_elbo"]) for row in rows])
    assert elbo.mean() == pytest.approx(likelihood["negative_elbo"]["mean"])
    assert result["scores"]["own"]["means"]["nll_3"]["mean"] == pytest.approx(
        likelihood["importance_weighted"][1]["nll"]["mean"]
    )
    kl = sum(np.array([float(row[f"kl_{g}"]) for row in rows]) for g in range(3))
    assert kl == pytest.approx([float(row["kl"]) for row in rows])
    assert result["typicality"]["images"] == 8
    typical = abs(elbo - result["typicality"]["entropy"])
    assert typical == pytest.approx([float(row["typicality"]) for row in rows])
    assert {"llr_1", "llr_2", "llr_3", "nll_2"} < rows[0].keys()
    assert list(result["against"]) == ["digits", "inverted", "noise"]
    for name, separations in result["against"].items():
        others = rows_of(tmp_path / "out" / f"s-against-{name}.csv")
        assert len(others) == 10
        assert set(separations) == set(result["scores"]["own"]["means"])
        assert f"against {name}: 10 images" in printed
    assert rows_of(tmp_path / "out" / "s-against-digits.csv")[0]["label"].isdigit()
    assert "AUROC" in printed
    assert "that is evidence about these sets alone" in printed
    assert protocol["mode"] == "scores"
    assert protocol["ratio_samples"] == 2
    assert protocol["against"]["noise"]["change"]["change"] == "noise"
    assert sorted(result["files"]) == sorted(
        path.name for path in (tmp_path / "out").iterdir() if path.name != "s.json"
    )
    for name in ("s-maps", "s-against-noise-maps", "s-histograms"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert min(picture.size) > 100
    assert "done before" in evaluate(
        f"checkpoint={checkpoint}", "mode=scores", "importance_samples=[2,3]", "maps=2",
        "typicality_images=8", "against=[digits,inverted,noise]", "max_images=10", "bootstrap=5",
        "output=out/s.json", "ratio_samples=2",
    )  # fmt: skip


def test_a_killed_run_goes_on_also_with_other_sets(evaluate, checkpoint, tmp_path, monkeypatch):
    evaluate(f"checkpoint={checkpoint}", *SCORES, "against=noise", "output=whole.json")
    original, computed = RecordStore.add, []

    def kill_after_eighteen(self, part):
        computed.append(len(part))
        original(self, part)
        if sum(computed) >= 8 + 10:  # of the reference, and of the own images
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "add", kill_after_eighteen)
        with pytest.raises(SystemExit, match="130"):
            evaluate(f"checkpoint={checkpoint}", *SCORES, "output=again.json", "chunk=4")
    assert not list(tmp_path.glob("again*"))
    done, again = sum(computed), []

    def watch(self, part):
        again.append(len(part))
        original(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(RecordStore, "add", watch)
        evaluate(f"checkpoint={checkpoint}", *SCORES, "against=noise", "output=again.json")
    assert done + sum(again) == 8 + 12 + 12
    whole, resumed = (
        json.loads((tmp_path / f"{name}.json").read_text())["result"] for name in ("whole", "again")
    )
    for score, mean in whole["scores"]["noise"]["means"].items():
        assert resumed["scores"]["noise"]["means"][score]["mean"] == pytest.approx(
            mean["mean"], rel=1e-4
        )
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    for i in range(20):
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (11, 9), 12 * i).save(folder / f"class{i % 2}" / f"scan {i:02}.png")
    return folder


OF_PICTURES = (
    *("data=folder", "data.root=pictures", "data.image_size=8", "data.channels=1", "data.bits=4"),
    *("data.likelihood=logistic_mixture", "split=all"),
)


def test_every_picture_of_a_folder_by_its_name(evaluate, checkpoint, tmp_path, pictures):
    """Two runs of a folder must name the same picture in the row with its numbers."""
    printed = evaluate(f"checkpoint={checkpoint}", *SCORES, *OF_PICTURES, "output=s.json")
    rows = rows_of(tmp_path / "s.csv")
    assert sorted(row["file"] for row in rows) == sorted(
        str(path.relative_to(pictures)) for path in pictures.rglob("*.png")
    )
    assert all(row["label"] == row["file"].split("/")[0] for row in rows)
    assert {row["split"] for row in rows} == {"train", "valid"}
    # what was scored under a name is the picture of that name
    data = ImageData(
        DataConfig(
            name="folder", format="auto", root=str(pictures), image_size=8, channels=1, bits=4,
            likelihood="logistic_mixture",
        )
    )  # fmt: skip
    data.setup()
    for row in rows:
        number = int(row["file"][-6:-4])
        pixel = data.split(row["split"]).images[int(row["index"]), 0, 0, 0]
        assert int(pixel) == 12 * number
    # the folder's own images are not those that the model knows
    assert json.loads((tmp_path / "s.json").read_text())["result"]["typicality"]["data"] == "random"
    assert "of random train" in printed


def test_a_folder_to_hold_against(evaluate, checkpoint, tmp_path, pictures):
    evaluate(
        f"checkpoint={checkpoint}", *SCORES, "against=folder", f"against_root={pictures}",
        "against_split=all", "bootstrap=5", "output=s.json",
    )  # fmt: skip
    rows = rows_of(tmp_path / "s-against-folder.csv")
    assert len(rows) == 20
    assert rows[0]["file"].endswith(".png")


def test_no_typicality_where_the_models_own_images_are_not_here(
    evaluate, checkpoint, tmp_path, monkeypatch
):
    elsewhere = write_checkpoint(tmp_path / "cifar.ckpt", name="cifar10")
    printed = evaluate(f"checkpoint={elsewhere}", *SCORES, "data=random", "data.image_size=8",
                       "data.channels=1", "data.bits=4", "output=s.json")  # fmt: skip
    assert "note: no typicality" in printed
    assert "typicality" not in rows_of(tmp_path / "s.csv")[0]
    evaluate(f"checkpoint={checkpoint}", *SCORES, "typicality_split=null", "output=t.json")
    assert "typicality" not in rows_of(tmp_path / "t.csv")[0]


def test_typicality_is_of_the_images_that_the_model_was_trained_on(checkpoint, capsys):
    """Not of others of a set with the same name: those may be the ones to be judged."""
    data, other = (ImageData(replace(DATA, split_seed=seed)) for seed in (0, 1))
    for each in (data, other):
        each.setup()

    def known(of, train_sha256):
        opened = open_checkpoint(str(checkpoint), "ema")
        assert opened.train_sha256 == train_sha256
        return known_data(of, opened, opened.model, shown=True)

    assert known(other, None) is other
    assert "it is not known which images" in capsys.readouterr().out
    file, trained = torch.load(checkpoint), data.split("train").sha256
    torch.save({**file, "fingerprint": {"data": data.fingerprint()}}, checkpoint)
    assert known(data, trained) is data
    assert known(other, trained).split("train").sha256 == trained
    assert capsys.readouterr().out == ""
    marks = {"data": {"splits": {"train": {"sha256": "0" * 64}}}}
    torch.save({**file, "fingerprint": marks}, checkpoint)
    assert known(data, "0" * 64) is None
    assert "no typicality" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 3, "image_size": 16},
        {"channels": 1, "image_size": [12, 20], "bits": 1, "likelihood": "bernoulli"},
        {"image_size": 16, "pad": 2, "counted_size": 12, "bits": 8},
        {"image_size": 8, "bits": 1, "binarize": "dynamic", "likelihood": "bernoulli"},
    ],
)
def test_a_set_becomes_images_of_the_models_kind(changes):
    own = replace(DATA, **changes)
    data = ImageData(converted("digits", None, own))
    data.setup()
    batch = next(data.batches("test"))
    height, width = [own.image_size] * 2 if isinstance(own.image_size, int) else own.image_size
    assert batch.x.shape[1:] == (own.channels, height, width)
    levels = batch.x * (2**own.bits - 1)
    assert (levels - levels.round()).abs().max() < 1e-4
    assert batch.x.std() > 0.2
    if own.pad:
        assert batch.x[..., : own.pad].max() == 0


def test_another_folder_of_ones_own_is_read_as_the_first():
    """What the values mean is said once; how many there are is another folder's own business."""
    own = replace(DATA, name="folder", format="auto", bits=12, value_range=[0, 4095], crop="none")
    other = converted("folder", "new", own)
    assert (other.value_range, other.crop, other.root) == ([0, 4095], "none", "new")
    assert (own.test_size, other.test_size) == (12, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": 4}, "against=digits: its images have 1 channels, the model's 4"),
        ({"bits": 12}, "have 4 bits, and the model's 12 bits cannot be made"),
        ({"floats": True, "likelihood": "normal"}, "floating-point pixels cannot be made"),
    ],
)
def test_what_cannot_be_converted_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        converted("digits", None, replace(DATA, **changes))


def test_what_would_be_all_black_is_refused():
    data = ImageData(replace(DATA, bits=1, likelihood="bernoulli"))
    with pytest.raises(ValueError, match="images of one bit, half as bright, are all black"):
        open_other("faded", EvaluateConfig("model.ckpt", mode="scores"), data, None)


def test_densities_are_called_so(evaluate, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "normal.ckpt", likelihood="normal", bits=8)
    printed = evaluate(f"checkpoint={checkpoint}", *SCORES, "output=s.json")
    assert "of the density of 2x - 1" in printed
    assert json.loads((tmp_path / "s.json").read_text())["result"]["density_of"] == "2x - 1"


def test_a_protocol_comes_back_from_json_as_it_was():
    """Or the same command would take its own result for somebody else's."""
    own = replace(DATA, image_size=[12, 16], counted_size=[8, 12], labels="auto")
    data = ImageData(own)
    data.setup()
    change = Synthetic("inverted", 4, data.config.counted_size)
    protocol = ImageSet("inverted", data, ("test",), change).protocol()
    assert json.loads(json.dumps(protocol)) == protocol


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "score"}, "allowed: likelihood, scores"),
        ({"against": "noise"}, "against=noise is of mode=scores"),
        ({"against_root": "x"}, "against_root=x is of mode=scores"),
        ({"split": "all"}, "allowed: train, valid, test"),
        ({"mode": "scores", "against": "digit"}, "did you mean digits"),
        ({"mode": "scores", "against": ["noise", 3]}, "a list of names"),
        ({"mode": "scores", "against": {"a": 1}}, "a list of names"),
        ({"mode": "scores", "against": "noise", "against_root": "x"}, "names none"),
        ({"mode": "scores", "against": ["mnist", "celeba64"], "against_root": "x"}, "one set"),
        ({"mode": "scores", "metrics": ["fid"]}, r"metrics=\[fid\] is of mode=likelihood"),
        ({"mode": "scores", "generated": 10}, "generated=10 is of mode=likelihood"),
        ({"bootstrap": 5}, "bootstrap=5 is of mode=scores"),
        ({"typicality_split": None}, "typicality_split=None is of mode=scores"),
        ({"mode": "scores", "against_split": "some"}, "allowed: train, valid, test, all"),
        ({"mode": "scores", "typicality_split": "all"}, "allowed: train, valid, test"),
        ({"mode": "scores", "ratio_samples": 0}, "at least 1"),
        ({"mode": "scores", "bootstrap": 0}, "at least 1"),
        ({"mode": "scores", "maps": -1}, "at least 0"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        EvaluateConfig("model.ckpt", **settings)


def test_settings_of_one_mode_are_settings():
    """Statistics of BN are taken at `temperature` in both."""
    EvaluateConfig("model.ckpt", mode="scores", temperature=0.7, recalibrate_bn=2, labels=False)
    names = [name for names in _OF_MODE.values() for name in names]
    assert set(names) <= {field.name for field in fields(EvaluateConfig)}


def test_mistakes_are_one_line_and_leave_nothing(evaluate, checkpoint, tmp_path):
    common = f"checkpoint={checkpoint}", *SCORES
    assert "noize" in evaluate.fails(*common, "against=noize")
    assert "missing does not exist" in evaluate.fails(
        *common, "against=folder", "against_root=missing"
    )
    assert [f.name for f in tmp_path.iterdir()] == ["model.ckpt"]
    (tmp_path / "s.csv").write_text("mine")
    assert "s.csv is there already" in evaluate.fails(*common, "output=s.json")
    assert (tmp_path / "s.csv").read_text() == "mine"


def test_a_likelihood_without_maps_says_so_before_any_work(evaluate, checkpoint, monkeypatch):
    def worked(*_args, **_kwargs):
        raise AssertionError("work began before the mistake was found")

    def untold(self, x):
        return super(type(self), self).pixel_log_prob(x)

    from nvae.models.logistic_mixture import LogisticMixture

    monkeypatch.setattr("nvae.cli.scores.score", worked)
    monkeypatch.delattr(LogisticMixture, "pixel_log_prob")
    monkeypatch.setattr(LogisticMixture, "log_prob", lambda self, x: x.flatten(1).sum(1))
    said = evaluate.fails(f"checkpoint={checkpoint}", "mode=scores", "maps=2")
    assert "LogisticMixture has no pixel_log_prob" in said


def _process(rank, port, arguments):
    environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.argv = ["evaluate.py", *arguments]
    evaluate_module.main()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_agree_with_one(evaluate, checkpoint, tmp_path):
    common = (
        *(f"checkpoint={checkpoint}", *SCORES, "against=noise", "bootstrap=5", "max_images=7"),
        *("device=cpu", "data.num_workers=0", "typicality_images=5"),
    )
    evaluate(*common, "output=one.json")
    mp.spawn(_process, (free_port(), (*common, f"output={tmp_path}/two.json")), nprocs=2)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["protocol"] == two["protocol"]
    assert two["result"]["typicality"]["entropy"] == pytest.approx(
        one["result"]["typicality"]["entropy"], rel=1e-5
    )
    first, second = (rows_of(tmp_path / f"{name}-against-noise.csv") for name in ("one", "two"))
    assert len(first) == len(second) == 7
    for a, b in zip(first, second, strict=True):
        assert {k: float(v) for k, v in a.items()} == pytest.approx(
            {k: float(v) for k, v in b.items()}, rel=1e-3, abs=1e-3
        )
    assert [f.name for f in tmp_path.iterdir() if "partial" in f.name] == []
