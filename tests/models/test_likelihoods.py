import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvae.models import EVDVAEConfig, ModelConfig, VDVAEConfig
from nvae.models.logistic_mixture import LogisticMixture, log_scale_floor
from nvae.models.pixel_distribution import ImageConfig, build_likelihood, logit_channels

KINDS = ("bernoulli", "logistic_mixture", "normal")


def config(kind: str, channels: int = 1, bits: int = 3, **kw: int) -> ModelConfig:
    return ModelConfig(
        image_size=8, image_channels=channels, bits=bits, likelihood=kind, num_mixtures=3,
        num_scales=1, preprocess_blocks=1, **kw,
    )  # fmt: skip


def logits_for(cfg: ModelConfig, batch: int = 1, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, logit_channels(cfg), cfg.image_size, cfg.image_size)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_logistic_mixture_masses_sum_to_one(channels: int, bits: int) -> None:
    """Over every value of a pixel, all channels jointly: no mass is lost or counted twice."""
    cfg = config("logistic_mixture", channels, bits)
    levels = 2**bits
    values = list(itertools.product(range(levels), repeat=channels))
    pixels = torch.tensor(values, dtype=torch.float64).view(-1, channels, 1, 1) / (levels - 1)
    # one pixel's logits, narrow enough that most of the mass falls between the edges
    logits = logits_for(cfg, scale=0.5)[:, :, :1, :1].expand(len(values), -1, -1, -1)
    likelihood = build_likelihood(cfg, logits)
    assert likelihood.log_prob(pixels).exp().sum().item() == pytest.approx(1.0, abs=2e-4)


