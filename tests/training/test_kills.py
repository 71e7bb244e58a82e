"""`benchmarks/kills.py` in small: runs killed at random moments lose nothing."""

import pytest

from benchmarks import kills


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_a_handful_of_kills_loses_nothing(
    ranks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kills, "EPOCHS", 4)
    assert kills.main(kills=3, seed=ranks, longest=10, ranks=[ranks]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("kills 3, ")
    assert last.endswith("lost 0, unreadable 0, steps 0, different 0")


def test_what_is_broken_is_counted() -> None:
    """The verdict can fail."""
    assert kills.Count(kills=9, resumed=8, runs=1).is_clean
    for name in ("lost", "unreadable", "steps", "different"):
        assert not kills.Count(**{name: 1}).is_clean
    assert not kills.are_equal({"a": [1.0]}, {"a": [1.5]})
