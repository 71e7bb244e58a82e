"""Typed schemas for Hydra, built from the dataclasses that the code itself uses.

Composing against a schema refuses unknown keys and wrong types; building the dataclasses from the
result runs their own checks.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Collection
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf

from nvae.settings import CONFIGS, unknown_key

T = TypeVar("T")


def schema_of(cls: type, untyped: Collection[str] = ()) -> type:
    """A mutable copy of a dataclass for OmegaConf, without its checks.

    OmegaConf cannot merge into a frozen dataclass, and interpolations are not values yet that
    could be checked. Fields without a default become mandatory.

    Args:
        cls: the dataclass.
        untyped: fields that take anything, and are mandatory.
    """
    hints = schema_types(cls) | dict.fromkeys(untyped, Any)
    fields: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        default: Any = dataclasses.field(default=MISSING)
        if f.name in untyped:
            pass
        elif dataclasses.is_dataclass(kind):
            kind = schema_of(typing.cast(type, kind))
            default = dataclasses.field(default_factory=kind)
        elif f.default is not dataclasses.MISSING:
            default = dataclasses.field(default=f.default)
        elif f.default_factory is not dataclasses.MISSING:
            default = dataclasses.field(default_factory=f.default_factory)
        fields.append((f.name, kind, default))
    return dataclasses.make_dataclass(cls.__name__, fields)


def schema_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields as OmegaConf can hold them.

    It knows no union with a list, such as a size; those fields take anything until the dataclass
    checks them.
    """

    def holds_list(kind: Any) -> bool:
        parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else ()
        return len(set(parts) - {type(None)}) > 1 and any(map(typing.get_origin, parts))

    return {k: Any if holds_list(v) else v for k, v in typing.get_type_hints(cls).items()}


def build(cls: type[T], config: DictConfig, **kinds: type) -> T:
    """The dataclass that a composed config describes; interpolations are resolved.

    Args:
        cls: the dataclass.
        config: composed.
        kinds: types of fields, by name, in place of those that it says.

    Raises:
        ValueError: a value or a combination is not allowed; one line.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}: give {missing[0]}=...")
    values = OmegaConf.to_container(config, resolve=True)
    _check_finite(values, "")
    return _from_dict(cls, values, "", **kinds)


def _check_finite(value: Any, path: str) -> None:
    """Raise a ValueError that names the first number that is not finite.

    Before the dataclasses check how their numbers fit each other: there the innocent one may be
    named.
    """
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_finite(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for entry in value:
            _check_finite(entry, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}; it must be a finite number")


def _from_dict(cls: type[T], values: Any, prefix: str, **kinds: type) -> T:
    if not isinstance(values, dict):
        raise ValueError(takes_group(prefix.removesuffix("."), values))
    hints = typing.get_type_hints(cls) | kinds
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(unknown_key(prefix + name, list(hints)))
        nested = dataclasses.is_dataclass(hints[name])
        arguments[name] = _from_dict(hints[name], value, f"{prefix}{name}.") if nested else value
    return cls(**arguments)


def takes_group(path: str, value: Any) -> str:
    """What to say about something else in the place of a group of settings."""
    shown = "null" if value is None else value
    place = path.replace(".", "/")
    where = f", see configs/{place}" if (CONFIGS / place).is_dir() else ""
    return f"{path}={shown}: it takes a group of settings{where}"


def lookup(cls: type, path: str) -> tuple[type, str | None]:
    """The dataclass that a dotted path leads into, and the first name it does not have."""
    here = cls
    for name in path.split("."):
        names = {f.name for f in dataclasses.fields(here)}
        if name not in names:
            return here, name
        kind = typing.get_type_hints(here)[name]
        if not dataclasses.is_dataclass(kind):
            break
        here = typing.cast(type, kind)
    return here, None
