"""A recipe says all that decides the bytes of a merge; the same recipe over the same inputs gives the same bits.

    method = "weighted"              dtype = "bfloat16"            [[inputs]]
    stochastic_rounding = true       seed = 0                      path = "A"
    shard_size = 5000000000          faulty = 1                    weight = 0.7
    base = "…"                                                     digest = "…"

`inputs = ["A", "B"]` is short for tables with a path alone. Relative paths are seen from the recipe's folder.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from capibara.errors import ConfigError, unknown_name
from capibara.merge.tensors import FLOATS, SAFETENSORS

DTYPES = {ours: theirs for ours, theirs in SAFETENSORS.items() if theirs in FLOATS}
SUM = 1e-6
"""By how much weights may miss 1: what is left of decimal fractions."""


@dataclass(frozen=True)
class Recipe:
    """What to merge, and how.

    Attributes:
      inputs: Paths.
      method: A name of `capibara.merge.methods.METHODS`.
      weights: One for each input, summing to 1; None where the method needs none.
      base: What the inputs are fine-tunes of, where the method needs it.
      faulty: f, inputs that may be arbitrary; None for as many as the method tolerates, at most a third.
      dtype: Of the output (`float32`, `bfloat16`, …); None keeps the inputs'.
      stochastic_rounding: Whether to round to 16 bits without bias instead of to the nearest.
      seed: Of everything random.
      shard_size: Most bytes of one output file; None writes one.
      vocabulary_maps: Number of an input → file of its map.
      digests: What the inputs must be, where they are known; as `merge inspect --digests` prints.
      options: Further numbers of the method.
      validation: Text on which to find the weights; then the method is `weighted` by them.
    """

    inputs: tuple[Path, ...]
    method: str = "uniform"
    weights: tuple[float, ...] | None = None
    base: Path | None = None
    faulty: int | None = None
    dtype: str | None = None
    stochastic_rounding: bool = False
    seed: int = 0
    shard_size: int | None = None
    vocabulary_maps: Mapping[int, Path] = field(default_factory=dict)
    digests: tuple[str | None, ...] = ()
    options: Mapping[str, float] = field(default_factory=dict)
    validation: Path | None = None

    def check(self) -> None:
        """Raises ConfigError for what cannot be meant, whatever the inputs hold."""
        if not self.inputs:
            raise ConfigError("There is nothing to merge: give two or more checkpoints: capibara merge A B -o C")
        if len(self.inputs) == 1:
            raise ConfigError(f"There is nothing to merge with {self.inputs[0]}: give two or more checkpoints.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(unknown_name("dtype", self.dtype, DTYPES))
        if self.stochastic_rounding and self.dtype in ("float32", "float64"):
            raise ConfigError(f"Stochastic rounding is to 16 bits; dtype is {self.dtype}. Leave one of them out.")
        if self.weights is not None:
            check_weights(self.weights, len(self.inputs))
        for i in self.vocabulary_maps:
            if not 0 <= i < len(self.inputs):
                raise ConfigError(f"A vocabulary map is for input {i}; inputs are 0 to {len(self.inputs) - 1}.")
        if self.shard_size is not None and self.shard_size < 1:
            raise ConfigError(f"shard_size is a number of bytes above 0; got {self.shard_size}.")

    def decides(self) -> dict[str, Any]:
        """Everything but paths that decides the bytes, for the identity of a merge."""
        return {
            "method": self.method,
            "weights": self.weights,
            "faulty": self.faulty,
            "dtype": self.dtype,
            "stochastic_rounding": self.stochastic_rounding,
            "seed": self.seed,
            "shard_size": self.shard_size,
            "maps": {str(i): read_map(path).tolist() for i, path in self.vocabulary_maps.items()},
            "options": dict(self.options),
        }


def check_weights(weights: tuple[float, ...], count: int) -> None:
    """Raises ConfigError unless these are `count` shares of a whole."""
    if len(weights) != count:
        raise ConfigError(f"There are {len(weights)} weights for {count} checkpoints; give one for each.")
    for i, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"Weight {i} is {weight}; weights are numbers of 0 or more.")
    total = math.fsum(weights)
    if abs(total - 1) > SUM:
        scaled = ",".join(f"{weight / total:.6g}" for weight in weights) if total > 0 else "one above 0"
        raise ConfigError(f"The weights sum to {total:.6g}; they must sum to 1. Give {scaled}.")


def read_map(path: Path) -> np.ndarray:
    """int64[V] of a vocabulary map, a JSON list of row numbers and nulls (−1 here).

    Raises:
      ConfigError: If it is none.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ConfigError(f"{path} is no vocabulary map ({reason}); give a JSON list of rows and nulls.") from None
    if not isinstance(rows, list) or not all(row is None or (type(row) is int and row >= 0) for row in rows):
        raise ConfigError(f"{path} is no vocabulary map: it must be a JSON list of row numbers and nulls.")
    return np.array([-1 if row is None else row for row in rows], np.int64)


