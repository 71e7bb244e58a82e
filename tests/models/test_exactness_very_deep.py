"""VDVAE and Efficient-VDVAE, number by number, in float64.

Each test breaks if any operation of the networks, the densities or the likelihood deviates.
"""

import math

import numpy as np
import pytest
import torch

from nvae.models import EVDVAE, VDVAEConfig
from nvae.models.pixel_distribution import build_likelihood
from nvae.models.very_deep import keep_by_kl
from nvae.published_very_deep import published_names
from tests.reference import FOLDER
from tests.reference.very_deep import Given, Numbers, assert_close, channels_first


@pytest.fixture(scope="module")
def vdvae():
    return Numbers("vdvae")


@pytest.fixture(scope="module")
def evdvae():
    return Numbers("evdvae")


def gradients(model):
    names = published_names(model)
    return {names[name]: parameter.grad for name, parameter in model.named_parameters()}


def thin(logits):
    """As VDVAE's numbers are kept: channels last, every 4th row and column."""
    return logits.permute(0, 2, 3, 1)[:, ::4, ::4]


def test_vdvae_posterior_pass(vdvae):
    model, expected = vdvae.model, vdvae.expected
    x = channels_first(expected["image"]) / 255
    model.zero_grad()
    output = model(x, vdvae.noise())
    vdvae.assert_close(thin(output.logits), "dmol_params")
    vdvae.assert_close(output.logits.sum(), "dmol_params_sum")
    vdvae.assert_close(output.logits.square().sum(), "dmol_params_sq")
    vdvae.assert_close(output.kl_per_group, "kl_per_layer")
    log_likelihood = model.likelihood(output.logits).log_prob(x)
    vdvae.assert_close(log_likelihood, "dmol_log_prob")
    negative_elbo = output.kl_per_group.sum(1) - log_likelihood
    vdvae.assert_close(negative_elbo, "negative_elbo_nats")
    loss = (negative_elbo / x[0].numel()).mean()
    vdvae.assert_close(loss, "elbo")
    loss.backward()
    found = gradients(model)
    assert set(found) == set(expected["grad_names"])
    vdvae.assert_close([float(found[n].norm()) for n in expected["grad_names"]], "grad_norms")
    vdvae.assert_close([float(found[n].sum()) for n in expected["grad_names"]], "grad_sums")
    # the closed form is the expectation of log q - log p
    kl = output.log_q - output.log_p
    assert (kl - output.kl_per_group.sum(1)).abs().max() < 0.2 * kl.abs().max()


def test_vdvae_remembers_the_last_map_of_every_resolution(vdvae):
    expected = vdvae.expected
    x = channels_first(expected["image"]) / 255
    maps = {each.shape[-1]: each.detach() for each in vdvae.model.encode(x)}
    sizes = expected["enc_resolutions"].tolist()
    vdvae.assert_close([float(maps[size].sum()) for size in sizes], "enc_activation_sum")
    vdvae.assert_close([float(maps[size].square().sum()) for size in sizes], "enc_activation_sq")


@pytest.mark.parametrize("name", ["t1", "t0p7", "tlist"])
def test_vdvae_samples(vdvae, name):
    """One temperature, and one a layer."""
    per_layer = [float(t) for t in vdvae.expected["sample_t_list"]]
    temperature = {"t1": 1.0, "t0p7": 0.7, "tlist": per_layer}[name]
    logits = vdvae.model.sample_logits(2, temperature, vdvae.noise("sample_eps"))
    vdvae.assert_close(thin(logits), f"sample_dmol_params_{name}")
    vdvae.assert_close(logits.sum(), f"sample_dmol_params_{name}_sum")


def test_vdvae_pixels(vdvae):
    """The uint8 image is truncated, as its authors write it."""
    logits = vdvae.model.sample_logits(2, 0.7, vdvae.noise("sample_eps"))
    uniforms = [channels_first(vdvae.expected[f"pix_u_{u}"]) for u in ("mixture", "logistic")]
    images = vdvae.model.likelihood(logits).sample(1.0, Given(*uniforms))
    pixels = (255 * images).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    np.testing.assert_array_equal(pixels, vdvae.expected["pix_sample_uint8"])


@torch.no_grad()
def test_vdvae_partial_latents(vdvae):
    """Coarse layers of images, the rest drawn; and all of an image's give its logits back."""
    model, given = vdvae.model, int(vdvae.expected["partial_k"])
    x = channels_first(vdvae.expected["image"]) / 255
    output = model(x, vdvae.noise())
    latents = [group.z[:2] for group in output.groups[:given]]
    noise = vdvae.noise("sample_eps")
    state, _ = model.top_down(noise, latents=latents, temperature=0.7)
    vdvae.assert_close(thin(model.decode_state(state)), "partial_dmol_params")
    state, _ = model.top_down(vdvae.noise(), latents=[group.z for group in output.groups])
    assert torch.equal(model.decode_state(state), output.logits)


