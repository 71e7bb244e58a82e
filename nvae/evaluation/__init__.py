"""Evaluation: likelihood of a data split, and the quality of samples.

The likelihood's names are here; quality is in :mod:`~nvae.evaluation.extractors` (images to
features), :mod:`~nvae.evaluation.features` (features of samples and of data) and
:mod:`~nvae.evaluation.distances` (FID and its relatives).
"""

from nvae.evaluation.likelihood import BoundSettings, Progress, evaluate
from nvae.evaluation.records import RecordStore
from nvae.evaluation.result import Estimate, EvaluationResult, ImportanceWeighted

__all__ = [
    "BoundSettings",
    "Estimate",
    "EvaluationResult",
    "ImportanceWeighted",
    "Progress",
    "RecordStore",
    "evaluate",
]
