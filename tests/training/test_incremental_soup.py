"""`IncrementalSoupStrategy`: the specification's snippet, every kind of checkpoint and method, and every bad input."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from capibara.consensus.averages import decay_weights
from capibara.consensus.evidence import held_out
from capibara.consensus.models import vote_models
from capibara.consensus.soup_metrics import perplexity
from capibara.consensus.soups import greedy_soup, linear_soup
from capibara.core.config import ModelConfig
from capibara.core.model import ModularCapibaraModel, objective, parameters, with_parameters
from capibara.errors import CapibaraError, ConfigError, DataError
from capibara.files import tensors_to_bytes
from capibara.training import IncrementalSoupStrategy

SNIPPET = """
from capibara.training import IncrementalSoupStrategy

soup = IncrementalSoupStrategy(
    merging_method="uniform",  # uniform, weighted, greedy
    evaluation_metric="perplexity"
)

# Add checkpoints to soup
soup.add_checkpoint("checkpoint_epoch_1.pkl")
soup.add_checkpoint("checkpoint_epoch_2.pkl")
soup.add_checkpoint("checkpoint_epoch_3.pkl")

# Create soup model
souped_model = soup.merge(validation_data=val_data)
"""

TEXT = np.frombuffer((Path(__file__).parents[2] / "LICENSE").read_bytes(), np.uint8).astype(np.int32)
SHAPE: dict[str, Any] = dict(vocab_size=256, width=16, num_layers=1, num_heads=2, num_kv_heads=1, hidden=16)
T = 16


def batch_at(places: np.ndarray) -> dict[str, np.ndarray]:
    """Sequences of T bytes that begin there."""
    rows = places[:, None] + np.arange(T)
    ones = np.ones(rows.shape, np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), rows.shape)
    return {
        "tokens": TEXT[rows],
        "targets": TEXT[rows + 1],
        "segments": ones,
        "positions": positions,
        "mask": ones > 0,
    }


VAL = batch_at(np.arange(8000, 8000 + 16 * T, T))


@pytest.fixture(scope="module")
def model() -> ModularCapibaraModel:
    return ModularCapibaraModel(ModelConfig(**SHAPE))


@pytest.fixture(scope="module")
def losses(model):
    return objective(model)


@pytest.fixture(scope="module")
def trees(model, losses) -> list[dict[str, np.ndarray]]:
    """The states of one run after 20, 21 … 24 steps at a rate that makes it jump about the valley."""

    @jax.jit
    def step(params, batch):
        slope = jax.grad(lambda p: losses.loss(p, batch, jax.random.key(0))[0])(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, slope)

    params, kept = parameters(model), []
    for k in range(24):
        params = step(params, batch_at(np.random.default_rng(k).integers(0, 8000 - T, 8)))
        kept.append({name: np.array(leaf) for name, leaf in params.items()})
    return kept[-5:]


@pytest.fixture
def pickled(tmp_path, monkeypatch, trees):
    """checkpoint_epoch_1.pkl … in the working folder."""
    monkeypatch.chdir(tmp_path)
    for i, tree in enumerate(trees, 1):
        Path(f"checkpoint_epoch_{i}.pkl").write_bytes(pickle.dumps(tree))
    return tmp_path


def soup_of(checkpoints, *args, **options) -> IncrementalSoupStrategy:
    soup = IncrementalSoupStrategy(*args, **options)
    for checkpoint in checkpoints:
        soup.add_checkpoint(checkpoint)
    return soup


def mean(trees, weights=None) -> dict[str, np.ndarray]:
    return {name: np.average([tree[name] for tree in trees], axis=0, weights=weights) for name in trees[0]}


def close(ours, theirs, atol=1e-6):
    assert dict(ours).keys() == dict(theirs).keys()
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=atol)


def test_the_specifications_snippet_runs_as_written(pickled, trees):
    """Bare pickles do not say what model they are of: the soup is a tree, and nothing is evaluated."""
    names: dict[str, Any] = {"val_data": VAL}
    exec(SNIPPET, names)
    close(names["souped_model"], mean(trees[:3]))
    assert names["soup"].last_result.evaluations == 0


def test_the_snippet_evaluates_where_the_model_is_known(pickled, trees, model, losses):
    """A config.json beside the pickles, as `save` writes it, makes them models."""
    (pickled / "config.json").write_text(json.dumps(model.config.model_dump(mode="json")))
    names: dict[str, Any] = {"val_data": VAL}
    exec(SNIPPET, names)
    souped, result = names["souped_model"], names["soup"].last_result
    assert isinstance(souped, ModularCapibaraModel) and result.evaluations == 4
    value = np.exp(float(losses.loss(parameters(souped), VAL, jax.random.key(0))[0]))
    assert result.value == pytest.approx(value, rel=1e-4) and result.value <= min(result.values)


def test_the_facade_adds_nothing(trees, model, losses):
    models = [with_parameters(model, tree) for tree in trees]
    metric = perplexity(losses, held_out(VAL))
    cores = {"uniform": linear_soup(trees, np.ones(5), metric=metric), "greedy": greedy_soup(trees, metric)}
    for method, core in cores.items():
        merged = soup_of(models, method, objective=losses).merge(VAL)
        jax.tree.map(np.testing.assert_array_equal, dict(parameters(merged)), core.params)


def test_every_kind_of_checkpoint_goes_in(tmp_path, trees, model):
    """A model, a tree, a pickle, safetensors, NPZ and a saved folder are the same checkpoint."""
    (tmp_path / "a.safetensors").write_bytes(tensors_to_bytes(trees[0]))
    np.savez(tmp_path / "a.npz", **trees[0])  # pyright: ignore[reportArgumentType]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(trees[0]))
    with_parameters(model, trees[0]).save(tmp_path / "saved")
    kinds = [with_parameters(model, trees[0]), trees[0], *(tmp_path / f"a.{x}" for x in ("safetensors", "npz", "pkl"))]
    for method in ("uniform", "median"):
        soup = soup_of([*kinds, str(tmp_path / "saved")], method)
        merged = soup.merge()
        assert isinstance(merged, ModularCapibaraModel) and len(soup) == 6
        close(parameters(merged), trees[0], atol=1e-7)


def test_nested_trees_keep_their_structure(tmp_path, trees):
    nested = [{"params": {"blocks": [tree["embedding"], {"x": tree["embedding"] * 2}]}} for tree in trees[:3]]
    (tmp_path / "n.pkl").write_bytes(pickle.dumps(nested[2]))
    for method in ("uniform", "median", "vote"):
        merged = soup_of([*nested[:2], tmp_path / "n.pkl"], method).merge()
        assert jax.tree.structure(merged) == jax.tree.structure(nested[0])
    close({"e": soup_of(nested, "uniform").merge()["params"]["blocks"][0]}, {"e": mean(trees[:3])["embedding"]})


def test_windows_and_decay(trees):
    close(soup_of(trees, "window", last=2).merge(), mean(trees[-2:]))
    close(soup_of([trees[0], *trees], "window").merge(), mean(trees))  # five, where nothing is said
    for schedule in ("1-sqrt", "linear", "cosine"):
        close(soup_of(trees, "decay", schedule=schedule).merge(), mean(trees, decay_weights(5, schedule)))
    close(soup_of(trees, "decay", last=3).merge(), mean(trees[-3:], decay_weights(3)))


def test_given_weights_are_used(trees):
    soup = IncrementalSoupStrategy("weighted")
    for tree, weight in zip(trees, (1, 0, 3, 0, 4), strict=True):
        soup.add_checkpoint(tree, weight=weight)
    close(soup.merge(), mean(trees, [1, 0, 3, 0, 4]))
    soup.add_checkpoint(trees[0])
    with pytest.raises(ConfigError, match="5 of 6 checkpoints have a weight"):
        soup.merge()
    with pytest.raises(ConfigError, match="0 or more"):
        soup.add_checkpoint(trees[0], weight=-1)
    with pytest.raises(ConfigError, match="uniform takes no weights"):
        IncrementalSoupStrategy().add_checkpoint(trees[0], weight=1)


def test_weights_are_found_on_the_validation_data(trees, losses):
    soup = soup_of(trees, "weighted", objective=losses)
    soup.merge(VAL)
    assert soup.last_weights is not None and soup.last_result is not None
    assert soup.last_weights.certificate == "global_convex" and 0 <= (soup.last_weights.dual_gap or 0) < 1e-6
    assert soup.last_result.value <= np.exp(min(soup.last_weights.losses)) * (1 + 1e-5)


def geometric_median(given: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The point of least summed distance over whole trees, by 1,000 Weiszfeld steps in float64."""
    rows = np.stack([np.concatenate([tree[name].ravel() for name in given[0]]) for tree in given]).astype(np.float64)
    centre = rows.mean(axis=0)
    for _ in range(1000):
        pull = 1 / np.maximum(np.linalg.norm(rows - centre, axis=1), 1e-300)
        centre = (pull / pull.sum()) @ rows
    ends = np.cumsum([given[0][name].size for name in given[0]])[:-1]
    parts = np.split(centre, ends)
    return {name: part.reshape(given[0][name].shape) for name, part in zip(given[0], parts, strict=True)}


