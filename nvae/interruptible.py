"""What Ctrl-C does to a command."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C in the block becomes one line and exit code 130, the shell's for this signal."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        raise SystemExit(130) from None
