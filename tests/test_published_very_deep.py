"""Published files of VDVAE and Efficient-VDVAE: recognized, translated, or refused in one line."""

import pytest
import torch

from nvae.checkpoint import CheckpointError, load_model, save_model
from nvae.cli.checkpoint_data import open_checkpoint
from nvae.models import EVDVAE, VDVAE
from nvae.published_settings import FAMILIES, presets, read_settings
from nvae.published_very_deep import published_names, translate_very_deep
from tests.reference import checkpoint_path
from tests.reference.very_deep import Numbers

PARAMETERS = {
    "vdvae_cifar10": 39_145_700, "vdvae_imagenet32": 119_280_868, "vdvae_imagenet64": 125_005_860,
    "vdvae_ffhq256": 114_874_852, "vdvae_ffhq1024": 109_366_904,
    "evdvae_binarized_mnist_baseline": 69_919_585, "evdvae_celeba64_baseline": 131_402_212,
    "evdvae_celeba64_compact": 25_426_788, "evdvae_celebahq1024_baseline": 75_869_284,
    "evdvae_celebahq256_5bits_baseline": 197_677_156,
    "evdvae_celebahq256_8bits_baseline": 208_873_444,
    "evdvae_celebahq256_8bits_compact": 71_233_284, "evdvae_cifar10_c1": 18_124_020,
    "evdvae_cifar10_baseline": 56_598_692, "evdvae_ffhq1024_baseline": 75_869_284,
    "evdvae_ffhq256_5bits_c1": 67_032_644, "evdvae_ffhq256_5bits_baseline": 197_677_156,
    "evdvae_ffhq256_8bits_baseline": 208_873_444, "evdvae_ffhq256_8bits_compact": 71_233_284,
    "evdvae_imagenet32_c1": 52_289_316, "evdvae_imagenet32_baseline": 145_068_388,
    "evdvae_imagenet32_compact": 19_561_188, "evdvae_imagenet64_c1": 57_000_740,
    "evdvae_imagenet64_baseline": 168_367_588, "evdvae_imagenet64_compact": 42_550_340,
}  # fmt: skip
LAYERS = {
    "vdvae_cifar10": 43, "vdvae_imagenet32": 78, "vdvae_imagenet64": 75, "vdvae_ffhq256": 66,
    "vdvae_ffhq1024": 70, "evdvae_binarized_mnist_baseline": 23, "evdvae_celeba64": 62,
    "evdvae_celebahq1024": 72, "evdvae_celebahq256_5bits": 66, "evdvae_celebahq256_8bits": 69,
    "evdvae_cifar10": 47, "evdvae_ffhq1024": 72, "evdvae_ffhq256_5bits": 66,
    "evdvae_ffhq256_8bits": 69, "evdvae_imagenet32": 73, "evdvae_imagenet64": 84,
}  # fmt: skip
ENTRIES = {
    "vdvae_cifar10": 1393, "vdvae_imagenet32": 2423, "vdvae_imagenet64": 2482,
    "vdvae_ffhq256": 2272, "vdvae_ffhq1024": 2392, "evdvae_binarized_mnist_baseline": 945,
    "evdvae_celeba64": 2300, "evdvae_celebahq1024": 2700, "evdvae_celebahq256_5bits": 2682,
    "evdvae_celebahq256_8bits": 2780, "evdvae_cifar10": 1765, "evdvae_ffhq1024": 2700,
    "evdvae_ffhq256_5bits": 2682, "evdvae_ffhq256_8bits": 2780, "evdvae_imagenet32": 2695,
    "evdvae_imagenet64": 3080,
}  # fmt: skip


def of_preset(table, name):
    return next(value for key, value in table.items() if name.startswith(key))


def on_meta(name):
    family = name.split("_")[0]
    with torch.device("meta"):
        return FAMILIES[family](read_settings(name, family))


def test_presets_are_these():
    found = {name for family in FAMILIES for name in presets(family)}
    ours = {f"{family}_{size}" for family in FAMILIES for size in ("tiny", "fashion_mnist")}
    assert found == PARAMETERS.keys() | ours


@pytest.mark.slow  # a second each on a quiet machine
@pytest.mark.parametrize("name", PARAMETERS)
def test_size_of_every_preset(name):
    """Parameters, layers and entries of the state dict, one published name each."""
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.num_groups == of_preset(LAYERS, name)
    names = published_names(model)
    assert len(set(names.values())) == len(names) == of_preset(ENTRIES, name)


@pytest.fixture
def vdvae():
    return Numbers("vdvae")


@pytest.fixture
def evdvae():
    return Numbers("evdvae")


def test_raw_weights_of_a_vdvae_have_a_prefix(vdvae, tmp_path):
    weights = torch.load(vdvae.checkpoint, weights_only=True)
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "raw.th")
    model = load_model(tmp_path / "raw.th", format="vdvae", config=vdvae.settings)
    for name, value in model.state_dict().items():
        assert torch.equal(value.double(), vdvae.model.state_dict()[name]), name


def test_the_likelihood_of_a_published_file_is_the_published_one(vdvae, tmp_path):
    """Unless the settings say otherwise; a saved copy keeps it."""
    assert vdvae.model.config.bits == 5
    assert vdvae.model.config.overcounts
    ours = {**vdvae.model.config.to_dict(), "normalized": True}
    assert not load_model(vdvae.checkpoint, config=ours).config.overcounts
    save_model(vdvae.model, tmp_path / "copy.ckpt")
    assert load_model(tmp_path / "copy.ckpt").config == vdvae.model.config