@pytest.mark.parametrize("method", ["median", "trimmed_mean", "geometric_median", "vote"])
def test_a_lie_among_five_does_not_move_a_robust_soup(tmp_path, trees, method):
    """All within the honest range, but the geometric median, which a far lie shifts by a share of the honest spread:
    that one is its float64 definition to rounding."""
    lie = {name: leaf + 100 for name, leaf in trees[0].items()}
    given: list[Any] = [*trees[:4], lie]
    (tmp_path / "lie.safetensors").write_bytes(tensors_to_bytes(lie))
    soup = soup_of([*trees[:4], tmp_path / "lie.safetensors"], method)
    merged = soup.merge()
    if method == "geometric_median":
        close(merged, geometric_median(given), atol=1e-5)
    else:
        for name in lie:
            rows = np.stack([tree[name] for tree in trees[:4]])
            spread = rows.max(axis=0) - rows.min(axis=0)
            assert (merged[name] >= rows.min(axis=0) - spread - 1e-3).all()
            assert (merged[name] <= rows.max(axis=0) + spread + 1e-3).all()
    assert soup.last_result is not None
    if method == "median":
        close(merged, {name: np.median([tree[name] for tree in given], axis=0) for name in lie})
    if method == "vote":
        close(merged, vote_models(given, 1).merged, atol=1e-5)
        assert soup.last_result.reasons == ("used", "used", "used", "used", "outvoted")


