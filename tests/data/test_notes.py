"""Much text is prepared with a word now and then: notes reach whoever opens the source, the session or the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_text

from capibara.core.config import ModularConfig
from capibara.run.directory import Run
from capibara.training.session import open_session, reopen_session
from capibara.training.solo_parts import open_parts


@pytest.fixture(autouse=True)
def much(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as much text: 100 kB of the 400 kB that there are."""
    monkeypatch.setattr("capibara.data.prepare.NOTE_EVERY", 100_000)


@pytest.fixture
def config(tmp_path: Path) -> ModularConfig:
    return ModularConfig.from_toml(tiny_text.make(tmp_path) / "tiny.toml")


def test_a_session_passes_notes_on_and_a_resumed_one_has_none_to_pass(config, tmp_path):
    notes: list[str] = []
    with open_session(config, run_dir=tmp_path / "runs" / "a", note=notes.append):
        assert len(notes) >= 2 and all(note.startswith("Preparing the text: ") for note in notes)
    notes.clear()
    with reopen_session(tmp_path / "runs" / "a", note=notes.append):
        assert notes == [], "the text is prepared already"


def test_a_single_model_passes_notes_on(config, tmp_path):
    notes: list[str] = []
    with Run.create(tmp_path / "solo", "") as run:
        open_parts(config, run, config.data.path, note=notes.append)
    assert len(notes) >= 2
