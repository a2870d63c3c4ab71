"""What both kinds of run are built from: the tokenizer in the run directory, and the model's losses.

    tokenizer.json of the run  ◄─ the model's own, or what data.tokenizer names
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from capibara.core.config import ModularConfig
from capibara.core.model import ModularCapibaraModel, objective
from capibara.core.tokenizer import Tokenizer, load_tokenizer, train_bpe
from capibara.data.batches import documents_of
from capibara.errors import ConfigError
from capibara.run.directory import Run
from capibara.transforms.remat import with_gradient_checkpointing
from capibara.types import Objective


def run_tokenizer(config: ModularConfig, run: Run, model: Any = None) -> Tokenizer:
    """The tokenizer of a run directory, written there first: that of the model if it has one, else the configured one.

    Raises:
      ConfigError: If `data.tokenizer` cannot be meant.
    """
    path = run.path / "tokenizer.json"
    if not path.is_file():
        tokenizer = getattr(model, "tokenizer", None) or new_tokenizer(config)
        run.files.write_atomic(path, tokenizer.definition.encode())
    return load_tokenizer(path)


def new_tokenizer(config: ModularConfig) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; `bpe:SIZE` is trained on the data."""
    kind, _, size = config.data.tokenizer.partition(":")
    if kind != "bpe":
        return load_tokenizer(config.data.tokenizer)
    if not size.isdigit():
        raise ConfigError(f"data.tokenizer = {config.data.tokenizer!r} needs a size, e.g. 'bpe:4096'.")
    documents, _ = documents_of(config.data.path)
    return train_bpe((document.text for document in documents()), int(size))


def give_tokenizer(model: ModularCapibaraModel, tokenizer: Tokenizer) -> None:
    """Lets the model read and write text.

    Raises:
      ConfigError: If the tokenizer has ids that the model does not know.
    """
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"The model knows {model.config.vocab_size} tokens and the tokenizer has {tokenizer.vocab_size}. Set "
            f"model.vocab_size = {tokenizer.vocab_size}, or use a smaller tokenizer."
        )
    model.tokenizer = tokenizer


def training_objective(config: ModularConfig, model: Any, loss: Callable[..., Any] | None = None) -> Objective:
    """The model's losses, with its blocks recomputed in the backward pass where `training` says so.

    Raises:
      ConfigError: If the model cannot recompute its blocks.
    """
    recomputes = config.training.gradient_checkpointing and not getattr(model, "gradient_checkpointing", False)
    return objective(with_gradient_checkpointing(model) if recomputes else model, loss)
