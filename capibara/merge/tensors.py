"""A checkpoint as merging sees it: named tensors, each a range of bytes in some file, and the files beside them.

Most tensors are `Stored`: read by `pread` at a known offset. A few (compressed archives, Orbax) are `Loaded`, whole; a
vocabulary map makes them `Rows` of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUMPY = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""Names in safetensors files to those of NumPy and ml_dtypes."""

SAFETENSORS = {ours: theirs for theirs, ours in NUMPY.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Those that are merged. Others must be equal in all inputs, and are copied."""


class Stored(NamedTuple):
    """Contiguous little-endian bytes in a file."""

    path: Path
    offset: int


class Loaded(NamedTuple):
    """An array that can only be read whole; `load` gives it, C-contiguous and little-endian."""

    load: Callable[[], np.ndarray]


class Rows(NamedTuple):
    """Row j of this tensor is row `rows[j]` of `own`, or row j of `first` where that is −1."""

    own: Tensor
    first: Tensor
    rows: np.ndarray


class Tensor(NamedTuple):
    """One tensor of a checkpoint: `dtype` as safetensors names it, `shape`, and where its bytes come from."""

    dtype: str
    shape: tuple[int, ...]
    place: Stored | Loaded | Rows

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """What an input is.

    Attributes:
      path: As the user gave it.
      kind: `safetensors`, `huggingface`, `capibara`, `run`, `npz` or `orbax`.
      tensors: Name → tensor, in file order.
      config: Content of `config.json`, or of a run's `config.toml` as such; empty where there is none.
      carried: File name → bytes or path of what goes to the output as it is.
      files: Every file that holds weights; a change of one while it is merged is an error.
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Path | bytes] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.numbers for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numbers * np.dtype(numpy_type(tensor.dtype)).itemsize for tensor in self.tensors.values())

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding, by the configuration."""
        return bool(self.config.get("tie_word_embeddings", self.config.get("tie_embeddings", False)))


def numpy_type(name: str) -> np.dtype:
    """The NumPy dtype of a safetensors name."""
    wanted = NUMPY[name]
    if wanted.startswith(("bfloat", "float8")):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, wanted))
    return np.dtype(wanted)
