"""Merges checkpoints that are larger than memory, at the speed of the disk, and so that any death costs little.

    open → plan → [one pass for products → decide] → one pass that merges → sync → rename

The output is made in `.OUT.merging` beside OUT and becomes OUT by one rename. The same command goes on where one that
was killed stopped, and ends in the same bytes.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from capibara import __version__
from capibara.consensus.certificate import canonical, digest_over
from capibara.errors import ConfigError, DataError, RunError
from capibara.files import Files
from capibara.merge.journal import LOCK, NAME, Journal, read_journal
from capibara.merge.layout import INDEX, WEIGHTS, lay_out
from capibara.merge.methods import Decision, Method, decide, method_of
from capibara.merge.output import Output, out_of_room
from capibara.merge.passes import Passes, Progress
from capibara.merge.plan import Job, plan_jobs
from capibara.merge.recipe import DTYPES, Recipe, read_map, recipe_toml
from capibara.merge.sources import open_checkpoint
from capibara.merge.tensors import Checkpoint

RECORD = "merge.json"

OTHER_FILES = (".npz", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".gguf", ".msgpack", ".h5", ".json", ".txt")
"""Names of an output that mean a file of another kind, where a folder would be made."""


@dataclass(frozen=True)
class Report:
    """What a merge did; `merge.json` beside the weights holds the same.

    Attributes:
      out: The output.
      record: Method, inputs with their digests, coefficients, reasons, the output's digest and those of its tensors.
      resumed: Tensors that an earlier, killed merge had finished.
      found: True where the output had been there already, made by the same recipe of the same inputs.
    """

    out: Path
    record: dict[str, Any]
    resumed: int = 0
    found: bool = False


def merge(
    recipe: Recipe, out: Path | str, *, files: Files | None = None, progress: Progress | None = None
) -> Report:
    """Merges as a recipe says.

    Args:
      recipe: What and how.
      out: A folder to be made, or a file that ends in `.safetensors`.
      files: Where everything is written through.
      progress: Told of the bytes that have been read.

    Raises:
      ConfigError: If the recipe or the inputs cannot be meant: nothing has been written.
      DataError: If an input is damaged, changes while it is read, or makes a number that is not finite.
      RunError: If the output cannot be written; what has been merged is kept, and the same command goes on.
    """
    recipe.check()
    method, out = method_of(recipe), Path(out)
    _check_out(out, recipe)
    checkpoints = [open_checkpoint(path) for path in (*recipe.inputs, *([recipe.base] if recipe.base else []))]
    maps = {i: read_map(path) for i, path in recipe.vocabulary_maps.items()}
    jobs = plan_jobs(checkpoints, dtype=DTYPES[recipe.dtype] if recipe.dtype else None, vocabulary=maps)
    work = out.with_name(f".{out.name}.merging")
    validation: dict[str, Any] | None = None
    if recipe.validation is not None:
        from capibara.merge.validation import weigh

        before = _validations(out, work)
        recipe, validation = weigh(recipe, checkpoints, _stamps(checkpoints), before, progress or _silent)
    identity = _identity(recipe, checkpoints)
    if out.exists() and not _is_empty_folder(out):
        return _found(out, identity, files or Files())
    try:
        journal = Journal(work, identity, files or Files())
    except OSError as error:
        raise out_of_room(out, error, kept=False) from error
    try:
        parts = _Merge(recipe, method, checkpoints, jobs, journal, progress or _silent, validation)
        return parts.run(out, identity)
    except (ConfigError, DataError):  # the same command would fail again: nothing is worth keeping
        journal.files.remove(work)
        raise
    finally:
        journal.close()
        with suppress(OSError):
            os.rmdir(work)  # where nothing came to be in it


class _Merge:
    """One merge, with what its steps share."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        checkpoints: list[Checkpoint],
        jobs: list[Job],
        journal: Journal,
        progress: Progress,
        validation: dict[str, Any] | None,
    ):
        self.validation = validation
        self.recipe, self.method, self.checkpoints, self.jobs = recipe, method, checkpoints, jobs
        self.journal, self.files, self.work = journal, journal.files, journal.folder
        self.passes = Passes(recipe, jobs, progress)

    def run(self, out: Path, identity: str) -> Report:
        """From the journal to the rename."""
        metadata = {"format": "pt", "capibara": json.dumps({"merge": self.recipe.method, "identity": identity})}
        layout = lay_out(self.jobs, self.recipe.shard_size, metadata)
        before = _stamps(self.checkpoints)
        try:
            if self.validation is not None and not any("validation" in line for line in self.journal.lines):
                self.journal.append([{"validation": json.dumps(self.validation)}])
            output = Output(self.journal, layout, self.files)
        except OSError as error:
            self.files.remove(self.work)  # what did not fit must not keep the room
            raise out_of_room(out, error, kept=False) from error
        whole = False
        try:
            done = self._finished(output)
            decision = self._decide() if self.method.gram else None
            self.passes.combine(output, decision, done)
            whole = True
        except OSError as error:
            raise out_of_room(out, error, kept=True) from error
        finally:
            try:
                output.close(whole=whole)
            except OSError as error:
                raise out_of_room(out, error, kept=True) from error
        if _stamps(self.checkpoints) != before:
            raise DataError("An input was changed while it was merged. Nothing was published; run the command again.")
        record = self._record(identity, decision)
        self._check_digests(record)
        try:
            self._publish(out, layout.index_json, record)
        except OSError as error:
            raise out_of_room(out, error, kept=True) from error
        return Report(out, record, resumed=len(done))

    def _finished(self, output: Output) -> set[str]:
        """The tensors that the journal vouches for and whose bytes are still those."""
        done = set()
        for line in self.journal.lines:
            name = line.get("tensor")
            if name in output.place and output.digest(name) == line["digest"]:
                done.add(name)
                self.passes.inputs[name] = line["inputs"]
        return done

    def _decide(self) -> Decision:
        """The pass over products, or what the journal says of it."""
        for line in self.journal.lines:
            if "gram" in line:
                self.passes.inputs = line["inputs"]
                grams = {name: np.array(gram, np.float64) for name, gram in line["gram"].items()}
                return decide(self.recipe, grams, line["finite"])
        grams, finite = self.passes.compare(self.method)
        line = {
            "gram": {name: gram.tolist() for name, gram in grams.items()},
            "finite": finite,
            "inputs": self.passes.inputs,
        }
        self.journal.append([line])
        return decide(self.recipe, grams, finite)

    def _record(self, identity: str, decision: Decision | None) -> dict[str, Any]:
        lines = {line["tensor"]: line for line in self.journal.lines if "tensor" in line}
        tensors = {job.name: lines[job.name]["digest"] for job in self.jobs}
        inputs = []
        for i, checkpoint in enumerate(self.checkpoints[: len(self.recipe.inputs)]):
            entry = self._about(i, checkpoint)
            if self.recipe.weights is not None or self.recipe.method == "uniform":
                entry["weight"] = self.recipe.weights[i] if self.recipe.weights else 1 / len(self.recipe.inputs)
            if decision is not None and decision.reasons:
                entry["reason"] = decision.reasons[i]
                entry["coefficient"] = float(decision.coefficients[""][i])
            inputs.append(entry)
        return {
            "capibara": __version__,
            "identity": identity,
            **{key: value for key, value in self.recipe.decides().items() if key not in ("weights", "maps")},
            "inputs": inputs,
            **({"base": self._about(len(inputs), self.checkpoints[-1])} if self.recipe.base else {}),
            **({"middle": decision.middle} if decision and decision.reasons else {}),
            **({"validation": self.validation} if self.validation else {}),
            "parameters": sum(job.numbers for job in self.jobs),
            "digest": digest_over({name: bytes.fromhex(digest) for name, digest in tensors.items()}),
            "tensors": tensors,
        }

    def _about(self, i: int, checkpoint: Checkpoint) -> dict[str, Any]:
        leaves = {name: bytes.fromhex(digests[i]) for name, digests in self.passes.inputs.items()}
        return {"path": str(checkpoint.path.resolve()), "kind": checkpoint.kind, "digest": digest_over(leaves)}

    def _check_digests(self, record: dict[str, Any]) -> None:
        for entry, wanted in zip(record["inputs"], self.recipe.digests, strict=False):
            if wanted is not None and wanted != entry["digest"]:
                raise DataError(
                    f"{entry['path']} is not what the recipe was made of: its digest is {entry['digest'][:16]}…, the "
                    f"recipe says {wanted[:16]}…"
                )

    def _publish(self, out: Path, index: bytes | None, record: dict[str, Any]) -> None:
        """The files beside the weights, then the rename."""
        from capibara.merge.card import carried_files, model_card

        files, work = self.files, self.work
        text = json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n"
        recipe = recipe_toml(self.recipe, [entry["digest"] for entry in record["inputs"]]).encode()
        if out.suffix == ".safetensors":
            files.write_atomic(out.with_name(f"{out.name}.{RECORD}"), text)
            files.write_atomic(out.with_name(f"{out.name}.recipe.toml"), recipe)
            files.rename(work / WEIGHTS, out)
            files.fsync_folder(out.parent)
            files.remove(work)
            return
        for name, data in carried_files(self.checkpoints[0], self.jobs).items():
            files.write(work / name, data)
        if index is not None:
            files.write(work / INDEX, index)
        files.write(work / RECORD, text)
        files.write(work / "recipe.toml", recipe)
        files.write(work / "README.md", model_card(record).encode())
        files.fsync_folder(work)
        files.rename(work, out)
        files.fsync_folder(out.parent)
        _tidy(out, files)


