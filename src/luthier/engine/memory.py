"""The allocator keeps its pages: large temporaries are then not zeroed and mapped afresh in every step."""

from __future__ import annotations

import ctypes
import platform
import sys

# Parameter numbers of glibc's mallopt (malloc.h) and the largest value its int argument takes.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def keep_pages() -> bool:
    """Let glibc serve blocks of up to 2 GiB from its heap, and never give the heap's top back to the system.

    By default every block above 32 MiB (logits, gradients of an embedding) is mapped anew and its pages are zeroed by
    the kernel at the first touch. Freed memory is reused, so the peak stays; what the process holds does not shrink.

    Returns:
        Whether it was applied: only on Linux with glibc.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    applied = [libc.mallopt(name, _LARGEST) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
    return all(applied)
