"""Sampling, evaluation, recalibration, compiling and export of a model that is none of ours."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nvae.bn_recalibration import RecalibrationSettings, recalibrate
from nvae.checkpoint import CheckpointError, load_model, save_model
from nvae.evaluation import RecordStore, evaluate
from nvae.export.folder import export
from nvae.export.sampler import Sampler, export_sampler
from nvae.models import MODELS
from nvae.sampling import (
    CompiledDecoder,
    decode,
    encode,
    from_noise,
    prior_latents,
    sample_images,
    scale_temperatures,
    traverse,
)

from .outside import NAME, TwoGroups, TwoGroupsConfig, two_groups


@pytest.fixture(scope="module")
def model():
    return two_groups()


@pytest.fixture
def x():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1)).round()


def test_kl_of_groups_of_different_widths_is_padded_with_zeros(model, x):
    output = model(x)
    assert [kl.shape for kl in output.kl_per_channel] == [(5, 3), (5, 2)]
    together = output.kl_by_channel
    assert together.shape == (5, 2, 3)
    assert torch.equal(together[:, 0], output.kl_per_channel[0])
    assert torch.equal(together[:, 1, :2], output.kl_per_channel[1])
    assert (together[:, 1, 2] == 0).all()
    assert torch.equal(together.sum(2), output.kl_per_group)


def test_evaluation_counts_every_channel_once(model, x, tmp_path):
    batches = [SimpleNamespace(x=x, index=torch.arange(5))]
    store = RecordStore(tmp_path / "partial", "p")
    result = evaluate(model, batches, importance_samples=(4,), elbo_samples=3, store=store)
    assert result.latent_channels == (3, 2)
    assert sum(result.kl_per_group) == pytest.approx(result.kl.mean, rel=1e-12)
    assert all(0 <= n <= of for n, of in zip(result.active_units, (3, 2), strict=True))
    assert f"{result.active_units[1]} of 2" in result.table().splitlines()[-1]
    again = RecordStore(tmp_path / "partial", "p")
    assert again.records.kl_per_channel.shape == (5, 2, 3)
    assert np.all(again.records.kl_per_channel[:, 1, 2] == 0)
    resumed = evaluate(model, batches, importance_samples=(4,), elbo_samples=3, store=again)
    assert resumed == result


def test_images_latents_and_paths(model, x):
    images = sample_images(model, range(4), temperature=scale_temperatures(model, [0.5, 1.0]))
    assert images.shape == (4, 1, 8, 8)
    latents = encode(model, x)
    again = from_noise(model, latents.noise)
    for z, other in zip(latents.z, again.z, strict=True):
        assert torch.allclose(z, other, atol=1e-4)
    moved = traverse(model, prior_latents(model, torch.tensor([3])), 1, 3, torch.tensor([0]))
    assert decode(model, moved).shape == (3, 1, 8, 8)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@torch.inference_mode()
def test_compiled_sampling(model):
    found = sample_images(model, range(3), batch_size=2, decode=CompiledDecoder(model, 2))
    torch.testing.assert_close(found, sample_images(model, range(3)), rtol=0, atol=1e-5)


def test_recalibration_without_batch_normalization_is_refused(model):
    with pytest.raises(ValueError, match="no batch normalization"):
        recalibrate(model, RecalibrationSettings((1.0, 1.0), 1, 4))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_recalibration_of_torchs_own_norms(momentum):
    model = two_groups(with_norms=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = []
    norm = model.get_submodule("merge.1.1")
    hook = norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    found = recalibrate(model, RecalibrationSettings((0.7, 0.7), 3, 8))
    hook.remove()
    assert found.mean.keys() == {"merge.0.1", "merge.1.1"}
    mean = torch.stack([each.mean((0, 2, 3)) for each in inputs]).mean(0)
    variance = torch.stack([each.transpose(0, 1).flatten(1).var(1) for each in inputs]).mean(0)
    assert torch.allclose(found.mean["merge.1.1"].double(), mean, rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.variance["merge.1.1"].double(), variance, rtol=1e-4)
    with found.applied(model):
        assert torch.equal(norm.running_mean, found.mean["merge.1.1"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_export(model, tmp_path):
    """The folder names the class, and is believed only where the class was named before."""
    file, folder = tmp_path / "model.ckpt", tmp_path / "out"
    assert MODELS[NAME] is type(model)
    save_model(model, file)
    assert export(file, folder) <= 1e-5
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == NAME
    config["model"] = "tests.outside:Another"
    noise = model.draw_noise(2)
    loaded = load_model(folder).to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(
        loaded.sample_logits(2, 0.7, noise), model.sample_logits(2, 0.7, noise)
    )
    card = (folder / "README.md").read_text()
    assert "| latent channels of a group | 2, 3 |" in card
    assert f"plugins=['{NAME}']" in card
    assert "Vahdat" not in card
    description = json.loads((folder / "sampler.json").read_text())
    assert description["noise"] == [["B", 3, 2, 2], ["B", 2, 4, 4]]
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="counts only where you name it"):
        load_model(folder)


class OneBatchSize(TwoGroups):
    def top_down(self, noise, **arguments):
        return super().top_down([eps[: len(eps)] for eps in noise], **arguments)  # len is no size


def test_a_model_that_cannot_be_traced_is_an_error_in_words():
    with pytest.raises(ValueError, match="cannot be traced for batches of any size"):
        export_sampler(Sampler(OneBatchSize(TwoGroupsConfig()).eval()))
