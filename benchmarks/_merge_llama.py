"""A Hugging Face folder of a Llama as the start of fine-tunes, and a random one to try that with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_llama(folder: Path) -> tuple[Any, dict[str, Any], Any]:
    """Shape, float32 parameters under our names, and tokenizer of a folder with one `model.safetensors`."""
    import numpy as np

    from capibara.core.tokenizer import load_tokenizer
    from capibara.files import read_tensors
    from capibara.hf.llama import llama_config, our_array, our_name

    shape = llama_config(json.loads((folder / "config.json").read_text()))
    params = {
        our_name(name): np.ascontiguousarray(our_array(name, np.asarray(array, np.float32)))
        for name, array in read_tensors(folder / "model.safetensors").items()
        if not (shape.tie_embeddings and name == "lm_head.weight")
    }
    return shape, params, load_tokenizer(folder / "tokenizer.json")


def write_random_llama(folder: Path, width: int = 64, hidden: int = 128) -> None:
    """One layer over bytes, with random weights."""
    import numpy as np

    from capibara.core.tokenizer import byte_tokenizer
    from capibara.files import tensors_to_bytes

    config = {
        "model_type": "llama", "vocab_size": 257, "hidden_size": width, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": hidden, "tie_word_embeddings": True,
    }  # fmt: skip
    square, kv, up = (width, width), (width // 2, width), (hidden, width)
    matrices = {
        "self_attn.q_proj": square, "self_attn.k_proj": kv, "self_attn.v_proj": kv, "self_attn.o_proj": square,
        "mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": (width, hidden),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {f"model.layers.0.{name}.weight": 0.02 * rng.normal(size=size) for name, size in matrices.items()}
    tensors["model.embed_tokens.weight"] = 0.02 * rng.normal(size=(257, width))
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{name}.weight"] = np.ones(width)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(folder / "tokenizer.json")
    (folder / "model.safetensors").write_bytes(
        tensors_to_bytes({name: np.asarray(value, np.float32) for name, value in tensors.items()})
    )
