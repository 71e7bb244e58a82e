"""Class labels: what a source says of its pictures, and how classes are numbered."""

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvae.data.config import DataError

Label = int | str
"""What a source calls a class."""

MOST_CLASSES = 1 << 20
_MOST_CHARACTERS = 200


class Labeled(NamedTuple):
    """A picture and the class that its source puts it in.

    Attributes:
        picture: encoded bytes, an array (H, W, C) of numbers, or a PIL image.
        label: None where the source does not say.
    """

    picture: bytes | NDArray[Any] | Image.Image
    label: Label | None = None


def label_of(value: Any) -> Label | None:
    """A label as sources give it: a whole number or a text, of any library; None: neither."""
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        value = value.item()  # of a numpy array or scalar
    elif hasattr(value, "numel") and value.numel() == 1:
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return value if isinstance(value, int | str) else None


def class_names(labels: Sequence[Label]) -> list[Label]:
    """Labels in the order of their classes: whole numbers by value, everything else by name."""
    if all(isinstance(each, int) or _is_number(each) for each in labels):
        return sorted(labels, key=int)
    return sorted(labels, key=str)


def _is_number(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 20


class LabelTable:
    """The labels of all splits while they are read, numbered when all classes are known.

    Args:
        wanted: `data.labels`.
        names: for each part of the source, the names of its classes by number, where it has them.
    """

    def __init__(self, wanted: bool | str, names: Sequence[Sequence[str] | None]) -> None:
        self._wanted = wanted
        self._names = next((list(each) for each in names if each), None)
        self._numbers: dict[Label, int] = {}
        self._of_split: dict[str, array[int]] = {}
        self._is_on = wanted is not False
        self._has_labels = False
        self._first_fault: str | None = None

    def add(self, split: str, label: Label | None, name: str) -> None:
        """Note the label of the next picture of a split.

        Raises:
            DataError: There is none, or a bad one, and labels are needed.
        """
        self._has_labels |= label is not None
        if not self._is_on:
            return
        if reason := self._fault(label):
            if self._wanted is True:
                raise DataError(f"{name} {reason}, and data.labels=true needs one of every picture")
            self._is_on, self._first_fault = False, f"{name} {reason}"
            return
        assert label is not None
        number = self._numbers.setdefault(label, len(self._numbers))
        self._of_split.setdefault(split, array("q")).append(number)

    def _fault(self, label: Label | None) -> str | None:
        if label is None:
            return "has no label"
        if isinstance(label, str) and len(label) > _MOST_CHARACTERS:
            return f"has a label of {len(label)} characters"
        if label not in self._numbers and len(self._numbers) >= MOST_CLASSES:
            return f"has a label beyond {MOST_CLASSES} classes"
        is_number = self._names is not None and isinstance(label, int)
        if is_number and not 0 <= int(label) < len(self._names or ()):
            return f"has the label {label}, and there are {len(self._names or ())} classes"
        return None

    @property
    def why_lost(self) -> str | None:
        """The first picture that keeps the labels of the others from being kept, and why; None
        where they are kept, are not wanted, or where there are none."""
        return self._first_fault if self._has_labels else None

    def finish(self) -> tuple[list[str], dict[str, NDArray[np.int64]]]:
        """The classes' names, and each split's class numbers, (N,); nothing where not all have one.

        Where labels are only kept if they are there, one class alone is no class.

        Raises:
            DataError: Labels are needed, and all pictures are of one class.
        """
        if not self._is_on or not self._numbers:
            return [], {}
        if self._names is not None and all(isinstance(label, int) for label in self._numbers):
            names = self._names
            order = {number: int(label) for label, number in self._numbers.items()}
        else:
            found = class_names(list(self._numbers))
            names = [str(label) for label in found]
            order = {self._numbers[label]: position for position, label in enumerate(found)}
        if len(names) < 2:
            if self._wanted is True:
                raise DataError(
                    f"all pictures are of one class, {names[0]!r}: labels need two at least; "
                    "set data.labels=false"
                )
            return [], {}
        table = np.array([order[number] for number in range(len(order))], np.int64)
        return names, {
            split: table[np.asarray(numbers, np.int64)] for split, numbers in self._of_split.items()
        }
