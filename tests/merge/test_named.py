"""The named merges over files are the merges of a round on the same rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disk_models import random_model, read_model, write_model, write_models

from capibara.consensus.aggregate import merge_ballot
from capibara.consensus.ballot import open_ballot
from capibara.errors import ConfigError
from capibara.merge import passes
from capibara.merge.merge import merge
from capibara.merge.methods import METHODS
from capibara.merge.named import named_merge
from capibara.merge.recipe import Recipe

SHAPES = {"b.w": (9, 8), "a.w": (6, 10), "c": (12,)}
NAMED = [name for name, method in METHODS.items() if method.base != "no"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, three fine-tunes of it, and their task vectors."""
    folder = tmp_path_factory.mktemp("named")
    base = random_model(0, shapes=SHAPES)
    tunes = [{n: base[n] + np.float32(0.1) * random_model(i, shapes=SHAPES)[n] for n in base} for i in (1, 2, 3)]
    paths = [write_model(folder / f"{i}.safetensors", model) for i, model in enumerate([base, *tunes])]
    stack = {name: jnp.stack([jnp.asarray(tune[name] - base[name]) for tune in tunes]) for name in base}
    return paths[0], tuple(paths[1:]), base, stack


def in_a_round(recipe, stack, weights):
    key = jax.random.key(recipe.seed)
    return merge_ballot(open_ballot(stack, weights), named_merge(recipe), None, None, key)[0]


@pytest.mark.parametrize("method", NAMED)
def test_over_task_vectors_it_is_what_a_round_makes_of_the_deltas(files, tmp_path, method):
    """float32 sums of numbers of order 1, in another order: 1e-6."""
    base_path, paths, base, stack = files
    weights = (0.2, 0.3, 0.5) if METHODS[method].weights else None
    recipe = Recipe(paths, method=method, base=base_path, weights=weights, seed=4)
    report = merge(recipe, tmp_path / "out")
    expected = in_a_round(recipe, stack, weights or (1, 1, 1))
    for name, value in read_model(tmp_path / "out").items():
        np.testing.assert_allclose(value, base[name] + np.asarray(expected[name]), atol=1e-6, err_msg=name)
    assert report.record["base"]["path"] == str(base_path)
    assert "Base: 0.safetensors" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("method", ["task_arithmetic", "model_stock", "karcher"])
def test_blocks_change_only_the_order_of_the_products(files, tmp_path, monkeypatch, method):
    base_path, paths, _, _ = files
    recipe = Recipe(paths, method=method, base=base_path)
    merge(recipe, tmp_path / "whole")
    monkeypatch.setattr(passes, "block_numbers", lambda jobs, n: 8)
    merge(recipe, tmp_path / "blocks")
    blocks = read_model(tmp_path / "blocks")
    for name, value in read_model(tmp_path / "whole").items():
        np.testing.assert_allclose(blocks[name], value, rtol=1e-6)


def test_options_reach_the_merge(files, tmp_path):
    base_path, paths, base, stack = files
    merge(Recipe(paths, method="task_arithmetic", base=base_path, options={"scale": 0.0}), tmp_path / "zero")
    for name, value in read_model(tmp_path / "zero").items():
        np.testing.assert_allclose(value, base[name], atol=1e-7)
    merge(Recipe(paths, method="ties", base=base_path, options={"density": 1.0, "scale": 0.5}), tmp_path / "ties")
    expected = in_a_round(Recipe(paths, method="ties", options={"density": 1.0, "scale": 0.5}), stack, (1, 1, 1))
    for name, value in read_model(tmp_path / "ties").items():
        np.testing.assert_allclose(value, base[name] + np.asarray(expected[name]), atol=1e-6)


def test_a_seed_draws_other_lots(files, tmp_path):
    base_path, paths, _, _ = files
    digests = [
        merge(Recipe(paths, method="dare", base=base_path, seed=seed), tmp_path / str(number)).record["digest"]
        for number, seed in enumerate([0, 0, 1])
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("change", "reason"), [
    ({"method": "ties"}, "give the model that was fine-tuned as --base"),
    ({"method": "ties", "base": True, "options": {"densty": 0.5}}, "Did you mean 'density'"),
    ({"method": "ties", "base": True, "options": {"density": 0.0}}, "density"),
    ({"method": "uniform", "base": True}, "no use for a base model"),
    ({"method": "uniform", "options": {"scale": 1.0}}, "has no options"),
    ({"method": "model_stock", "base": True, "weights": (0.2, 0.3, 0.5)}, "takes no weights"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(files, tmp_path, change, reason):
    base_path, paths, _, _ = files
    change = {**change, "base": base_path if change.get("base") else None}
    with pytest.raises(ConfigError) as caught:
        merge(Recipe(paths, **change), tmp_path / "out")
    assert reason in str(caught.value)


def test_files_for_every_merge_of_a_configuration():
    """The names of `merge_strategy` are the command's too; there the weighted average is called `weighted`."""
    from capibara.consensus.vocabulary import MERGES

    assert set(MERGES) - {"weighted_average", "convex_optimization"} <= set(METHODS)


def test_a_base_of_another_shape_is_refused(files, tmp_path):
    _, paths, _, _ = files
    other = write_models(tmp_path, 1)[0][0]
    with pytest.raises(ConfigError, match="has no tensor"):
        merge(Recipe(paths, method="task_arithmetic", base=other), tmp_path / "out")
