"""A real Llama, end to end: three fine-tunes as Hugging Face folders, merged by every method, loaded by transformers.

    python benchmarks/merge_llama.py FOLDER -o OUT      FOLDER: SmolLM2-135M, or another small Llama; needs `make peers`

The fine-tunes (`_merge_bench.LLAMA`: older speeches, newer ones, programs) are trained once and kept. Each merge is the
command `capibara merge` in a process of its own. Its folder is then loaded by transformers, in float32, and by us, and
the logits of one text are compared; our own forward pass gives the losses on held-out text of the three domains. Prints
a JSON line a merge and a table; OUT/results.jsonl keeps the lines, and what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import say
from _merge_bench import LLAMA, Bench
from _merge_llama import read_llama
from _merge_text import TEST, VALIDATION

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
COMMAND = Path(sys.executable).parent / "capibara"
VALIDATION_TEXT = "validation.jsonl"
LOGITS_OF = "Fellow citizens of the Senate: the model below was merged from three others, and reads like this."
THEIRS = """
import sys, numpy, torch, transformers
transformers.logging.set_verbosity_error()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model, report = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, output_loading_info=True
)
assert not any(report.values()), report
ids = tokenizer(sys.argv[3], return_tensors="pt", add_special_tokens=False).input_ids
with torch.no_grad():
    numpy.savez(sys.argv[2], ids=ids.numpy(), logits=model.eval()(ids).logits.numpy())
"""


def main() -> None:
    """Trains, merges, compares."""
    parser = argparse.ArgumentParser(description="A real Llama, merged by every method.")
    parser.add_argument("folder", type=Path, help="a Hugging Face folder with one model.safetensors")
    parser.add_argument("-o", "--out", type=Path, required=True, help="where fine-tunes and merges are written")
    parser.add_argument("--transformers", type=Path, default=PEERS, help="an interpreter that has transformers")
    given = parser.parse_args()
    from capibara.runtime import prepare_process

    prepare_process()
    given.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(LLAMA, HERE / ".merge_quality", given.folder)
    names = bench.names("domains")
    for name in names:
        write_folder(given.folder, given.out / name, bench.get(0, name))
    write_validation(bench, given.out / VALIDATION_TEXT)
    compare(bench, given.folder, given.out, names, given.transformers)


def compare(bench: Bench, base: Path, out: Path, names: tuple[str, ...], interpreter: Path) -> None:
    """Every row that is missing, then the table."""
    results = out / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    rows = {entry["merge"]: entry for entry in map(json.loads, lines)}
    judge = Judge(bench)
    for name, options in merges(base, len(names), out / VALIDATION_TEXT).items():
        if name in rows:
            continue
        folder, began = (base if name == "base" else out / name), time.monotonic()
        if options is not None:
            folder = out / "merged"
            shutil.rmtree(folder, ignore_errors=True)
            inputs = [str(out / each) for each in names]
            subprocess.run([COMMAND, "merge", *inputs, "-o", folder, *options], check=True, capture_output=True)
        merged = time.monotonic()
        params, gap, scale = judge.logits(folder, interpreter, out / "logits.npz")
        rows[name] = {"merge": name, "losses": judge.losses(params), "largest_gap": gap, "largest_logit": scale,
                      "merge_s": round(merged - began, 1), "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
        with results.open("a") as file:
            file.write(json.dumps(rows[name]) + "\n")
        say(json.dumps(rows[name]))
    print(table(list(rows.values())))


def merges(base: Path, count: int, validation: Path) -> dict[str, tuple[str | Path, ...] | None]:
    """Row → options of the command; None is a model that is only judged."""
    from capibara.merge.methods import METHODS

    rows: dict[str, tuple[str | Path, ...] | None] = {"base": None, **{f"domain-{i}": None for i in range(count)}}
    for name, method in METHODS.items():
        options: tuple[str | Path, ...] = ("--method", name)
        if method.base == "must":
            options += ("--base", base)
        if name == "weighted":
            options += ("--weights", "0.5,0.3,0.2")
        if method.per_fault is not None:
            options += ("--faulty", str((count - method.least) // method.per_fault))
        rows[name] = options
        if name == "uniform":
            rows["certified weights"] = ("--validation", validation)
    return rows


def write_folder(base: Path, folder: Path, params: dict[str, Any]) -> None:
    """A fine-tune as float32 under Llama's names, with the files of its base beside it."""
    from capibara.files import Files, read_tensors, tensors_to_bytes
    from capibara.hf.llama import our_array, our_name

    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(exist_ok=True)
    for file in base.glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2))
    names = [name for name in read_tensors(base / "model.safetensors") if our_name(name) in params]
    tensors = {n: np.ascontiguousarray(our_array(n, np.asarray(params[our_name(n)], np.float32))) for n in names}
    Files().write_atomic(folder / "model.safetensors", tensors_to_bytes(tensors))


def write_validation(bench: Bench, path: Path) -> None:
    """Held-out text of the three domains that no row is judged on; a sequence is a document."""
    held = bench.texts.held_out("domains", 0, VALIDATION, bench.setting.validation)
    texts = [bench.tokenizer.decode(row[mask].tolist()) for row, mask in zip(held["tokens"], held["mask"], strict=True)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


class Judge:
    """Losses on the three domains and the logits of a text, compiled once."""

    def __init__(self, bench: Bench):
        import jax

        from capibara.consensus.evidence import held_out

        self.bench = bench
        assert bench.objective.logits is not None
        self.logits_of = jax.jit(bench.objective.logits)
        self.test = held_out(bench.texts.held_out("domains", 0, TEST, bench.setting.test))

    def logits(self, folder: Path, interpreter: Path, scratch: Path) -> tuple[dict[str, Any], float, float]:
        """Our parameters, the largest difference of logits between us and transformers, and the largest logit."""
        subprocess.run([interpreter, "-c", THEIRS, folder, scratch, LOGITS_OF], check=True, capture_output=True)
        theirs = np.load(scratch)
        ids = theirs["ids"].astype(np.int32)
        positions = np.arange(ids.shape[1], dtype=np.int32)[None]
        params = read_llama(folder)[1]
        batch = {"tokens": ids, "segments": np.ones_like(ids), "positions": positions}
        ours = np.asarray(self.logits_of(params, batch))
        return params, float(np.abs(ours - theirs["logits"]).max()), float(np.abs(ours).max())

    def losses(self, params: dict[str, Any]) -> list[float]:
        """Nats a token on each domain's test split; the sequences of a domain stand together."""
        from capibara.consensus.evidence import read_logs

        logs, rows = read_logs(self.bench.objective, params, self.test)
        sums, counts = np.bincount(rows.sequence, -rows.tokens * logs), np.bincount(rows.sequence, rows.tokens)
        domains = self.bench.setting.models
        return [float(s.sum() / c.sum()) for s, c in zip(*(np.split(x, domains) for x in (sums, counts)), strict=True)]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in the order of the rows."""
    lines = ["| merge | older speeches | newer speeches | programs | mean | logits differ by | merging |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        losses = " | ".join(f"{loss:.3f}" for loss in (*row["losses"], float(np.mean(row["losses"]))))
        lines.append(f"| {row['merge']} | {losses} | {row['largest_gap']:.1e} | {row['merge_s']:.0f} s |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
