"""Generation: the cache changes nothing, the draws follow the probabilities, one program serves one shape."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capibara.core import generate
from capibara.core.config import ModelConfig
from capibara.core.generate import _draw, _generate
from capibara.core.model import ModularCapibaraModel, parameters, with_parameters
from capibara.core.tokenizer import byte_tokenizer
from capibara.errors import ConfigError


@pytest.fixture(scope="module")
def model() -> ModularCapibaraModel:
    config = ModelConfig(
        vocab_size=257, width=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden=24, max_length=50, init_scale=0.3
    )
    return ModularCapibaraModel(config, seed=2)


@pytest.fixture(scope="module")
def greedy(model):
    """The most likely continuation, every token from reading all again; rows of 50 behind which nothing counts."""
    read = nnx.jit(lambda m, tokens: m(tokens))

    def go_on(prompt: np.ndarray, count: int) -> np.ndarray:
        tokens = np.zeros((2, 50), np.int32)
        tokens[:, : prompt.shape[1]] = prompt
        for at in range(prompt.shape[1], prompt.shape[1] + count):
            tokens[:, at] = np.asarray(read(model, tokens))[:, at - 1].argmax(-1)
        return tokens[:, prompt.shape[1] : prompt.shape[1] + count]

    return go_on


PROMPT = np.array([[5, 17, 42, 9, 77], [1, 2, 3, 4, 5]], np.int32)


def test_the_cache_gives_what_reading_everything_again_gives(model, greedy):
    np.testing.assert_array_equal(model.generate(PROMPT, 12, temperature=0), greedy(PROMPT, 12))


def test_the_sequence_may_fill_max_length(model, greedy):
    prompt = np.arange(60, dtype=np.int32).reshape(2, 30)
    np.testing.assert_array_equal(model.generate(prompt, 20, temperature=0), greedy(prompt, 20))


def test_one_program_serves_all_prompts_of_a_shape(model):
    model.generate(PROMPT, 12, temperature=0.5, top_p=0.8)
    before = _generate._cache_size()
    other = with_parameters(model, {name: leaf * 0.9 for name, leaf in parameters(model).items()})
    other.generate(PROMPT[:, :4], 12, temperature=0.7, top_p=0.9, seed=3)
    assert _generate._cache_size() == before


def test_the_seed_decides_the_draws(model):
    first, again, other = (model.generate(PROMPT, 12, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_sequences_of_a_batch_are_drawn_apart(model):
    both = model.generate(np.stack([PROMPT[0], PROMPT[0]]), 12, temperature=2.0)
    assert not np.array_equal(both[0], both[1])


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
def test_one_candidate_is_the_greedy_choice(model, options):
    np.testing.assert_array_equal(
        model.generate(PROMPT, 12, temperature=1.5, **options), model.generate(PROMPT, 12, temperature=0)
    )


def in_steps(model, dtype):
    """The model with matrices in whole steps of 2⁻⁷, up to 127 of them in each column: int8 and bfloat16 hold them."""

    def stepped(name, w):
        if w.ndim < 2:
            return w
        steps = np.clip(np.round(np.asarray(w) * 128), -127, 127)
        one_of_each = steps[:, 0] if name == "embedding" else steps[0]
        one_of_each[:] = np.where(np.arange(len(one_of_each)) % 2, 127, -127)
        return steps / np.float32(128)

    found = with_parameters(model, {name: stepped(name, leaf) for name, leaf in parameters(model).items()})
    found.config = found.config.model_copy(update={"dtype": dtype})
    for block in found.blocks:
        block.config = found.config
    return found


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_int8_weights_write_the_same_text_where_they_hold_the_weights(model, dtype):
    """Scales are powers of two here: every sum is the same to the last bit."""
    exact = in_steps(model, dtype)
    for temperature in (0.0, 20.0):  # large weights make sharp choices: a high one gives other tokens a chance
        wanted = exact.generate(PROMPT, 12, temperature=temperature)
        np.testing.assert_array_equal(exact.generate(PROMPT, 12, temperature=temperature, weights="int8"), wanted)
    assert len(np.unique(wanted)) > 3


def test_int8_weights_follow_the_model(model):
    """The copy that is kept is the one of these parameters."""
    other = with_parameters(model, {name: leaf[::-1] for name, leaf in parameters(model).items()})
    first, changed, again = (m.generate(PROMPT, 12, temperature=0, weights="int8") for m in (model, other, model))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, changed)


def test_the_int8_copy_lives_as_long_as_the_parameters():
    model = ModularCapibaraModel(ModelConfig(vocab_size=257, width=16, num_layers=1, num_heads=4), seed=3)
    model.generate(PROMPT, 2, weights="int8")
    kept = generate._KEPT[0][2]
    model.generate(PROMPT, 2, weights="int8")
    assert generate._KEPT[0][2] is kept
    del model
    gc.collect()
    assert not generate._KEPT


def test_parameters_that_may_be_written_over_leave_no_int8_copy(model):
    graph, state = nnx.split(model)
    state = jax.tree.map(np.array, state)
    before = generate._int8_of(graph, state)[1].values
    assert not generate._KEPT
    for leaf in jax.tree.leaves(state):
        leaf *= -1
    np.testing.assert_array_equal(generate._int8_of(graph, state)[1].values, -before)


draw = jax.jit(_draw, static_argnums=2)


def frequencies(shares: list[float], *, top_k: int = 0, top_p: float = 1.0, count: int = 20000) -> np.ndarray:
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(shares, jnp.float32)), (count, len(shares)))
    drawn = draw(logits, jax.random.key(0), top_k, jnp.float32(top_p))
    return np.bincount(np.asarray(drawn), minlength=len(shares)) / count


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.1, 0.5, 0.3, 0.1]),
        ({"top_k": 2}, [0, 0.625, 0.375, 0]),
        ({"top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 0.625, 0.375, 0]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),
    ],
)
def test_draws_follow_the_probabilities_of_what_is_left(options, wanted):
    """20 000 draws: a frequency strays by more than 0.016 (4.5 standard errors) once in 100 000 times."""
    np.testing.assert_allclose(frequencies([0.1, 0.5, 0.3, 0.1], **options), wanted, atol=0.016)


def test_text_goes_in_and_comes_out_up_to_the_end_of_the_document(model, monkeypatch):
    ids = np.frombuffer(b"capi", np.uint8).astype(np.int32)
    new = model.generate(ids, 12, temperature=0)
    assert new.shape == (12,)
    text = byte_tokenizer().decode(new)
    assert model.generate("capi", 12, temperature=0) == text
    monkeypatch.setattr(generate, "_generate", lambda *args, **options: np.array([[*b"ra", 256, *b"xy"]]))
    assert model.generate("capi", 5) == "ra"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        (np.array([3, 257]), {}, "has token 257; the model knows 0 to 256"),
        (np.array([-1, 3]), {}, "has token -1; the model knows 0 to 256"),
        ("abc", {"max_new_tokens": 48}, "3 prompt tokens and 48 new ones are more than max_length = 50"),
        ("abc", {"max_new_tokens": 0}, "max_new_tokens"),
        ("abc", {"temperature": -1.0}, "temperature"),
        ("abc", {"top_k": 0}, "top_k"),
        ("abc", {"top_p": 0.0}, "top_p"),
        ("abc", {"weights": "int4"}, "Unknown weights 'int4'"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, prompt, options, message):
    with pytest.raises(ConfigError, match=message):
        model.generate(prompt, **{"max_new_tokens": 5, **options})
