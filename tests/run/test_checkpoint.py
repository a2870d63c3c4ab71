"""Checkpoints and kept deltas: a flipped byte never loads, and a damaged one is walked past, aloud."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import NODES, finished, make_run, merge, parameters, rows

from capibara.errors import CertificateError
from capibara.files import tensors_to_bytes
from capibara.run.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_deltas,
    newest_intact,
    prune,
    save_checkpoint,
)
from capibara.run.commit import commit
from capibara.run.directory import Run

FILES = ("params.safetensors", "anchor.safetensors", "kept.safetensors", "merged.safetensors", "state.json")


def flip(file: Path, place: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    with make_run(tmp_path / "run", 2) as run:
        sections, meta = load_checkpoint(run.path / "checkpoints" / "step-00000002")
        done = finished(1, run.lines[0]["hash"])
    assert done.sections is not None
    assert sections.keys() == done.sections.keys()
    for name, tensors in done.sections.items():
        assert sections[name].keys() == tensors.keys()
        for leaf, array in tensors.items():
            assert sections[name][leaf].dtype == array.dtype
            np.testing.assert_array_equal(sections[name][leaf], array, strict=True)
    assert (meta["round"], meta["refusals"], meta["head"]) == (2, 0, done.line["hash"])


def test_what_is_neither_nan_nor_zero_nor_float32_survives_too(tmp_path):
    import ml_dtypes

    odd = {
        "nan": np.array([np.nan, -np.nan, np.inf, -0.0], np.float32).view(np.uint32).view(np.float32),
        "half": np.arange(4).astype(ml_dtypes.bfloat16),
        "key": np.array([1, 2**32 - 1], np.uint32),
        "flag": np.array(True),
        "count": np.int64(2**60),
    }
    with make_run(tmp_path / "run", 0) as run:
        save_checkpoint(run, 1, {"params": odd, "none": {}}, {"head": run.head})
        sections, _ = load_checkpoint(checkpoints(run.path)[0])
    assert sections["none"] == {}
    for name, array in odd.items():
        assert sections["params"][name].dtype == array.dtype
        assert sections["params"][name].shape == array.shape
        assert sections["params"][name].tobytes() == array.tobytes()


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_refused_and_the_file_named(tmp_path, name):
    with make_run(tmp_path / "run", 1) as run:
        folder = checkpoints(run.path)[0]
    size = (folder / name).stat().st_size
    for place in sorted({0, 7, 8, 20, size // 3, size // 2, size - 2, size - 1}):
        flip(folder / name, place, bit=place % 8)
        with pytest.raises(CertificateError, match=rf"^checkpoints/step-00000001/{name} "):
            load_checkpoint(folder)
        flip(folder / name, place, bit=place % 8)
    load_checkpoint(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer"])
def test_a_missing_or_cut_file_is_refused_and_named(tmp_path, name, damage):
    with make_run(tmp_path / "run", 1) as run:
        file = checkpoints(run.path)[0] / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": data[:-1], "longer": data + b"\0"}[damage])
    with pytest.raises(CertificateError, match=rf"^checkpoints/step-00000001/{name} "):
        load_checkpoint(file.parent)


def test_the_newest_intact_checkpoint_is_found_and_the_damaged_ones_are_named(tmp_path):
    make_run(tmp_path / "run", 4, keep_checkpoints=4).close()
    flip(tmp_path / "run" / "checkpoints" / "step-00000004" / "params.safetensors", -1)
    (tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").unlink()
    with Run.open(tmp_path / "run") as run:
        found = newest_intact(run)
    assert found.sections is not None
    assert found.meta["round"] == 2
    np.testing.assert_array_equal(found.sections["params"]["head"], parameters(2)["head"])
    assert [note.split(" ")[0] for note in found.notes] == [
        "checkpoints/step-00000004/params.safetensors",
        "checkpoints/step-00000003/state.json",
    ]
    assert all("Going back to the checkpoint before it." in note for note in found.notes)


def test_where_none_is_intact_the_run_goes_back_to_its_start(tmp_path):
    make_run(tmp_path / "run", 2).close()
    for folder in checkpoints(tmp_path / "run"):
        flip(folder / "kept.safetensors", -1)
    with Run.open(tmp_path / "run") as run:
        found = newest_intact(run)
    assert found.sections is None
    assert len(found.notes) == 2
    assert "Going back to the start." in found.notes[1]


def test_an_intact_checkpoint_of_another_run_is_not_taken(tmp_path):
    make_run(tmp_path / "run", 2).close()
    with make_run(tmp_path / "other", 0) as other:
        commit(other, finished(0, other.head, extensions={"other": True}), 3)
        commit(other, finished(1, other.head), 3)
    ours = tmp_path / "run" / "checkpoints" / "step-00000002"
    (tmp_path / "other" / "checkpoints" / "step-00000002").rename(tmp_path / "taken")
    ours.rename(tmp_path / "ours")
    (tmp_path / "taken").rename(ours)
    with Run.open(tmp_path / "run") as run:
        found = newest_intact(run)
    assert found.meta["round"] == 1
    assert found.notes == [
        "checkpoints/step-00000002 belongs to another run. Going back to the checkpoint before it."
    ]


def test_only_the_newest_checkpoints_stay(tmp_path):
    with make_run(tmp_path / "run", 5, keep_checkpoints=2) as run:
        assert [folder.name for folder in checkpoints(run.path)] == ["step-00000004", "step-00000005"]
        prune(run, 1)
        assert [folder.name for folder in checkpoints(run.path)] == ["step-00000005"]
        assert not list((run.path / "checkpoints").glob(".*"))


def test_a_checkpoint_can_be_written_again(tmp_path):
    with make_run(tmp_path / "run", 1) as run:
        folder = checkpoints(run.path)[0]
        good = (folder / "params.safetensors").read_bytes()
        flip(folder / "params.safetensors", -1)
        done = finished(0, run.lines[0]["previous"])
        assert done.sections is not None
        save_checkpoint(run, 1, done.sections, {"head": run.head, **done.numbers})
        assert (folder / "params.safetensors").read_bytes() == good
        load_checkpoint(folder)


def test_kept_deltas_come_back_bit_for_bit(tmp_path):
    with make_run(tmp_path / "run", 1) as run:
        stack, merged = load_deltas(run.path / "deltas" / "round-00000000.safetensors", NODES)
    for name, leaf in rows(0).items():
        np.testing.assert_array_equal(stack[name], leaf, strict=True)
        np.testing.assert_array_equal(merged[name], merge(rows(0))[name], strict=True)
    with pytest.raises(CertificateError, match=r"^deltas/round-00000000\.safetensors does not hold 4 whole rows"):
        load_deltas(tmp_path / "run" / "deltas" / "round-00000000.safetensors", NODES + 1)


def test_nothing_is_ever_unpickled(tmp_path):
    """A pickle in place of a checkpoint's tensors, its digest put right, is refused as no safetensors file."""
    import pickle

    from blake3 import blake3

    from capibara.run.checkpoint import _state_digest

    with make_run(tmp_path / "run", 1) as run:
        folder = checkpoints(run.path)[0]
    data = pickle.dumps(print)
    (folder / "params.safetensors").write_bytes(data)
    state = json.loads((folder / "state.json").read_text())
    state["digests"]["params.safetensors"] = blake3(data).hexdigest()
    (folder / "state.json").write_text(json.dumps(state | {"digest": _state_digest(state)}))
    with pytest.raises(CertificateError, match=r"params\.safetensors is not a whole safetensors file"):
        load_checkpoint(folder)


def test_writing_and_reading_take_one_extra_copy(tmp_path):
    """Peaks of Python's own allocations, for 32 MB in rows; 10 % for headers and the like."""
    stack = {f"leaf{i}": np.full((4, 500_000), i, np.float32) for i in range(4)}
    size = sum(leaf.nbytes for leaf in stack.values())
    tensors = {f"row/{i}/{name}": leaf[i] for name, leaf in stack.items() for i in range(4)}
    tracemalloc.start()
    data = tensors_to_bytes(tensors)
    written = tracemalloc.get_traced_memory()[1]
    (tmp_path / "round-00000000.safetensors").write_bytes(data)
    del data
    tracemalloc.reset_peak()
    from capibara.files import read_tensors

    again = read_tensors(tmp_path / "round-00000000.safetensors")
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(again) == 16
    assert written < 1.1 * size
    assert read < 2.1 * size  # the file's bytes and the arrays themselves
