"""Llama's folders as our decoder: it is the same network, under other names and with projections transposed.

    model.layers.3.self_attn.q_proj.weight [out, in]  ↔  blocks.3.query [in, out]

What the decoder does not have (biases, scaled rotary positions, other activations, sliding windows) is refused, not
ignored: a model that is nearly the same would be evaluated wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from capibara.core.config import ModelConfig
from capibara.errors import ConfigError

_NAMES = {
    "input_layernorm": "norm_attention",
    "post_attention_layernorm": "norm_mlp",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


def llama_config(config: Mapping[str, Any]) -> ModelConfig:
    """The shape of our decoder that is the model of a `config.json`.

    Raises:
      ConfigError: If it is no Llama, or one with a part that the decoder does not have; the setting is named.
    """
    if config.get("model_type") != "llama":
        raise ConfigError(f"model_type is {config.get('model_type')!r}; only 'llama' is known here.")
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    for setting, value, needed in (
        ("rope_type", kind, "default"),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", bool(config.get("attention_bias", False)), False),
        ("mlp_bias", bool(config.get("mlp_bias", False)), False),
    ):
        if value != needed:
            raise ConfigError(f"{setting} is {value!r}; the decoder has only {needed!r}.")
    try:
        return ModelConfig(
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim"),
            hidden=config["intermediate_size"],
            max_length=config.get("max_position_embeddings", 2048),
            rope_theta=float(rotary.get("rope_theta", config.get("rope_theta", 10000.0))),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise ConfigError(f"The configuration of the Llama lacks {error}.") from None


def our_name(theirs: str) -> str:
    """The flat name of one of Llama's parameters.

    Raises:
      ConfigError: If it has no such parameter.
    """
    parts = theirs.removeprefix("model.").removesuffix(".weight").split(".")
    ends = {"embed_tokens": "embedding", "norm": "norm", "lm_head": "head"}
    if len(parts) == 1 and parts[0] in ends:
        return ends[parts[0]]
    if len(parts) < 3 or parts[0] != "layers" or parts[-1] not in _NAMES:
        raise ConfigError(f"{theirs!r} is no parameter of a Llama without biases.")
    return f"blocks.{parts[1]}.{_NAMES[parts[-1]]}"


def our_array(theirs: str, array: np.ndarray) -> np.ndarray:
    """A parameter as ours: projections are transposed."""
    return array.T if "_proj" in theirs else array
