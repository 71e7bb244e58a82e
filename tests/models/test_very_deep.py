"""What the house does with any model, with both families."""

import copy
import shutil

import numpy as np
import pytest
import torch

from nvae.checkpoint import load_model, save_model
from nvae.export.folder import export
from nvae.export.sampler import Sampler, export_sampler, largest_difference
from nvae.models import MODELS
from nvae.models.output import GroupSample, Output
from nvae.models.very_deep import LogSigmaNormal
from nvae.objective import ObjectiveConfig, build_objective
from nvae.sampling import CompiledDecoder, decode, encode, from_noise, sample_images
from nvae.training.recompute import recompute_segments

from .small import VERY_DEEP, small_very_deep


@pytest.fixture(params=VERY_DEEP)
def model(request):
    return small_very_deep(request.param)


@pytest.fixture
def x():
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_round_trip_of_a_checkpoint(model, x, tmp_path):
    save_model(model, tmp_path / "model.ckpt")
    loaded = load_model(tmp_path / "model.ckpt")
    assert type(loaded) is type(model) is MODELS[MODELS.name_of(type(model))]
    assert loaded.config == model.config
    noise = model.draw_noise(3)
    torch.testing.assert_close(loaded(x, noise).logits, model(x, noise).logits)


def loss_and_gradients(model, x, noise):
    objective = build_objective(
        model, ObjectiveConfig(kl_anneal_portion=0, kl_balancing=False, spectral_weight=0)
    )
    loss = objective(model.train(), x, noise, step=0, total_steps=1)
    loss.data.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def test_the_objective_is_the_negative_elbo_and_reaches_every_parameter(model, x):
    noise = model.draw_noise(3)
    with torch.no_grad():
        output = model(x, noise)
        log_likelihood = model.likelihood(output.logits).log_prob(x)
    loss, gradients = loss_and_gradients(model, x, noise)
    expected = (output.kl_per_group.sum(1) - log_likelihood).mean()
    torch.testing.assert_close(loss.total, expected)
    assert loss.penalty is None
    missing = {name for name, gradient in gradients.items() if gradient is None}
    assert not missing


def test_recomputed_segments_give_the_same_gradients(model, x):
    noise = model.draw_noise(3)
    other = copy.deepcopy(model)
    recompute_segments(other)
    _, plain = loss_and_gradients(model, x, noise)
    _, recomputed = loss_and_gradients(other, x, noise)
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_the_decoding_half_draws_the_same(model):
    half = model.without_encoder()
    noise = model.draw_noise(2)
    assert torch.equal(half.sample_logits(2, 0.7, noise), model.sample_logits(2, 0.7, noise))
    assert not [name for name in half.state_dict() if "posterior" in name or "encoder" in name]


def test_latents_of_images(model, x):
    """z and its coordinates under the prior decode to the same image."""
    latents = encode(model, x, torch.arange(3))
    again = from_noise(model, latents.noise)
    for z, other in zip(latents.z, again.z, strict=True):
        torch.testing.assert_close(z, other, atol=1e-4, rtol=1e-3)
    assert decode(model, latents).shape == x.shape


def test_exported_program(model, tmp_path):
    """For batches of any size, with drawn pixels."""
    sampler = Sampler(model, 1.0)
    assert largest_difference(sampler, export_sampler(sampler).module()) <= 1e-5
    save_model(model, tmp_path / "model.ckpt")
    export(tmp_path / "model.ckpt", tmp_path / "out", with_sampler=False)
    loaded = load_model(tmp_path / "out")
    noise = model.draw_noise(2)
    torch.testing.assert_close(
        loaded.sample_logits(2, noise=noise), model.sample_logits(2, noise=noise)
    )
    assert "HubNVAE" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("model", ["evdvae"], indirect=True)
