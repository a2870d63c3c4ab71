"""What a checkpoint holds, and in what two of them differ, without loading either.

    distance  ‖b − a‖ / ‖a‖      cosine  ⟨a, b⟩ / ‖a‖‖b‖      largest  max |b − a|

Sums are in float64, of differences taken in float32, number by number, so near-equal models are told apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capibara.consensus.certificate import digest_over
from capibara.merge import kernels
from capibara.merge.passes import Progress
from capibara.merge.plan import Job
from capibara.merge.sources import open_checkpoint
from capibara.merge.stream import WORKERS, Digests, Unit, block_numbers, stream, units_of
from capibara.merge.tensors import FLOATS, Checkpoint, Tensor, numpy_type


def inspect(path: Path | str, *, digests: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Kind, size and tensors of a checkpoint; how it was merged, where capibara merged it.

    Args:
      path: As `merge` takes it.
      digests: Whether to read it all for the digests of its tensors.
      progress: Told of the bytes that have been read.

    Raises:
      DataError: If it is no checkpoint.
    """
    checkpoint = open_checkpoint(path)
    types: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        types[tensor.dtype] = types.get(tensor.dtype, 0) + tensor.numbers
    found: dict[str, Any] = {
        "path": str(path),
        "kind": checkpoint.kind,
        "parameters": checkpoint.num_parameters,
        "bytes": checkpoint.num_bytes,
        "files": len(checkpoint.files),
        "dtypes": types,
        "tied": checkpoint.tied,
        "model": {key: checkpoint.config[key] for key in _SHOWN if key in checkpoint.config},
        "carried": sorted(checkpoint.carried),
        "tensors": {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for name, tensor in checkpoint.tensors.items()
        },
    }
    record = Path(path) / "merge.json"
    if record.is_file():
        made = json.loads(record.read_text(encoding="utf-8"))
        found["merged"] = {key: made.get(key) for key in ("method", "digest", "inputs")}
    if digests:
        leaves = _digests(checkpoint, progress or (lambda *_: None))
        found["digest"] = digest_over({name: bytes.fromhex(digest) for name, digest in leaves.items()})
        for name, digest in leaves.items():
            found["tensors"][name]["digest"] = digest
    return found


def diff(a: Path | str, b: Path | str, *, progress: Progress | None = None) -> dict[str, Any]:
    """In what b differs from a: tensors that one lacks or that have other shapes, and how far the others are apart.

    Raises:
      DataError: If one is no checkpoint.
    """
    first, second = open_checkpoint(a), open_checkpoint(b)
    common = [name for name in first.tensors if name in second.tensors]
    shapes = {
        name: [list(first.tensors[name].shape), list(second.tensors[name].shape)]
        for name in common
        if first.tensors[name].shape != second.tensors[name].shape
    }
    jobs = [_job(name, first.tensors[name], second.tensors[name]) for name in common if name not in shapes]
    sums = _compare(jobs, progress or (lambda *_: None))
    tensors = {job.name: _apart(sums[j]) for j, job in enumerate(jobs)}
    whole = _apart(np.array([*sums[:, :3].sum(axis=0), sums[:, 3].max(initial=0.0), sums[:, 4].sum()]))
    missing = {
        "only_in_a": [name for name in first.tensors if name not in second.tensors],
        "only_in_b": [name for name in second.tensors if name not in first.tensors],
    }
    types = {
        job.name: [tensor.dtype for tensor in job.inputs] for job in jobs if job.inputs[0].dtype != job.inputs[1].dtype
    }
    settings = {
        key: [first.config.get(key), second.config.get(key)]
        for key in sorted(first.config.keys() | second.config.keys())
        if first.config.get(key) != second.config.get(key)
    }
    equal = not (shapes or missing["only_in_a"] or missing["only_in_b"]) and whole["different"] == 0
    return {
        "a": str(a), "b": str(b), "equal": equal, **missing, "shapes": shapes, "dtypes": types, "settings": settings,
        "whole": whole, "tensors": tensors,
    }  # fmt: skip


def inspect_text(found: dict[str, Any]) -> str:
    """For people."""
    types = ", ".join(f"{count:,} {dtype}" for dtype, count in found["dtypes"].items())
    lines = [
        f"{found['path']}: {found['kind']}, {found['parameters']:,} parameters, {readable(found['bytes'])}"
        f" in {found['files']} {'file' if found['files'] == 1 else 'files'}",
        f"  numbers   {types or 'none'}",
    ]
    if found["model"]:
        lines.append("  model     " + ", ".join(f"{key} {value}" for key, value in found["model"].items()))
        lines.append(f"  head      {'tied to the embedding' if found['tied'] else 'of its own'}")
    if found["carried"]:
        lines.append("  beside    " + ", ".join(found["carried"]))
    if "merged" in found:
        lines.append(f"  merged    by {found['merged']['method']} of {len(found['merged']['inputs'])} inputs")
    if "digest" in found:
        lines.append(f"  digest    {found['digest']}")
    width = max((len(name) for name in found["tensors"]), default=0)
    lines += [
        f"  {name:{width}}  {one['dtype']:5} {_shape(one['shape'])}  {one.get('digest', '')[:16]}".rstrip()
        for name, one in found["tensors"].items()
    ]
    return "\n".join(lines)


