"""Kernels do not change training: at the states of a run, gradients are as near to float64's as those of plain JAX."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_steps import KEPT, load

from capibara.kernels.library import instruction_sets

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("training_steps.py")

WORSE = 1.25
"""Two roundings of the same size differ in luck; a kernel that lost digits would lose a factor of two and more."""


def run(*arguments: str | Path, kernels: str = "") -> None:
    variables = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])} | ({"CAPIBARA_KERNELS": kernels} if kernels else {})
    subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], check=True, env=variables)


@pytest.mark.skipif(not instruction_sets(), reason="the native kernels were not built, or are turned off")
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_gradients_along_a_run_are_as_exact_as_those_of_plain_jax(dtype: str, tmp_path: Path):
    states, exact = tmp_path / "states.npz", tmp_path / "exact.npz"
    run("train", dtype, states)
    run("exact", states, exact)
    wanted = load(str(exact))
    errors = {}
    for kernels in (*instruction_sets(), "0"):
        run("gradients", dtype, states, tmp_path / "found.npz", kernels=kernels)
        found = load(str(tmp_path / "found.npz"))
        errors[kernels] = [
            np.sqrt(sum(np.sum(np.square(found[i][name] - wanted[i][name])) for name in wanted[i])) for i in range(KEPT)
        ]
    norms = [np.sqrt(sum(np.sum(np.square(leaf)) for leaf in state.values())) for state in wanted]
    plain = np.array(errors.pop("0"))
    assert (plain <= np.array(norms) * {"float32": 1e-5, "bfloat16": 5e-2}[dtype]).all()
    for kernels, found in errors.items():
        assert (np.array(found) <= WORSE * plain).all(), (kernels, found, plain.tolist())