@torch.inference_mode()
def test_compiled_sampling(model):
    """Of one family: the walk, which a compiler could stumble over, is that of both."""
    found = sample_images(model, range(3), batch_size=2, decode=CompiledDecoder(model, 2))
    torch.testing.assert_close(found, sample_images(model, range(3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bernoulli", "normal", "logistic_mixture"])
@pytest.mark.parametrize("family", VERY_DEEP)
def test_every_likelihood(family, kind, x):
    model = small_very_deep(family, likelihood=kind, bits=1 if kind == "bernoulli" else 4)
    log_prob = model.likelihood(model(x.round()).logits).log_prob(x.round())
    assert log_prob.shape == (3,)
    assert log_prob.isfinite().all()


def test_mixed_precision_keeps_distributions_in_float32(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.logits.dtype == torch.float32
    for group in output.groups:
        assert group.prior.sigma.dtype == group.posterior.mean.dtype == torch.float32
    assert output.kl_per_group.isfinite().all()


def test_kl_of_groups_worked_out_together_knows_their_log_sigma():
    """Sigma itself rounds to 0 here; a KL that is made of it would be infinite."""
    groups = []
    for shift in (0.0, 0.5):
        zeros, log_sigma = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), -120.0)
        prior = LogSigmaNormal.of(zeros, log_sigma + shift)
        posterior = LogSigmaNormal.of(zeros, log_sigma)
        groups.append(GroupSample(zeros, prior, posterior, zeros))
    output = Output(torch.zeros(2, 1, 8, 8), tuple(groups))
    expected = torch.stack([group.kl.sum((1, 2, 3)) for group in groups], dim=1)
    assert expected.isfinite().all()
    torch.testing.assert_close(output.kl_per_group, expected, rtol=1e-6, atol=1e-4)


def test_temperatures_of_numpy_and_torch_are_numbers(model):
    """Alone and one a layer; in the authors' code of VDVAE they fail."""
    noise, layers = model.draw_noise(2), model.num_groups
    expected = model.sample_logits(2, 0.5, noise)
    for given in (
        np.float32(0.5),
        torch.tensor(0.5),
        np.full(layers, 0.5),
        [np.float32(0.5)] * layers,
    ):
        assert torch.equal(model.sample_logits(2, given, noise), expected)
    for wrong in (None, [None] * layers, ["1"] * layers, [[1.0]] * layers, torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="it must be a finite number, 0 or more"):
            model.sample_logits(2, wrong, noise)


def test_inputs_of_another_kind_are_one_line(model, x):
    noise = model.draw_noise(3)
    with pytest.raises(ValueError, match=r"images are torch.float64, the model is torch.float32"):
        model(x.double(), noise)
    with pytest.raises(ValueError, match=r"between 0 and 1.000001, the model takes"):
        model.eval()(torch.tensor([0.0, 1 + 1e-6]).repeat(3, 1, 8, 4), noise)
    with pytest.raises(ValueError, match="noise of group 0 is ndarray, not a tensor"):
        model(x, [eps.numpy() for eps in noise])
    with pytest.raises(
        ValueError, match=r"the latent of group 0 has shape \(3, 1, 1, 1\), the model"
    ):
        model.top_down(noise, latents=[noise[0][:, :1]])
    # numbers of a wider type are rounded, as everywhere
    wide = model(x, [eps.double() for eps in noise]).logits
    torch.testing.assert_close(wide, model(x, noise).logits)


def test_masks_must_fit_the_layers(model, x):
    noise = model.draw_noise(3)
    keep = [torch.arange(shape[0]) % 2 for shape in model.latent_shapes]
    expected = model.masked(x, [kept.bool() for kept in keep], noise, noise).logits
    for given in ([kept.byte() for kept in keep], [kept.tolist() for kept in keep]):
        assert torch.equal(model.masked(x, given, noise, noise).logits, expected)
    with pytest.raises(ValueError, match=r"keep has \d+ entries, the model \d+ layers"):
        model.masked(x, keep[1:], noise)
    with pytest.raises(
        ValueError, match=r"keep of layer 1 has shape \(1,\), the layer \d channels"
    ):
        model.masked(x, [keep[0], keep[1][:1], *keep[2:]], noise)