def image_config(family: str, channels: int, bits: int) -> ImageConfig:
    images = {"image_size": 8, "image_channels": channels, "bits": bits, "num_mixtures": 1}
    if family == "nvae":
        return ModelConfig(**images, likelihood="logistic_mixture", preprocess_blocks=1)  # type: ignore[arg-type]
    if family == "vdvae":
        return VDVAEConfig(**images, encoder_blocks="8x1", decoder_blocks="8x1")  # type: ignore[arg-type]
    return EVDVAEConfig(**images, up_strides=[2, 4, 1, 1], down_strides=[1, 1, 4, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", range(1, 17))
def test_masses_sum_to_one_at_every_depth_and_number_of_channels(bits: int) -> None:
    """Every value of every channel given the others: by the chain rule the images sum to 1 too.

    Broad and narrow logistics, inside and at both edges. The published form of gray and color with
    8 bits, which counts 254 as an edge too, is the exception that the class names.
    """
    levels = 2**bits
    generator = torch.Generator().manual_seed(bits)
    pairs = [("nvae", channels) for channels in range(1, 6)]
    pairs += itertools.product(("vdvae", "evdvae"), (1, 2, 3))
    for family, channels in pairs:
        cfg = image_config(family, channels, bits)
        shape = (1, logit_channels(cfg), 1, 1)
        raw = 2 * torch.randn(shape, generator=generator, dtype=torch.float64) - 1
        likelihood = build_likelihood(cfg, raw.expand(levels, -1, -1, -1))
        assert isinstance(likelihood, LogisticMixture)
        others = torch.randint(levels, (1, channels, 1, 1), generator=generator)
        for channel in range(channels):
            x = others.repeat(levels, 1, 1, 1)
            x[:, channel] = torch.arange(levels).view(-1, 1, 1)
            masses = likelihood._log_masses(x / torch.tensor(levels - 1.0).double()).exp()
            masses = masses[:, channel].flatten(1)
            if likelihood.is_published and family == "nvae":
                masses = masses[: 255 if bits == 8 else levels]
                tolerance = 2e-4
            else:
                tolerance = 1e-11
            error = (masses.sum(0) - 1).abs().max().item()
            assert error < tolerance, (family, channels, channel)


@pytest.mark.parametrize(("bits", "most"), [(8, 3e-5), (12, 3e-4), (16, 6e-3)])
def test_float32_loses_little_of_narrow_bins(bits: int, most: float) -> None:
    """Against float64, nats of every level that is no rarer than e^-12 of the likeliest one.

    The figures are those of the narrowest logistic; at a log-scale of -3 all is within 5e-6.
    """
    cfg = config("logistic_mixture", 2, bits)
    levels = 2**bits
    x = (torch.arange(levels) / torch.tensor(levels - 1.0)).view(-1, 1, 1, 1).expand(-1, 2, -1, -1)
    for mean in (-1.2, -0.97, -0.3, 0.013, 0.77, 0.9991):
        for log_scale, bound in ((log_scale_floor(bits), most), (-3.0, 5e-6), (8.0, 5e-6)):
            raw = torch.zeros(1, logit_channels(cfg), 1, 1)
            raw[:, 3:9], raw[:, 9:15] = mean, mean
            raw[:, 6:9], raw[:, 12:15], raw[:, 15:18] = log_scale, log_scale, 0.3
            single = build_likelihood(cfg, raw.expand(levels, -1, -1, -1))
            double = build_likelihood(cfg, raw.double().expand(levels, -1, -1, -1))
            assert isinstance(single, LogisticMixture)
            assert isinstance(double, LogisticMixture)
            found, exact = single._log_masses(x), double._log_masses(x.double())
            near = exact > exact.amax(0) - 12
            assert (found - exact)[near].abs().max() < bound
            total = found[:, 0].double().exp().sum(0)  # the second moves with the first
            assert (total - 1).abs().max() < 2e-4


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_a_channel_moves_with_the_two_before_it(channels: int) -> None:
    """In draws as in densities, and as published for color: red, green, blue."""
    cfg = config("logistic_mixture", channels, bits=12)
    logits = logits_for(cfg).clone()
    first = 3 + 6 * channels
    logits[:, :first] = 0
    logits[:, 3:first].unflatten(1, (channels, 2, 3))[:, :, 1] = -7.0  # narrow
    logits[:, 3:6] = 0.5  # the first channel
    logits[:, first : first + 3] = 10.0  # the second is the first
    logits[:, first + 3 :] = 0.0
    if channels > 2:  # the third is the first too, by the far coefficient
        logits[:, 3 + 6 * channels + 3 * (channels - 1) :][:, :3] = 10.0
    likelihood = build_likelihood(cfg, logits)
    draw = likelihood.sample(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw[:, 1], draw[:, 0], atol=0.01, rtol=0)
    assert (likelihood.mean[:, 1] - 0.75).abs().max() < 1e-6
    if channels > 2:
        torch.testing.assert_close(draw[:, 2], draw[:, 0], atol=0.01, rtol=0)
    x = (draw * 4095).round() / 4095
    moved = x.clone()
    moved[:, 1] = 1 - moved[:, 1]
    assert (likelihood.log_prob(moved) < likelihood.log_prob(x) - 1000).all()


def test_draws_of_many_bits_follow_the_masses() -> None:
    """Of 12 bits, rounded to levels: as many below a level as log_prob says."""
    cfg = config("logistic_mixture", bits=12)
    logits = logits_for(cfg)[:, :, :1, :1]
    n, below = 40_000, 1700
    samples = build_likelihood(cfg, logits.expand(n, -1, -1, -1)).sample(
        generator=torch.Generator().manual_seed(3)
    )
    frequency = ((samples * 4095).round() < below).double().mean().item()
    x = torch.arange(below, dtype=torch.float64).view(-1, 1, 1, 1) / 4095
    expected = build_likelihood(cfg, logits.expand(below, -1, -1, -1)).log_prob(x).exp().sum()
    assert frequency == pytest.approx(expected.item(), abs=4 * math.sqrt(0.25 / n))


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_rectangular_window_counts(kind: str) -> None:
    cfg = config(kind, 2, counted_size=(4, 6))  # type: ignore[arg-type]
    x = torch.zeros(1, 2, 8, 8)
    before = build_likelihood(cfg, logits_for(cfg)).log_prob(x)
    x[..., :2, :] = x[..., :, 7] = 1
    torch.testing.assert_close(build_likelihood(cfg, logits_for(cfg)).log_prob(x), before)
    x[..., 2, 1] = 1
    assert build_likelihood(cfg, logits_for(cfg)).log_prob(x) != before


def test_logistic_mixture_equals_the_sum_over_components() -> None:
    """log p of a gray pixel against the definition, written out with the logistic's CDF."""
    cfg = config("logistic_mixture", bits=3)
    logits = logits_for(cfg)[:, :, :1, :1]
    weights, means, log_scales = logits.flatten().chunk(3)
    value = 3
    x, half = 2 * value / 7 - 1, 1 / 7
    expected = sum(
        w * (torch.sigmoid((x + half - m) / s.exp()) - torch.sigmoid((x - half - m) / s.exp()))
        for w, m, s in zip(weights.softmax(0), means, log_scales, strict=True)
    )
    pixel = torch.full((1, 1, 1, 1), value / 7, dtype=torch.float64)
    actual = build_likelihood(cfg, logits).log_prob(pixel)
    torch.testing.assert_close(actual.exp().squeeze(), expected)


def test_eight_bits_count_254_as_an_edge_too() -> None:
    """The published rule "above 0.99" takes in the last bin but one; stated, not hidden."""
    cfg = config("logistic_mixture", bits=8)
    likelihood = build_likelihood(cfg, logits_for(cfg)[:, :, :1, :1])
    p = [
        likelihood.log_prob(torch.full((1, 1, 1, 1), v / 255, dtype=torch.float64)).exp().item()
        for v in range(256)
    ]
    assert sum(p) - p[255] == pytest.approx(1.0, abs=2e-4)


def test_bernoulli_masses_sum_to_one() -> None:
    likelihood = build_likelihood(config("bernoulli"), logits_for(config("bernoulli"))[..., :1, :1])
    p = [likelihood.log_prob(torch.full((1, 1, 1, 1), v)).exp().item() for v in (0.0, 1.0)]
    assert sum(p) == pytest.approx(1.0)


def test_normal_density_integrates_to_one_over_2x_minus_1() -> None:
    cfg = config("normal")
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64).view(-1, 1, 1, 1)
    logits = logits_for(cfg)[:, :, :1, :1].expand(len(x), -1, -1, -1)
    density = build_likelihood(cfg, logits).log_prob(x).exp()
    assert torch.trapezoid(density, 2 * x.flatten()).item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_counted_window_counts(kind: str) -> None:
    """Padding must not enter the likelihood."""
    cfg = config(kind, counted_size=4)
    logits = logits_for(cfg)
    x = torch.zeros(1, 1, 8, 8)
    before = build_likelihood(cfg, logits).log_prob(x)
    x[..., 0, :] = 1
    x[..., :, 7] = 1
    torch.testing.assert_close(build_likelihood(cfg, logits).log_prob(x), before)
    x[..., 3, 3] = 1
    assert build_likelihood(cfg, logits).log_prob(x) != before


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_temperature(kind: str, channels: int) -> None:
    """0 gives the mode whatever the seed; variance grows with the temperature."""
    cfg = config(kind, channels)
    logits = logits_for(cfg).expand(4000, -1, -1, -1)
    likelihood = build_likelihood(cfg, logits)

    def draw(t: float, seed: int = 0) -> Tensor:
        return likelihood.sample(t, torch.Generator().manual_seed(seed))

    mode = draw(0.0)
    assert torch.equal(mode, draw(0.0, seed=1))
    assert (mode[0] == mode).all()
    # the mode has no less mass than its neighbors among the samples
    spread = [draw(t).var(0).mean().item() for t in (0.0, 0.3, 0.6, 1.0, 1.5)]
    assert spread[0] == pytest.approx(0.0, abs=1e-12)
    assert spread == sorted(spread)
    assert ((mode >= 0) & (mode <= 1)).all()


def test_mode_of_a_bernoulli_is_the_likelier_value() -> None:
    logits = torch.tensor([-0.1, 0.1]).view(1, 1, 1, 2)
    mode = build_likelihood(config("bernoulli"), logits).sample(0.0)
    assert mode.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("channels", [1, 3])
def test_logistic_samples_follow_the_masses(channels: int) -> None:
    """Sampled values, rounded to the grid, appear as often as log_prob says."""
    cfg = config("logistic_mixture", channels, bits=1)
    logits = logits_for(cfg)[:, :, :1, :1]
    n = 40_000
    samples = build_likelihood(cfg, logits.expand(n, -1, -1, -1)).sample(
        generator=torch.Generator().manual_seed(3)
    )
    # red alone: the other channels are drawn given the unrounded red
    frequency = (samples[:, 0] > 0.5).double().mean().item()
    grid = list(itertools.product((0.0, 1.0), repeat=channels))
    pixels = torch.tensor(grid, dtype=torch.float64).view(-1, channels, 1, 1)
    p = build_likelihood(cfg, logits.expand(len(grid), -1, -1, -1)).log_prob(pixels).exp()
    expected = p[pixels[:, 0, 0, 0] == 1].sum().item()
    assert frequency == pytest.approx(expected, abs=4 * math.sqrt(0.25 / n))


@pytest.mark.parametrize("kind", KINDS)
def test_mean_matches_the_samples(kind: str) -> None:
    """Where no value is clipped, the mean is the samples' mean."""
    cfg = config(kind)
    logits = logits_for(cfg)
    if kind == "normal":
        logits = torch.cat([0.3 * logits[:, :1], logits[:, 1:] - 5], 1)
    if kind == "logistic_mixture":
        logits = torch.cat([logits[:, :3], 0.3 * logits[:, 3:6], logits[:, 6:] - 5], 1)
    likelihood = build_likelihood(cfg, logits.expand(4000, -1, -1, -1))
    samples = likelihood.sample(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.mean(0), likelihood.mean[0], atol=0.04, rtol=0)


def test_negative_pixel_temperature_is_refused() -> None:
    cfg = config("bernoulli")
    with pytest.raises(ValueError, match="pixel temperature is -1"):
        build_likelihood(cfg, logits_for(cfg)).sample(-1.0)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(KINDS), st.sampled_from([1, 2, 3, 5]), st.sampled_from([1.0, 1e2, 1e4]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from([1, 5, 8, 12, 16]),
)  # fmt: skip
def test_finite_for_wild_logits(
    kind: str, channels: int, scale: float, dtype: torch.dtype, bits: int
) -> None:
    """Logits up to 1e4 in any precision: log p and its gradient stay finite, in float32."""
    cfg = config(kind, channels, bits)
    logits = logits_for(cfg).clamp(-1, 1).mul(scale).to(dtype)
    if bits > 8:  # float16 cannot hold such gradients; image heads put out float32
        logits = logits.float()
    logits.requires_grad_()
    x = torch.randint(2**bits, (1, channels, 8, 8)) / (2**bits - 1)
    log_prob = build_likelihood(cfg, logits).log_prob(x.round() if kind == "bernoulli" else x)
    log_prob.sum().backward()
    assert log_prob.dtype == torch.float32
    assert torch.isfinite(log_prob).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
