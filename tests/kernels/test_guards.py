"""Builds `guards.cpp`, every array of which lies between pages that may not be touched, and runs it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from capibara.kernels import library

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "capibara" / "kernels" / "src"
COMPILER = shutil.which("c++")
CASES = 15  # that `main` calls in a round
FLAGS = {"baseline": [], "avx2": ["-mavx2", "-mfma"]}
FLAGS["avx512"] = [*FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS["avx512bf16"] = [*FLAGS["avx512"], "-mavx512bf16"]
CHECKED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")


def run_guards(tmp_path: Path, name: str, flags: tuple[str, ...], rounds: int) -> None:
    program = tmp_path / "guards"
    sources = [f"-I{SOURCES}", HERE / "guards.cpp", "-o", program]
    defined = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-DCAPIBARA_ISA=capibara_guarded"]
    subprocess.run([COMPILER, *defined, *FLAGS[name], *flags, *sources], check=True)
    done = subprocess.run([program, str(rounds)], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout == f"{CASES * rounds} cases passed\n"


needs_compiler = pytest.mark.skipif(not COMPILER or not SOURCES.is_dir(), reason="needs a C++ compiler and the sources")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", library.instruction_sets() or ["baseline"])
def test_no_kernel_leaves_its_arrays(tmp_path: Path, name: str):
    """Every kernel, float32 and bfloat16, as they are built to be used."""
    run_guards(tmp_path, name, ("-O3", "-fno-math-errno"), 40)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", sorted({*library.instruction_sets()[:1], "baseline"}))
def test_no_kernel_leaves_its_own_memory_or_defined_behaviour(tmp_path: Path, name: str):
    """Scratch memory and the stack too: what a guard page cannot see."""
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    if subprocess.run([COMPILER, *CHECKED, tmp_path / "empty.cpp", "-o", tmp_path / "empty"]).returncode:
        pytest.skip("this compiler comes without its sanitizers")
    run_guards(tmp_path, name, (*CHECKED, "-O1"), 8)
