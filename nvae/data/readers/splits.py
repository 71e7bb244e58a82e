"""Which picture goes to which split: as the source says, or drawn from its training part."""

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvae.data.config import SPLITS, TEST, TRAIN, VALID, DataConfig, DataError
from nvae.random import STREAM_SPLIT, permutation

TOO_FEW = "it takes at least two: one to train on, one to hold out"


def split_of_word(word: str) -> str | None:
    """The split that a folder's or file's name starts with: train_32x32 is training, trainer is
    not; None if it names none."""
    match = re.match(r"(train|val|valid|validation|test)(?![a-z])", word, re.IGNORECASE)
    return {"train": TRAIN, "test": TEST}.get(match[1].lower(), VALID) if match else None


def group_by_split(names: list[str]) -> dict[str, list[int]]:
    """Assign relative paths to splits by the first folder that names one.

    Only where every path says its split does the source have splits; a class folder that happens
    to be called "test" beside others changes nothing.

    Returns:
        Positions in `names` by split; all under `train` where the source has no splits.
    """
    groups: dict[str | None, list[int]] = {}
    for position, name in enumerate(names):
        words = map(split_of_word, name.split("/")[:-1])
        groups.setdefault(next(filter(None, words), None), []).append(position)
    if None in groups or TRAIN not in groups:
        return {TRAIN: list(range(len(names)))}
    return {split: rows for split, rows in groups.items() if split is not None}


class Plan(NamedTuple):
    """Which picture of which part of a source goes to which split.

    Attributes:
        counts: pictures by split, before unreadable ones are left out.
        destination: for each part, the number in `SPLITS` of every picture, -1 for none.
        rule: the same in words.
    """

    counts: dict[str, int]
    destination: dict[str, NDArray[np.int8]]
    rule: str


def plan_splits(available: dict[str, int], config: DataConfig) -> Plan:
    """Decide the splits, given how many pictures each part of the source has.

    A split that the source lacks is drawn from its training part; every split keeps the order of
    the source.

    Raises:
        DataError: The source cannot give the sizes that the config asks for.
    """
    counts = split_counts(available, {split: getattr(config, f"{split}_size") for split in SPLITS})
    drawn = {split: 0 if split in available else counts[split] for split in (VALID, TEST)}
    destination = {
        split: np.full(count, SPLITS.index(split) if counts[split] else -1, dtype=np.int8)
        for split, count in available.items()
    }
    if not any(drawn.values()):
        return Plan(counts, destination, "as in the source")
    order = permutation(available[TRAIN], seed=config.split_seed, epoch=0, stream=STREAM_SPLIT)
    valid, test = drawn.values()
    rows = order[len(order) - valid - test :].numpy()
    destination[TRAIN][rows[:valid]] = SPLITS.index(VALID)
    destination[TRAIN][rows[valid:]] = SPLITS.index(TEST)
    names = " and ".join(split for split, count in drawn.items() if count)
    rule = f"{names} drawn from the source's training part (draw_splits, version 1, seed "
    return Plan(counts, destination, f"{rule}{config.split_seed})")


def split_counts(available: dict[str, int], wanted: dict[str, int | None]) -> dict[str, int]:
    """Sizes of the three splits, given what the source has and what the config asks for.

    Where the source has nothing but a training part and the config names no size, a tenth goes to
    validation, at least one.

    Args:
        available: images in each split of the source.
        wanted: `train_size`, `valid_size`, `test_size` of the config, None = no wish.

    Raises:
        DataError: The source cannot give what is asked for.
    """
    have = {split: available.get(split, 0) for split in SPLITS}
    if sum(have.values()) == 1:
        raise DataError(f"the source has one picture; {TOO_FEW}")
    counts = dict(have)
    if all(wanted[split] is None for split in SPLITS) and not have[VALID] and not have[TEST]:
        counts[VALID] = max(have[TRAIN] // 10, 1)
    else:
        counts |= {split: wanted[split] or 0 for split in (VALID, TEST) if not have[split]}
    counts[TRAIN] = sum(have.values()) - counts[VALID] - counts[TEST]
    for split in SPLITS:
        asked = wanted[split]
        # A source's own validation or test images may be left unused, never cut short.
        if asked == 0 and split != TRAIN:
            counts[split] = 0
        elif asked is not None and asked != counts[split]:
            images = ", ".join(f"{count} {name}" for name, count in have.items())
            raise DataError(
                f"data.{split}_size is {asked}, but the source gives {counts[split]} (it has "
                f"{images} images)"
            )
    if counts[TRAIN] < 1:
        raise DataError(
            f"no training images are left: the source has {have[TRAIN]}, and "
            f"{have[TRAIN] - counts[TRAIN]} are asked for validation and test"
        )
    return counts
