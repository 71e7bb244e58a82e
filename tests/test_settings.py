"""Every configuration holds its fields against types and bounds with these."""

import math
from dataclasses import dataclass, field

import pytest

from nvae.settings import Size, check_choice, check_fields, height_width, plain_size, show_size


@dataclass
class Settings:
    count: int = 1
    rate: float = 0.5
    name: str = "a"
    on: bool = False
    some: list[float] = field(default_factory=list)
    limit: int | None = None
    pair: tuple[int, ...] = ()
    size: Size = 1

    def __post_init__(self) -> None:
        check_fields(self, "group.", count=(1, 10), some=(0, None), size=(1, 9))


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
        ("size", "x", "group.size='x' is not an integer or a list of two integers"),
        ("size", (1, 2, 3), "group.size=(1, 2, 3) is not an integer or a list of two integers"),
        ("size", (1, 0), "group.size is 0; it must be at least 1"),
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
    Settings(count=10, rate=1, some=[0, 1.5], limit=2**62, pair=(1, 2), size=(3, 4))


def test_a_size_has_one_form():
    assert (plain_size([32, 32]), plain_size([96, 64]), plain_size(32)) == (32, (96, 64), 32)
    assert plain_size([True, True]) == (True, True)  # left to be refused
    assert (height_width(32), height_width((96, 64))) == ((32, 32), (96, 64))
    assert (show_size(32), show_size((96, 64))) == ("32", "[96, 64]")


def test_choices():
    check_choice("x", "a", ("a", "b"))
    with pytest.raises(ValueError, match="x='c' is unknown; allowed: a, b"):
        check_choice("x", "c", ("a", "b"))
