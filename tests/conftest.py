"""What holds in every test: JAX on the CPU, no settings of ours from outside, strict promotion where we do the maths.

`CAPIBARA_DATA` may name a folder of further real text; without it the tests that use it skip.
`CAPIBARA_SPEC` may name the specification; see tests/spec/.
`CAPIBARA_KERNELS` may force an instruction set of the native kernels, or turn them off with 0.
"""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import threadpoolctl

TESTS = Path(__file__).parent
KEPT = ("CAPIBARA_DATA", "CAPIBARA_SPEC", "CAPIBARA_KERNELS")
STRICT = ("consensus", "core")
"""Folders of tests under strict dtype promotion. Not the others: optax 0.2.8 raises a float to an integer power
(`optax.tree.bias_correction`), which strict promotion refuses."""

COMPILED = {
    "JAX_COMPILATION_CACHE_DIR": str(TESTS.parent / ".pytest_cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""Compiled programs are kept: between subprocesses, workers and runs. Most of the tests' time is compilation (a second
run of tests/core takes 0.4 of the first)."""

# Before anything imports JAX; subprocesses inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for name, value in COMPILED.items():
    os.environ.setdefault(name, value)

hypothesis.settings.register_profile("capibara", derandomize=True, deadline=None)
hypothesis.settings.load_profile("capibara")


def pytest_configure(config: pytest.Config) -> None:
    """One thread for NumPy's BLAS; a kept program that cannot be read (a worker may be writing it) is compiled again.

    A worker a core keeps the machine busy: OpenBLAS threads that wait for each other made small solves 50 times slower.
    The variable OPENBLAS_NUM_THREADS would come too late, after the plugin of jaxtyping has imported NumPy.
    """
    threadpoolctl.threadpool_limits(1, user_api="blas")
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes every CAPIBARA_* variable of the caller, which would override configurations."""
    for name in list(os.environ):
        if name.startswith("CAPIBARA_") and name not in KEPT:
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest):
    """A float32 that silently becomes float64, or an int that becomes a float, fails the tests of our own maths."""
    folders = request.path.relative_to(TESTS).parts
    if folders[0] not in STRICT:
        yield
        return
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of further real text."""
    folder = os.environ.get("CAPIBARA_DATA")
    if not folder:
        pytest.skip("CAPIBARA_DATA names no folder of further text")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"CAPIBARA_DATA names {folder!r}, which is no folder")
    return path