def _check_out(out: Path, recipe: Recipe) -> None:
    target = out.resolve()
    for path in (*recipe.inputs, *([recipe.base] if recipe.base else [])):
        given = path.resolve()
        if given == target:
            raise ConfigError(f"The output {out} is one of the inputs; name another place.")
        if target.is_relative_to(given) or given.is_relative_to(target):
            raise ConfigError(f"The output {out} lies inside the input {path} or holds it; name a place beside it.")
    if out.suffix in OTHER_FILES:
        raise ConfigError(f"Merges are written as safetensors: name a folder or a .safetensors file; got {out}.")
    try:
        is_folder = out.parent.is_dir()
    except OSError as error:
        raise RunError(f"{out.parent} cannot be entered ({error.strerror}); name another place.") from None
    if not is_folder:
        raise RunError(f"{out.parent} is no folder; make it first, or name another output.")


def _silent(what: str, done: int, total: int) -> None:
    pass


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and path.suffix != ".safetensors" and not any(path.iterdir())


def _identity(recipe: Recipe, checkpoints: list[Checkpoint]) -> str:
    content = {"recipe": recipe.decides(), "version": 1, "files": [_stamps([one]) for one in checkpoints]}
    return blake3(canonical(content)).hexdigest()


def _validations(out: Path, work: Path) -> list[dict[str, Any]]:
    """What earlier commands found on text: in the journal of a killed merge, or beside a finished one."""
    records: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, TypeError):
        found = (line["validation"] for line in read_journal(work / NAME)[0] if "validation" in line)
        records += [dict(json.loads(text)) for text in found]
    with suppress(OSError, ValueError, KeyError, TypeError):
        records.append(dict(json.loads(_record_path(out).read_text(encoding="utf-8"))["validation"]))
    return records


def _record_path(out: Path) -> Path:
    return out / RECORD if out.is_dir() else out.with_name(f"{out.name}.{RECORD}")


def _stamps(checkpoints: list[Checkpoint]) -> list[list[Any]]:
    """Path, size and time of every file of weights: when one of them changes, the merge is another."""
    stamps = []
    for file in (file for checkpoint in checkpoints for file in checkpoint.files):
        stat = file.stat()
        stamps.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    return stamps


def _tidy(out: Path, files: Files) -> None:
    """Removes what only an unfinished merge needs; done last, so that no death makes finished work be done again."""
    for name in (NAME, LOCK):
        files.remove(out / name)


def _found(out: Path, identity: str, files: Files) -> Report:
    """The report of an output that a killed process had just finished; anything else is not touched."""
    try:
        record = json.loads(_record_path(out).read_text(encoding="utf-8"))
        if record["identity"] == identity:
            if out.is_dir():
                _tidy(out, files)
            return Report(out, record, found=True)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RunError(f"{out} exists and is something else. Name another output, or remove it first.")
