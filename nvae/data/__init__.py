"""Data sets: preparation, loading, and the way from uint8 pixels to the model's input."""

from nvae.data.config import DataConfig

__all__ = ["DataConfig"]
