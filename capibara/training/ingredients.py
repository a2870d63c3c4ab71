"""Checkpoints of any kind as trees of one structure, read one at a time and kept by nobody.

    NNX model · pytree of arrays · .safetensors · .npz · a folder of a model, a run or Orbax · .pkl (arrays only)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capibara.core.config import ModelConfig
from capibara.core.model import ModularCapibaraModel, parameters
from capibara.errors import ConfigError, DataError
from capibara.files import Files, tensors_to_bytes
from capibara.merge.pickles import read_pickle
from capibara.merge.sources import open_checkpoint
from capibara.merge.stream import Reader
from capibara.merge.tensors import Checkpoint, numpy_type
from capibara.tree import from_named_leaves, named_leaves
from capibara.types import PyTree

PICKLES = (".pkl", ".pickle")


class Ingredient(NamedTuple):
    """One checkpoint.

    Attributes:
      name: For errors.
      read: Its tree; what is on disk is read then.
      path: Where files of tensors are, or None.
      flat: Whether the tree has leaves by dotted name already.
      template: `() -> model` of its structure, where the checkpoint tells.
    """

    name: str
    read: Callable[[], PyTree]
    path: Path | None = None
    flat: bool = False
    template: Callable[[], Any] | None = None


def ingredient(checkpoint: Any, number: int) -> Ingredient:
    """A path, a model or a tree as an ingredient; headers, and pickles whole, are checked at once.

    Raises:
      DataError: If there is no such checkpoint, or it is damaged, or a pickle that holds more than arrays.
      ConfigError: If it is nothing that holds arrays.
    """
    if isinstance(checkpoint, (str, Path)):
        return _on_disk(Path(checkpoint))
    name = f"checkpoint {number}"
    if hasattr(checkpoint, "loss"):
        kept = parameters(checkpoint)  # now: training changes the model, not these arrays
        return Ingredient(name, lambda: kept, flat=True, template=lambda: checkpoint)
    leaves = named_leaves(checkpoint)
    if not leaves:
        raise ConfigError(f"{name} holds no array; give a path, a model, or a tree of arrays.")
    for leaf, value in leaves.items():
        if not hasattr(value, "dtype"):
            kind, place = type(value).__name__, leaf or "its root"
            raise ConfigError(f"{name} holds a {kind} at {place!r}; give a path, a model, or a tree of arrays.")
    return Ingredient(name, lambda: checkpoint)


class Ingredients(Sequence[PyTree]):
    """Ingredients as trees of the first one's structure.

    Where one of them is a model or files of tensors, or the model is known, all are dicts by dotted name.
    """

    def __init__(self, given: Sequence[Ingredient], *, flat: bool = False):
        self.given = list(given)
        self.flat = flat or any(one.flat for one in given)

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, i: Any) -> Any:
        tree = self.given[i].read()
        return dict(named_leaves(tree)) if self.flat else tree

    def __iter__(self) -> Iterator[PyTree]:
        return (self[i] for i in range(len(self)))

    def file(self, i: int, folder: Path) -> Path:
        """The ingredient as files of tensors: where it lies, or written into a folder."""
        if (path := self.given[i].path) is not None:
            return path
        path = folder / f"{i}.safetensors"
        Files().write(path, tensors_to_bytes(named_leaves(self[i])))
        return path

    def unnamed(self, leaves: dict[str, np.ndarray]) -> PyTree:
        """Leaves by dotted name in the structure of these trees."""
        return leaves if self.flat else from_named_leaves(self[0], leaves)


def read_whole(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """All tensors of an opened checkpoint."""
    arrays = {}
    with Reader() as reader:
        for name, tensor in checkpoint.tensors.items():
            array = np.empty(tensor.numbers, numpy_type(tensor.dtype))
            reader.read(0, tensor, 0, array.view(np.uint8).data)
            arrays[name] = array.reshape(tensor.shape)
    return arrays


def _on_disk(path: Path) -> Ingredient:
    if path.suffix in PICKLES:
        if not path.is_file():
            raise DataError(f"{path} does not exist, or is no file; nothing is downloaded.")
        read_pickle(path)
        return Ingredient(str(path), lambda: read_pickle(path), template=_described(path.parent / "config.json"))
    checkpoint = open_checkpoint(path)
    template = None
    if checkpoint.kind in ("capibara", "run") and checkpoint.config:
        template = _model(checkpoint.config)
    elif path.is_file():
        template = _described(path.parent / "config.json")
    return Ingredient(str(path), lambda: read_whole(open_checkpoint(path)), path, True, template)


def _described(config: Path) -> Callable[[], Any] | None:
    """The model of a `config.json` beside a checkpoint, where `ModularCapibaraModel.save` wrote it."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return _model(content) if isinstance(content, dict) and "width" in content and "model_type" not in content else None


def _model(config: dict[str, Any]) -> Callable[[], Any]:
    return lambda: ModularCapibaraModel(ModelConfig(**config))
