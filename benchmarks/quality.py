"""How good is the vote? Real text, 8 nodes, 2 liars, every attack against every rule; hours on two cores, resumable.

    python benchmarks/quality.py            # goes on where it stopped; one JSON line a run in benchmarks/quality.jsonl
    python benchmarks/quality.py --table    # writes docs/quality.md from what is there

Every run is a consensus run without a disk: the same `run_round`, the same seeds and batches, judged on the test split.
Losses are compared sequence by sequence with the n − f honest nodes alone (same seed), with the paired standard error.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE / "quality.jsonl"
SUMS = HERE / ".quality"
ROUNDS, STEPS, NODES, FAULTY, TEST_SEQUENCES = 20, 20, 8, 2, 512
ATTACKS = (
    "optimised", "alie", "ipm", "min_max", "label_flip", "sign_flip", "scale:-10", "mimic", "gaussian", "copy",
    "stale", "nan",
)  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "vote": {"merge_rows": "mixed"},
    "vote, own rows": {"merge_rows": "own"},
    "mean": {"voting_strategy": "majority"},
    "trimmed mean": {"voting_strategy": "trimmed_mean"},
    "multi-Krum": {"voting_strategy": "multi_krum"},
}
REFERENCE = "6 honest nodes alone"
WORST = 3
"""Attacks that get further seeds: so many that are worst for mixed rows, and so many that are worst for own rows."""
SETTING = f"""A byte-level decoder of {{parameters:,}} parameters on the State of the Union speeches, split by
president: {NODES} nodes, f = {FAULTY}, H = {STEPS} AdamW steps of 2 sequences of 64 tokens, {ROUNDS} rounds, the loss
judged on {TEST_SEQUENCES} held-out sequences. The {FAULTY} liars are the last nodes; they know all honest deltas and
the rule. The reference is the {NODES - FAULTY} honest nodes alone: what could be had without the liars. `vote` is the
default vote with `merge_rows = "mixed"`, `vote, own rows` with `"own"`, the default."""



class Cell(NamedTuple):
    """One run of the table."""

    row: str
    rule: str
    attack: str | None = None
    seed: int = 0
    nodes: int = NODES
    split: str = "by_field"
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.row}|{self.rule}|{self.attack}|{self.seed}"


def cells(done: dict[str, dict[str, Any]]) -> Iterator[Cell]:
    """All runs in order of importance; the worst attacks are known only once the first seed is complete."""
    honest = f"{NODES} honest nodes"
    liars = f"{FAULTY} liars"
    reset = (("inner_state", "reset"),)

    def without_liars(seed: int, rules: tuple[str, ...]) -> Iterator[Cell]:
        yield Cell(REFERENCE, "mean", seed=seed, nodes=NODES - FAULTY)
        yield from (Cell(honest, rule, seed=seed) for rule in rules)
        yield Cell("one node, the same tokens", "mean", seed=seed, nodes=1)
        yield from (Cell(f"{honest}, iid", rule, seed=seed, split="iid") for rule in ("vote", "mean"))

    yield from without_liars(0, tuple(RULES))
    for rule in ("vote", "vote, own rows"):
        yield from (Cell(liars, rule, attack) for attack in ATTACKS)
    worst: list[str] = []
    for rule in ("vote", "vote, own rows"):
        losses = {e["attack"]: e["loss"] for e in done.values() if (e["row"], e["rule"], e["seed"]) == (liars, rule, 0)}
        ordered = sorted(losses, key=lambda attack: -losses[attack])
        worst += [attack for attack in ordered[:WORST] if attack not in worst]
    for seed in (1, 2):
        yield from without_liars(seed, ("vote", "vote, own rows", "mean"))
        for rule in ("vote", "vote, own rows"):
            yield from (Cell(liars, rule, attack, seed) for attack in worst)
    yield Cell(f"{honest}, inner state reset", "vote", changes=reset)
    yield from (Cell(f"{liars}, inner state reset", "vote", attack, changes=reset) for attack in worst[:1])
    for rule in ("trimmed mean", "multi-Krum", "mean"):
        yield from (Cell(liars, rule, attack) for attack in ATTACKS)


class Bench:
    """Data, model and compiled programs, shared by all runs of a seed."""

    def __init__(self) -> None:
        from capibara.core.config import ModularConfig
        from capibara.core.model import ModularCapibaraModel
        from capibara.core.tokenizer import byte_tokenizer

        self.config = ModularConfig.preset("small").replace(
            model={"width": 200, "num_layers": 2, "num_heads": 4},
            data={"sequence_length": 64},
            training={"batch_size": 2, "learning_rate": 2e-3, "warmup_steps": 40},
            consensus={"local_steps": STEPS},
        )
        self.tokenizer = byte_tokenizer()
        self.model = ModularCapibaraModel(self.config)
        self.plans: dict[Any, Any] = {}

    def plan(self, cell: Cell) -> Any:
        """The cell's plan; objective and strategy are shared, so that programs are compiled once a shape."""
        from capibara.consensus.config import ConsensusConfig
        from capibara.core.model import objective
        from capibara.data.batches import open_source
        from capibara.training import vocabulary
        from capibara.training.session import build_plan

        single = cell.nodes == 1
        shared = (cell.split, cell.seed, single)
        if shared not in self.plans:
            source = open_source(
                self.config.data, num_nodes=1 if single else NODES, split="iid" if single else cell.split,
                seed=cell.seed, cache=SUMS / "data", tokenizer=self.tokenizer,
            )  # fmt: skip
            consensus = {"num_nodes": 1, "local_steps": STEPS * NODES, "consensus_threshold": None} if single else {}
            base = self.config.replace(consensus={"seed": cell.seed, **consensus})
            losses = self.plans.setdefault("objective", objective(self.model))
            plan = build_plan(base, losses, source, ROUNDS)
            same = self.plans.setdefault(("strategy", single), plan.strategies)
            self.plans[shared] = plan._replace(strategies=same)
        plan = self.plans[shared]
        if single:
            return plan
        threshold = 0.75 if cell.nodes == NODES else 1.0
        values = {name: getattr(plan.config, name) for name in type(plan.config).model_fields}
        values |= {"num_nodes": cell.nodes, "consensus_threshold": threshold, "attack": cell.attack}
        config = ConsensusConfig(**{**values, **RULES[cell.rule], **dict(cell.changes)})
        return plan._replace(
            config=config, aggregator=vocabulary.aggregator(config), attack=vocabulary.attack(config)
        )

    def run(self, cell: Cell) -> dict[str, Any]:
        """Trains one cell and judges it."""
        import numpy as np

        from capibara.consensus.gates import sequence_sums
        from capibara.core.model import ModularCapibaraModel, parameters
        from capibara.round import run_round
        from capibara.round_state import first_state

        began = time.monotonic()
        plan = self.plan(cell)
        params = parameters(ModularCapibaraModel(self.config, seed=cell.seed))
        state = first_state(plan, params)
        outcomes, accused, caught, seen = [], 0, 0, {}
        honest = [i for i in range(cell.nodes) if i not in plan.hostile]
        while state.round < ROUNDS:
            before = state.round
            state, record = run_round(plan, state, first_draw=len(outcomes), past_digests=seen)
            reasons = [node["reason"] for node in record.line["nodes"]]
            for node in record.line["nodes"]:
                seen.setdefault(node["id"], {})[node["digest"]] = before
            outcomes.append(record.line["outcome"])
            accused += sum(reasons[i] != "backed" for i in honest)
            caught += sum(reasons[i] != "backed" for i in plan.hostile)
            if outcomes.count("no_quorum") >= 3 or outcomes[-5:] == ["refused"] * 5:
                break
        batch = plan.source.held_out("test", round=0, draw=0, count=TEST_SEQUENCES)
        sums, tokens = sequence_sums(plan.objective, state.params, batch)
        if cell.row == REFERENCE:
            SUMS.mkdir(exist_ok=True)
            np.savez(reference_sums(cell.seed), sums=sums)
        rounds = max(len(outcomes), 1)
        return {
            "row": cell.row, "rule": cell.rule, "attack": cell.attack, "seed": cell.seed,
            "loss": float(sums.sum() / tokens.sum()), **against_reference(cell, sums, tokens),
            "rounds": state.round, "outcomes": {o: outcomes.count(o) for o in set(outcomes)},
            "honest_accused": accused / (rounds * len(honest)),
            "liars_caught": caught / (rounds * len(plan.hostile)) if plan.hostile else None,
            "parameters": self.model.num_parameters, "seconds": round(time.monotonic() - began),
        }  # fmt: skip


