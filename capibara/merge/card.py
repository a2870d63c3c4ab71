"""What goes beside merged weights: the first input's configuration and tokenizer, and a model card that says all.

The card's front matter is what model hubs read; the rest is for people.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capibara.merge.methods import METHODS
from capibara.merge.plan import Job
from capibara.merge.tensors import FLOATS, Checkpoint, numpy_type

MOST_NAMED = 50
"""Inputs in the card's table; `merge.json` lists all."""


def carried_files(first: Checkpoint, jobs: Sequence[Job]) -> dict[str, bytes]:
    """Configuration, tokenizer and generation files of the first input; the configuration names the output's dtype."""
    found = {name: data if isinstance(data, bytes) else Path(data).read_bytes() for name, data in first.carried.items()}
    if first.kind == "huggingface" and "config.json" in found:
        config = json.loads(found["config.json"])
        floats = {job.dtype for job in jobs if job.dtype in FLOATS}
        keys = [key for key in ("dtype", "torch_dtype") if key in config]
        if len(floats) == 1 and keys:
            dtype = numpy_type(floats.pop()).name
            if config[keys[0]] != dtype:
                config |= dict.fromkeys(keys, dtype)
                found["config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    return found


def model_card(record: dict[str, Any]) -> str:
    """README.md: method, inputs with digests and weights, how certain, how measured, how to make it again."""
    method = record["method"]
    lines = ["---", "tags:", "- merge", "- capibara", "---", "", "# Merged model", ""]
    lines += [
        f"Made of {len(record['inputs'])} checkpoints by `{method}`: {METHODS[method].about}. Sums were taken in "
        f"float32 or wider; {_rounding(record)}",
        "",
        "| input | digest (BLAKE3 of its tensors) | weight | note |",
        "|---|---|---|---|",
    ]
    for entry in record["inputs"][:MOST_NAMED]:
        share = entry.get("weight", entry.get("coefficient"))
        number = "" if share is None else f"{share:.6g}"
        note = entry.get("reason", "").replace("_", " ")
        lines.append(f"| {_cell(Path(entry['path']).name)} | `{entry['digest'][:32]}…` | {number} | {note} |")
    if len(record["inputs"]) > MOST_NAMED:
        lines.append(f"| and {len(record['inputs']) - MOST_NAMED} more, in `merge.json` | | | |")
    if record.get("middle"):
        lines += ["", f"A share of {record['middle']:.6g} stays on the coordinate-wise median of the inputs."]
    if "base" in record:
        lines += ["", f"Base: {_cell(Path(record['base']['path']).name)}, `{record['base']['digest'][:32]}…`."]
    if record["options"]:
        lines += ["", "Options: " + ", ".join(f"{name} = {value:g}" for name, value in record["options"].items()) + "."]
    lines += ["", "## Certificate", "", *_certificate(record), "", "## Evaluation", "", *_evaluation(record), ""]
    lines += [
        "## Made again",
        "",
        "`capibara merge --recipe recipe.toml -o OUT` gives the same bits from the same inputs:",
        "",
        f"- digest of the output's tensors: `{record['digest']}`",
        f"- {record['parameters']:,} numbers, capibara {record['capibara']}; every tensor's digest is in `merge.json`",
        "",
    ]
    return "\n".join(lines)


def _rounding(record: dict[str, Any]) -> str:
    kept = record["dtype"] or "each tensor's own type"
    if record["stochastic_rounding"]:
        return f"the output is {kept}, rounded stochastically without bias (seed {record['seed']})."
    return f"the output is {kept}, rounded to the nearest."


def _certificate(record: dict[str, Any]) -> list[str]:
    found = record.get("validation")
    if not found:
        return ["None: the weights were not found on data. Nothing is claimed about how good this merge is."]
    whose, lines = "", []
    if found["chosen"] != "candidate":
        shares = ", ".join(f"{weight:.6g}" for weight in found["candidate"])
        whose = " of the weights that the search found"
        lines = [
            f"- **not of the weights above**: the search found {shares}, but that merge measured worse than "
            f"{found['chosen']}, which this is; what follows certifies the search, and bounds nothing for this merge"
        ]
    return [
        *lines,
        f"- kind: `{found['certificate']}`; objective: {found['objective']}, value{whose} {found['value']:.6f} nats",
        f"- at most {found['dual_gap']:.3g} above the best weights' value, on these validation tokens",
        "- the gap certifies the surrogate on this validation sample, not the merged network",
    ]


def _evaluation(record: dict[str, Any]) -> list[str]:
    found = record.get("validation")
    if not found:
        return ["None was made."]
    rows = [f"| {name} | {loss:.4f} |" for name, loss in found["losses"].items()]
    head = f"Held-out loss in nats a token, {found['tokens']:,} tokens in {found['sequences']} sequences:"
    return [head, "", "| model | loss |", "|---|---|", *rows, *(["", found["caution"]] if "caution" in found else [])]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