def diff_text(found: dict[str, Any], most: int = 20) -> str:
    """For people: the whole, then the tensors that are furthest apart."""
    if found["equal"] and not found["dtypes"] and not found["settings"]:
        return f"{found['a']} and {found['b']} hold the same tensors with the same numbers."
    whole = found["whole"]
    lines = [
        f"‖b − a‖/‖a‖ = {whole['distance']:.6g}, cosine {whole['cosine']:.8f}, largest difference "
        f"{whole['largest']:.6g}, {whole['different']:,} numbers differ"
    ]
    for key, where in (("only_in_a", found["a"]), ("only_in_b", found["b"])):
        lines += [f"only in {where}: {name}" for name in found[key]]
    lines += [f"{name}: shape {_shape(one)} and {_shape(two)}" for name, (one, two) in found["shapes"].items()]
    lines += [f"{name}: {one} and {two}" for name, (one, two) in found["dtypes"].items()]
    lines += [f"{key}: {one} and {two}" for key, (one, two) in found["settings"].items()]
    apart = sorted(found["tensors"].items(), key=lambda item: -_or_zero(item[1]["distance"]))
    apart = [item for item in apart if item[1]["different"]]
    width = max((len(name) for name, _ in apart[:most]), default=0)
    lines += [
        f"  {name:{width}}  distance {one['distance']:.4g}  cosine {one['cosine']:.6f}  largest {one['largest']:.4g}"
        for name, one in apart[:most]
    ]
    if len(apart) > most:
        lines.append(f"  and {len(apart) - most} tensors more, with --json")
    return "\n".join(lines)


def readable(size: float) -> str:
    """`1.23 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.3g} TB"


def _digests(checkpoint: Checkpoint, progress: Progress) -> dict[str, str]:
    jobs = [_job(name, tensor) for name, tensor in checkpoint.tensors.items()]
    found = Digests()
    _run(jobs, lambda *_: None, lambda *_: None, progress, found)
    return {job.name: found.done[j, 0] for j, job in enumerate(jobs)}


def _compare(jobs: Sequence[Job], progress: Progress) -> np.ndarray:
    """float64[jobs, 5]: ‖a‖², ‖b‖², ‖b − a‖², the largest difference, and how many numbers differ."""
    sums = np.zeros((len(jobs), 5))
    scratch = [kernels.Rows(2, np.float32) for _ in range(WORKERS)]
    wide = [kernels.Rows(2, np.float64) for _ in range(WORKERS)]

    def work(which: int, unit: Unit, raws: list[np.ndarray]) -> np.ndarray:
        job = jobs[unit.job]
        exact = all(tensor.dtype in ("F32", "F16", "BF16") for tensor in job.inputs)
        rows = (scratch if exact else wide)[which]
        dtypes = [tensor.dtype for tensor in job.inputs]
        rows.open(raws, dtypes, [numpy_type(dtype).itemsize for dtype in dtypes])
        total = np.zeros(5)
        for first in range(0, unit.numbers, 2**15):
            last = min(first + 2**15, unit.numbers)
            a = rows.row(0, first, last, room="a").astype(np.float64)
            b = rows.row(1, first, last, room="b").astype(np.float64)
            gap = b - a
            largest = np.abs(gap).max(initial=0.0)
            total[:3] += a @ a, b @ b, gap @ gap
            total[3:] = max(total[3], largest), total[4] + np.count_nonzero(gap)
        return total

    def sink(unit: Unit, total: np.ndarray) -> None:
        largest = max(sums[unit.job, 3], total[3])
        sums[unit.job] += total
        sums[unit.job, 3] = largest

    _run(jobs, work, sink, progress, None)
    return sums


def _run(jobs: Sequence[Job], work: Any, sink: Any, progress: Progress, digests: Digests | None) -> None:
    each = [sum(numpy_type(tensor.dtype).itemsize for tensor in job.inputs) for job in jobs]
    done, total = 0, sum(size * job.numbers for size, job in zip(each, jobs, strict=True))

    def told(unit: Unit, result: Any) -> None:
        nonlocal done
        sink(unit, result)
        done += unit.numbers * each[unit.job]
        progress("reading", done, total)

    block = block_numbers(jobs, len(jobs[0].inputs) if jobs else 1)
    stream(jobs, units_of(jobs, range(len(jobs)), block), work, told, digests=digests)


def _job(name: str, *tensors: Tensor) -> Job:
    return Job(name, tensors[0].shape, tensors[0].dtype, tensors, tensors[0].dtype in FLOATS)


def _apart(sums: np.ndarray) -> dict[str, Any]:
    a, b, gap, largest, different = (float(one) for one in sums)
    product = (a + b - gap) / 2
    lengths = math.sqrt(a) * math.sqrt(b)
    return {
        "distance": math.sqrt(gap / a) if a > 0 else (0.0 if gap == 0 else math.inf),
        "cosine": max(-1.0, min(1.0, product / lengths)) if lengths > 0 else (1.0 if a == b else 0.0),
        "largest": largest,
        "different": int(different),
    }


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _shape(sides: Sequence[int]) -> str:
    return "×".join(map(str, sides)) or "one number"


_SHOWN = (
    "model_type", "architectures", "num_hidden_layers", "num_layers", "hidden_size", "width", "num_attention_heads",
    "num_heads", "vocab_size",
)  # fmt: skip
