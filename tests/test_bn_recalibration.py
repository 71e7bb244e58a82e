"""Recalibrated statistics must be plain averages, finite, cached and reversible."""

import pytest
import torch

from nvae.bn_recalibration import (
    RecalibrationError,
    RecalibrationSettings,
    cache_path,
    load_statistics,
    recalibrate,
    save_statistics,
)
from nvae.models import NVAE, ModelConfig
from nvae.random import STREAM_RECALIBRATION, image_keys, latent_noise


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = NVAE(
        ModelConfig(
            image_size=8, num_scales=2, groups_per_scale=2, latent_channels=2,
            encoder_channels=4, decoder_channels=4, preprocess_blocks=1, preprocess_cells=1,
            postprocess_cells=1, encoder_cells_per_group=1, decoder_cells_per_group=1,
        )
    )  # fmt: skip
    with torch.no_grad():  # statistics that a reset would lose
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.eval()


def settings(**changes):
    return RecalibrationSettings(
        **{"temperature": (0.7, 0.7, 0.7), "batches": 3, "batch_size": 16, **changes}
    )


def _norm_inputs(model, batches):
    """Inputs of one norm in train mode, by a hook: an independent way to its statistics."""
    name = "groups.1.cells.0.branch.0.norm_spatial"
    norm = model.get_submodule(name)
    seen = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    model.train()
    for batch in range(batches):
        index = torch.arange(batch * 16, (batch + 1) * 16)
        keys = image_keys(index, seed=0, stream=STREAM_RECALIBRATION)
        model.sample_logits(16, 0.7, latent_noise(keys, model.latent_shapes))
    return name, seen


def test_statistics_are_the_equal_average_over_batches(model):
    found = recalibrate(model, settings())
    name, seen = _norm_inputs(model, 3)
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
    assert torch.allclose(found.mean[name].double(), mean, rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.variance[name].double(), variance, rtol=1e-4, atol=1e-7)
    assert found.mean[name].dtype == torch.float32


def test_the_network_is_left_exactly_as_it_was(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model.encoder.eval()
    found = recalibrate(model, settings())
    assert model.training
    assert not model.encoder.training
    model.eval()
    noise = model.draw_noise(2, torch.Generator().manual_seed(0))
    plain = model.sample_logits(2, 0.7, noise)
    with found.applied(model):
        changed = model.sample_logits(2, 0.7, noise)
    assert not torch.allclose(plain, changed, atol=1e-3)
    assert torch.equal(model.sample_logits(2, 0.7, noise), plain)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_network_without_norms_is_refused():
    config = ModelConfig(
        image_size=8, num_scales=1, groups_per_scale=2, latent_channels=2, encoder_channels=4,
        decoder_channels=4, preprocess_blocks=0, cell_family="res_elu",
    )  # fmt: skip
    with pytest.raises(ValueError, match="no batch normalization"):
        recalibrate(NVAE(config), RecalibrationSettings((1.0, 1.0)))


def test_only_norms_that_sampling_runs_are_changed(model):
    found = recalibrate(model, settings())
    assert found.mean
    assert not [name for name in found.mean if name.startswith("encoder")]


def test_statistics_that_are_not_finite_are_refused_and_nothing_changes(model):
    with torch.no_grad():
        model.groups[2].cells[0].branch[0].expand.weight[0] = torch.inf
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RecalibrationError, match=r"groups\.2.*unchanged"):
        recalibrate(model, settings())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_cache_serves_only_the_same_weights_and_settings(model, tmp_path):
    path = cache_path(tmp_path / "last.ckpt", settings())
    assert path.name == "last.bn-t0.7-n3x16-seed0.npz"
    assert load_statistics(path, settings(), model) is None
    found = recalibrate(model, settings())
    save_statistics(found, path)
    loaded = load_statistics(path, settings(), model)
    assert loaded.settings == found.settings
    assert all(torch.equal(loaded.mean[k], v) for k, v in found.mean.items())
    assert load_statistics(path, settings(seed=1), model) is None
    with torch.no_grad():
        model.initial_state += 1
    assert load_statistics(path, settings(), model) is None
    path.write_bytes(b"junk")
    with pytest.raises(RecalibrationError, match="cannot be read"):
        load_statistics(path, settings(), model)


def test_group_temperatures_have_a_cache_of_their_own(tmp_path):
    a = cache_path(tmp_path / "x.ckpt", settings(temperature=(0.5, 0.7, 1.0)))
    b = cache_path(tmp_path / "x.ckpt", settings(temperature=(0.5, 1.0, 1.0)))
    assert a != b


@pytest.mark.parametrize(
    "wrong", [{"temperature": (-0.1, 1, 1)}, {"batches": 0}, {"batch_size": 1}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"at least|0 or more"):
        settings(**wrong)
