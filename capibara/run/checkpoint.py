"""Checkpoints and kept deltas: safetensors files with our own digests, because a flipped byte must not load silently.

    checkpoints/step-00000008/  params.safetensors anchor.safetensors … state.json (digests, head, numbers)
    deltas/round-00000007.safetensors   row/NODE/LEAF and merged/LEAF
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from capibara.consensus.certificate import GENESIS, digest_tree
from capibara.errors import CertificateError, RunError
from capibara.files import read_tensors, tensors_to_bytes
from capibara.run.directory import Run

STATE = "state.json"


class Found(NamedTuple):
    """The newest checkpoint that is intact; `sections` is None where there is none."""

    sections: dict[str, dict[str, np.ndarray]] | None
    meta: dict[str, Any]
    notes: list[str]


def save_checkpoint(run: Run, number: int, sections: dict[str, dict[str, Any]], meta: dict[str, Any]) -> Path:
    """Writes named sections of named arrays, then makes them count by one rename.

    Args:
      run: The run directory.
      number: Rounds or steps finished.
      sections: Section → leaf → array; an empty section has no file.
      meta: Numbers and strings; `head` is the hash of the certificate that this checkpoint belongs to.

    Raises:
      RunError: If the disk is full or not writable; what was there before is intact.
    """
    files, folder = run.files, run.path / "checkpoints"
    target, temporary = folder / f"step-{number:08d}", folder / f".step-{number:08d}.tmp"
    try:
        files.remove(temporary)
        temporary.mkdir()
        digests = {}
        for name, tensors in sections.items():
            if tensors:
                data = tensors_to_bytes(tensors)
                digests[f"{name}.safetensors"] = blake3(data).hexdigest()
                files.write(temporary / f"{name}.safetensors", data)
        state = {**meta, "sections": sorted(sections), "digests": digests}
        state["params_digest"] = digest_tree(sections["params"])[0]
        state["digest"] = _state_digest(state)
        files.write(temporary / STATE, json.dumps(state, indent=1, sort_keys=True).encode())
        files.fsync_folder(temporary)
        files.remove(target)
        files.rename(temporary, target)
        files.fsync_folder(folder)
    except OSError as error:
        with suppress(OSError):
            files.remove(temporary)  # what did not fit must not keep the room
        raise RunError(
            f"The checkpoint of step {number} could not be written to {folder} ({error.strerror or error}). Nothing "
            f"that was committed is lost: make room, then `capibara resume {run.path}`."
        ) from error
    return target


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """A checkpoint whose every byte checks.

    Raises:
      CertificateError: Naming the file that is missing or has been changed.
    """
    state = read_state(path)
    sections: dict[str, dict[str, np.ndarray]] = {}
    for name in state["sections"]:
        file = path / f"{name}.safetensors"
        expected = state["digests"].get(file.name)
        if expected is None:
            sections[name] = {}
            continue
        sections[name] = read_tensors(file, digest=expected, name=_short(file))
    return sections, state


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, checked against its own digest.

    Raises:
      CertificateError: If it is missing or has been changed.
    """
    try:
        state = json.loads((path / STATE).read_text())
        good = state["digest"] == _state_digest(state)
    except FileNotFoundError:
        raise CertificateError(f"{_short(path / STATE)} is missing.") from None
    except (ValueError, KeyError, TypeError):
        good = False
        state = {}
    if not good:
        raise CertificateError(f"{_short(path / STATE)} has been changed: its digest does not check.")
    return state


def checkpoints(path: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted(folder for folder in (path / "checkpoints").glob("step-*") if folder.is_dir())


def newest_intact(run: Run) -> Found:
    """Walks back from the newest checkpoint to one that checks, and says what it walked past.

    Where none is intact a run begins again at its start, and must reproduce its certificates.
    """
    notes = []
    for folder in reversed(checkpoints(run.path)):
        try:
            sections, meta = load_checkpoint(folder)
            if meta["head"] not in ({line["hash"] for line in run.lines} or {GENESIS}):
                raise CertificateError(f"checkpoints/{folder.name} belongs to another run.")
        except CertificateError as error:
            notes.append(f"{error} Going back to the checkpoint before it.")
            continue
        return Found(sections, meta, notes)
    return Found(None, {}, [note.replace("the checkpoint before it", "the start") for note in notes])


def prune(run: Run, keep: int) -> None:
    """Removes all but the `keep` ≥ 1 newest checkpoints.

    Raises:
      RunError: If the disk does not let one go; everything committed is intact.
    """
    for folder in checkpoints(run.path)[:-keep]:
        try:
            run.files.remove(folder)
        except OSError as error:
            raise RunError(
                f"The old checkpoint {folder} could not be removed ({error.strerror or error}). Everything that was "
                f"committed is intact: mend the disk, then `capibara resume {run.path}`."
            ) from error


def save_deltas(run: Run, number: int, stack: dict[str, Any], merged: dict[str, Any]) -> Path:
    """Keeps the rows of a round, as they entered validation, and the merged delta.

    Raises:
      RunError: If the disk is full or not writable.
    """
    rows = {name: np.asarray(leaf) for name, leaf in stack.items()}
    tensors = {f"row/{i}/{name}": leaf[i] for name, leaf in rows.items() for i in range(len(leaf))}
    tensors |= {f"merged/{name}": leaf for name, leaf in merged.items()}
    path = run.path / "deltas" / f"round-{number:08d}.safetensors"
    try:
        run.files.write_atomic(path, tensors_to_bytes(tensors))
    except OSError as error:
        raise RunError(
            f"The deltas of round {number} could not be written to {path} ({error.strerror or error}). Nothing that "
            f"was committed is lost: make room or set keep_deltas = false, then `capibara resume {run.path}`."
        ) from error
    return path


def load_deltas(path: Path, num_nodes: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The stack [n, ...] and the merged delta of a kept round.

    Raises:
      CertificateError: If the file is missing, damaged, or does not hold `num_nodes` rows.
    """
    tensors = read_tensors(path, name=_short(path))
    merged = {name.removeprefix("merged/"): leaf for name, leaf in tensors.items() if name.startswith("merged/")}
    try:
        stack = {name: np.stack([tensors[f"row/{i}/{name}"] for i in range(num_nodes)]) for name in merged}
    except (KeyError, ValueError):
        raise CertificateError(f"{_short(path)} does not hold {num_nodes} whole rows.") from None
    return stack, merged


def _state_digest(state: dict[str, Any]) -> str:
    content = {key: value for key, value in state.items() if key != "digest"}
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _short(path: Path) -> str:
    return "/".join(path.parts[-3:]) if "checkpoints" in path.parts else "/".join(path.parts[-2:])
