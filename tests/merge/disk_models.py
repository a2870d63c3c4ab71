"""Small models on disk for the tests of merging, and the same numbers in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHAPES = {"model.embed_tokens.weight": (11, 6), "model.layers.0.w": (7, 5), "model.norm.weight": (6,), "scale": ()}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 6, "num_attention_heads": 2}


def random_model(
    seed: int, dtype: Any = np.float32, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, np.ndarray]:
    """Normal numbers."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_model(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A safetensors file by the reference library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.array(value, order="C", copy=True) for name, value in tensors.items()}, path)
    return path


def write_folder(path: Path, tensors: dict[str, np.ndarray], tokens: str = "abc", **config: Any) -> Path:
    """A Hugging Face folder."""
    write_model(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 11, **config}))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    return path


def write_shards(path: Path, tensors: dict[str, np.ndarray], per_file: int = 2) -> Path:
    """A folder of several files and their index."""
    names = list(tensors)
    groups = [names[first : first + per_file] for first in range(0, len(names), per_file)]
    where = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_model(path / file, {name: tensors[name] for name in group})
        where |= dict.fromkeys(group, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def read_model(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file or folder, by the reference library."""
    from capibara.files import read_tensors

    if path.is_file():
        return read_tensors(path)
    found: dict[str, np.ndarray] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= read_tensors(file)
    return found


def write_models(folder: Path, count: int, dtype: Any = np.float32) -> tuple[list[Path], list[dict[str, np.ndarray]]]:
    """`count` files of models that share a base and differ by a tenth."""
    base = random_model(1000)
    models = []
    for i in range(count):
        other = random_model(i)
        models.append({name: (base[name] + 0.1 * other[name]).astype(dtype) for name in base})
    return [write_model(folder / f"m{i}.safetensors", model) for i, model in enumerate(models)], models


BF16 = ml_dtypes.bfloat16