@pytest.mark.parametrize("bits", [8, 5])
def test_published_likelihood(bits):
    """Every branch: both edges, bins, the far tail, the floor; values and gradients."""
    expected = np.load(FOLDER / "dmol_unit.expected.npz")
    config = VDVAEConfig(
        encoder_blocks="32x1", decoder_blocks="32x1", num_mixtures=4, bits=bits, normalized=False
    )
    parameters = torch.from_numpy(expected["parameters"])[:, :, None, None].requires_grad_()
    x = torch.from_numpy(expected["level"]).double()[:, :, None, None] / 255
    log_prob = build_likelihood(config, parameters).log_prob(x)
    assert_close(log_prob, expected[f"log_prob_{bits}bit"], "log p")
    log_prob.sum().backward()
    assert_close(parameters.grad[..., 0, 0], expected[f"grad_{bits}bit"], "gradient")
    single = build_likelihood(config, parameters.detach().float()).log_prob(x.float())
    # as published, in float32 the difference of two sigmoids is off by up to 6e-3
    assert (single - log_prob).abs().max() < 5e-4


def test_pixel_draw():
    expected = np.load(FOLDER / "dmol_unit.expected.npz")
    config = VDVAEConfig(encoder_blocks="32x1", decoder_blocks="32x1", num_mixtures=4)
    parameters = torch.from_numpy(expected["parameters"])[:, :, None, None]
    uniforms = [
        torch.from_numpy(expected[u])[:, :, None, None] for u in ("u_mixture", "u_logistic")
    ]
    images = build_likelihood(config, parameters).sample(1.0, Given(*uniforms))
    assert_close(2 * images[..., 0, 0] - 1, expected["sample"], "sample")


def sparse(logits):
    """As Efficient-VDVAE's numbers are kept."""
    return logits[:, ::5, ::4, ::4]


def test_evdvae_posterior_pass(evdvae):
    """With the gradients of the plain loss, and of that with balanced KL at update 1000."""
    model, expected = evdvae.model, evdvae.expected
    x = torch.from_numpy(expected["x_uint8"]).double() / 255
    output = model(x, evdvae.noise())
    evdvae.assert_close(sparse(output.logits), "raw_output")
    evdvae.assert_close(output.kl_per_group, "kl")
    log_likelihood = model.likelihood(output.logits).log_prob(x)
    evdvae.assert_close(log_likelihood, "log_likelihood")
    bits = (output.kl_per_group.sum(1) - log_likelihood).mean() / (x[0].numel() * math.log(2))
    evdvae.assert_close(bits, "nelbo")
    names = expected["grad_names"]
    model.zero_grad()
    (bits * math.log(2)).backward(retain_graph=True)
    found = gradients(model)
    assert set(found) == set(names)
    evdvae.assert_close([float(found[n].norm()) for n in names], "grad_norms")
    skips = [skip.detach() for skip in model.encoder(2 * x - 1)]
    evdvae.assert_close([float(skip.sum()) for skip in skips], "skip_sum")


@torch.no_grad()
def test_evdvae_masked_pass(evdvae):
    """The channels that carry least are drawn from the prior; the KL still counts them."""
    model, expected = evdvae.model, evdvae.expected
    x = torch.from_numpy(expected["x_uint8"]).double() / 255
    groups = model(x, evdvae.noise()).groups
    statistics = [group.kl.mean((0, 2, 3)) / math.log(2) for group in groups]
    keep, threshold = keep_by_kl(statistics, 0.3)
    evdvae.assert_close(np.array(threshold), "mask_threshold_bits")
    for layer, kept in enumerate(keep):
        assert kept.tolist() == expected[f"mask_{layer:03d}"].astype(bool).tolist()
    output = model.masked(x, keep, evdvae.noise(), evdvae.noise("mask_prior_eps"))
    evdvae.assert_close(sparse(output.logits), "masked_raw_output")
    evdvae.assert_close(output.kl_per_group, "masked_kl")
    log_likelihood = model.likelihood(output.logits).log_prob(x)
    evdvae.assert_close(log_likelihood, "masked_log_likelihood")


@pytest.mark.parametrize("name", ["t1.0", "t0.7", "linear"])
def test_evdvae_samples(evdvae, name):
    """One temperature, and one a level."""
    model = evdvae.model
    assert isinstance(model, EVDVAE)
    per_level = [float(t) for t in evdvae.expected["sample_linear_temperatures"]]
    linear = model.layer_temperatures(per_level)
    temperature = {"t1.0": 1.0, "t0.7": 0.7, "linear": linear}[name]
    logits = model.sample_logits(2, temperature, evdvae.noise("sample_eps"))
    evdvae.assert_close(sparse(logits), f"sample_raw_output_{name}")


@pytest.mark.parametrize("family", ["vdvae", "evdvae"])
def test_number_of_parameters(family, request):
    numbers = request.getfixturevalue(family)
    count = sum(p.numel() for p in numbers.model.parameters())
    assert count == {"vdvae": 96_554, "evdvae": int(numbers.expected.get("parameters", 0))}[family]
