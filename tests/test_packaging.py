"""The wheel holds what the source tree holds, and works away from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_wheel_is_complete_and_works_elsewhere(tmp_path: Path):
    """Built by pip in an environment of its own, unpacked in an empty folder and used from there."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("capibara-*.whl")
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