def against_reference(cell: Cell, sums: Any, tokens: Any) -> dict[str, float | None]:
    """Paired difference to the n − f honest nodes alone, nats a token, with its standard error."""
    import numpy as np

    from capibara.consensus.gates import paired

    mean, se = paired((sums - np.load(reference_sums(cell.seed))["sums"])[None], tokens)
    return {"difference": float(mean[0]), "se": float(se[0])}


def reference_sums(seed: int) -> Path:
    """Where the test losses of the n − f honest nodes alone are kept, sequence by sequence."""
    return SUMS / f"reference-{seed}.npz"


def results(everything: bool = False) -> dict[str, dict[str, Any]]:
    """Finished runs by name; a reference whose sums are not on this machine counts only for `everything`."""
    if not RESULTS.exists():
        return {}
    entries = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    named = {f"{e['row']}|{e['rule']}|{e['attack']}|{e['seed']}": e for e in entries}
    return {
        name: e
        for name, e in named.items()
        if everything or e["row"] != REFERENCE or reference_sums(e["seed"]).exists()
    }


def main() -> None:
    """Runs what is missing, or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write docs/quality.md from the finished runs")
    if parser.parse_args().table:
        from _quality_table import write

        entries, honest = list(results(everything=True).values()), f"{NODES} honest nodes"
        write(
            entries, reference=REFERENCE, honest=honest, liars=f"{FAULTY} liars", rules=tuple(RULES), attacks=ATTACKS,
            setting=SETTING.format(parameters=entries[0]["parameters"] if entries else 0),
        )  # fmt: skip
        return
    from capibara.runtime import prepare_process

    prepare_process()
    bench, done = Bench(), results()
    while (cell := next((c for c in cells(done) if c.name not in done), None)) is not None:
        entry = bench.run(cell)
        with RESULTS.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        done[cell.name] = entry
        print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