def test_shapes_of_no_preset_need_settings(tmp_path):
    model = VDVAE(read_settings({"image_channels": 1, **small_settings()}, "vdvae"))
    translated = published_names(model)
    weights = {translated[name]: value for name, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "unknown.th")
    with pytest.raises(
        CheckpointError, match="those of no preset; give config=, of the commands settings="
    ):
        load_model(tmp_path / "unknown.th")


def small_settings():
    return {
        "image_size": 8, "encoder_blocks": "8x1", "decoder_blocks": "8x2", "width": 8,
        "num_mixtures": 2, "latent_channels": 2,
    }  # fmt: skip


@pytest.mark.slow
def test_published_presets_are_recognized(tmp_path):
    """By the shapes alone: a file of CIFAR-10's size needs no settings."""
    model = VDVAE(read_settings("vdvae_cifar10", "vdvae"))
    names = published_names(model)
    torch.save({names[n]: t for n, t in model.state_dict().items()}, tmp_path / "ema.th")
    found = load_model(tmp_path / "ema.th")
    assert found.config == model.config
    with pytest.raises(CheckpointError, match=r"33 encoder blocks, but .* make 48"):
        load_model(tmp_path / "ema.th", config="imagenet32")


def test_an_evdvae_is_told_the_presets_of_its_shapes():
    """Shapes do not say the scales, so which of them it is must be said by who knows."""
    model = on_meta("evdvae_ffhq256_8bits_compact")
    names = published_names(model)
    weights = {names[name]: value for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="shapes do not say all settings") as error:
        translate_very_deep({"ema_model_state_dict": weights}, "evdvae", "ema", None)
    same = "evdvae_celebahq256_8bits_compact and evdvae_ffhq256_8bits_compact"
    assert str(error.value).endswith(f"the shapes are those of {same}")


def test_wrong_family_or_settings_are_one_line(vdvae, evdvae, tmp_path):
    cases = [
        (vdvae.checkpoint, {"format": "evdvae"}, "no checkpoint of format=evdvae; it has format=v"),
        (evdvae.checkpoint, {"format": "vdvae"}, "it has format=evdvae"),
        (checkpoint_path("mnist"), {"format": "vdvae"}, "it has format=nvae"),
        (vdvae.checkpoint, {"format": "nvae"}, "it has format=vdvae"),
        (checkpoint_path("mnist"), {"config": "cifar10"}, "says its settings itself"),
        (vdvae.checkpoint, {"config": "vdvae_cifar10"}, r"8 encoder blocks, but .* make 33"),
        (evdvae.checkpoint, {"config": "cifar10_baseline", "weights": "raw"}, "too few for"),
        (evdvae.checkpoint, {"weights": "raw"}, "or a preset; the shapes are those of none"),
        (evdvae.checkpoint, {"config": evdvae.settings}, "no ema_model_state_dict; take weights="),
        (vdvae.checkpoint, {"config": tmp_path / "no.json"}, "there is no"),
        (vdvae.checkpoint, {"config": {"enc_blocks": "16x1"}}, "settings given: dec_blocks is mi"),
        (vdvae.checkpoint, {"config": 5}, "5 is no preset, no file and no dictionary"),
        (
            vdvae.checkpoint,
            {"config": evdvae.settings},
            "settings of evdvae, the checkpoint is a vdvae",
        ),
        (
            evdvae.checkpoint,
            {"config": vdvae.settings, "weights": "raw"},
            "settings of vdvae, the checkpoint is a evdvae",
        ),
        (vdvae.checkpoint, {"config": {**small_settings(), "depth": 3}}, "setting.s.: depth"),
    ]
    for path, arguments, message in cases:
        with pytest.raises(CheckpointError, match=message) as error:
            load_model(path, **arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="format='gan' is unknown"):
        load_model(vdvae.checkpoint, format="gan")


@pytest.mark.parametrize("spoiled", ["missing", "surplus", "shape", "nan", "integers"])
def test_spoiled_weights_are_named(vdvae, tmp_path, spoiled):
    weights = torch.load(vdvae.checkpoint, weights_only=True)
    name = "decoder.dec_blocks.3.z_proj.weight"
    if spoiled == "missing":
        del weights[name]
    elif spoiled == "surplus":
        weights["decoder.more"] = torch.zeros(1)
    elif spoiled == "shape":
        weights[name] = weights[name].flatten()
    elif spoiled == "integers":
        weights[name] = weights[name].long()
    else:
        weights[name][0] = torch.nan
    torch.save(weights, tmp_path / "spoiled.th")
    words = {"missing": f"lacks the weight '{name}'", "surplus": "lacks: 'decoder.more'",
             "shape": "has shape", "nan": "not finite",
             "integers": "holds torch.int64, not numbers"}  # fmt: skip
    with pytest.raises(CheckpointError, match=words[spoiled]):
        load_model(tmp_path / "spoiled.th", config=vdvae.settings)


class Harmful:
    def __reduce__(self):
        return (print, ("ran",))


def test_files_that_would_run_code_are_refused(vdvae, tmp_path, capsys):
    weights = torch.load(vdvae.checkpoint, weights_only=True)
    torch.save({**weights, "more": Harmful()}, tmp_path / "harmful.th")
    with pytest.raises(CheckpointError, match="could run code; nothing was run"):
        load_model(tmp_path / "harmful.th", config=vdvae.settings)
    assert "ran" not in capsys.readouterr().out


def test_the_commands_open_them(evdvae):
    opened = open_checkpoint(str(evdvae.checkpoint), "raw", settings=str(evdvae.settings))
    assert isinstance(opened.model, EVDVAE)
    assert opened.weights == "raw"
    assert opened.run_config == {}
