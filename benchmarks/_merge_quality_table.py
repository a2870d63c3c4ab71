"""docs/merge-quality.md, written from the finished cells of `merge_quality.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _common import machine, versions
from _merge_bench import SWEEP, Setting
from _merge_methods import BEST, UNIFORM
from _merge_text import YEAR

Entry = dict[str, Any]
FAMILY_WORDS = {
    "sweep": "A sweep: fine-tunes of one base with other learning rates, decays and orders of the same text.",
    "two bad": "Two are bad: the sweep's first, one tuned on wrong targets (poisoned), one on programs (irrelevant).",
    "experts": "Experts: fine-tunes of one base, each on the speeches of presidents of its own; judged on all of them.",
    "domains": "Domains: one pretrained Llama tuned on older speeches, newer ones and programs; judged on all three.",
    "trajectory": "A trajectory: the last checkpoints of one run at constant learning rate.",
}


def write(
    entries: Sequence[Entry], page: Path, *, families: Sequence[str], main: Sequence[str], reference: Sequence[str],
    decay: Sequence[str], setting: Setting, cells: int,
) -> None:  # fmt: skip
    """Writes the page.

    Args:
      entries: One finished cell each, see `merge_quality.py`.
      page: Where to.
      families: Of ingredients, in order.
      main: Rows of the soup table, in order.
      reference: Rows of merges by rule.
      decay: Rows of merging instead of decay.
      setting: Of the runs.
      cells: How many there are when all is computed.
    """
    missing = cells - len(entries)
    lines = [
        "# How good is a merge?",
        "",
        "Written by `python benchmarks/merge_quality.py --table` from the runs in `benchmarks/merge_quality.jsonl`.",
        "",
        *_setting(entries, setting),
        "",
        "Differences are in nats a token, paired sequence by sequence on the test sequences, on which no model was",
        "trained and no weight found; they are means over the seeds. ± is the standard error over sequences. *Better",
        "in* counts the seeds in which the 95 % interval lies below zero, *worse in* those in which it lies above.",
        "Seconds are those of merging and judging, not of training the models.",
    ]
    if missing:
        fewer = f"rows of fewer than {len(setting.seeds)} seeds will change."
        lines += ["", f"**{missing} of {cells} cells are not computed yet**: {fewer}"]
    for family in families:
        rows = [e for e in entries if e["part"] == "soup" and e["family"] == family]
        lines += ["", f"## {FAMILY_WORDS[family].partition(':')[0]}", "", FAMILY_WORDS[family], ""]
        lines += _table(rows, [*main, *reference], (BEST, UNIFORM)) if rows else ["Not run."]
        lines += ["", *_certificates(rows)] if rows else []
    lines += ["", "## Merging instead of decaying the learning rate", ""]
    lines += [
        "All runs see the same tokens in the same order, from the same weights. The constant rate's checkpoints are",
        f"{setting.spacing} steps apart; WSD decays over the last fifth.",
        "",
    ]
    rows = [e for e in entries if e["part"] == "decay"]
    lines += _table(rows, decay, decay[:2]) if rows else ["Not run."]
    lines += ["", "## Loss against the number of models", ""]
    curves = [e for e in entries if e["part"] == "number"]
    lines += _curves(curves, families) if curves else ["Not run."]
    lines += ["", "## What came of it", "", *_findings(entries, families, decay), "", f"Measured on {_machine()}.", ""]
    page.write_text("\n".join(lines))


def _setting(entries: Sequence[Entry], s: Setting) -> list[str]:
    size = f"{entries[0]['parameters']:,}" if entries else "no"
    tokens = f"a BPE of {s.vocabulary} tokens" if s.vocabulary else "bytes"
    older = "a text of its own" if s.text else f"the State of the Union speeches before {YEAR}"
    rates = ", ".join(f"{rate:g}/{decay:g}" for rate, decay in SWEEP[: s.models])
    return [
        f"Decoders of {size} parameters over {tokens}. The base is trained on {older}: {s.steps} AdamW steps of",
        f"{s.batch} sequences of {s.length} tokens. {s.models} fine-tunes of {s.tune_steps} steps are on the speeches",
        f"from {YEAR} on; learning rate/weight decay of the sweep: {rates}. Weights are found on up to {s.validation}",
        f"held-out sequences and judged on up to {s.test} others.",
    ]


def _table(entries: Sequence[Entry], rows: Sequence[str], bases: Sequence[str]) -> list[str]:
    first, second = bases[:2]
    lines = [
        f"| merge | seeds | test loss | against {first} | better in | worse in | against {second} | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = [e for e in entries if e["row"] == row]
        if not found:
            continue
        loss, seconds = _mean(e["loss"] for e in found), _mean(e["seconds"] for e in found)
        better, worse = (sum(_clear(e, first, sign) for e in found) for sign in (-1, 1))
        counts = "– | –" if row == first else f"{better} | {worse}"
        lines.append(
            f"| {row} | {len(found)} | {loss:.4f} | {_difference(found, first)} | {counts} | "
            f"{_difference(found, second)} | {seconds:.0f} |"
        )
    return lines


def _difference(entries: Sequence[Entry], other: str) -> str:
    pairs = [e["against"][other] for e in entries if other in e["against"]]
    if not pairs:
        return "–"
    mean, se = _mean(p[0] for p in pairs), math.sqrt(sum(p[1] ** 2 for p in pairs)) / len(pairs)
    return f"{mean:+.4f} ± {se:.4f}"


def _clear(entry: Entry, other: str, sign: int) -> bool:
    mean, se = entry["against"].get(other, (0.0, 0.0))
    return sign * mean - 1.96 * se > 0


def _certificates(entries: Sequence[Entry]) -> list[str]:
    found = [e for e in entries if "certificate" in e]
    if not found:
        return []
    lines = [
        "What the searches for weights reported, on the validation data:",
        "",
        "| problem | seed | chosen | gap | certificate | transfer gap | left out | weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in sorted(found, key=lambda e: (e["row"], e["seed"])):
        gap = "–" if e["dual_gap"] is None else f"{e['dual_gap']:.1e}"
        out = ", ".join(f"{i}: {reason.replace('_', ' ')}" for i, reason in e["excluded"].items()) or "–"
        weights = " ".join(f"{w:.2f}" for w in e["candidate"])
        lines.append(
            f"| {e['row']} | {e['seed']} | {e['chosen']} | {gap} | {e['certificate'].replace('_', ' ')} | "
            f"{e['transfer_gap']:+.4f} | {out} | {weights} |"
        )
    return [*lines, "", "The weights are those that the solver found, whatever was chosen in the end."]


def _curves(entries: Sequence[Entry], families: Sequence[str]) -> list[str]:
    lines = [
        "Test loss, mean over the seeds and over random subsets of k models; for the trajectory the newest k. The",
        "plain mean and the certified weights are merges without a fallback; the ensemble mixes probabilities evenly.",
    ]
    for family in families:
        found = [e["curve"] for e in entries if e["family"] == family]
        if not found:
            continue
        lines += [
            "", f"### {family.capitalize()} (seeds: {len(found)})", "",
            "| k | one model, mean | one model, best on test | plain mean | certified weights | ensemble |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for points in zip(*found, strict=True):
            columns = ("mean_single", "best_single", "uniform", "certified", "ensemble")
            values = " | ".join(f"{_mean(p[c] for p in points):.4f}" for c in columns)
            lines.append(f"| {points[0]['k']} | {values} |")
    return lines


def _findings(entries: Sequence[Entry], families: Sequence[str], decay: Sequence[str]) -> list[str]:
    """What was measured, in words; nothing is said of what was not run."""
    told: list[str] = []
    for family in families:
        rows = [e for e in entries if e["part"] == "soup" and e["family"] == family]
        for row in ("certified weights", "greedy, sorted", UNIFORM):
            found = [e for e in rows if e["row"] == row and BEST in e["against"]]
            if found:
                worse = sum(_clear(e, BEST, 1) for e in found)
                told.append(
                    f"- {family.capitalize()}, {row}: {_difference(found, BEST)} against the best single model; "
                    f"clearly worse in {worse} of {len(found)} seeds."
                )
        means = {e["row"]: [o["loss"] for o in rows if o["row"] == e["row"]] for e in rows}
        most = max(map(len, means.values()), default=0)
        whole = {row: _mean(losses) for row, losses in means.items() if len(losses) == most and "ensemble" not in row}
        if len(whole) > 2:
            least = ", ".join(row for row in whole if whole[row] == min(whole.values()))
            told.append(f"- {family.capitalize()}: the lowest mean test loss of one network is that of {least}.")
    rows = [e for e in entries if e["part"] == "decay"]
    merges = [row for row in decay[3:] if any(e["row"] == row for e in rows)]
    if merges:
        least = min(merges, key=lambda row: _mean(e["loss"] for e in rows if e["row"] == row))
        found = [e for e in rows if e["row"] == least]
        for other in decay[:2]:
            told.append(
                f"- Instead of decay: {least} is the best of the merges (chosen here, on the test loss): "
                f"{_difference(found, other)} against {other}."
            )
    return told or ["Nothing yet."]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _machine() -> str:
    here, found = machine(), versions(("jax", "flax", "optax", "numpy"))
    return f"{here['cpu']}, {here['cores']} cores; " + ", ".join(f"{name} {number}" for name, number in found.items())
