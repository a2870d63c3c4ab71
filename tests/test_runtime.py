"""The allocator thresholds: what they change, and that only who asks for them gets them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from capibara.runtime import tune_allocator

GLIBC = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"

PROBE = """
import ctypes, resource, sys
import capibara, capibara.runtime
tuned = capibara.runtime.tune_allocator() if {tune} else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def once():
    block = libc.malloc({size})
    libc.memset(block, 1, {size})
    libc.free(block)

once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
once()
print(tuned, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
SIZE = 96 * 2**20
PAGES = SIZE // 4096


def probe(*, tune: bool, **environment: str) -> tuple[str, int]:
    """What tuning answered, and the page faults of a large block that is allocated for the second time."""
    code = PROBE.format(tune=tune, size=SIZE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    answer, faults = done.stdout.split()
    return answer, int(faults)


@pytest.mark.skipif(not GLIBC, reason="glibc's malloc")
def test_a_large_block_is_not_mapped_afresh_after_tuning():
    """Without tuning each of its pages (or huge pages, where the kernel makes them so) faults again."""
    answer, faults = probe(tune=True)
    assert answer == "True"
    assert faults < 10
    _, untuned = probe(tune=False)
    assert untuned >= min(PAGES, SIZE // 2**21), "importing capibara alone must not change its host's malloc"


@pytest.mark.skipif(not GLIBC, reason="glibc's malloc")
def test_the_environment_forbids_it():
    answer, faults = probe(tune=True, CAPIBARA_ALLOCATOR="0")
    assert answer == "False"
    assert faults >= SIZE // 2**21


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch, system: str):
    monkeypatch.setattr(sys, "platform", system)
    assert tune_allocator() is False


def test_a_libc_without_mallopt_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert tune_allocator() is False


def test_our_process_keeps_what_the_user_set():
    code = (
        "import os; from capibara.runtime import prepare_process; prepare_process(); "
        "print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    )
    for environment, expected in (({}, "2"), ({"TF_CPP_MIN_LOG_LEVEL": "0"}, "0")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.strip() == expected
