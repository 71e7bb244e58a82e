"""Splits: their sizes, and which pictures are in them."""

import numpy as np
import pytest

from nvae.data.readers.splits import plan_splits, split_counts


def wanted(train=None, valid=None, test=None):
    return {"train": train, "valid": valid, "test": test}


@pytest.mark.parametrize(
    ("available", "asked", "counts"),
    [
        ({"train": 60, "test": 10}, wanted(), (60, 0, 10)),
        ({"train": 60, "test": 10}, wanted(50, 10, 10), (50, 10, 10)),
        ({"train": 60, "test": 10}, wanted(valid=5), (55, 5, 10)),
        ({"train": 60}, wanted(), (54, 6, 0)),
        ({"train": 60}, wanted(50, 10, 0), (50, 10, 0)),
        ({"train": 9}, wanted(), (8, 1, 0)),
        ({"train": 2}, wanted(), (1, 1, 0)),
        ({"train": 60}, wanted(valid=5, test=5), (50, 5, 5)),
        ({"train": 60, "valid": 7, "test": 3}, wanted(60, 7, 0), (60, 7, 0)),
    ],
)
def test_counts(available, asked, counts):
    assert tuple(split_counts(available, asked).values()) == counts


@pytest.mark.parametrize(
    ("available", "asked", "words"),
    [
        ({"train": 60}, wanted(60, 10), "data.train_size is 60, but the source gives 50"),
        ({"train": 60, "test": 10}, wanted(test=9), "data.test_size is 9"),
        ({"train": 10}, wanted(valid=10), "no training images are left"),
        ({"train": 1}, wanted(), "the source has one picture; it takes at least two"),
    ],
)
def test_impossible_sizes_are_one_clear_line(available, asked, words):
    with pytest.raises(ValueError, match=words):
        split_counts(available, asked)


def test_drawn_splits_are_complete_and_seeded(make_config):
    def destination(n, seed=0, **sizes):
        config = make_config(split_seed=seed, train_size=None, **sizes)
        return plan_splits({"train": n}, config).destination["train"]

    first = destination(100, valid_size=20, test_size=10)
    assert [(first == split).sum() for split in range(3)] == [70, 20, 10]
    other = destination(100, seed=1, valid_size=20, test_size=10)
    assert not np.array_equal(first, other)
    # Pinned: a changed split would silently make old and new likelihoods incomparable.
    pinned = destination(10, valid_size=2, test_size=2)
    assert np.flatnonzero(pinned == 1).tolist() == PINNED_VALID


PINNED_VALID = [4, 7]
