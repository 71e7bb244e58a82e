import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvae.models.distributions import SIGMA_FLOOR, SOFT_CLAMP, Normal, soft_clamp


def normal(mean: float, log_sigma: float) -> Normal:
    return Normal.from_parameters(
        torch.full((1,), mean, dtype=torch.float64), torch.full((1,), log_sigma).double()
    )


def test_parameters_follow_the_formula() -> None:
    """mu = 5 tanh(mu / 5), sigma = exp(5 tanh(log sigma / 5)) + 0.01."""
    q = normal(3.0, -2.0)
    assert q.mean.item() == pytest.approx(5 * math.tanh(0.6))
    assert q.sigma.item() == pytest.approx(math.exp(5 * math.tanh(-0.4)) + 0.01)


def test_kl_equals_torch() -> None:
    """The closed form against an independent implementation."""
    q, p = normal(0.3, -0.7), normal(-1.1, 0.4)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(q.mean, q.sigma), torch.distributions.Normal(p.mean, p.sigma)
    )
    torch.testing.assert_close(q.kl(p), expected)


def test_kl_equals_the_integral() -> None:
    """KL = integral of q log(q / p), by the trapezoid rule."""
    q, p = normal(0.3, -0.7), normal(-1.1, 0.4)
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    integrand = q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z))
    assert torch.trapezoid(integrand, z).item() == pytest.approx(q.kl(p).item(), rel=1e-8)


def test_kl_of_equal_distributions_is_zero() -> None:
    assert normal(0.5, 0.2).kl(normal(0.5, 0.2)).item() == pytest.approx(0.0, abs=1e-15)


def test_log_prob_integrates_to_one() -> None:
    q = normal(0.3, -0.7)
    z = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    assert torch.trapezoid(q.log_prob(z).exp(), z).item() == pytest.approx(1.0, rel=1e-9)


def test_temperature_scales_the_spread_and_zero_gives_the_mean() -> None:
    noise = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    mean, log_sigma = torch.full_like(noise, 0.7), torch.full_like(noise, -0.3)
    spread = {t: Normal.from_parameters(mean, log_sigma, t).sample(noise) for t in (0.0, 0.5, 1.0)}
    torch.testing.assert_close(spread[0.0], soft_clamp(mean))
    torch.testing.assert_close(2 * spread[0.5].std(), spread[1.0].std())


@given(
    st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)  # fmt: skip
def test_everything_stays_finite(
    a: float, b: float, c: float, d: float, dtype: torch.dtype
) -> None:
    """Whatever the network puts out, in any precision: the clamp and the floor hold."""
    q = Normal.from_parameters(torch.tensor([a], dtype=dtype), torch.tensor([b], dtype=dtype))
    p = Normal.from_parameters(torch.tensor([c], dtype=dtype), torch.tensor([d], dtype=dtype))
    assert q.sigma.dtype == torch.float32
    assert q.mean.abs() <= SOFT_CLAMP
    assert q.sigma >= SIGMA_FLOOR
    for value in (q.kl(p), q.log_prob(p.mean), p.log_prob(q.mean)):
        assert torch.isfinite(value).all()