def test_nan_one_and_none(trees, losses):
    bad = {**trees[1], "embedding": np.full_like(trees[1]["embedding"], np.nan)}
    for method in ("uniform", "window", "decay", "greedy", "greedy_by_arrival", "median", "vote"):
        soup = soup_of([trees[0], bad, trees[2]], method, objective=losses)
        merged = soup.merge(VAL)
        assert soup.last_result is not None and soup.last_result.reasons[1] == "not_finite"
        assert all(np.isfinite(leaf).all() for leaf in merged.values())
        alone = soup_of([bad], method, objective=losses)
        with pytest.raises(ConfigError, match="None of the 1 checkpoints"):
            alone.merge(VAL)
        close(soup_of([trees[0]], method, objective=losses).merge(VAL), trees[0], atol=0)
        with pytest.raises(ConfigError, match="no checkpoints in the soup"):
            IncrementalSoupStrategy(method).merge(VAL)


def test_two_hundred_checkpoints(tmp_path, trees):
    small = {"w": trees[0]["embedding"][:8]}
    rng = np.random.default_rng(0)
    rows = [{"w": small["w"] + rng.normal(size=small["w"].shape).astype(np.float32)} for _ in range(200)]
    for i, row in enumerate(rows):
        (tmp_path / f"{i}.safetensors").write_bytes(tensors_to_bytes(row))
    files = [tmp_path / f"{i}.safetensors" for i in range(200)]
    close(soup_of(files).merge(), mean(rows), atol=1e-5)
    close(soup_of(files, "median").merge(), {"w": np.median([row["w"] for row in rows], axis=0)})


def test_one_sequence_of_validation(trees, losses):
    one = {name: leaf[:1] for name, leaf in VAL.items()}
    soup = soup_of(trees, "greedy", objective=losses)
    soup.merge(one)
    assert soup.last_result is not None and soup.last_result.reasons.count("used") == 1
    assert soup.last_result.value == min(soup.last_result.values)


