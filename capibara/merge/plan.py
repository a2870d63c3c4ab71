"""May these checkpoints be merged at all? Either a list of tensors that fit, or an error naming what does not.

    names equal · shapes equal · kinds of numbers equal · heads tied or not alike · one tokenizer · one configuration
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capibara.errors import ConfigError
from capibara.merge.tensors import FLOATS, Checkpoint, Rows, Tensor, numpy_type

HEADS = ("lm_head.weight", "head", "output.weight", "embed_out.weight")
EMBEDDINGS = ("model.embed_tokens.weight", "embedding", "transformer.wte.weight", "wte.weight", "embed_tokens.weight")
HIDDEN_KEYS = ("architectures", "auto_map", "model_type", "id2label", "label2id", "quantization_config")
"""Settings of a model's configuration beyond the numeric ones that change what its weights mean."""

IGNORED_KEYS = (
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range", "init_scale",
    "loss_chunk", "z_loss", "max_position_embeddings", "max_length",
)  # fmt: skip
"""Settings that do not: they may differ, and the first input's are kept."""


class Job(NamedTuple):
    """One tensor of the output.

    Attributes:
      name: Its name, as in the first input.
      shape: Its dimensions.
      dtype: Of the output.
      inputs: The same tensor in every input.
      merged: False where it holds no floats: then it must be the same everywhere, and is copied.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    inputs: tuple[Tensor, ...]
    merged: bool

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return self.inputs[0].numbers


def plan_jobs(
    checkpoints: Sequence[Checkpoint],
    *,
    dtype: str | None = None,
    vocabulary: Mapping[int, np.ndarray] | None = None,
) -> list[Job]:
    """The tensors of the output in the order of the first input's files.

    Args:
      checkpoints: The inputs, two or more; a base model may be among them.
      dtype: Of the merged tensors; None keeps the inputs' (the widest where they differ).
      vocabulary: Number of an input → int[V], its row for each row of the first input's vocabulary, −1 for none (then
        the first input's row stands in). Its tokenizer may differ.

    Raises:
      ConfigError: Naming the first tensor, token or setting in which an input differs from the first.
    """
    vocabulary = vocabulary or {}
    first = checkpoints[0]
    for number, other in enumerate(checkpoints[1:], 1):
        _same_settings(first, other, mapped=number in vocabulary)
        if number not in vocabulary:
            _same_tokenizer(first, other)
    named = _untied([dict(checkpoint.tensors) for checkpoint in checkpoints], checkpoints)
    for number, tensors in enumerate(named[1:], 1):
        if number in vocabulary:
            named[number] = _mapped(checkpoints[number], tensors, named[0], vocabulary[number])
        _same_names(first, named[0], checkpoints[number], named[number])
    jobs = [_job(name, [tensors[name] for tensors in named], checkpoints, dtype) for name in named[0]]
    return sorted(jobs, key=lambda job: -numpy_type(job.dtype).itemsize)  # stable; keeps wide numbers aligned


def _job(name: str, tensors: list[Tensor], checkpoints: Sequence[Checkpoint], dtype: str | None) -> Job:
    one = tensors[0]
    for tensor, checkpoint in zip(tensors[1:], checkpoints[1:], strict=True):
        if tensor.shape != one.shape:
            hint = ""
            if tensor.shape[1:] == one.shape[1:] and len(one.shape) == 2 and name in (*HEADS, *EMBEDDINGS):
                hint = " Vocabulary rows are mapped only by an explicit map (--vocabulary-map)."
            raise ConfigError(
                f"Tensor {name!r} has shape {one.shape} in {checkpoints[0].path} and {tensor.shape} in "
                f"{checkpoint.path}; only equal shapes can be merged.{hint}"
            )
        if (tensor.dtype in FLOATS) != (one.dtype in FLOATS) or (one.dtype not in FLOATS and tensor.dtype != one.dtype):
            raise ConfigError(
                f"Tensor {name!r} holds {one.dtype} in {checkpoints[0].path} and {tensor.dtype} in {checkpoint.path}."
            )
    if one.dtype.startswith("F8"):
        raise ConfigError(f"Tensor {name!r} holds {one.dtype}, quantised numbers; merge the models before quantising.")
    merged = one.dtype in FLOATS
    return Job(name, one.shape, (dtype or widest(tensors)) if merged else one.dtype, tuple(tensors), merged)


def widest(tensors: Sequence[Tensor]) -> str:
    """The float type that holds the numbers of all; float32 for bfloat16 beside float16."""
    found = {tensor.dtype for tensor in tensors}
    if len(found) == 1:
        return found.pop()
    return "F64" if "F64" in found else "F32"


def _same_names(first: Checkpoint, ours: dict[str, Tensor], other: Checkpoint, theirs: dict[str, Tensor]) -> None:
    for a, b, there, absent in ((ours, theirs, first, other), (theirs, ours, other, first)):
        missing = [name for name in a if name not in b]
        if missing:
            raise ConfigError(
                f"{absent.path} has no tensor {missing[0]!r}; {there.path} has it with shape {a[missing[0]].shape} "
                f"({len(missing)} such tensors). Only models of the same structure can be merged."
            )


def _untied(named: list[dict[str, Tensor]], checkpoints: Sequence[Checkpoint]) -> list[dict[str, Tensor]]:
    """Drops the copy of the embedding that some files keep as the head of a model whose head is tied."""
    for head in HEADS:
        has = [head in tensors for tensors in named]
        if all(has) or not any(has):
            continue
        for tensors, checkpoint in zip(named, checkpoints, strict=True):
            if head in tensors and not checkpoint.tied:
                lacking = checkpoints[has.index(False)]
                raise ConfigError(
                    f"Tensor {head!r} of shape {tensors[head].shape} is a head of its own in {checkpoint.path}; in "
                    f"{lacking.path} there is none, the head is its embedding. Such models cannot be merged."
                )
            tensors.pop(head, None)
    return named


def _same_settings(first: Checkpoint, other: Checkpoint, *, mapped: bool) -> None:
    ours, theirs = first.config, other.config
    if not ours or not theirs:
        return
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if key in IGNORED_KEYS or (mapped and key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")):
            continue
        matters = key in HIDDEN_KEYS or (key in ours and key in theirs)
        if matters and a != b:
            raise ConfigError(
                f"{key} is {_short(a)} in {first.path} and {_short(b)} in {other.path}: their weights do not mean the "
                "same. Only models of one architecture, with one head, can be merged."
            )


def _same_tokenizer(first: Checkpoint, other: Checkpoint) -> None:
    for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"):
        a, b = (_content(checkpoint.carried.get(name)) for checkpoint in (first, other))
        if a is None or b is None or a == b:
            continue
        reason = _first_token(a, b) if name == "tokenizer.json" else "the files differ"
        if reason:
            raise ConfigError(
                f"{first.path} and {other.path} have different tokenizers ({name}: {reason}). Vocabulary rows are "
                "mapped only by an explicit map (--vocabulary-map)."
            )


def _first_token(a: bytes, b: bytes) -> str:
    """In what two tokenizer.json differ that changes ids; empty where only their layout does."""
    try:
        ours, theirs = json.loads(a), json.loads(b)
        vocabularies = [_ids(one) for one in (ours, theirs)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "the files differ"
    for token in sorted(vocabularies[0].keys() | vocabularies[1].keys()):
        i, j = (vocabulary.get(token) for vocabulary in vocabularies)
        if i != j:
            return f"token {token!r} has id {_or_none(i)} in the first and {_or_none(j)} in the second"
    for key in ("model", "normalizer", "pre_tokenizer"):
        if ours.get(key) != theirs.get(key):
            return f"{key} differs"
    return ""


def _ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: pairs of token and score
        vocabulary = {pair[0]: number for number, pair in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}}


def _mapped(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], first: dict[str, Tensor], rows: np.ndarray
) -> dict[str, Tensor]:
    """The tensors with the rows of embeddings and heads in the order of the first input's vocabulary."""
    mapped = dict(tensors)
    for name in (*EMBEDDINGS, *HEADS):
        if name not in tensors or name not in first:
            continue
        own, one = tensors[name], first[name]
        if len(rows) != one.shape[0] or rows.min(initial=-1) < -1 or rows.max(initial=-1) >= own.shape[0]:
            raise ConfigError(
                f"The vocabulary map of {checkpoint.path} must give {one.shape[0]} rows (of {name!r}), each null or "
                f"from 0 to {own.shape[0] - 1}; it gives {len(rows)}."
            )
        if own.shape[1:] != one.shape[1:]:
            raise ConfigError(
                f"Tensor {name!r} has shape {one.shape} in the first input and {own.shape} in {checkpoint.path}; a "
                "vocabulary map can change the number of rows only."
            )
        if own.dtype != one.dtype:
            raise ConfigError(
                f"Tensor {name!r} holds {one.dtype} in the first input and {own.dtype} in {checkpoint.path}; a "
                "vocabulary map needs one type."
            )
        mapped[name] = Tensor(own.dtype, one.shape, Rows(own, one, rows))
    return mapped


def _content(source: Path | bytes | None) -> bytes | None:
    return source.read_bytes() if isinstance(source, Path) else source


def _or_none(value: int | None) -> str:
    return "none" if value is None else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
