"""Prepared text is whole or not there: killed or out of disk at any point, nothing half done is taken for whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from faulty import FaultyFiles, disk_full
from killed_preparation import again, go_on, old, shards, whole_or_nothing

from capibara.errors import DataError

KILLED = Path(__file__).with_name("killed_preparation.py")


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What `killed_preparation.py` found after each death."""
    folder = tmp_path_factory.mktemp("preparation")
    done = subprocess.run([sys.executable, KILLED, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("of", "order"), [("nothing", ["nothing", "new"]), ("old", ["old", "nothing", "new"])])
def test_kill_9_at_every_point_leaves_whole_shards_or_none(deaths, of, order):
    """15 shards, each with an fsync and a rename, and the manifest, which alone makes them count."""
    found = [death["found"] for death in deaths if death["of"] == of]
    assert len(found) > 30
    assert list(dict.fromkeys(found)) == order and found == sorted(found, key=order.index)


def test_whenever_it_was_killed_preparing_again_ends_in_the_same_bytes(deaths):
    assert not [death for death in deaths if not death["same_end"]]


@pytest.mark.parametrize("begin", [lambda folder: None, old], ids=["over nothing", "over other shards"])
def test_a_full_disk_at_any_point_is_a_clear_error_and_leaves_no_half_shards(tmp_path, begin):
    """The disk has room again for the removal that follows; the next test is of one that has not."""
    counting = FaultyFiles(disk_full)
    begin(tmp_path / "whole")
    go_on(tmp_path / "whole", counting)
    assert len(counting.trace) > 30
    for at, point in enumerate(counting.trace, 1):
        begin(tmp_path / str(at))
        before = shards(tmp_path / str(at)) if (tmp_path / str(at)).exists() else {}
        with pytest.raises(DataError, match=rf"{at} cannot be written \(No space left on device\)\. Make room"):
            go_on(tmp_path / str(at), FaultyFiles(disk_full, at))
        found = shards(tmp_path / str(at))
        assert found == {} or (point.startswith("remove") and found.items() <= before.items()), point


def test_what_stays_on_a_disk_that_fails_for_good_is_not_taken_for_whole(tmp_path):
    counting = FaultyFiles(disk_full)
    go_on(tmp_path / "whole", counting)
    expected = shards(tmp_path / "whole")
    for at in range(1, len(counting.trace) + 1):
        folder = tmp_path / str(at)
        with pytest.raises(DataError, match="No space left"):
            go_on(folder, FaultyFiles(disk_full, at, again=True))
        assert whole_or_nothing(folder) in ("nothing", "new")
        again(folder)
        assert shards(folder) == expected
