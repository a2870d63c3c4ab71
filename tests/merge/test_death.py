"""A merge that dies anywhere, by kill -9, is finished by the same command, to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from disk_models import read_model, write_models

from capibara.errors import RunError
from capibara.files import Files
from capibara.merge.merge import merge
from capibara.merge.recipe import Recipe

VICTIM = Path(__file__).with_name("victim.py")


def victim(folder, out, method, at, **options):
    command = [sys.executable, str(VICTIM), str(folder), str(out), method, str(at)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Models, and what a merge that nobody interrupts makes of them."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, 3)
    code, found = victim(folder, folder / "whole", "uniform", 0)
    assert code == 0, found
    return folder, found, contents(folder / "whole")


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_point_the_same_command_ends_in_the_same_bytes(whole, tmp_path, step):
    """The fast lane tries every fifth point."""
    command = [sys.executable, str(VICTIM), str(whole[0]), str(tmp_path / "out"), "every", str(step)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == -(-whole[1]["points"] // step) and whole[1]["points"] > 40
    for one in found:
        assert one == {"at": one["at"], "died": True, "part": False, "same": True, "left": []}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uniform", "geometric_median"])
def test_a_process_that_is_killed_resumes_tensor_by_tensor(whole, tmp_path, method):
    folder = whole[0]
    code, counted = victim(folder, tmp_path / "whole", method, 0)
    assert code == 0, counted
    going_on = 0
    for at in (counted["points"] // 3, counted["points"] // 2, 2 * counted["points"] // 3):
        out = tmp_path / f"out{at}"
        assert victim(folder, out, method, at)[0] == -9
        code, found = victim(folder, out, method, 0)
        assert code == 0 and found["digest"] == counted["digest"]
        assert contents(out) == contents(tmp_path / "whole")
        going_on += found["resumed"]
    assert going_on


def test_tensors_whose_bytes_were_changed_after_death_are_merged_again(whole, tmp_path):
    folder, counted, expected = whole
    out = tmp_path / "out"
    assert victim(folder, out, "uniform", counted["points"] * 3 // 4)[0] == -9
    for file in (tmp_path / ".out.merging").glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    code, found = victim(folder, out, "uniform", 0)
    assert code == 0 and contents(out) == expected


def test_an_input_that_changed_since_the_death_starts_afresh(whole, tmp_path):
    counted = whole[1]
    paths, models = write_models(tmp_path / "models", 3)
    out = tmp_path / "out"
    assert victim(tmp_path / "models", out, "uniform", counted["points"] * 3 // 4)[0] == -9
    os.utime(paths[0], ns=(1, 1))
    code, found = victim(tmp_path / "models", out, "uniform", 0)
    assert code == 0 and found["resumed"] == 0


class Full(Files):
    """Runs full at the i-th write into the weights."""

    def __init__(self, at):
        self.at, self.done = at, 0

    def write_at(self, descriptor, data, offset):
        self.done += 1
        if self.done == self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write_at(descriptor, data, offset)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_disk_that_runs_full_midway_says_so_and_the_same_command_goes_on(tmp_path, at):
    paths, _ = write_models(tmp_path, 2)
    recipe = Recipe(tuple(paths))
    with pytest.raises(RunError, match="No space left on device.*Make room"):
        merge(recipe, tmp_path / "out", files=Full(at))
    assert not (tmp_path / "out").exists()
    again = merge(recipe, tmp_path / "out")
    assert again.record["digest"] == merge(recipe, tmp_path / "other").record["digest"]


@pytest.mark.parametrize("at", ["fsync", "rename", "write"])
def test_a_sync_a_rename_or_a_write_that_fails_is_an_error_and_not_a_result(tmp_path, at):
    paths, _ = write_models(tmp_path, 2)
    files = Files()

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    setattr(files, at, fails)
    with pytest.raises(RunError, match="Input/output error"):
        merge(Recipe(tuple(paths)), tmp_path / "out", files=files)
    assert not (tmp_path / "out").exists()
    merge(Recipe(tuple(paths)), tmp_path / "out")
    assert len(read_model(tmp_path / "out")) == 4


def test_a_small_file_system_refuses_before_anything_is_read(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        import numpy as np
        from disk_models import write_model

        paths = tuple(write_model(tmp_path / f"{i}.safetensors", {"w": np.ones(100_000, "f4")}) for i in range(2))
        with pytest.raises(RunError, match="No space left on device"):
            merge(Recipe(paths), small / "out")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_two_merges_into_one_output_do_not_meet(tmp_path):
    from capibara.merge.journal import Journal

    paths, _ = write_models(tmp_path, 2)
    held = Journal(tmp_path / ".out.merging", "x", Files())
    try:
        with pytest.raises(RunError, match="Another process is merging"):
            merge(Recipe(tuple(paths)), tmp_path / "out")
    finally:
        held.close()
    merge(Recipe(tuple(paths)), tmp_path / "out")
