"""docs/quality.md, written from the finished runs of `quality.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _common import machine, versions

PAGE = Path(__file__).resolve().parents[1] / "docs" / "quality.md"
Entry = dict[str, Any]

AIM_WORST, AIM_TAX = 2.0, 0.5
"""Percent of the n − f honest nodes' loss: what the worst attack may cost, and what the vote may cost without one."""


def write(entries: Sequence[Entry], *, reference: str, honest: str, liars: str, rules: Sequence[str],
          attacks: Sequence[str], setting: str) -> None:  # fmt: skip
    """Writes the page.

    Args:
      entries: One finished run each, see `quality.py`.
      reference: Row of the n − f honest nodes alone.
      honest: Row of the n honest nodes.
      liars: Row of the runs under attack.
      rules: In the order of the columns; the first two are the vote with mixed and with own rows.
      attacks: In the order of the rows.
      setting: One paragraph on model, text and rounds.
    """
    base = {e["seed"]: e["loss"] for e in entries if e["row"] == reference}
    lines = [
        "# How good is the vote?",
        "",
        "Written by `python benchmarks/quality.py --table` from the runs in `benchmarks/quality.jsonl`.",
        "",
        setting,
        "",
        "A difference is to the reference of the same seed, in nats a token, paired sequence by sequence on the test",
        "split; ± is its standard error. It says how sure the comparison of these two models is; how much another seed",
        "would differ shows where several stand.",
        "",
        "## Without liars",
        "",
        "| who trains | vote | seed | test loss | difference | percent | honest node-rounds kept out |",
        "|---|---|---|---|---|---|---|",
        *(_plain_row(e, base) for e in _sorted(entries, rules) if e["row"] != liars and liars not in e["row"]),
        "",
        "## Under attack: change of the test loss against the honest nodes alone",
        "",
        f"{liars} of {honest.split()[0]} nodes; percent of the reference's loss, seed 0. Negative is better than the",
        "honest nodes alone.",
        "",
        "| attack | " + " | ".join(rules) + " |",
        "|---|" + "---|" * len(rules),
        *(f"| `{a}` | " + " | ".join(_cell(entries, liars, rule, a, base) for rule in rules) + " |" for a in attacks),
        "| **worst** | " + " | ".join(_worst(entries, liars, rule, attacks, base) for rule in rules) + " |",
        "",
        "### The worst attacks on the vote with mixed and with own rows, every seed",
        "",
        "| attack | vote | seed | test loss | difference | percent | honest kept out | liars kept out |",
        "|---|---|---|---|---|---|---|---|",
        *(_liar_row(e, base) for e in _seeds(entries, liars, rules)),
        "",
        "## What came of it",
        "",
        *_findings(entries, base, reference, honest, liars, rules),
        "",
        f"Measured on {_machine()}.",
        "",
    ]
    PAGE.write_text("\n".join(lines))


def _sorted(entries: Iterable[Entry], rules: Sequence[str]) -> list[Entry]:
    order = {rule: k for k, rule in enumerate(rules)}
    return sorted(entries, key=lambda e: (e["row"], order[e["rule"]], e["seed"]))


def _percent(entry: Entry, base: dict[int, float]) -> float:
    return 100 * entry["difference"] / base[entry["seed"]]


def _difference(entry: Entry) -> str:
    return "–" if not entry["se"] else f"{entry['difference']:+.4f} ± {entry['se']:.4f}"


def _plain_row(entry: Entry, base: dict[int, float]) -> str:
    return (
        f"| {entry['row']} | {entry['rule']} | {entry['seed']} | {entry['loss']:.4f} | {_difference(entry)} | "
        f"{_percent(entry, base):+.2f} | {100 * entry['honest_accused']:.2f} % |"
    )


def _liar_row(entry: Entry, base: dict[int, float]) -> str:
    return (
        f"| `{entry['attack']}` | {entry['rule']} | {entry['seed']} | {entry['loss']:.4f} | {_difference(entry)} | "
        f"{_percent(entry, base):+.2f} | {100 * entry['honest_accused']:.2f} % | {100 * entry['liars_caught']:.0f} % |"
    )


def _find(entries: Iterable[Entry], row: str, rule: str, attack: str | None, seed: int = 0) -> Entry | None:
    wanted = (row, rule, attack, seed)
    return next((e for e in entries if (e["row"], e["rule"], e["attack"], e["seed"]) == wanted), None)


