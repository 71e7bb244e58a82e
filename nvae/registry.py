"""Classes by the names that configurations use.

A name is one of ours, or ``package.module:Class`` for a class from elsewhere. The second form
imports that module, so it counts only where the user composes a configuration; what a file says is
held against the names that are known already (:meth:`Registry.check_known`).
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """What may stand for one setting.

    Args:
        setting: the setting's name, for messages: ``model.likelihood``.
        base: what a class from elsewhere must derive from, or an object be an instance of.
        ours: by name.
    """

    def __init__(self, setting: str, base: type, ours: Mapping[str, T]) -> None:
        self.setting, self._base = setting, base
        self._known: dict[str, T] = dict(ours)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __getitem__(self, name: str) -> T:
        """What a name stands for; ``package.module:Class`` is imported.

        Raises:
            ValueError: no such name, module or class, or one of another kind.
        """
        if name not in self._known and ":" in name and not self.plug_in(name):
            raise ValueError(f"{self.setting}={name} is no {self._base.__name__}")
        self.check_known(name)
        return self._known[name]

    def plug_in(self, name: str) -> bool:
        """Import ``package.module:Class`` and know it from now on; False if it is of another kind.

        Raises:
            ValueError: no such module or class.
        """
        found = _imported(self.setting, name)
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
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{setting}={name} cannot be imported: {error}") from None
