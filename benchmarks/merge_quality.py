"""How good is a merge? Real text, every way to merge against every kind of ingredient; hours on two cores, resumable.

    python benchmarks/merge_quality.py            # goes on where it stopped; a JSON line a cell in merge_quality.jsonl
    python benchmarks/merge_quality.py --table    # writes docs/merge-quality.md from what is there
    python benchmarks/merge_quality.py --small    # every kind of cell once, tiny, in a temporary folder: minutes
    python benchmarks/merge_quality.py --llama DIR    # the part on a Llama folder (SmolLM2-135M) tuned on three domains

Models are trained when the first cell needs them and kept, see `_merge_bench.py`; ways to merge are in
`_merge_methods.py`. Weights are found on one held-out split and judged on another, sequence by sequence against the
best single model (chosen on the first split) and the plain mean, with paired standard errors.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _common import say
from _merge_bench import LLAMA, SMALL, SMALL_LLAMA, Bench, Setting
from _merge_methods import BEST, MAIN, REFERENCE, SLOW, UNIFORM, Case, Merged, mixed, mixture_weights
from _merge_text import TEST, VALIDATION

HERE = Path(__file__).parent
RESULTS = "merge_quality.jsonl"
FAMILIES = ("sweep", "two bad", "experts", "trajectory")
DOMAINS = "domains"
COSINE, WSD = "cosine", "WSD"
BASES = {"soup": (BEST, UNIFORM), "decay": (COSINE, WSD), "number": ()}
"""The rows with which the others of a part are compared; they come first."""

SUBSETS = 2
COLUMNS = ("mean_single", "best_single", "uniform", "certified", "ensemble")
"""What a point of the curve over the number of models tells."""



class Cell(NamedTuple):
    """One line of the results."""

    part: str
    family: str
    row: str
    seed: int

    @property
    def name(self) -> str:
        return "|".join(map(str, self))


def decay_rows(setting: Setting) -> dict[str, tuple[str, str, int]]:
    """Row → the run it is of, what is done with its checkpoints, and how many of them."""
    half, whole = setting.models // 2, setting.models
    return {
        COSINE: ("cosine", "last", 1),
        WSD: ("wsd", "last", 1),
        "constant rate": ("constant", "last", 1),
        f"constant rate, mean of the last {half}": ("constant", "linear", half),
        f"constant rate, mean of the last {whole}": ("constant", "linear", whole),
        f"constant rate, 1-sqrt weights, last {half}": ("constant", "1-sqrt", half),
        f"constant rate, 1-sqrt weights, last {whole}": ("constant", "1-sqrt", whole),
    }


def cells(setting: Setting) -> Iterator[Cell]:
    """All cells, the most important first."""
    if setting.llama:
        yield from (Cell("soup", DOMAINS, row, seed) for seed in setting.seeds for row in MAIN | REFERENCE)
        return
    for seed in setting.seeds:
        for family in FAMILIES:
            yield from (Cell("soup", family, row, seed) for row in MAIN if row not in SLOW)
            if family == "sweep":
                yield from (Cell("decay", "trajectory", row, seed) for row in decay_rows(setting))
        for family in FAMILIES:
            yield from (Cell("soup", family, row, seed) for row in SLOW)
    for seed in setting.seeds:
        for family in FAMILIES[:3]:
            yield from (Cell("soup", family, row, seed) for row in REFERENCE)
    for seed in setting.seeds:
        yield from (Cell("number", family, "1 to all", seed) for family in ("sweep", "experts", "trajectory"))


class Results:
    """The finished cells of a setting, and the test losses of those that others are compared with."""

    def __init__(self, path: Path, bench: Bench):
        self.path, self.bench = path, bench
        self.done = {e["name"]: e for e in read(path, bench.digest) if self.usable(e)}

    def logs_path(self, part: str, family: str, row: str, seed: int) -> Path:
        return self.bench.folder / f"{part}-{family}-{row}-{seed}.npy".replace(" ", "_")

    def usable(self, entry: dict[str, Any]) -> bool:
        """A base whose test losses are not on this machine is computed again."""
        key = (entry["part"], entry["family"], entry["row"], entry["seed"])
        return entry["row"] not in BASES[entry["part"]] or self.logs_path(*key).exists()

    def add(self, cell: Cell, entry: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.done[cell.name] = entry


def run(bench: Bench, results: Results, cell: Cell) -> dict[str, Any]:
    """Computes one cell, training what it needs."""
    import numpy as np

    from capibara.consensus.evidence import held_out, read_logs

    setting, began = bench.setting, time.monotonic()
    names = list(needed(setting, bench, cell))
    trees = [bench.get(cell.seed, name) for name in names]
    trained = time.monotonic() - began
    validation, test = (
        held_out(bench.texts.held_out(cell.family, cell.seed, splits, count))
        for splits, count in ((VALIDATION, setting.validation), (TEST, setting.test))
    )
    base = bench.get(cell.seed, "cosine") if cell.row in REFERENCE else None
    case = Case(trees, base, bench.objective, validation, test, math.log(bench.tokenizer.vocab_size), cell.seed)
    entry: dict[str, Any] = {"name": cell.name, **cell._asdict(), "setting": bench.digest,
                             "parameters": bench.model.num_parameters}  # fmt: skip
    if cell.part == "number":
        entry["curve"] = curve(case, nested=cell.family == "trajectory")
    else:
        merged = decayed(case, setting, cell.row) if cell.part == "decay" else (MAIN | REFERENCE)[cell.row].run(case)
        logs, rows = read_logs(case.objective, trees[0] if merged.params is None else merged.params, test)
        logs = logs if merged.logs is None else merged.logs
        entry |= {"loss": rows.loss(logs), "against": {}, **merged.notes}
        for other in BASES[cell.part]:
            path = results.logs_path(cell.part, cell.family, other, cell.seed)
            if other == cell.row:
                np.save(path, np.asarray(logs, np.float32))
            elif path.exists():
                mean, se = rows.paired(logs, np.load(path))
                entry["against"][other] = [mean, se]
    now = time.monotonic()
    return {**entry, "trained_s": round(trained), "seconds": round(now - began - trained, 1)}


def needed(setting: Setting, bench: Bench, cell: Cell) -> tuple[str, ...]:
    """The models of a cell, by name."""
    if cell.part != "decay":
        return bench.names(cell.family)
    kind, _, count = decay_rows(setting)[cell.row]
    return bench.names("trajectory")[-count:] if kind == "constant" else (kind,)


def decayed(case: Case, setting: Setting, row: str) -> Merged:
    """Checkpoints weighed like a decay of the learning rate; the linear one is the plain mean."""
    from capibara.consensus.averages import decay_weights
    from capibara.consensus.soups import linear_soup

    _, how, count = decay_rows(setting)[row]
    return Merged(case.trees[-1] if how == "last" else linear_soup(case.trees, decay_weights(count, how)).params)


def curve(case: Case, *, nested: bool) -> list[dict[str, float]]:
    """Test loss against the number of models: means over random subsets, or the newest where they come in order."""
    import numpy as np

    from capibara.consensus.combine import combine
    from capibara.consensus.evidence import gather, read_logs

    count, rng = len(case.trees), np.random.default_rng(case.seed)
    seen = gather(case.trees, case.objective, case.validation, chance=case.chance)
    fresh = gather(case.trees, case.objective, case.test)

    def merged(weights: np.ndarray) -> np.ndarray:
        if weights.max() == 1:
            return fresh.logs[:, weights.argmax()]
        return read_logs(case.objective, combine(case.trees, weights), case.test)[0]

    def losses(chosen: np.ndarray) -> list[float]:
        equal = np.isin(np.arange(count), chosen) / len(chosen)
        weights = mixture_weights(seen.logs, seen.rows.tokens, np.intersect1d(chosen, seen.usable))
        alone, logs = fresh.losses[chosen], (merged(equal), merged(weights), mixed(fresh.logs, equal))
        return [alone.mean(), alone.min(), *map(fresh.rows.loss, logs)]

    points = []
    for k in range(1, count + 1):
        if nested or k == count:
            drawn = [np.arange(count - k, count)]
        elif k == 1:
            drawn = [np.array([i]) for i in range(count)]
        else:
            drawn = [rng.permutation(count)[:k] for _ in range(SUBSETS)]
        values = np.mean([losses(chosen) for chosen in drawn], axis=0)
        points.append({"k": k, "subsets": len(drawn), **dict(zip(COLUMNS, map(float, values), strict=True))})
    return points


def hours(bench: Bench, todo: list[Cell]) -> tuple[float, float]:
    """What is left, of training and of merging, from a measured step and forward pass."""
    setting, (step, forward) = bench.setting, bench.measure()
    names = {(cell.seed, name) for cell in todo for name in needed(setting, bench, cell)}
    m, sequences = setting.models, 0
    for cell in todo:
        of_validation, of_test = (MAIN | REFERENCE)[cell.row].passes(m) if cell.part == "soup" else (0, 1)
        if cell.part == "number":
            of_validation, of_test = m, m + 2 * ((m - 2) * SUBSETS + 1)
        sequences += of_validation * setting.validation + of_test * setting.test
    return bench.steps_to_make(names) * step / 3600, sequences * forward / 3600


def read(path: Path, digest: str) -> list[dict[str, Any]]:
    """The newest line of each cell of a setting, named by its digest or the beginning of it."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({e["name"]: e for e in map(json.loads, lines) if e["setting"].startswith(digest)}.values())


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, or writes the table."""
    parser = argparse.ArgumentParser(description="How good is a merge?")
    parser.add_argument("--table", action="store_true", help="write docs/merge-quality.md from the finished cells")
    parser.add_argument("--small", action="store_true", help="every kind of cell, tiny, in a temporary folder")
    parser.add_argument("--text", nargs="+", default=(), help="folders or files for the base, instead of old speeches")
    parser.add_argument("--llama", type=Path, help="a Hugging Face folder of a Llama, tuned on three domains")
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="only these: two processes can share the work")
    given = parser.parse_args(arguments)
    if given.llama and (given.text or given.small):
        parser.error("--llama has texts of its own and a size of its own; leave --text and --small out.")
    setting = LLAMA if given.llama else Setting(text=tuple(given.text))
    if given.small:
        with tempfile.TemporaryDirectory() as folder:
            small(Path(folder), SMALL._replace(text=tuple(given.text)))
    elif given.table:
        table((Setting(text=tuple(given.text)), LLAMA), HERE / RESULTS, HERE.parent / "docs" / "merge-quality.md")
    else:
        work(setting, HERE / ".merge_quality", HERE / RESULTS, given.llama, given.seeds)


def small(folder: Path, setting: Setting) -> None:
    """Computes every kind of cell in a folder and prints the page."""
    from _merge_llama import write_random_llama

    write_random_llama(folder / "llama")
    work(setting, folder, folder / RESULTS)
    work(SMALL_LLAMA, folder, folder / RESULTS, folder / "llama")
    table((setting, SMALL_LLAMA), folder / RESULTS, folder / "page.md")
    print((folder / "page.md").read_text())


def work(
    setting: Setting, folder: Path, results_path: Path, llama: Path | None = None, seeds: Sequence[int] = ()
) -> None:
    """Computes every cell that is missing, of these seeds or of all."""
    from capibara.runtime import prepare_process

    prepare_process()
    bench = Bench(setting, folder, llama)
    results = Results(results_path, bench)
    todo = [c for c in cells(setting) if c.name not in results.done and c.seed in (seeds or setting.seeds)]
    if not todo:
        return
    training, merging = hours(bench, todo)
    say(
        f"{bench.model.num_parameters:,} parameters, {len(todo)} cells to go: about {training:.2f} h of training and "
        f"{merging:.2f} h of merging, if the machine stays as busy as now."
    )
    for cell in todo:
        entry = run(bench, results, cell)
        results.add(cell, entry)
        print(json.dumps(entry), flush=True)


def table(settings: tuple[Setting, ...], results_path: Path, page: Path) -> None:
    """Writes the page from the finished cells of the settings; the first is the one that is described."""
    from _merge_quality_table import write

    write(
        [entry for setting in settings for entry in read(results_path, setting.digest)], page,
        families=(*FAMILIES, DOMAINS), main=tuple(MAIN), reference=tuple(REFERENCE),
        decay=tuple(decay_rows(settings[0])), setting=settings[0],
        cells=sum(len(list(cells(setting))) for setting in settings),
    )  # fmt: skip


if __name__ == "__main__":
    main()
