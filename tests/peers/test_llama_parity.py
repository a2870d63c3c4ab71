"""The decoder is Llama's: the same weights in `transformers` give the same logits, losses, gradients and tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.core.config import ModelConfig
from capibara.core.model import ModularCapibaraModel, objective, parameters, with_parameters
from capibara.hf.llama import llama_config, our_array, our_name

pytestmark = pytest.mark.peers

CONFIG = ModelConfig(
    vocab_size=97, width=48, num_layers=3, num_heads=6, num_kv_heads=2, hidden=80, max_length=64, rope_theta=500.0,
    norm_eps=1e-5, init_scale=0.15,
)  # fmt: skip
LOGITS, GRADIENTS = 1e-4, 1e-4
"""Logits are of order 3, gradients of order 0.1: float32 in another order of summation."""


@pytest.fixture(scope="module")
def model() -> ModularCapibaraModel:
    """Random everywhere, norms too: a scale of 1 would hide a norm in the wrong place."""
    model, rng = ModularCapibaraModel(CONFIG, seed=0), np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32) if leaf.ndim == 1 else leaf
        for name, leaf in parameters(model).items()
    }
    return with_parameters(model, params)


@pytest.fixture(scope="module")
def llama(model) -> Any:
    """`LlamaForCausalLM` with the model's weights, float32, eager attention."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.width,
        intermediate_size=CONFIG.hidden_size,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.kv_heads,
        max_position_embeddings=CONFIG.max_length,
        rms_norm_eps=CONFIG.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        attn_implementation="eager",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in llama.named_parameters():
            ours = np.array(parameters(model)[our_name(name)])
            weight.copy_(torch.from_numpy(our_array(name, ours).copy()))
    return llama


def tokens_and_targets(B: int = 3, T: int = 21) -> tuple[np.ndarray, np.ndarray]:
    text = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (B, T + 1)).astype(np.int32)
    return text[:, :-1], text[:, 1:]


def test_every_parameter_has_its_counterpart(model, llama):
    theirs = {our_name(name): weight.numel() for name, weight in llama.named_parameters()}
    assert theirs == {name: leaf.size for name, leaf in parameters(model).items()}


def test_its_configuration_is_ours(llama):
    found = llama_config(llama.config.to_dict())
    assert found.head_size == CONFIG.head_size
    assert found == CONFIG.model_copy(update={"init_scale": found.init_scale, "head_dim": found.head_dim})


def test_logits_are_llamas(model, llama):
    import torch

    tokens, _ = tokens_and_targets()
    with torch.no_grad():
        theirs = llama(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    ours = jax.jit(lambda t: model(t))(tokens)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=LOGITS)


def test_loss_and_gradients_are_llamas(model, llama):
    import torch

    tokens, targets = tokens_and_targets()
    llama.zero_grad()
    logits = llama(torch.from_numpy(tokens.astype(np.int64))).logits
    entropy = torch.nn.functional.cross_entropy
    wanted = entropy(
        logits.flatten(0, 1), torch.from_numpy(targets.astype(np.int64)).flatten()
    )
    wanted.backward()
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = dict(tokens=tokens, targets=targets, segments=ones, positions=positions, mask=ones > 0)
    step = jax.jit(jax.value_and_grad(lambda p: objective(model).loss(p, batch, jax.random.key(0))[0]))
    loss, slopes = step(parameters(model))
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-5)
    for name, weight in llama.named_parameters():
        theirs = weight.grad.numpy()
        np.testing.assert_allclose(
            slopes[our_name(name)], theirs.T if "_proj" in name else theirs, atol=GRADIENTS, err_msg=name
        )


def test_greedy_generation_is_llamas(model, llama):
    import torch

    prompt = tokens_and_targets(B=2, T=9)[0]
    with torch.no_grad():
        tokens = torch.from_numpy(prompt.astype(np.int64))
        for _ in range(20):
            tokens = torch.cat([tokens, llama(tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
    np.testing.assert_array_equal(model.generate(prompt, 20, temperature=0), tokens[:, 9:].numpy())