def test_metrics(trees, model, losses):
    models = [with_parameters(model, tree) for tree in trees]
    accurate = soup_of(models, "greedy", "accuracy", objective=losses)
    accurate.merge(VAL)
    assert accurate.last_result is not None and accurate.last_result.value == max(
        [accurate.last_result.value, *accurate.last_result.values]
    )

    def lengths(given, data):
        assert isinstance(given, ModularCapibaraModel) and data is VAL
        return np.array([np.abs(np.asarray(leaf)).sum() for leaf in parameters(given).values()])

    shortest = soup_of(models, "greedy", lengths, accept="better")
    shortest.merge(VAL)
    assert shortest.last_result is not None and shortest.last_result.value <= min(shortest.last_result.values)


def test_a_callable_needs_no_model(trees):
    def size(tree, data):
        return [float(np.abs(leaf).sum()) for leaf in tree.values()]

    assert soup_of(trees, "greedy", size).merge(VAL).keys() == trees[0].keys()


def test_what_cannot_be_meant_says_why(tmp_path, trees):
    with pytest.raises(ConfigError, match="Did you mean 'greedy'"):
        IncrementalSoupStrategy("greedi")
    with pytest.raises(ConfigError, match="Unknown evaluation_metric 'ppl'"):
        IncrementalSoupStrategy("greedy", "ppl")
    with pytest.raises(ConfigError, match="last is a number"):
        IncrementalSoupStrategy("window", last=0)
    with pytest.raises(ConfigError, match="accept is"):
        IncrementalSoupStrategy("greedy", accept="maybe")
    with pytest.raises(ConfigError, match="Unknown schedule"):
        IncrementalSoupStrategy("decay", schedule="step")
    with pytest.raises(ConfigError, match="keeps no variance"):
        IncrementalSoupStrategy("vote", variance=True)
    with pytest.raises(ConfigError, match="greedy chooses by validation data"):
        soup_of(trees, "greedy").merge()
    with pytest.raises(ConfigError, match="where the checkpoints are trees or files without a config.json"):
        soup_of(trees, "greedy").merge(VAL)
    with pytest.raises(ConfigError, match="holds no array"):
        IncrementalSoupStrategy().add_checkpoint({})
    with pytest.raises(ConfigError, match="holds a str at 'name'"):
        IncrementalSoupStrategy().add_checkpoint({**trees[0], "name": "x"})


def test_damaged_and_hostile_files_are_refused_when_they_are_added(tmp_path, trees):
    whole = tensors_to_bytes(trees[0])
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps(trees[0])[:-9])
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "canary").encode() + b"'\ntR.")
    (tmp_path / "torch.pt").write_bytes(b"PK")
    for name, says in (
        ("cut.safetensors", "cut.safetensors"),
        ("cut.pkl", "not a whole pickle"),
        ("evil.pkl", "asks for 'os.system'.*Nothing of it was run"),
        ("torch.pt", "pickle"),
        ("absent.pkl", "does not exist"),
        ("absent", "does not exist"),
    ):
        with pytest.raises(CapibaraError, match=says):
            IncrementalSoupStrategy().add_checkpoint(tmp_path / name)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("method", ["uniform", "median"])
def test_checkpoints_of_another_structure_are_named(tmp_path, trees, method):
    other = {**trees[1], "embedding": trees[1]["embedding"][:100]}
    (tmp_path / "other.pkl").write_bytes(pickle.dumps(other))
    with pytest.raises((ConfigError, DataError), match="embedding"):
        soup_of([trees[0], tmp_path / "other.pkl"], method).merge()


def test_a_file_that_is_cut_after_it_was_added_is_an_error(tmp_path, trees):
    path = tmp_path / "a.safetensors"
    path.write_bytes(tensors_to_bytes(trees[0]))
    soup = soup_of([trees[1], path])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError):
        soup.merge()


def test_a_model_that_trains_on_is_not_followed(trees, model):
    moving = with_parameters(model, trees[0])
    soup = soup_of([moving])
    moving.embedding[...] = moving.embedding[...] + 1
    close(parameters(soup.merge()), trees[0], atol=0)


def test_variance_on_request(trees):
    soup = soup_of(trees, variance=True)
    soup.merge()
    assert soup.last_result is not None
    exact = {name: np.var([tree[name] for tree in trees], axis=0, dtype=np.float64) for name in trees[0]}
    for name in exact:
        np.testing.assert_allclose(soup.last_result.variance[name], exact[name], rtol=1e-3, atol=1e-9)
