"""Scores by name, and one row an image on disk."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvae.files import replacing
from nvae.scores.scoring import ScoreRecords

Columns = dict[str, NDArray[Any]]
"""``(N,)`` each, by name."""


@dataclass(frozen=True)
class Reference:
    """What is typical of a model's own images (Nalisnick et al. 2019, "Detecting
    out-of-distribution inputs to deep generative models using typicality").

    Attributes:
        entropy: mean negative ELBO of images that the model was trained on, nats.
        images: number of images that the mean is taken over.
        data: name of the data set that they are from.
        split: name of the split that they are from.
    """

    entropy: float
    images: int
    data: str
    split: str

    def of(self, negative_elbo: NDArray[np.float64]) -> NDArray[np.float64]:
        """Distance to the entropy, ``(N,)``, nats: what is too likely is not typical either."""
        return np.abs(negative_elbo - self.entropy)


def score_columns(
    records: ScoreRecords, importance_samples: Sequence[int], reference: Reference | None = None
) -> Columns:
    """The scores, all in nats; higher means that an image belongs less.

    Args:
        records: N images.
        importance_samples: values of K, ascending, in the order of the records' columns.
        reference: for the typicality; None: without.

    Returns:
        ``negative_elbo``, its parts ``reconstruction`` and ``kl``, ``nll_K`` for every K,
        ``typicality``, and ``llr_k`` for k = 1 .. G, the number of finest groups from the prior.
    """
    columns = {
        "negative_elbo": records.negative_elbo,
        "reconstruction": records.reconstruction,
        "kl": records.kl_per_channel.sum((1, 2)),
    }
    for column, samples in enumerate(importance_samples):
        columns[f"nll_{samples}"] = -records.log_evidence[:, column]
    if reference is not None:
        columns["typicality"] = reference.of(columns["negative_elbo"])
    ratios = records.ratios
    return columns | {f"llr_{k}": ratios[:, k - 1] for k in range(1, ratios.shape[1] + 1)}


def image_columns(
    records: ScoreRecords, importance_samples: Sequence[int], scores: Mapping[str, NDArray[Any]],
    names: Sequence[str] | None = None, labels: Sequence[str] | None = None,
) -> Columns:  # fmt: skip
    """All that is known of every image.

    Args:
        records: N images.
        importance_samples: as in :func:`score_columns`.
        scores: of that function.
        names: the images' files by index, if known.
        labels: the images' classes by index, if known.

    Returns:
        ``index``, ``file``, ``label``, the scores, ``kl_g`` of group g, coarsest first, and
        ``effective_samples_K``.
    """
    columns: Columns = {"index": records.index}
    for name, known in (("file", names), ("label", labels)):
        if known is not None:
            # as objects: a column of numpy's own text is as wide as its longest entry
            columns[name] = np.array([known[i] for i in records.index], dtype=object)
    columns |= scores
    groups = records.kl_per_group
    columns |= {f"kl_{g}": groups[:, g] for g in range(groups.shape[1])}
    for column, samples in enumerate(importance_samples):
        columns[f"effective_samples_{samples}"] = records.effective_samples[:, column]
    return columns


def table_files(csv_file: Path) -> list[Path]:
    """What :func:`write_table` writes: CSV, and Parquet where pyarrow is installed."""
    return [csv_file, *([csv_file.with_suffix(".parquet")] if find_spec("pyarrow") else [])]


def write_table(csv_file: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """One row an image, with all digits; each file is written whole or not at all."""
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    with (
        replacing(csv_file) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    for path in table_files(csv_file)[1:]:
        import pyarrow as pa
        from pyarrow import parquet

        with replacing(path) as temporary:
            parquet.write_table(pa.table(dict(columns)), temporary)
