"""Sample quality: distances between the features of generated and of real images."""

from nvae.metrics.distances import (
    METRICS,
    DistanceSettings,
    FeatureSet,
    check_possible,
    distances,
)
from nvae.metrics.extractors import FeatureExtractor, load_extractor
from nvae.metrics.generated import generated_features, image_features
from nvae.metrics.pooling import pool_features
from nvae.metrics.reference import reference_features

__all__ = [
    "METRICS",
    "DistanceSettings",
    "FeatureExtractor",
    "FeatureSet",
    "check_possible",
    "distances",
    "generated_features",
    "image_features",
    "load_extractor",
    "pool_features",
    "reference_features",
]
