"""Generation on a CPU with SmolLM2-135M's shape: our cache of keys and values against transformers' on torch.

    .venv-peers/bin/python benchmarks/generation.py [FOLDER]      a Hugging Face folder; random weights without one

Greedy, one core and one thread each, in one process, in turn; a run reads the prompt and makes all new tokens. Our int8
weights stand beside transformers' of the row's dtype: on a CPU it has no int8 of its own without further packages. In
float32 the first new tokens must agree, where the weights are a trained model's; later ones part at near ties. Needs
`make peers`.
"""

from __future__ import annotations

import os

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX and torch count the cores

import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from _common import emit, interleaved, row, say  # noqa: E402
from _merge_llama import read_llama  # noqa: E402

PROMPT, NEW = 32, 32
BATCHES = (1, 16)
AIM = 1.5
REPEATS = 3


def main() -> None:
    """Prints tokens a second and ratios for every dtype and batch."""
    import torch
    import transformers

    from capibara.runtime import prepare_process

    prepare_process()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else write_random(Path(made))
        for dtype in ("float32", "bfloat16"):
            ours, theirs, vocabulary = models(folder, dtype)
            for batch in BATCHES:
                prompt = np.random.default_rng(0).integers(3, vocabulary, (batch, PROMPT)).astype(np.int32)
                rows += measure(ours, theirs, prompt, dtype, trained=len(sys.argv) > 1)
    emit("generation", rows)


def measure(ours: Any, theirs: Any, prompt: np.ndarray, dtype: str, *, trained: bool) -> list[dict[str, Any]]:
    """Rows of one dtype and batch."""
    import torch

    from capibara.core.generate import generate

    ids = torch.from_numpy(prompt.astype(np.int64))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    candidates = {
        "capibara": lambda: generate(ours, prompt, NEW, temperature=0.0),
        "capibara int8": lambda: generate(ours, prompt, NEW, temperature=0.0, weights="int8"),
        "transformers": lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), **options),
    }
    if trained and dtype == "float32":
        mine, other = candidates["capibara"](), candidates["transformers"]()[:, PROMPT:].numpy()
        if not np.array_equal(mine[:, 0], other[:, 0]):
            sys.exit("The first new tokens differ: the models are not the same.")
    timings = interleaved(candidates, repeats=REPEATS)
    batch, rows = len(prompt), []
    label = f"{PROMPT} + {NEW} tokens, batch {batch}, {dtype}"
    for name, t in timings.items():
        tokens = batch * NEW
        spread = tokens / t.high, tokens / t.low
        rows.append(row(f"{name}: {label}", round(tokens / t.median, 1), "tokens/s", spread=spread))
    for name, kind in (("capibara", ""), ("capibara int8", ", ours in int8")):
        ratio = timings["transformers"].median / timings[name].median
        say(f"{label}{kind}: {ratio:.2f} × transformers")
        rows.append(row(f"ratio: {label}{kind}", round(ratio, 2), "×", limit=f"≥ {AIM} ×", met=ratio >= AIM))
    return rows


def models(folder: Path, dtype: str) -> tuple[Any, Any, int]:
    """The same weights in both libraries, and the size of the vocabulary."""
    import torch
    import transformers

    from capibara.core.model import ModularCapibaraModel, with_parameters

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    shape, params, _ = read_llama(folder)
    config = shape.replace(dtype=dtype) if hasattr(shape, "replace") else shape.model_copy(update={"dtype": dtype})
    return with_parameters(ModularCapibaraModel(config, seed=0), params), theirs, config.vocab_size


def write_random(folder: Path) -> Path:
    """A folder of SmolLM2-135M's shape with random weights."""
    import transformers

    from capibara.core.tokenizer import byte_tokenizer

    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, rope_theta=100_000.0, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save(folder / "tokenizer.json")
    return folder


if __name__ == "__main__":
    main()
