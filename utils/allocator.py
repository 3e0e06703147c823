"""How the C library keeps memory."""

import ctypes

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Lets glibc keep blocks of up to 32 MiB that are freed, instead of handing them back to the system.

    Tensors as large as a network's weights come and go at every step, and pages that the system hands out again have
    to be cleared first: a tenth of the time of look-ahead steps on images. Does nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, (2 << 30) - 1)
    mallopt(_M_TOP_PAD, 64 << 20)
