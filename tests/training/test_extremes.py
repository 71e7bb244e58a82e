"""Whatever the network puts out, likelihood, KL and sigma stay finite; so do gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvae.models import ModelConfig
from nvae.models.distributions import Normal
from nvae.models.pixel_distribution import build_likelihood, logit_channels

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LIKELIHOODS = (("bernoulli", 1, 1), ("logistic_mixture", 1, 4), ("logistic_mixture", 3, 8),
               ("logistic_mixture", 3, 5), ("normal", 3, 8))  # fmt: skip
SPREADS = (0.0, 1e-3, 1.0, 30.0, 1e3, 1e4)


def _values(shape: tuple[int, ...], spread: float, seed: int, dtype: torch.dtype) -> Tensor:
    """Random numbers up to +-spread, a good part of them at the very ends."""
    generator = torch.Generator().manual_seed(seed)
    x = (2 * torch.rand(shape, generator=generator) - 1) * spread
    ends = torch.rand(shape, generator=generator)
    x = torch.where(ends < 0.2, -spread, torch.where(ends > 0.8, spread, x))
    return x.to(dtype).requires_grad_()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LIKELIHOODS),
    st.sampled_from(DTYPES),
    st.sampled_from(SPREADS),
    st.integers(0, 10_000),
)
def test_likelihood_is_finite(
    kind: tuple[str, int, int], dtype: torch.dtype, spread: float, seed: int
) -> None:
    likelihood, channels, bits = kind
    config = ModelConfig(
        image_size=4, image_channels=channels, bits=bits, likelihood=likelihood, num_mixtures=3,
        num_scales=1, preprocess_blocks=1,
    )  # fmt: skip
    logits = _values((3, logit_channels(config), 4, 4), spread, seed, dtype)
    levels = 2**bits - 1
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(levels + 1, (3, channels, 4, 4), generator=generator) / levels
    x[0], x[1] = 0, 1  # the edge bins
    log_prob = build_likelihood(config, logits).log_prob(x)
    assert log_prob.dtype == torch.float32
    assert log_prob.isfinite().all()
    # in float16 the gradient itself may overflow: the loss scaler's business
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    if dtype != torch.float16:
        assert gradient.isfinite().all()
    assert not gradient.isnan().any()
    image = build_likelihood(config, logits.detach()).mean
    assert ((image >= 0) & (image <= 1)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(SPREADS),
    st.sampled_from(SPREADS),
    st.integers(0, 10_000),
)
def test_kl_and_sigma_are_finite(
    dtype: torch.dtype, posterior: float, prior: float, seed: int
) -> None:
    """KL of any two heads, closed form and by a sample, with gradients."""
    shape = (2, 5, 3, 3)
    heads = [
        _values(shape, spread, 4 * seed + i, dtype)
        for i, spread in enumerate((posterior, posterior, prior, prior))
    ]
    q = Normal.from_parameters(heads[0], heads[1])
    p = Normal.from_parameters(heads[2], heads[3])
    z = q.sample(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    for value in (q.sigma, p.sigma):
        assert value.dtype == torch.float32
        assert ((value > 0) & value.isfinite()).all()
    closed, sampled = q.kl(p), q.log_prob(z) - p.log_prob(z)
    assert closed.isfinite().all()
    assert (closed >= -1e-3).all()
    assert sampled.isfinite().all()
    for gradient in torch.autograd.grad((closed + sampled).sum(), heads):
        assert not gradient.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_with_huge_weights_has_a_finite_loss(dtype: torch.dtype) -> None:
    """The whole pass under autocast, heads a thousand times too large."""
    from nvae.models import NVAE

    torch.manual_seed(0)
    model = NVAE(ModelConfig(
        image_size=8, num_scales=1, groups_per_scale=3, preprocess_blocks=1, preprocess_cells=1,
        postprocess_cells=1, encoder_channels=8, decoder_channels=8, latent_channels=2, bits=1,
    ))  # fmt: skip
    with torch.no_grad():
        for group in model.groups:
            group.posterior.conv.log_gain += 7  # type: ignore[union-attr, operator]
    x = torch.rand(2, 1, 8, 8).round()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = model(x)
        log_prob = model.likelihood(output.logits).log_prob(x)
    assert output.kl_per_group.dtype == torch.float32
    assert output.kl_per_group.isfinite().all()
    assert log_prob.isfinite().all()
