"""Finds the native module, chooses its instruction set, and tells XLA of its handlers, all at the first use.

The variable CAPIBARA_KERNELS names a set (`avx512`, `avx2`, `baseline`, …), or is 0: no native kernels. Sets differ in
the last bits of their results.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from functools import lru_cache
from types import ModuleType

from capibara.errors import ConfigError, unknown_name

VARIABLE = "CAPIBARA_KERNELS"
MODULE = "capibara.kernels._native"
COST = "attention takes several times as long, and memory that grows with the square of the length"

_LOCK = threading.RLock()


def native() -> bool:
    """Whether jitted code on the CPU may call the native kernels; the first call registers their handlers with XLA.

    Raises:
      ConfigError: If CAPIBARA_KERNELS names a set that this machine or build does not have.
    """
    with _LOCK:
        return _registered()


def library() -> ModuleType | None:
    """The native module, or None where it was not built or is turned off; logs one line where it was not built.

    Raises:
      ConfigError: If CAPIBARA_KERNELS names a set that this machine or build does not have.
    """
    with _LOCK:
        found, problem = _loaded()
        if problem:
            _say_once(problem)
        return found


def instruction_set() -> str | None:
    """The name of the set that runs, or None without native kernels."""
    found = library()
    return found.current() if found else None


def instruction_sets() -> tuple[str, ...]:
    """The sets that were built and that this machine runs, best first."""
    found = library()
    return found.sets() if found else ()


def use(name: str) -> None:
    """Makes a set run from now on, in programs that are compiled already too.

    Raises:
      ConfigError: If this machine or build does not have it.
    """
    found = library()
    if found is None or not found.choose(name):
        known = found.sets() if found else ()
        raise ConfigError(f"{unknown_name('instruction set', name, known)} This machine and build have no other.")


@lru_cache(1)
def _loaded() -> tuple[ModuleType | None, str]:
    """The module with its set chosen, and what is wrong where there is none."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "0":
        return None, ""
    try:
        found = importlib.import_module(MODULE)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == MODULE
        problem = "are not built (install a C++ compiler and reinstall)" if absent else f"cannot be loaded ({error})"
        if wanted:
            raise ConfigError(f"{VARIABLE}={wanted}, but the native kernels {problem}; 0 goes on without.") from error
        return None, problem
    if wanted and not found.choose(wanted):
        known = unknown_name("instruction set", wanted, (*found.sets(), "0"))
        raise ConfigError(f"{VARIABLE}={wanted}: {known} This machine and build have no other; 0 turns kernels off.")
    return found, ""


@lru_cache(1)
def _registered() -> bool:
    found = library()
    if found is None:
        return False
    import jax

    for name, capsule in found.targets().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return True


@lru_cache(1)
def _say_once(problem: str) -> None:
    logging.getLogger("capibara.kernels").warning("The native kernels %s: %s.", problem, COST)
