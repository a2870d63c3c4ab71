"""What holds in every test: JAX on the CPU, no settings of ours from outside, strict promotion where we do the maths.

`CAPIBARA_DATA` may name a folder of further real text; without it the tests that use it skip.
`CAPIBARA_SPEC` may name the specification; see tests/spec/.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports JAX; subprocesses inherit it

KEPT = ("CAPIBARA_DATA", "CAPIBARA_SPEC")
STRICT = ("consensus", "core")
"""Folders of tests under strict dtype promotion. Not the others: optax 0.2.8 raises a float to an integer power
(`optax.tree.bias_correction`), which strict promotion refuses."""


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes every CAPIBARA_* variable of the caller, which would override configurations."""
    for name in list(os.environ):
        if name.startswith("CAPIBARA_") and name not in KEPT:
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest):
    """A float32 that silently becomes float64, or an int that becomes a float, fails the tests of our own maths."""
    folders = request.path.relative_to(Path(__file__).parent).parts
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
