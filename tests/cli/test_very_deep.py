"""VDVAE and Efficient-VDVAE from the command line."""

import json
import re

import pytest
import torch
import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from nvae.cli.config import TrainConfig, compose_train
from nvae.cli.errors import one_line
from nvae.cli.evaluate import main as evaluate_main
from nvae.cli.sample import main as sample_main
from nvae.command_line import LONGEST_MESSAGE
from nvae.models import MODELS
from nvae.published_settings import FAMILIES, presets
from nvae.settings import CONFIGS
from tests.reference.very_deep import FOLDER

from .commands import Commands


@pytest.mark.parametrize("family", FAMILIES)
def test_model_alone_chooses_the_architecture(family):
    """`model=` is the one choice; the objective and the rest are the same for all families."""
    config = compose_train([f"model={family}_tiny", "objective=elbo"])
    assert config.architecture == family
    model = config.build_model()
    assert type(model) is FAMILIES[family]
    text = (CONFIGS / "model" / f"{family}_tiny.yaml").read_text()
    said = re.search(r"# ([\d,]+) parameters", text)
    assert said is not None
    assert int(said[1].replace(",", "")) == sum(p.numel() for p in model.parameters())
    assert config.objective.spectral_weight == 0


def test_block_strings_and_lists_are_typed_as_they_are():
    blocks = "model.encoder_blocks='8x3,8d2,4x1,4d4,1x1'"
    config = compose_train(["model=vdvae_tiny", blocks])
    assert len(config.model.encoder_plan) == 7
    config = compose_train(["model=evdvae_tiny", "model.down_n_blocks_per_res=[1,1,0,2]"])
    assert config.model.layers_per_level == [2, 2, 1, 3]
    with pytest.raises(ValueError, match=r"model\.image_size=32 does not fit data\.image_size=8"):
        compose_train(["model=vdvae_cifar10"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "experiment=vdvae data=folder data.image_size=32",
            "vdvae_cifar10 vdvae_fashion_mnist vdvae_imagenet32",
        ),
        ("experiment=vdvae data=folder data.image_size=32 data.channels=1", "vdvae_fashion_mnist"),
        ("model=vdvae_cifar10 data=fashion_mnist", "vdvae_fashion_mnist"),
        ("experiment=evdvae data=fashion_mnist", "evdvae_fashion_mnist"),
        (
            "experiment=evdvae data=folder data.image_size=64",
            "evdvae_celeba64_baseline evdvae_celeba64_compact evdvae_imagenet64_baseline "
            "evdvae_imagenet64_c1 evdvae_imagenet64_compact",
        ),
    ],
)
def test_images_of_another_shape_are_told_their_networks(given, expected):
    """Blocks are bound to a size, so `model=` has to be given; whatever is named fits."""
    with pytest.raises(ValueError, match="does not fit") as caught:
        compose_train(given.split())
    line = str(caught.value)
    assert re.findall(r"model=(\w+)", line) == expected.split()
    assert len(line) < LONGEST_MESSAGE
    rest = [word for word in given.split() if not word.startswith("model=")]
    for name in expected.split():
        compose_train([*rest, f"model={name}"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.up_strides=[2,2.5,1]", "model.up_strides[1]: 2.5 is not an integer"),
        ("model.up_mid_filters_ratio=[a]", "model.up_mid_filters_ratio[0]: a is not a number"),
        ("model.up_strides=[1,null]", "model.up_strides[1]: null is not an integer"),
        ("model.up_strides={a:1}", "model.up_strides={a:1} is not a list; write"),
        ("model.up_strides=2", "model.up_strides=2 is not a list; write model.up_strides=[2]"),
        ("model.width=3", "unknown key model.width; allowed here: image_size"),
    ],
)
def test_an_entry_of_a_list_that_cannot_be(setting, message):
    """The model's own settings are meant, not those that all models have."""
    with pytest.raises((HydraException, OmegaConfBaseException)) as error:
        compose_train(["model=evdvae_tiny", setting])
    assert one_line(error.value, TrainConfig).startswith(message)


