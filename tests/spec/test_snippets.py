"""The snippets of the specification run as written, and each that does not is listed with what it waits for.

`CAPIBARA_SPEC=FILE` names the document; without it our own words for the same calls run.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from snippets import COVERED, TO_COME, blocks, localised


@pytest.fixture(scope="session")
def document() -> dict[str, str]:
    """Heading → block."""
    path = os.environ.get("CAPIBARA_SPEC")
    if not path:
        pytest.skip("CAPIBARA_SPEC names no document")
    if not Path(path).is_file():
        pytest.fail(f"CAPIBARA_SPEC names {path!r}, which is no file")
    return blocks(Path(path).read_text(encoding="utf-8"))


def run(heading: str, code: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Runs a covered snippet in `folder`, and checks what it left."""
    snippet = COVERED[heading]
    patch.chdir(folder)
    names = snippet.supply(folder, patch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        exec(compile(localised(code, folder), f"<{heading}>", "exec"), names)
    assert [str(one.message)[: len(snippet.warns or "")] for one in said] == ([snippet.warns] if snippet.warns else [])
    snippet.check(names, folder)


RUN = [pytest.param(name, marks=[pytest.mark.slow] * one.slow) for name, one in COVERED.items()]


@pytest.mark.parametrize("heading", RUN)
def test_our_words_for_it_run(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(heading, COVERED[heading].ours, tmp_path, monkeypatch)


@pytest.mark.parametrize("heading", [*RUN, *TO_COME])
def test_the_document_runs_as_written(heading: str, document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert heading in document
    if heading in TO_COME:
        pytest.skip(f"still to come: {TO_COME[heading]}")
    run(heading, document[heading], tmp_path, monkeypatch)


def test_every_block_of_the_document_runs_or_is_listed(document):
    assert sorted(document) == sorted([*COVERED, *TO_COME])


def test_what_runs_is_not_also_to_come():
    assert not COVERED.keys() & TO_COME.keys()


def test_blocks_are_found_under_their_headings():
    text = "# A\n```python\nx = 1\n```\n### 2. B (c)\n```bash\nls\n```\n```python\ny = 2\nz = 3\n```\n"
    assert blocks(text) == {"A": "x = 1\n", "B (c)": "y = 2\nz = 3\n"}


def test_the_bucket_and_strategies_to_come_are_replaced_and_nothing_else():
    code = 'train("gs://capibara-data/", strategies=["plain", "not_yet"], other=["not_yet"])'
    assert localised(code, Path("/f")) == "train('/f/text', strategies=[\"plain\", \"plain\"], other=[\"not_yet\"])"