def _cell(entries: Sequence[Entry], row: str, rule: str, attack: str, base: dict[int, float]) -> str:
    found = _find(entries, row, rule, attack)
    if found is None:
        return "not run"
    stopped = "" if set(found["outcomes"]) == {"committed"} else f" ({_outcomes(found)})"
    return f"{_percent(found, base):+.2f}{stopped}"


def _outcomes(entry: Entry) -> str:
    return ", ".join(f"{count} {outcome.replace('_', ' ')}" for outcome, count in sorted(entry["outcomes"].items()))


def _worst(
    entries: Sequence[Entry], row: str, rule: str, attacks: Sequence[str], base: dict[int, float]
) -> str:
    found = [e for a in attacks if (e := _find(entries, row, rule, a))]
    if not found:
        return "not run"
    most = max(found, key=lambda e: e["difference"])
    part = "" if len(found) == len(attacks) else f", of {len(found)}"
    return f"**{_percent(most, base):+.2f}** (`{most['attack']}`{part})"


def _seeds(entries: Sequence[Entry], row: str, rules: Sequence[str]) -> list[Entry]:
    repeated = {e["attack"] for e in entries if e["row"] == row and e["seed"] > 0}
    return [
        e for e in sorted(_sorted(entries, rules), key=lambda e: str(e["attack"]))
        if e["row"] == row and e["attack"] in repeated and e["rule"] in rules[:2]
    ]  # fmt: skip


def _findings(
    entries: Sequence[Entry], base: dict[int, float], reference: str, honest: str, liars: str, rules: Sequence[str]
) -> list[str]:
    """The aims and whether they were met, in words; nothing is said of what was not run."""
    told: list[str] = []
    for rule in rules[:2]:
        attacked = [e for e in entries if e["row"] == liars and e["rule"] == rule]
        if attacked:
            worst = max(attacked, key=lambda e: _percent(e, base))
            met = "met" if _percent(worst, base) <= AIM_WORST else "**not met**"
            told.append(
                f"- {rule}: the worst of {len(attacked)} runs under attack is `{worst['attack']}` (seed "
                f"{worst['seed']}): {_percent(worst, base):+.2f} % against {reference}; the aim, at most "
                f"{AIM_WORST:g} %, is {met}."
            )
        taxes = [
            100 * (e["loss"] - mean["loss"]) / mean["loss"]
            for e in entries
            if e["row"] == honest and e["rule"] == rule and (mean := _find(entries, honest, "mean", None, e["seed"]))
        ]
        if taxes:
            met = "met" if max(taxes) <= AIM_TAX else "**not met**"
            shown = ", ".join(f"{tax:+.2f}" for tax in taxes)
            told.append(
                f"- {rule}: without liars it costs {shown} % against the plain mean of the same nodes (one figure a "
                f"seed); the aim, at most {AIM_TAX:g} %, is {met}."
            )
    attacked = [e for e in entries if e["rule"] == rules[0] and e["row"] == liars]
    pairs = [
        _percent(e, base) - _percent(other, base)
        for e in attacked
        if (other := _find(entries, liars, rules[1], e["attack"], e["seed"]))
    ]
    if pairs:
        better = sum(pair < 0 for pair in pairs)
        told.append(
            f"- Mixed or own rows: mixed rows are better in {better} of {len(pairs)} runs under attack; the mean "
            f"difference is {sum(pairs) / len(pairs):+.2f} points, the largest {max(pairs, key=abs):+.2f} (negative: "
            "mixed rows are better)."
        )
    for row in (honest, liars):
        for e in entries:
            kept = _find(entries, row, rules[0], e["attack"], e["seed"])
            if e["row"] == f"{row}, inner state reset" and kept:
                change = 100 * (e["loss"] - kept["loss"]) / kept["loss"]
                under = f" under `{e['attack']}`" if e["attack"] else ""
                told.append(f"- Resetting the inner optimiser state instead of keeping it{under}: {change:+.2f} %.")
    for rule in rules[:2]:
        shares = [e["honest_accused"] for e in entries if e["rule"] == rule and e["row"] == honest]
        if shares:
            told.append(
                f"- {rule}: honest node-rounds gated out or outvoted without liars: "
                f"{100 * sum(shares) / len(shares):.2f} %."
            )
    return told


def _machine() -> str:
    here, found = machine(), versions(("jax", "flax", "optax", "numpy"))
    return f"{here['cpu']}, {here['cores']} cores; " + ", ".join(f"{name} {number}" for name, number in found.items())
