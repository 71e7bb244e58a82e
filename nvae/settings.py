"""What settings may be: values, checked where a configuration is made, and names of classes."""

import dataclasses
import difflib
import importlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_INSTALLED = Path(__file__).with_name("configs")
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[1] / "configs"
"""The configurations that come with the package: in a wheel inside it, else beside it."""

LARGEST_INTEGER = 2**63 - 1
"""What a 64-bit counter, seed or index can hold."""

Bounds = tuple[float | None, float | None]
"""Least and greatest value allowed, both included; None: no bound on that side."""


Size = int | tuple[int, int]
"""Of an image in pixels: the side of a square, or height and width where they differ."""


def height_width(size: Size) -> tuple[int, int]:
    """Height and width of a size."""
    return (size, size) if isinstance(size, int) else size


def plain_size(size: Any) -> Any:
    """The one form of a size that a configuration or a JSON file holds.

    A list becomes a tuple, and ``[32, 32]`` the number 32. What is no size stays as it is, for
    :func:`check_fields` to refuse.
    """
    if not isinstance(size, list | tuple):
        return size
    is_square = len(size) == 2 and type(size[0]) is type(size[1]) is int and size[0] == size[1]
    return size[0] if is_square else tuple(size)


def show_size(size: Size) -> str:
    """A size as one types it: ``32`` or ``[96, 64]``."""
    return str(size) if isinstance(size, int) else str(list(size))


def check_fields(config: Any, prefix: str = "", **bounds: Bounds) -> None:
    """Hold the fields of a dataclass against their types and bounds.

    Every number must be finite and every integer fit in 64 bits, in lists too. Fields that are
    dataclasses check themselves.

    Args:
        config: an instance of a dataclass.
        prefix: of its fields in messages, such as ``model.``.
        bounds: by field name.

    Raises:
        ValueError: one line that names the field, its value and what is allowed.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name = field.name
        check_value(prefix + name, getattr(config, name), hints[name], bounds.get(name))


def check_value(name: str, value: Any, kind: Any, bounds: Bounds | None = None) -> None:
    """Hold one value against a type and bounds; see :func:`check_fields`."""
    if not _fits(value, kind):
        raise ValueError(f"{name}={value!r} is not {describe_type(kind)}")
    for number in value if isinstance(value, list | tuple) else (value,):
        if _is_number(number):
            _check_number(name, number, *(bounds or (None, None)))


def _check_number(name: str, value: float, least: float | None, most: float | None) -> None:
    if isinstance(value, int) and not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        # one of thousands of digits cannot even be printed
        shown = value if value.bit_length() <= 128 else f"of {value.bit_length()} bits"
        raise ValueError(f"{name} is {shown}; it must fit in 64 bits")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be a finite number")
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least:g}")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value}; it must be at most {most:g}")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise a ValueError unless ``value`` is one of those allowed."""
    choices = list(allowed)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(map(str, choices))}")


def check_arguments(target: Callable[..., Any], given: Iterable[str], prefix: str) -> None:
    """Raise a ValueError unless ``target`` takes keyword arguments of the names ``given``."""
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    allowed = [parameter.name for parameter in parameters]
    for name in given:
        if name not in allowed:
            raise ValueError(unknown_key(prefix + name, allowed))


def unknown_key(path: str, allowed: Sequence[str]) -> str:
    """What to say about a key that does not exist, the last part of a dotted path."""
    hint = did_you_mean(path.split(".")[-1], allowed)
    return f"unknown key {path}{hint}; allowed here: {', '.join(allowed)}"


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`` (did you mean X?)`` where one of those allowed is like ``word``, else nothing."""
    close = difflib.get_close_matches(word, list(allowed), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def describe_type(kind: Any) -> str:
    """A field's type in words, for error messages."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(describe_type(arg) for arg in typing.get_args(kind))
    if kind == tuple[int, int]:
        return "a list of two integers"
    if typing.get_origin(kind) in (list, tuple):
        return f"a list of {describe_type(typing.get_args(kind)[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, "null" if kind is type(None) else getattr(kind, "__name__", str(kind)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as configurations write types."""
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_fits(value, option) for option in typing.get_args(kind))
    if typing.get_origin(kind) in (list, tuple):
        entry = typing.get_args(kind)[0]
        is_list = isinstance(value, list | tuple) and all(_fits(each, entry) for each in value)
        return is_list and (kind != tuple[int, int] or len(value) == 2)
    if kind is float:
        return _is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(kind) or kind)


class Registry(Generic[T]):
    """What may stand for one setting, by the names that configurations use.

    A name is one of ours, or ``package.module:Class`` for a class from elsewhere. The second form
    imports that module, so it counts only where the user composes a configuration; what a file
    says is held against the names that are known already (:meth:`check_known`).

    Args:
        setting: the setting's name, for messages: ``model.likelihood``.
        base: what a class from elsewhere must derive from, or an object be an instance of.
        ours: by name; :meth:`add` enters what is defined later.
    """

    def __init__(self, setting: str, base: type, ours: Mapping[str, T] | None = None) -> None:
        self.setting, self._base = setting, base
        self._known: dict[str, T] = dict(ours or {})

    def add(self, **ours: T) -> None:
        """Enter what is ours, by name."""
        self._known |= ours

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __getitem__(self, name: str) -> T:
        """What a name stands for; ``package.module:Class`` is imported.

        Raises:
            ValueError: no such name, module or class, or one of another kind.
        """
        if name not in self._known and ":" in name and not self.plug_in(name, self.setting):
            raise ValueError(f"{self.setting}={name} is no {self._base.__name__}")
        self.check_known(name)
        return self._known[name]

    def plug_in(self, name: str, setting: str = "plugins") -> bool:
        """Import ``package.module:Class`` and know it from now on; False if it is of another kind.

        Args:
            name: to import.
            setting: that says so, for messages.

        Raises:
            ValueError: no such module or class.
        """
        found = _imported(setting, name)
        kind = issubclass if isinstance(found, type) else isinstance
        if kind(found, self._base):
            self._known[name] = found
            return True
        return False

    def check_known(self, name: object) -> None:
        """Raise a ValueError unless ``name`` is ours or has been imported by name before."""
        if isinstance(name, str) and name in self._known:
            return
        message = f"{self.setting}={name!r} is unknown; allowed: {', '.join(self._known)}"
        if isinstance(name, str) and ":" in name:
            message += f"; a class from elsewhere counts only where you name it: plugins=[{name}]"
        raise ValueError(message)

    def name_of(self, thing: T) -> str:
        """The name that something was found under; for what nobody named, where it is defined."""
        for name, known in self._known.items():
            if known is thing:
                return name
        return f"{thing.__module__}:{getattr(thing, '__qualname__', '')}"


def _imported(setting: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    if "/" in name or name.startswith("."):
        raise ValueError(f"{setting}={name}: write package.module:Class, not a path")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{setting}={name} cannot be imported: {error}") from None
