"""Memory that is kept on purpose, and memory that is not: pages of the heap, compiled matrix products."""

from __future__ import annotations

import ctypes
import os
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


def few_products(kept: int = 64) -> None:
    """Let oneDNN keep this many compiled matrix products, unless the user has said how many.

    It compiles one for every shape, in bfloat16 at about half a megabyte, and by default keeps 1,024 of them; with rows
    of many lengths that is more than the model. A step of training uses a few dozen. Only in time before the first
    product of the process.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(kept))
