import itertools
import math

import pytest
import torch

from nvae.models import EVDVAEConfig, VDVAEConfig
from nvae.models.pixel_distribution import build_likelihood
from nvae.models.stable_mixture import StableLogisticMixture, gray_level, log_softplus


def config(family="vdvae", **changes):
    values = {"image_size": 8, "num_mixtures": 1, "image_channels": 1, **changes}
    if family == "vdvae":
        return VDVAEConfig(encoder_blocks="8x1", decoder_blocks="8x1", width=8, **values)
    return EVDVAEConfig(
        **{"up_strides": [2, 4, 1, 1], "down_strides": [1, 1, 4, 2], **values},
        up_filters=[64] * 4, up_skip_filters=[32, 64, 64, 64], down_filters=[64, 64, 64, 32],
    )  # fmt: skip


def masses(cfg, mean, log_scale, coefficients=None):
    """Of every value that an image of these bits has, one gray pixel."""
    logits = torch.tensor([0.0, mean, log_scale], dtype=torch.float64).view(1, 3, 1, 1)
    levels = 2**cfg.bits
    x = torch.arange(levels, dtype=torch.float64).view(-1, 1, 1, 1) / (levels - 1)
    likelihood = build_likelihood(cfg, logits.expand(levels, -1, -1, -1))
    return likelihood.log_prob(x).exp()


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
@pytest.mark.parametrize("log_scale", [-6.0, -3.0, 0.0, 3.0])
@pytest.mark.parametrize("mean", [-1.5, 0.01, 0.9])
def test_masses_sum_to_one(bits, log_scale, mean):
    assert masses(config(bits=bits), mean, log_scale).sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("family", "excess"), [("vdvae", 0.028), ("evdvae", 0.028)])
def test_published_five_bits_sum_to_more(family, excess):
    """Bins of 2 / 31 at a distance of 2 / 31.875: 0.04 bits/dim for nothing in the middle."""
    raw = -3.0 if family == "vdvae" else -2.0
    cfg = config(family, bits=5, normalized=False, output_gradient_smoothing_beta=1.0,
                 output_distribution_base="logstd") if family == "evdvae" else config(
                     bits=5, normalized=False)  # fmt: skip
    total = masses(cfg, 0.0, raw).sum().item()
    assert total - 1 == pytest.approx(excess, abs=0.003)
    assert math.log2(total) == pytest.approx(0.04, abs=0.005)


def test_narrow_and_broad_components_of_the_published_vdvae():
    """Between two levels up to 1.19; near the top its last bin takes no tail."""
    cfg = config(bits=5, normalized=False)
    assert masses(cfg, 12 / 127.5 - 1 + 0.5 * 8 / 127.5 - 4 / 127.5, -7.0).sum() > 1.1
    assert masses(cfg, 1.0, 0.0).sum() < 0.85


def test_eight_bits_are_the_published_ones_but_for_the_far_tail():
    for log_scale in (-5.0, -2.0, 1.0):
        ours = masses(config(), 0.1, log_scale)
        theirs = masses(config(normalized=False), 0.1, log_scale)
        near = theirs > 1.1e-5
        torch.testing.assert_close(ours[near], theirs[near], rtol=1e-9, atol=0)
        assert theirs.sum().item() == pytest.approx(1, abs=2e-4)


def test_colors_sum_to_one_jointly():
    cfg = config(image_channels=3, bits=2, num_mixtures=2)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 20, 1, 1, generator=generator, dtype=torch.float64)
    values = list(itertools.product(range(4), repeat=3))
    x = torch.tensor(values, dtype=torch.float64).view(-1, 3, 1, 1) / 3
    likelihood = build_likelihood(cfg, logits.expand(len(values), -1, -1, -1))
    assert likelihood.log_prob(x).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_levels_of_eight_bits_and_of_fewer_are_the_same():
    """k / 31 and the 8-bit values of its bin are level k, in float32 as well."""
    for bits in range(1, 9):
        step, top = 2 ** (8 - bits), 2**bits - 1
        levels = torch.arange(top + 1)
        assert torch.equal(gray_level(levels / top, bits), levels.float())
        pixels = torch.arange(256)
        assert torch.equal(gray_level(pixels / 255, bits), (pixels // step).float())


def test_eight_bit_images_count_as_their_level():
    cfg = config(bits=5)
    likelihood = build_likelihood(cfg, torch.randn(1, 3, 1, 1))
    of = lambda x: likelihood.log_prob(torch.full((1, 1, 1, 1), x))  # noqa: E731
    assert of(80 / 255) == of(87 / 255) == of(10 / 31)
    assert of(80 / 255) != of(88 / 255)


@pytest.mark.parametrize(("normalized", "brightest"), [(True, 1.0), (False, 248 / 255)])
def test_brightest_draw(normalized, brightest):
    cfg = config("evdvae", bits=5, normalized=normalized)
    logits = torch.tensor([0.0, 5.0, -3.0]).view(1, 3, 1, 1)
    likelihood = build_likelihood(cfg, logits)
    assert isinstance(likelihood, StableLogisticMixture)
    assert likelihood.sample(0.0).item() == pytest.approx(brightest)
    assert likelihood.mean.item() == pytest.approx(brightest)


def test_log_softplus_stays_finite_in_float32():
    raw = torch.tensor([-1e4, -200.0, -50.0, -1.0, 0.0, 30.0, 1e4], requires_grad=True)
    found = log_softplus(raw, 0.7)
    found.sum().backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    exact = torch.nn.functional.softplus(raw.detach()[2:].double(), 0.7).log()
    torch.testing.assert_close(found[2:].double(), exact, rtol=1e-5, atol=1e-6)
    assert found[0].item() == pytest.approx(-7000 - math.log(0.7))


@pytest.mark.parametrize("published", [True, False])
def test_extreme_outputs_have_finite_gradients(published):
    cfg = config("evdvae", image_channels=3, num_mixtures=2, normalized=not published)
    generator = torch.Generator().manual_seed(0)
    logits = (1e4 * torch.randn(64, 20, 1, 1, generator=generator)).requires_grad_()
    x = torch.rand(64, 3, 1, 1, generator=generator)
    log_prob = build_likelihood(cfg, logits).log_prob(x)
    log_prob.sum().backward()
    assert logits.grad is not None
    assert log_prob.isfinite().all()
    assert logits.grad.isfinite().all()


def test_data_of_other_bits_is_refused():
    StableLogisticMixture.check_data(config(bits=5), 8)
    StableLogisticMixture.check_data(config(bits=5), 5)
    with pytest.raises(ValueError, match=r"model\.bits=5 does not fit data\.bits=4"):
        StableLogisticMixture.check_data(config(bits=5), 4)
    with pytest.raises(ValueError, match=r"set data\.bits=8"):
        StableLogisticMixture.check_data(config(bits=5, normalized=False), 5)