def read_recipe(path: Path) -> Recipe:
    """The recipe of a TOML file.

    Raises:
      ConfigError: Naming the key that is unknown or has a value of the wrong kind.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no TOML: {error}"
        raise ConfigError(f"{path} is no recipe ({reason}). `recipe.toml` beside a merge is one.") from None
    for key in content:
        if key not in (*_KINDS, "inputs", "options"):
            raise ConfigError(f"{path}: " + unknown_name("key", key, [*_KINDS, "inputs", "options"]))
    inputs = [{"path": one} if isinstance(one, str) else one for one in _typed(path, content, "inputs", list, [])]
    for one in inputs:
        if not isinstance(one, dict) or not isinstance(one.get("path"), str):
            raise ConfigError(f"{path}: every one of `inputs` needs a path.")
        for key in one:
            if key not in _OF_INPUTS:
                raise ConfigError(f"{path}: " + unknown_name("key", key, _OF_INPUTS))
    values = {key: _typed(path, content, key, kind, None) for key, kind in _KINDS.items()}
    values = {key: value for key, value in values.items() if value is not None}
    here = path.parent
    if "base" in values:
        values["base"] = here / values["base"]
    weights: list[Any] = [one.get("weight") for one in inputs]
    if any(weight is not None for weight in weights):
        if not all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in weights):
            raise ConfigError(f"{path}: give every input a weight, a number, or none of them.")
        values["weights"] = tuple(float(weight) for weight in weights)
    options = _typed(path, content, "options", dict, {})
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in options.values()):
        raise ConfigError(f"{path}: options are numbers.")
    return Recipe(
        inputs=tuple(here / one["path"] for one in inputs),
        digests=tuple(one.get("digest") for one in inputs),
        vocabulary_maps={i: here / one["vocabulary_map"] for i, one in enumerate(inputs) if "vocabulary_map" in one},
        options=options,
        **values,
    )


def recipe_toml(recipe: Recipe, digests: list[str]) -> str:
    """The recipe with absolute paths and the digests of what was merged; `read_recipe` of it merges the same again."""
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment("The merge beside this file: capibara merge --recipe recipe.toml -o OUT"))
    for key in _KINDS:
        value = getattr(recipe, key)
        if value is not None:
            document.add(key, str(value.resolve()) if isinstance(value, Path) else value)
    if recipe.options:
        document.add("options", dict(recipe.options))
    tables = tomlkit.aot()
    for i, path in enumerate(recipe.inputs):
        table = tomlkit.table()
        table.add("path", str(path.resolve()))
        if recipe.weights is not None:
            table.add("weight", recipe.weights[i])
        table.add("digest", digests[i])
        if i in recipe.vocabulary_maps:
            table.add("vocabulary_map", str(recipe.vocabulary_maps[i].resolve()))
        tables.append(table)
    document.add("inputs", tables)
    return tomlkit.dumps(document)


def _typed(path: Path, content: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = content.get(key, default)
    if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ConfigError(f"{path}: {key} must be a {kind.__name__}; got {value!r}.")
    return value


_OF_INPUTS = ("path", "weight", "digest", "vocabulary_map")
_KINDS: dict[str, type] = {
    "method": str,
    "base": str,
    "faulty": int,
    "dtype": str,
    "stochastic_rounding": bool,
    "seed": int,
    "shard_size": int,
}
