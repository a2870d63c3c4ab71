"""Which output tensor goes into which file, and at which byte: known before the first byte is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from capibara.merge.header import ITEMSIZE, Entry, build_header
from capibara.merge.plan import Job

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Shard(NamedTuple):
    """One file of the output: its name, its first bytes, its tensors, and its size."""

    name: str
    header: bytes
    entries: dict[str, Entry]
    size: int


class Layout(NamedTuple):
    """All files of the output, and the index where there is more than one."""

    shards: tuple[Shard, ...]
    index_json: bytes | None

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(shard.size for shard in self.shards)


def lay_out(jobs: Sequence[Job], shard_size: int | None, metadata: Mapping[str, str]) -> Layout:
    """Fills files in order; a tensor larger than `shard_size` has a file of its own.

    Args:
      jobs: Tensors in the order of writing.
      shard_size: Most bytes of tensors in one file; None writes one file.
      metadata: For the header of each.
    """
    groups: list[list[Job]] = [[]]
    filled = 0
    for job in jobs:
        size = job.numbers * ITEMSIZE[job.dtype]
        if groups[-1] and shard_size is not None and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(job)
        filled += size
    shards, where, total = [], {}, 0
    for number, group in enumerate(groups, 1):
        name = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, entries = build_header([(job.name, job.dtype, job.shape) for job in group], metadata)
        size = sum(entry.size for entry in entries.values())
        shards.append(Shard(name, header, entries, len(header) + size))
        where |= dict.fromkeys(entries, name)
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return Layout(tuple(shards), json.dumps(index, indent=2).encode() + b"\n" if len(groups) > 1 else None)
