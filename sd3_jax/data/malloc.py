"""glibc's malloc, told to keep what is freed: records are read twice as fast for it."""

import ctypes
import functools

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of malloc.h
LARGE, KEPT = 2**25, 2**28  # bytes: of a block that is reused, and at most at the end


@functools.cache
def keep_freed() -> bool:
    """Blocks of a record's size come from the heap and stay there.

    By default each is mapped anew and given back, which the kernel fills with zeros
    page by page (benchmarks/records.md). Whether this system's malloc heeds it.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGE) and mallopt(TRIM_THRESHOLD, KEPT))
