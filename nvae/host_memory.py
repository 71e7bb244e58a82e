"""Keep freed memory inside the process, for work on the CPU.

A step allocates and frees hundreds of megabytes of activations. glibc hands large free blocks
back to the kernel at once, and the next allocation faults every page in again: about a fifth of a
training step's time on the CPU. The process then keeps the peak of what it used, which training
reaches in every step anyway.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_LARGEST = 1 << 30
_LARGEST_OF_OLD_GLIBC = 1 << 25


def keep_freed_memory() -> bool:
    """Tell the allocator; True where it listens (Linux with glibc), False elsewhere."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    blocks = mallopt(_M_MMAP_THRESHOLD, _LARGEST) or mallopt(
        _M_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC
    )
    kept = mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 1 << 26)
    return bool(blocks and kept)
