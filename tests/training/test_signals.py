"""How often several ranks agree on whether to stop."""

import pytest

from nvae.training.signals import AGREE_EVERY, MOST_STEPS, steps_until_next


@pytest.mark.parametrize("seconds", [0.01, 0.2, 1.0, 10.0, 400.0])
def test_ranks_agree_at_every_long_step_and_within_seconds_otherwise(seconds: float) -> None:
    """From the first step on, which was slow, to steps of one length."""
    steps = steps_until_next(1, 60.0)
    assert steps == 1
    for _ in range(20):
        steps = steps_until_next(steps, steps * seconds)
    assert steps == max(1, min(int(AGREE_EVERY / seconds + 1e-6), MOST_STEPS))


def test_a_quick_start_says_little() -> None:
    assert steps_until_next(0, 0.0) == 1
    assert steps_until_next(4, 0.0) == 8
