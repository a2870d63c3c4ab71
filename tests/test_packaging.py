"""The source distribution makes a wheel that holds what the source tree holds, and works away from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in two steps, each by pip in an environment of its own: tree → source distribution → wheel."""
    place = tmp_path_factory.mktemp("packages")
    subprocess.run([*PIP, "install", "--target", place / "backend", "scikit-build-core>=1.0"], check=True)
    code = "import sys, scikit_build_core.build as backend; backend.build_sdist(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": str(place / "backend")}
    subprocess.run([sys.executable, "-P", "-c", code, place], check=True, cwd=ROOT, env=environment)
    (source,) = place.glob("capibara-*.tar.gz")
    subprocess.run([*PIP, "wheel", "--no-deps", "-w", place, source], check=True)
    (found,) = place.glob("capibara-*.whl")
    return found


def test_the_wheel_is_complete_and_works_elsewhere(wheel: Path, tmp_path: Path):
    """Unpacked in an empty folder and used from there."""
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    sources = (path for path in (ROOT / "capibara").rglob("*") if path.suffix in (".py", ".toml", ".typed"))
    wanted = {path.relative_to(ROOT) for path in sources}
    found = {path.relative_to(unpacked) for path in (unpacked / "capibara").rglob("*") if path.is_file()}
    natives = {path for path in found if path.suffix == ".so"}
    assert found - natives == wanted
    assert bool(natives) == (shutil.which("c++") is not None)
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import capibara\n"
        "from capibara.core.config import ModularConfig\n"
        "assert capibara.__file__.startswith(sys.argv[1]), capibara.__file__\n"
        "ModularConfig.preset('tiny-cpu')\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(unpacked)], check=True, cwd=unpacked)


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_the_installed_wheel_passes_the_tests_of_the_kernels(wheel: Path, tmp_path: Path):
    """In a new environment that sees the packages of this one, but no source tree: .pth files in what a .pth file names
    are not followed. The tests are copied away too, and the module must be the installed one."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    libraries = tmp_path / "env" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (libraries / "around.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", "--ignore-installed", wheel], check=True)
    shutil.copytree(ROOT / "tests" / "kernels", tmp_path / "tests" / "kernels")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "kernels" / "test_installed.py").write_text(
        "from capibara.kernels import library\n\n\n"
        "def test_the_installed_module_is_tested():\n"
        f"    assert library.library().__file__.startswith({str(libraries)!r})\n"
    )
    ours = ("PYTHONPATH", "CAPIBARA_KERNELS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = [python, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-m", "not slow", "tests/kernels"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "not built" not in done.stdout, done.stdout[-1000:]
