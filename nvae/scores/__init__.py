"""Scores: which images do not belong, by what a trained model makes of each."""

from nvae.scores.scoring import ScoreRecords, ScoreSettings, log_likelihood_maps, score
from nvae.scores.separation import Advice, Interval, Separation, advise, separate
from nvae.scores.synthetic import Synthetic
from nvae.scores.table import Reference, image_columns, score_columns, write_table

__all__ = [
    "Advice",
    "Interval",
    "Reference",
    "ScoreRecords",
    "ScoreSettings",
    "Separation",
    "Synthetic",
    "advise",
    "image_columns",
    "log_likelihood_maps",
    "score",
    "score_columns",
    "separate",
    "write_table",
]
