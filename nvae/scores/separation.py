"""How well a score tells images that do not belong from those that do, and which score to trust.

Scores are higher for images that belong less. What does not belong is the positive class.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DETECTED = 0.95
"""True positive rate at which false positives are counted."""
CONFIDENCE = 0.95
"""Of the bootstrap's intervals."""

Scores = Mapping[str, NDArray[np.float64]]
"""A score of N images, ``(N,)``, by name."""


@dataclass(frozen=True)
class Interval:
    """A number, and where the bootstrap puts it with a confidence of ``CONFIDENCE``."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Separation:
    """How well one score tells two sets apart.

    Attributes:
        auroc: chance that an image that does not belong scores higher than one that does, ties
            counting half; 0.5 is a coin's, below it the score points the wrong way.
        auprc: average precision; its level for a coin is the share of images that do not belong.
        fpr95: share of the images that belong that is flagged where 95 % of the others are.
    """

    auroc: Interval
    auprc: Interval
    fpr95: Interval


def separate(
    inside: Scores, outside: Scores, *, resamples: int = 200, seed: int = 0
) -> dict[str, Separation]:
    """The separation by every score that both sets have.

    Args:
        inside: scores of N images that belong.
        outside: the same scores of M images that do not.
        resamples: of the bootstrap, which draws N of the first and M of the second with
            replacement, the same ones for every score.
        seed: of the bootstrap, any integer.

    Raises:
        ValueError: no image, a score that is not finite, or an impossible setting.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1")
    names = [name for name in inside if name in outside]
    n, m = (len(next(iter(scores.values()), ())) for scores in (inside, outside))
    if not names or not n or not m:
        raise ValueError("nothing to compare: a set has no images, or no score is of both")
    rankings = {name: _Ranking.of(inside[name], outside[name]) for name in names}
    points = {name: ranking.measures(np.ones(n + m, int)) for name, ranking in rankings.items()}
    drawn = {name: np.empty((resamples, 3)) for name in names}
    generator = np.random.default_rng(seed % 2**64)
    for i in range(resamples):
        rows, others = generator.integers(n, size=n), generator.integers(m, size=m)
        times = np.bincount(np.append(rows, n + others), minlength=n + m)
        for name, ranking in rankings.items():
            drawn[name][i] = ranking.measures(times)
    tail = (1 - CONFIDENCE) / 2
    found = {}
    for name in names:
        low, high = np.quantile(drawn[name], (tail, 1 - tail), axis=0)
        bounds = zip(points[name], low.tolist(), high.tolist(), strict=True)
        found[name] = Separation(*(Interval(*each) for each in bounds))
    return found


@dataclass(frozen=True)
class _Ranking:
    """N images that belong and M that do not, from the highest score to the lowest.

    The images are sorted once; a resample only says how often each was drawn. scikit-learn's
    functions would sort anew for every resample.

    Attributes:
        order: ``(N + M,)``, number of the image at every place; the first N belong.
        belongs_not: ``(N + M,)``, whether the image at that place does not belong.
        ends: places at which a run of equal scores ends.
    """

    order: NDArray[np.int64]
    belongs_not: NDArray[np.bool_]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, inside: NDArray[np.float64], outside: NDArray[np.float64]) -> "_Ranking":
        values = np.concatenate([inside, outside])
        if not np.isfinite(values).all():
            raise ValueError("a score holds a number that is not finite")
        order = np.argsort(-values, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
        return cls(order, order >= len(inside), ends)

    def measures(self, times: NDArray[np.int64]) -> tuple[float, ...]:
        """AUROC, average precision, and false positive rate at ``DETECTED``, of every image taken
        so many times, ``(N + M,)``."""
        drawn = times[self.order]
        tp = np.cumsum(np.where(self.belongs_not, drawn, 0))[self.ends]
        fp = np.cumsum(np.where(self.belongs_not, 0, drawn))[self.ends]
        tpr, fpr = np.append(0, tp) / tp[-1], np.append(0, fp) / fp[-1]
        auroc = np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1])) / 2
        precision = np.sum(np.diff(tpr) * tp / np.maximum(tp + fp, 1))
        return float(auroc), float(precision), float(fpr[np.argmax(tpr >= DETECTED)])


@dataclass(frozen=True)
class Advice:
    """Which score to trust.

    Attributes:
        score: its name; None: none of them.
        least_auroc: the lower end of its AUROC's interval on the set that it tells apart worst.
        misled: sets to which the model gives higher likelihood than to its own images: the whole
            interval of the negative ELBO's AUROC is below 0.5.
        text: the same for people, with what it rests on.
    """

    score: str | None
    least_auroc: float
    misled: tuple[str, ...]
    text: str


def advise(found: Mapping[str, Mapping[str, Separation]]) -> Advice:
    """The score whose AUROC is surely highest on the set where it is lowest.

    Args:
        found: what :func:`separate` gave for every set, by the set's name.
    """
    scores = [name for name in next(iter(found.values())) if all(name in s for s in found.values())]
    least = {
        score: min(separations[score].auroc.low for separations in found.values())
        for score in scores
    }
    best = max(scores, key=lambda score: least[score])
    elbo = "negative_elbo"
    misled = tuple(
        name for name, each in found.items() if elbo in each and each[elbo].auroc.high < 0.5
    )
    lines = []
    if misled:
        lines.append(
            f"the known trap: the model finds {_listed(misled)} more likely than its own images, "
            f"so do not trust {elbo} there"
        )
    sets = _listed(tuple(found))
    if least[best] > 0.5:
        lines.append(
            f"trust {best}: its AUROC is at least {least[best]:.3f} against {sets} (lower end of "
            "the bootstrap's interval)"
        )
    else:
        lines.append(f"trust no single score: none is surely better than a coin against {sets}")
    lines.append(
        "that is evidence about these sets alone, and the score was chosen by looking at them: "
        "what else does not belong may need another"
    )
    trusted = best if least[best] > 0.5 else None
    return Advice(trusted, least[best], misled, "\n".join(lines))


def _listed(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
