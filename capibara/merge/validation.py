"""Weights for a merge found on held-out text: P1, the mixture problem, with its gap, and the merge evaluated.

    text ─ first input's tokenizer ─► sequences ─► log-probabilities of every input ─► convex weights ─► weighted merge

Works for models that capibara can run: its own folders and runs, and Llama-shaped Hugging Face folders. One model at a
time is in memory, as float32, beside the one that is being summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from capibara import __version__
from capibara.consensus.certificate import canonical
from capibara.errors import ConfigError, DataError
from capibara.merge.recipe import Recipe
from capibara.merge.stream import Reader
from capibara.merge.tensors import Checkpoint, numpy_type

LENGTH = 256
"""Tokens of a sequence, or fewer where the model takes fewer."""

SEQUENCES = 64
"""At most, spread evenly over the text: each input reads them once, and the merges that are tried."""

DOCUMENTS = 10_000

CAUTION = (
    "The validation text is one sequence only: there is no cross-fit, and neither weights nor losses say anything "
    "about other text. Give more text."
)
STRENGTH = 0.01
"""λ of the pull to equal weights."""


def weigh(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    stamps: Sequence[Any],
    before: Sequence[dict[str, Any]] = (),
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with the weights found, and what is certain of them, as `merge.json` records it.

    Args:
      recipe: With the text.
      checkpoints: Its inputs, opened.
      stamps: What tells their files from others of the same name.
      before: What earlier commands found. What one of them found for the same question is not computed again.
      progress: Told of the bytes of models that have been read; how many it will be is not known before.

    Raises:
      ConfigError: If the recipe says how to weigh already, or an input is no model that can be run.
      DataError: If there is no text.
    """
    if recipe.method != "uniform" or recipe.weights is not None:
        raise ConfigError("--validation finds the weights itself: leave --method and --weights out.")
    from capibara.consensus.evidence import held_out
    from capibara.consensus.merge_weights import find_weights
    from capibara.consensus.problems import mixture_problem
    from capibara.consensus.simplex import kl_penalty
    from capibara.core.model import ModularCapibaraModel, objective

    assert recipe.validation is not None
    config = _config(checkpoints[0])
    model = ModularCapibaraModel(config)
    batch = _batch(recipe.validation, checkpoints[0], config)
    question = _question(batch, config, stamps)
    for record in before:
        if record.get("question") == question:
            return replace(recipe, method="weighted", weights=tuple(record["weights"]), validation=None), record
    trees = _Trees(checkpoints, progress)
    found = find_weights(
        trees,
        objective(model),
        held_out(batch),
        mixture_problem(),
        partial(kl_penalty, STRENGTH),
        chance=math.log(config.vocab_size),
    )
    weights = np.asarray(found.weights, np.float64)
    weights = tuple(float(weight) for weight in weights / weights.sum())
    names = {f"input {i}: {checkpoint.path.name}": float(loss) for i, (checkpoint, loss) in
             enumerate(zip(checkpoints, found.losses, strict=True))}  # fmt: skip
    record = {
        **{key: value for key, value in found.to_json().items() if key not in ("losses", "seconds")},
        "losses": {**names, "uniform": found.uniform_loss, "this merge": found.merged_loss},
        "tokens": int(batch["mask"].sum()),
        "sequences": len(batch["mask"]),
        "summary": found.summary() + ("" if found.crossfit else f"\n{CAUTION}"),
        **({} if found.crossfit else {"caution": CAUTION}),
        "question": question,
        "weights": list(weights),
    }
    return replace(recipe, method="weighted", weights=weights, validation=None), record


def _question(batch: dict[str, np.ndarray], config: Any, stamps: Sequence[Any]) -> str:
    """A digest of all that decides the weights: the sequences, the models, and how they are run."""
    hasher = blake3(canonical([__version__, config.model_dump(mode="json"), STRENGTH, list(stamps)]))
    for name in sorted(batch):
        hasher.update(np.ascontiguousarray(batch[name]).tobytes())
    return hasher.hexdigest()


class _Trees(Sequence[Any]):
    """The inputs' parameters under our names, float32, each read when it is asked for."""

    def __init__(self, checkpoints: Sequence[Checkpoint], progress: Callable[[str, int, int], None]):
        self.checkpoints, self.progress, self.read = checkpoints, progress, 0

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __getitem__(self, i: Any) -> Any:
        from capibara.hf.llama import our_array, our_name

        checkpoint, found = self.checkpoints[i], {}
        theirs = checkpoint.kind == "huggingface"
        with Reader() as reader:
            for name, tensor in checkpoint.tensors.items():
                if theirs and name == "lm_head.weight" and checkpoint.tied:
                    continue
                raw = np.empty(tensor.numbers * numpy_type(tensor.dtype).itemsize, np.uint8)
                reader.read(0, tensor, 0, raw.data)
                self.read += len(raw)
                self.progress("finding weights, models read", self.read, 0)
                values = raw.view(numpy_type(tensor.dtype)).reshape(tensor.shape).astype(np.float32)
                found[our_name(name) if theirs else name] = our_array(name, values) if theirs else values
        return found


def _config(checkpoint: Checkpoint) -> Any:
    from capibara.core.config import ModelConfig

    if checkpoint.kind in ("capibara", "run") and checkpoint.config:
        return ModelConfig(**checkpoint.config)
    if checkpoint.kind == "huggingface":
        from capibara.hf.llama import llama_config

        try:
            return llama_config(checkpoint.config)
        except ConfigError as error:
            raise ConfigError(f"--validation cannot run {checkpoint.path}: {error}") from None
    raise ConfigError(
        f"--validation needs models that can be run: folders with a config.json, or runs; {checkpoint.path} is "
        f"{checkpoint.kind}."
    )


def _batch(text: Path, checkpoint: Checkpoint, config: Any) -> dict[str, np.ndarray]:
    """Sequences spread evenly over the text, packed as in training."""
    from capibara.core.tokenizer import load_tokenizer
    from capibara.data.pack import line_up, num_rows, pack
    from capibara.data.source import read_documents

    definition = checkpoint.carried.get("tokenizer.json")
    if not isinstance(definition, Path):
        raise ConfigError(
            f"--validation needs {checkpoint.path}/tokenizer.json to read text with; copy the model's there "
            "(`model.save` writes it where `model.tokenizer` is set)."
        )
    tokenizer = load_tokenizer(definition)
    documents = [document.text for document in islice(read_documents(text), DOCUMENTS)]
    ids = [np.append(one, tokenizer.eos).astype(np.int64) for one in tokenizer.encode_batch(documents)]
    if sum(len(one) for one in ids) < 2:
        raise DataError(f"{text} holds no text to validate on; give two tokens at least, better some thousand.")
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids])])
    length = min(LENGTH, config.max_length)
    line = line_up(offsets, np.arange(len(ids)))
    rows = num_rows(line, length)
    chosen = np.unique(np.linspace(0, rows - 1, min(SEQUENCES, rows)).round().astype(np.int64))
    flat = np.concatenate(ids)
    if flat.max() >= config.vocab_size:
        raise ConfigError(f"The tokenizer has token {flat.max()}; the model's vocabulary has {config.vocab_size}.")
    return pack(flat, line, chosen, length)
