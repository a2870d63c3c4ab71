"""What a run needs is estimated, and one that cannot fit is refused before it starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from synthetic_run import NODES, SHAPES, make_run

from capibara.errors import RunError
from capibara.run.resources import Needs, estimate, refuse_if_impossible

MB = 10**6
SMALL: dict[str, Any] = dict(num_nodes=8, num_rounds=20, keep_deltas=False, keep_checkpoints=3, all_at_once=False)


def test_more_nodes_deltas_and_checkpoints_need_more():
    base = estimate(4 * MB, 64 * MB, 10 * MB, **SMALL)
    for change in ({"num_nodes": 16}, {"keep_deltas": True}, {"keep_checkpoints": 6}, {"all_at_once": True}):
        more = estimate(4 * MB, 64 * MB, 10 * MB, **SMALL | change)
        assert more.memory >= base.memory and more.disk >= base.disk and more != base, change


def test_the_disk_estimate_covers_a_real_run(tmp_path):
    """One with kept deltas; headers and certificates of so tiny a model are allowed for apart."""
    one = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    kept = 4 * NODES * 6
    changes = {"num_nodes": NODES, "num_rounds": 5, "keep_deltas": True, "keep_checkpoints": 2}
    needs = estimate(one, kept, 0, **SMALL | changes)
    make_run(tmp_path / "run", 5, keep_checkpoints=2).close()
    tensors = [file for file in (tmp_path / "run").rglob("*.safetensors")]
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in tensors)
    assert sum(file.stat().st_size for file in tensors) - headers <= needs.disk


def test_a_run_that_fits_is_not_refused(tmp_path):
    refuse_if_impossible(Needs(10, 10), tmp_path, free_memory=lambda: 10, free_disk=lambda path: 10)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (Needs(3 * 10**9, 1), r"needs about 3\.0 GB of memory; 2\.0 GB is free\. Use a smaller model"),
        (Needs(1, 5 * 10**12), r"needs about 5\.0 TB of disk in .*; 50 MB is free\. Make room"),
    ],
)
def test_one_that_does_not_is_refused_with_both_numbers(tmp_path, needs, message):
    with pytest.raises(RunError, match=message):
        refuse_if_impossible(needs, tmp_path, free_memory=lambda: 2 * 10**9, free_disk=lambda path: 50 * MB)


def test_the_machine_itself_is_asked(tmp_path):
    refuse_if_impossible(Needs(1, 1), tmp_path)
    with pytest.raises(RunError, match="memory"):
        refuse_if_impossible(Needs(10**18, 1), tmp_path)
    with pytest.raises(RunError, match="disk"):
        refuse_if_impossible(Needs(1, 10**18), tmp_path)
