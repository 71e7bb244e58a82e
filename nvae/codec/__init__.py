"""Lossless compression by bits-back coding: the negative ELBO as a file's size."""

from typing import Any

__all__ = ["ArchiveError", "Codec"]


def __getattr__(name: str) -> Any:
    """Import what is asked for at its first use: `python -m nvae.codec` begins here, and Ctrl-C
    during the seconds that torch takes is one line there."""
    if name == "Codec":
        from nvae.codec.codec import Codec

        return Codec
    if name == "ArchiveError":
        from nvae.codec.container import ArchiveError

        return ArchiveError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
