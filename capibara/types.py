"""The shapes and pairs of functions that the packages hand to each other.

Dimension letters, used in every annotation: n replicas, f faulty ones, H local steps, B sequences, T tokens,
V vocabulary, D width, d all parameters. Importing this module creates no array and starts no backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

PyTree = Any
"""A nest of dicts, lists, tuples with arrays at the leaves. The parameters of our models are flat: dict[str, Array]."""

Batch = Mapping[str, Any]
"""`tokens, targets, segments, positions: int32[..., B, T]`, `mask: bool[..., B, T]` (True where the target counts;
segment 0 is padding). A model of the user's own may use any other keys; only the leading axes are ours."""


class TrainState(NamedTuple):
    """What one node carries from step to step.

    Attributes:
      step: int32 scalar, local steps taken since the run began.
      params: The parameters, a pytree of float32 leaves.
      inner: Whatever else the strategy keeps (optimiser moments, an average): stays with its node between rounds.
    """

    step: Any
    params: PyTree
    inner: PyTree


class Objective(NamedTuple):
    """What is minimised, and how a model is judged on held-out sequences.

    Attributes:
      loss: `(params, batch[B, ...], key) -> (scalar, dict of scalars)`, the mean training loss of one batch.
      sequence_losses: `(params, batch[B, ...]) -> (float32[B] summed loss in nats, float32[B] tokens)`.
      token_losses: `(params, batch[B, ...]) -> (float32[B, T] nats, bool[B, T] where the target counts)`; None where
        the model does not tell tokens apart.
      logits: `(params, batch[B, ...]) -> float32[B, T, V]`; None where it has none.
    """

    loss: Callable[[PyTree, Batch, Any], tuple[Any, dict[str, Any]]]
    sequence_losses: Callable[[PyTree, Batch], tuple[Any, Any]]
    token_losses: Callable[[PyTree, Batch], tuple[Any, Any]] | None = None
    logits: Callable[[PyTree, Batch], Any] | None = None


class Strategy(NamedTuple):
    """How one node trains between two votes; a pure pair, built from optax.

    Attributes:
      name: For records and errors.
      init: `(params) -> TrainState` at step 0.
      step: `(TrainState, batch, key) -> (TrainState, info)`; info is a dict of scalars with at least `loss`.
    """

    name: str
    init: Callable[[PyTree], TrainState]
    step: Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Any]]]


class Source(Protocol):
    """Where batches come from. Every answer is a pure function of the arguments and the source's seed."""

    train_tokens: int
    tokens_per_sequence: int

    def batches(self, *, round: int, draw: int, node: int, steps: int, batch_size: int) -> Batch:
        """`steps` training batches of node `node`: every leaf `[steps, batch_size, ...]`, NumPy, host memory."""
        ...

    def held_out(self, split: str, *, round: int, draw: int, count: int) -> Batch:
        """`count` different sequences of a held-out split, leaves `[count, ...]`; the same for every node."""
        ...

    def num_sequences(self, split: str) -> int:
        """How many sequences the split `gate`, `merge`, `final_gate` or `test` holds."""
        ...
