"""Likelihood evaluation: ELBO with its parts and the importance-weighted bound."""

from nvae.evaluation.bound import BoundSettings, Progress
from nvae.evaluation.evaluate import EvalBatch, evaluate
from nvae.evaluation.records import RecordStore
from nvae.evaluation.result import Estimate, EvaluationResult, ImportanceWeighted

__all__ = [
    "BoundSettings",
    "Estimate",
    "EvalBatch",
    "EvaluationResult",
    "ImportanceWeighted",
    "Progress",
    "RecordStore",
    "evaluate",
]
