"""What is set per process: allocator thresholds before JAX starts, and when a Ctrl-C may arrive.

XLA on CPU allocates its outputs anew at every execution; glibc maps large ones afresh each time, and the page faults
cost about a tenth of a training step of a model 384 wide, nothing of a tiny one. Keeping the memory in the heap removes
them (`benchmarks/allocator.py`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1


def tune_allocator() -> bool:
    """Sets glibc's malloc to one arena that keeps large blocks; call it before the first use of JAX.

    Our command and workers call it. A library must not change its host's malloc silently, so `import capibara` does
    not. The process keeps its peak memory until it ends, and all threads share one arena's lock.

    Returns:
      True where it was set; False elsewhere than on Linux with glibc, or where `CAPIBARA_ALLOCATOR=0` forbids it.
    """
    if not sys.platform.startswith("linux") or os.environ.get("CAPIBARA_ALLOCATOR") == "0":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    largest = 2**31 - 1
    settings = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, largest), (_TRIM_THRESHOLD, largest))
    return all(mallopt(option, value) == 1 for option, value in settings)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_process() -> None:
    """What our own command and workers do before JAX starts: tunes the allocator, and keeps log noise of XLA away."""
    tune_allocator()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Lets a Ctrl-C take effect only when the block has ended well.

    For a commit, which should not be left half done, and for importing compiled modules, some of which abort the
    process when they are interrupted. Does nothing outside the main thread, or where nobody handles interrupts.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    arrived: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if arrived:
        handler(*arrived[0])
