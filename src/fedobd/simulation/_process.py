"""How a process is set up in which clients are trained: torch's threads and the allocator."""

from __future__ import annotations

import ctypes

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: malloc.h
_KEPT_BYTES = 2**30
_LARGEST_KEPT_BYTES = 2**25  # DEFAULT_MMAP_THRESHOLD_MAX of 64 bits: glibc refuses more


def prepare_process() -> None:
    """Let torch use one thread, as every client does in every engine, and keep freed memory."""
    torch.set_num_threads(1)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have the C library keep up to a gigabyte that was freed; does nothing without glibc.

    Every step of training makes and drops buffers of some megabytes. By default glibc gives such
    memory back to the system and asks for it anew, and each page then costs a fault: a third of
    the time of stacked small models, and in unlucky runs as much of a convolutional network's.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
