"""Kills a process at every point of preparing text, and says what is found afterwards.

    python killed_preparation.py FOLDER     prints one JSON line per point, over nothing and over shards of other inputs
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from faulty import FaultyFiles  # noqa: E402
from killed import deaths, say  # noqa: E402
from synthetic_run import Unsynced  # noqa: E402

from capibara.core.tokenizer import byte_tokenizer  # noqa: E402
from capibara.data.prepare import check_shards, prepare, read_manifest  # noqa: E402
from capibara.data.source import Document  # noqa: E402
from capibara.errors import DataError  # noqa: E402
from capibara.files import Files  # noqa: E402

MANY = [Document(f"document {i} " * (1 + i % 7), {"file": f"{i}.txt", "folder": "many"}) for i in range(200)]


def main(folder: Path) -> None:
    """Both scenarios, every point."""
    go_on(folder / "whole", FaultyFiles(lambda: None))
    expected = shards(folder / "whole")
    for of, begin in (("nothing", lambda path: None), ("old", old)):
        for point, path in deaths(folder, begin, go_on):
            found = whole_or_nothing(path)
            again(path)
            say(of=of, point=point, found=found, same_end=shards(path) == expected)


def old(folder: Path) -> None:
    """Shards of fewer documents."""
    prepare(lambda: MANY[:150], byte_tokenizer(), folder, held_out_fraction=0.3, inputs="old", files=Unsynced())


def go_on(folder: Path, files: FaultyFiles) -> None:
    """Prepares all documents, with a fault."""
    files.armed = True
    again(folder, files)


def again(folder: Path, files: Files | None = None) -> None:
    """Prepares all documents."""
    files = files or Unsynced()
    prepare(lambda: MANY, byte_tokenizer(), folder, held_out_fraction=0.3, inputs="new", files=files)


def whole_or_nothing(folder: Path) -> str:
    """Which inputs' shards are there whole, or "nothing" where none would be taken for whole."""
    try:
        manifest = read_manifest(folder)
    except DataError:
        return "nothing"
    check_shards(folder, manifest)
    return manifest["inputs"]


def shards(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but its lock, hidden files included."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    assert "jax" not in sys.modules
