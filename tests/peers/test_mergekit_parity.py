"""Our merges against mergekit's output on the same safetensors folders; where a name hides another formula, which one.

mergekit 0.1.5 pins versions of its own: run this file in an environment of its own (docs/merging.md says how). The
numbers are float32 on both sides, so equal formulas agree to rounding.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.consensus.aggregate import chain
from capibara.consensus.ballot import Merge, open_ballot
from capibara.consensus.dropout import dare, della
from capibara.consensus.model_stock import model_stock
from capibara.consensus.spherical import karcher, slerp
from capibara.consensus.task_vectors import breadcrumbs, sce, task_arithmetic, ties, ties_tensor
from capibara.consensus.voting import majority
from capibara.files import read_tensors, tensors_to_bytes

pytestmark = pytest.mark.peers

ROUNDING = 2e-6
"""Weights are of order 1 and deltas of order 0.1; both sides compute in float32."""

Model = dict[str, np.ndarray]

SHAPES = {
    "model.embed_tokens.weight": (32, 8),
    "model.norm.weight": (8,),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (20, 8),
    "model.layers.0.mlp.up_proj.weight": (20, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 20),
    "lm_head.weight": (32, 8),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 8,
    "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 16, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A base and three fine-tunes of it that have something in common."""
    root, random = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    base = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    common = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    folders = []
    for i in range(4):
        folder = root / f"m{i}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        tensors = {
            name: (base[name] + bool(i) * 0.1 * (common[name] + random.normal(size=shape))).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        (folder / "model.safetensors").write_bytes(tensors_to_bytes(tensors))
        folders.append(folder)
    return folders


@pytest.fixture
def mergekit(folders, tmp_path):
    """`(method, parameters of the merge, of each model) -> the merged tensors`."""
    pytest.importorskip("mergekit")

    def merge(method: str, whole: dict[str, Any], each: Any, models: slice = slice(1, None)) -> Model:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mergekit.config import MergeConfiguration
            from mergekit.merge import run_merge
            from mergekit.options import MergeOptions

            config = {
                "merge_method": method,
                "models": [
                    {"model": str(folder), "parameters": each[i] if isinstance(each, list) else each}
                    for i, folder in enumerate(folders[models])
                ],
                "parameters": whole,
                "dtype": "float32",
            }
            if method != "karcher":
                config["base_model"] = str(folders[models][0] if method == "slerp" else folders[0])
            options = MergeOptions(copy_tokenizer=False, random_seed=0)
            run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "out"), options)
        merged: Model = {}
        for path in (tmp_path / "out").glob("*.safetensors"):
            merged |= read_tensors(path)
        return merged

    return merge


def ours(merge: Merge, folders: list[Path], *, base: bool = True, weights: Any = None, models=slice(1, None)) -> Model:
    """Task vectors to the base, merged, on the base again; or the models themselves."""
    foot = read_tensors(folders[0] / "model.safetensors")
    given = [read_tensors(folder / "model.safetensors") for folder in folders[models]]
    stack = {name: jnp.stack([model[name] - base * foot[name] for model in given]) for name in foot}
    vote = chain(majority(), merge=merge)
    ballot = open_ballot(stack, np.ones(len(given)) if weights is None else weights)
    delta, _, _ = vote.apply(ballot, vote.init(None), jax.random.key(0))
    return {name: base * foot[name] + np.asarray(delta[name]) for name in foot}


def apart(a: Model, b: Model) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


