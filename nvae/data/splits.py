"""Which image belongs to which split, when the source does not say."""

from torch import Tensor

from nvae.data.tables import SPLITS, TEST, TRAIN, VALID
from nvae.random import STREAM_SPLIT, permutation

TOO_FEW = "it takes at least two: one to train on, one to hold out"


def split_counts(available: dict[str, int], wanted: dict[str, int | None]) -> dict[str, int]:
    """Sizes of the three splits, given what the source has and what the config asks for.

    A split that the source lacks is drawn from its training part. Where the source has nothing
    but a training part and the config names no size, a tenth goes to validation, at least one.

    Args:
        available: images in each split of the source.
        wanted: `train_size`, `valid_size`, `test_size` of the config, None = no wish.

    Returns:
        Images in each of train, valid, test.

    Raises:
        ValueError: The source cannot give what is asked for.
    """
    have = {split: available.get(split, 0) for split in SPLITS}
    if sum(have.values()) == 1:
        raise ValueError(f"the source has one picture; {TOO_FEW}")
    counts = dict(have)
    drawn = 0
    unspecified = all(wanted.get(split) is None for split in SPLITS)
    lonely = not have[VALID] and not have[TEST]
    for split in (VALID, TEST):
        if have[split]:
            continue
        asked = wanted.get(split)
        if split == VALID and lonely and unspecified:
            asked = max(have[TRAIN] // 10, 1)
        counts[split] = asked or 0
        drawn += counts[split]
    counts[TRAIN] = have[TRAIN] - drawn
    for split in SPLITS:
        asked = wanted.get(split)
        # A source's own validation or test images may be left unused, never cut short.
        if asked == 0 and split != TRAIN:
            counts[split] = 0
        elif asked is not None and asked != counts[split]:
            raise ValueError(
                f"data.{split}_size is {asked}, but the source gives {counts[split]} (it has "
                + ", ".join(f"{n} {name}" for name, n in have.items())
                + " images)"
            )
    if counts[TRAIN] < 1:
        raise ValueError(
            f"no training images are left: the source has {have[TRAIN]}, and {drawn} are asked "
            "for validation and test"
        )
    return counts


def draw_splits(n: int, valid: int, test: int, *, seed: int) -> dict[str, Tensor]:
    """Divide n images at random; every split keeps the order of the source.

    Returns:
        Sorted int64 indices for train, valid and test, disjoint and complete.
    """
    order = permutation(n, seed=seed, epoch=0, stream=STREAM_SPLIT)
    cut = n - valid - test
    return {
        TRAIN: order[:cut].sort().values,
        VALID: order[cut : cut + valid].sort().values,
        TEST: order[cut + valid :].sort().values,
    }
