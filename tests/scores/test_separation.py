"""How well scores separate, against cases worked out by hand."""

import numpy as np
import pytest
from sklearn.metrics import auc, average_precision_score, roc_curve

from nvae.scores import advise, separate

INSIDE = {"a": np.array([1.0, 2, 3, 4])}
OUTSIDE = {"a": np.array([3.5, 5, 6])}


def test_a_small_case_by_hand():
    found = separate(INSIDE, OUTSIDE)["a"]
    assert found.auroc.value == pytest.approx(11 / 12)  # 4 alone scores above 3.5
    assert found.auprc.value == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert found.fpr95.value == pytest.approx(1 / 4)  # all three are found at 3.5, and so is 4


def _scikit_learns(inside, outside):
    belongs_not = np.repeat([0, 1], [len(inside), len(outside)])
    values = np.concatenate([inside, outside])
    fpr, tpr, _ = roc_curve(belongs_not, values, drop_intermediate=False)
    precision = average_precision_score(belongs_not, values)
    return auc(fpr, tpr), precision, fpr[np.argmax(tpr >= 0.95)]


@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_numbers_are_scikit_learns(levels):
    """With few ties and with many, of the images and of every resample."""
    generator = np.random.default_rng(levels)
    inside, outside = (
        generator.integers(low, levels + low, n) / 7.0 for low, n in ((0, 60), (1, 41))
    )
    found = separate({"a": inside}, {"a": outside}, resamples=20, seed=3)["a"]
    drawn, generator = [], np.random.default_rng(3)
    for _ in range(20):
        rows, others = generator.integers(60, size=60), generator.integers(41, size=41)
        drawn.append(_scikit_learns(inside[rows], outside[others]))
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    each = found.auroc, found.auprc, found.fpr95
    assert [one.value for one in each] == pytest.approx(_scikit_learns(inside, outside), abs=1e-12)
    assert [one.low for one in each] == pytest.approx(low, abs=1e-12)
    assert [one.high for one in each] == pytest.approx(high, abs=1e-12)


def test_higher_scores_mean_that_an_image_belongs_less():
    found = separate(OUTSIDE, INSIDE)["a"]
    assert found.auroc.value == pytest.approx(1 / 12)


def test_equal_scores_are_a_coin():
    found = separate({"a": np.zeros(30)}, {"a": np.zeros(10)})["a"]
    assert found.auroc.value == 0.5
    assert found.auprc.value == pytest.approx(10 / 40)
    assert found.fpr95.value == 1


def test_intervals_hold_the_value_shrink_with_images_and_are_seeded():
    def of(n, seed=0):
        generator = np.random.default_rng(7)
        inside, outside = generator.normal(size=n), generator.normal(1, size=n)
        return separate({"a": inside}, {"a": outside}, resamples=100, seed=seed)["a"].auroc

    few, many = of(40), of(1000)
    assert few.low < few.value < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert 0.7 < many.low < many.high < 0.82  # of two Normals one sigma apart: 0.76
    assert of(40) == few
    assert of(40, seed=1) != few
    assert of(40, seed=-1) != few


def test_a_score_that_separates_in_every_resample_is_surely_good():
    found = separate({"a": np.arange(9.0)}, {"a": np.arange(10.0, 20)})["a"]
    assert (found.auroc.low, found.auroc.high, found.fpr95.high) == (1, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({"a": np.zeros(0)}, OUTSIDE), "nothing to compare"),
        ((INSIDE, {"b": np.zeros(2)}), "nothing to compare"),
        ((INSIDE, {"a": np.array([1, np.nan])}), "not finite"),
    ],
)
def test_nothing_to_compare_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        separate(*arguments)
    with pytest.raises(ValueError, match="at least 1"):
        separate(INSIDE, OUTSIDE, resamples=0)


def _sets(**means):
    """Scores of 200 images, around 0 inside, and around these means in each set."""
    generator = np.random.default_rng(0)
    inside = {name: generator.normal(size=200) for name in means}
    found = {}
    for number in range(len(next(iter(means.values())))):
        outside = {name: generator.normal(each[number], size=200) for name, each in means.items()}
        found[f"set{number}"] = separate(inside, outside, resamples=50)
    return found


def test_the_trap_is_told_and_another_score_advised():
    advice = advise(_sets(negative_elbo=[-3, 4], llr_1=[2, 2]))
    assert advice.score == "llr_1"
    assert advice.misled == ("set0",)
    assert "finds set0 more likely than its own images" in advice.text
    assert "trust llr_1" in advice.text
    assert advice.least_auroc > 0.85


def test_the_worst_set_decides():
    """One that is perfect on a set and useless on the other is no score to trust."""
    assert advise(_sets(llr_1=[9, 0], llr_2=[1, 1])).score == "llr_2"


def test_no_score_may_be_good_enough():
    advice = advise(_sets(negative_elbo=[0], llr_1=[-1]))
    assert advice.score is None
    assert advice.misled == ()
    assert "trust no single score" in advice.text
