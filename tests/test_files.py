"""The one place that writes: what is renamed has been synced, and what fails leaves the old content."""

from __future__ import annotations

import errno
import os

import pytest

from capibara.errors import RunError
from capibara.files import Files, write_new


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc here to name descriptors")
def test_an_atomic_write_syncs_the_file_renames_it_and_syncs_the_folder(tmp_path, monkeypatch):
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def name(descriptor: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(f"sync {name(fd)}"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"rename {b.name}"), replace(a, b)))
    Files().write_atomic(tmp_path / "a.bin", b"new")
    assert done == ["sync .a.bin.tmp", "rename a.bin", f"sync {tmp_path.name}"]
    done.clear()
    Files().append(tmp_path / "a.bin", b"er")
    Files().truncate(tmp_path / "a.bin", 4)
    assert done == ["sync a.bin", "sync a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"newe"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_disk_that_is_really_full_is_an_error():
    from pathlib import Path

    with pytest.raises(OSError) as caught:
        Files().append(Path("/dev/full"), b"x" * 100)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("at", ["fsync", "rename"])
def test_an_atomic_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, at):
    class Full(Files):
        def fsync(self, descriptor):
            if at == "fsync":
                raise OSError(errno.ENOSPC, "full")

        def rename(self, source, target):
            raise OSError(errno.ENOSPC, "full")

    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(OSError, match="full"):
        Full().write_atomic(tmp_path / "a.bin", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


def test_a_folder_goes_at_once(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "file").write_text("x")
    (tmp_path / ".folder.removed").mkdir()
    Files().remove(tmp_path / "folder")
    Files().remove(tmp_path / "not there")
    assert not list(tmp_path.iterdir())


def test_a_new_file_replaces_nothing(tmp_path):
    write_new(tmp_path / "a.toml", "mine")
    with pytest.raises(RunError, match=r"a\.toml exists already"):
        write_new(tmp_path / "a.toml", "theirs")
    assert (tmp_path / "a.toml").read_text() == "mine"
