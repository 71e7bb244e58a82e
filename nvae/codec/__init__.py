"""Lossless compression by bits-back coding: the negative ELBO as a file's size."""

from nvae.codec.codec import Codec
from nvae.codec.container import ArchiveError

__all__ = ["ArchiveError", "Codec"]