@pytest.mark.parametrize(
    ("method", "whole", "each", "merge"),
    [
        ("task_arithmetic", {}, {"weight": 0.4}, task_arithmetic(0.4)),
        ("ties", {"normalize": True}, {"weight": 1.0, "density": 0.5}, ties_tensor(0.5)),
        ("ties", {"normalize": True, "lambda": 0.7}, {"weight": 1.0, "density": 0.25}, ties_tensor(0.25, 0.7)),
        ("breadcrumbs", {}, {"weight": 0.4, "density": 0.75, "gamma": 0.125}, breadcrumbs(0.75, 0.125, 0.4)),
        ("breadcrumbs", {}, {"weight": 0.4, "density": 0.9, "gamma": 0.01}, breadcrumbs(0.9, 0.01, 0.4)),
        ("model_stock", {}, {}, model_stock()),
        ("sce", {"select_topk": 0.25}, {}, sce(0.25)),
        ("dare_linear", {}, {"weight": 1 / 3, "density": 1.0}, dare(1.0)),
        ("dare_ties", {"normalize": True}, {"weight": 1.0, "density": 1.0}, dare(1.0, elect=True)),
        ("della", {"normalize": True}, {"weight": 1.0, "density": 1.0, "epsilon": 0.0}, della(1.0, 0.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_same_formula_gives_the_same_model(mergekit, folders, method, whole, each, merge):
    assert apart(mergekit(method, whole, each), ours(merge, folders)) <= ROUNDING


@pytest.mark.parametrize("t", [0.25, 0.5, 0.9])
def test_slerp_is_mergekits(mergekit, folders, t):
    two = slice(1, 3)
    expected = ours(slerp(), folders, base=False, weights=np.array([1 - t, t]), models=two)
    assert apart(mergekit("slerp", {"t": t}, {}, two), expected) <= ROUNDING


def test_karcher_is_mergekits(mergekit, folders):
    """mergekit stops at a step of 1e-5 radians unless told otherwise; the rows are 3 to 17 long."""
    found = mergekit("karcher", {"tol": 1e-9, "max_iter": 100}, {"weight": 1.0})
    assert apart(found, ours(karcher(), folders, base=False)) <= ROUNDING


def test_weights_are_mergekits_too(mergekit, folders):
    """Unequal weights, none above the 2/m that a round allows: one model after the other has a weight of its own."""
    weights = np.array([0.5, 0.3, 0.2])
    each = [{"weight": float(w), "density": 0.5} for w in weights]
    found = mergekit("ties", {"normalize": True}, each)
    assert apart(found, ours(ties_tensor(0.5), folders, weights=weights)) <= ROUNDING


# ── The same name, another formula ───────────────────────────────────────────────────────────────────────────────────


def test_ties_over_the_whole_model_is_not_mergekits(mergekit, folders):
    found = mergekit("ties", {"normalize": True}, {"weight": 1.0, "density": 0.5})
    assert apart(found, ours(ties(0.5), folders)) > 0.01


def lone_delta(mergekit, folders, method: str, each: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The delta of one model in its largest tensor: as it was, and as mergekit leaves it."""
    name = "lm_head.weight"
    foot, tuned = (read_tensors(folder / "model.safetensors")[name] for folder in folders[:2])
    return tuned - foot, mergekit(method, {}, {"weight": 1.0, **each}, slice(1, 2))[name] - foot


def test_mergekits_dare_matches_the_l1_norm(mergekit, folders):
    """Other lots than ours, so what is compared is what they leave: our norm-matched variant, not 1/p."""
    before, after = lone_delta(mergekit, folders, "dare_linear", {"density": 0.5})
    kept = np.abs(after) > 1e-6
    factor = after[kept] / before[kept]
    assert np.ptp(factor) < 1e-2 and np.abs(after).sum() == pytest.approx(np.abs(before).sum(), rel=1e-4)
    assert abs(np.median(factor) - 2.0) > 0.01
    mine = ours(dare(0.5, norm_matched=True), folders, models=slice(1, 2))["lm_head.weight"]
    mine = mine - read_tensors(folders[0] / "model.safetensors")["lm_head.weight"]
    assert np.abs(mine).sum() == pytest.approx(np.abs(before).sum(), rel=1e-4)


def test_mergekits_della_rescales_by_the_norm_too_not_by_each_chance(mergekit, folders):
    before, after = lone_delta(mergekit, folders, "della_linear", {"density": 0.5, "epsilon": 0.4})
    kept = np.abs(after) > 1e-6
    assert np.ptp(after[kept] / before[kept]) < 1e-2
    rank = np.argsort(np.argsort(-np.abs(before), axis=-1), axis=-1)
    assert kept[rank < 4].mean() > kept[rank >= 4].mean() + 0.2  # the large ones stay, as with ours


def test_mergekits_sce_is_not_the_sum_alone(mergekit, folders):
    assert apart(mergekit("sce", {"select_topk": 0.25}, {}), ours(sce(0.25, divide=False), folders)) > 0.01