def test_images_that_no_network_is_for():
    with pytest.raises(ValueError, match="model=evdvae with settings of your own"):
        compose_train(["experiment=evdvae", "data=folder", "data.image_size=48"])


@pytest.mark.parametrize("family", FAMILIES)
def test_files_with_every_setting_say_the_defaults(family):
    values = yaml.safe_load((CONFIGS / "model" / f"{family}.yaml").read_text())
    of_data = {"image_size", "image_channels", "counted_size", "bits", "likelihood"}
    plain = MODELS[family].config_class(image_size=32).to_dict()
    assert values["model"].keys() == plain.keys()
    for key in plain.keys() - of_data:
        assert values["model"][key] == plain[key], key


def test_presets_of_five_bits_read_eight(tmp_path):
    """The network and the likelihood drop the low bits themselves."""
    five = [n for f in FAMILIES for n in presets(f) if "5bits" in n or n == "vdvae_ffhq256"]
    assert len(five) == 4
    for name in five:
        config = compose_train(["data=ffhq256", "data.bits=8", f"model={name}"])
        assert (config.model.bits, config.data.bits) == (5, 8)


def test_published_five_bits_give_both_numbers(evaluate, tmp_path):
    """The published figure, and that of masses that sum to 1, with the reason."""
    output = tmp_path / "result.json"
    images = ["random", "data.image_size=16", "data.bits=8", "data.channels=3", "data.test_size=2"]
    text = evaluate(
        f"checkpoint={FOLDER / 'vdvae_small.checkpoint.pt'}",
        f"settings={FOLDER / 'vdvae_small.json'}", f"output={output}", "importance_samples=[]",
        "device=cpu", *(f"data={images[0]}", *images[1:]),
    )  # fmt: skip
    assert "its masses do not sum to 1" in text
    assert text.count("negative ELBO") == 2
    found = json.loads(output.read_text())
    published, normalized = found["result"], found["normalized"]
    assert published["kl"] == normalized["kl"]
    assert published["reconstruction"]["mean"] != normalized["reconstruction"]["mean"]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    wrong = evaluate.fails(
        f"checkpoint={FOLDER / 'vdvae_small.checkpoint.pt'}", "settings=cifar10", "device=cpu"
    )
    assert "8 encoder blocks" in wrong


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_other_settings_of_a_published_file_are_other_work(command, monkeypatch, capsys, tmp_path):
    """What is there was made of the same file, and of another network."""
    main = {"evaluate": evaluate_main, "sample": sample_main}[command]
    run = Commands(main, monkeypatch, capsys, tmp_path)
    settings, own = json.loads((FOLDER / "vdvae_small.json").read_text()), tmp_path / "own.json"
    own.write_text(json.dumps(settings))
    if command == "evaluate":
        images = ["data=random", "data.image_size=16", "data.bits=8", "data.channels=3"]
        given = [
            *images,
            "data.test_size=2",
            "importance_samples=[]",
            f"output={tmp_path}/out.json",
        ]
    else:
        given = ["seeds=0-1", f"output={tmp_path}/out"]
    given += [f"checkpoint={FOLDER / 'vdvae_small.checkpoint.pt'}", f"settings={own}", "device=cpu"]
    run(*given)
    own.write_text(json.dumps(settings | {"batch": 7}))  # which changes nothing of the network
    run(*given)
    own.write_text(json.dumps(settings | {"low_bit": False}))
    assert "overwrite=true" in run.fails(*given)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_negative_elbo(family):
    """A hundred steps on two images that repeat."""
    torch.manual_seed(0)
    model = compose_train([f"model={family}_tiny"]).build_model()
    x = (torch.arange(128).view(2, 1, 8, 8) % 16) / 15
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(100):
        output = model(x)
        loss = (output.kl_per_group.sum(1) - model.likelihood(output.logits).log_prob(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 200)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
