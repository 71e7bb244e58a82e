"""The learning rate over time."""

from itertools import pairwise

import pytest

from nvae.training.optimizers import OptimizerConfig
from nvae.training.schedule import learning_rate_factor, warmup_steps


def test_learning_rate_warms_up_then_falls_to_the_minimum() -> None:
    """Linear over two epochs of ten steps, half a cosine over eight more; last step at 1e-4."""
    config = OptimizerConfig(warmup_epochs=2)
    factor = learning_rate_factor(config, 10, 100)
    rates = [config.learning_rate * factor(s) for s in range(101)]
    assert rates[0] == pytest.approx(1e-2 / 20)
    assert rates[19] == rates[20] == pytest.approx(1e-2)
    assert rates[60] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates[100] == pytest.approx(1e-4)
    assert all(a < b for a, b in pairwise(rates[:20]))
    assert all(a > b for a, b in pairwise(rates[20:]))


def test_cosine_by_the_epoch_is_constant_within_one() -> None:
    factor = learning_rate_factor(OptimizerConfig(warmup_epochs=1, decay_every="epoch"), 10, 50)
    assert len({factor(s) for s in range(20, 30)}) == 1
    assert factor(19) > factor(20)
    assert factor(3) == pytest.approx(0.4)  # warm-up goes step by step all the same


def test_a_warmup_longer_than_the_run_takes_half_of_it() -> None:
    """Ten steps an epoch: five epochs of warm-up in a run of two, and in one of ten."""
    config = OptimizerConfig(warmup_epochs=5)
    assert warmup_steps(config, 10, 20) == 10
    assert warmup_steps(config, 10, 100) == 50
    factor = learning_rate_factor(config, 10, 20)
    assert factor(4) < factor(9) <= 1.0
