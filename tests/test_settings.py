"""Every configuration holds its fields against types and bounds with these."""

import math
from dataclasses import dataclass, field

import pytest

from nvae.settings import check_choice, check_fields


@dataclass
class Settings:
    count: int = 1
    rate: float = 0.5
    name: str = "a"
    on: bool = False
    some: list[float] = field(default_factory=list)
    limit: int | None = None
    pair: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "group.", count=(1, 10), some=(0, None))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "group.count is 0; it must be at least 1"),
        ("count", 11, "group.count is 11; it must be at most 10"),
        ("count", 1.0, "group.count=1.0 is not an integer"),
        ("count", True, "group.count=True is not an integer"),
        ("count", "1", "group.count='1' is not an integer"),
        ("rate", math.nan, "group.rate is nan; it must be a finite number"),
        ("rate", math.inf, "group.rate is inf; it must be a finite number"),
        ("rate", None, "group.rate=None is not a number"),
        ("name", 3, "group.name=3 is not text"),
        ("on", 1, "group.on=1 is not true or false"),
        ("some", [0.5, math.nan], "group.some is nan; it must be a finite number"),
        ("some", [-1], "group.some is -1; it must be at least 0"),
        ("some", ["x"], "group.some=['x'] is not a list of a number"),
        ("some", 1.0, "group.some=1.0 is not a list of a number"),
        ("limit", 2**64, f"group.limit is {2**64}; it must fit in 64 bits"),
        ("limit", "x", "group.limit='x' is not an integer or null"),
        ("pair", (1, None), "group.pair=(1, None) is not a list of an integer"),
    ],
)
def test_what_does_not_fit_is_named(name, value, message):
    with pytest.raises(ValueError, match="group") as raised:
        Settings(**{name: value})
    assert str(raised.value) == message


def test_an_integer_too_long_to_print_is_named():
    with pytest.raises(ValueError, match="is of 16610 bits"):
        Settings(limit=10**5000)


def test_what_fits_passes():
    Settings(count=10, rate=1, some=[0, 1.5], limit=2**62, pair=(1, 2))


def test_choices():
    check_choice("x", "a", ("a", "b"))
    with pytest.raises(ValueError, match="x='c' is unknown; allowed: a, b"):
        check_choice("x", "c", ("a", "b"))
