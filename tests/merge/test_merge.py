"""Every method against NumPy in float64 on the whole models; and what must not change a bit does not."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from disk_models import BF16, random_model, read_model, write_folder, write_model, write_models, write_shards

from capibara.consensus.certificate import digest_tree
from capibara.merge import kernels, passes, stream
from capibara.merge.merge import merge
from capibara.merge.recipe import Recipe, read_recipe


def middle(stack):
    return np.median(stack, axis=0)


def trimmed(stack):
    return np.sort(stack, axis=0)[1:-1].mean(axis=0)


def on_circle(stack, t=0.25):
    a, b = (row.ravel() for row in stack)
    angle = np.arccos(a @ b / np.sqrt((a @ a) * (b @ b))) if a.size > 1 else 0.0
    if angle < 1e-6:
        return (1 - t) * stack[0] + t * stack[1]
    return (np.sin((1 - t) * angle) * stack[0] + np.sin(t * angle) * stack[1]) / np.sin(angle)


def summed(point, rows):
    return sum(np.linalg.norm(point - row) for row in rows)


ORACLES = {
    "uniform": (4, {}, lambda stack: stack.mean(axis=0)),
    "weighted": (3, {"weights": (0.2, 0.5, 0.3)}, lambda stack: np.tensordot([0.2, 0.5, 0.3], stack, 1)),
    "median": (5, {}, middle),
    "trimmed_mean": (5, {"faulty": 1}, trimmed),
    "slerp": (2, {"weights": (0.75, 0.25)}, on_circle),
}


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16, np.float64])
@pytest.mark.parametrize("method", ORACLES)
def test_a_method_is_its_formula(tmp_path, method, dtype):
    """float32 sums of at most 5 numbers of order 1: a few units of 2⁻²⁴; float64 inputs are summed in float64."""
    count, options, oracle = ORACLES[method]
    paths, models = write_models(tmp_path, count, dtype)
    wide = np.float64 if dtype is np.float64 else np.float32
    merge(Recipe(tuple(paths), method=method, dtype=np.dtype(wide).name, **options), tmp_path / "out")
    found = read_model(tmp_path / "out")
    assert found.keys() == models[0].keys()
    for name, value in found.items():
        stack = np.stack([model[name].astype(np.float64) for model in models])
        assert value.dtype == wide and value.shape == models[0][name].shape
        np.testing.assert_allclose(value, oracle(stack), atol=1e-6 if wide is np.float32 else 1e-14, err_msg=name)


VOTES = ("byzantine_tolerant", "geometric_median", "centered_clipping", "krum", "multi_krum")


@pytest.mark.parametrize("method", VOTES)
def test_a_vote_over_files_is_the_vote_over_models(tmp_path, method):
    """As `vote_models` for the default rule; for all, the coefficients give the point they stand for."""
    paths, models = write_models(tmp_path, 7)
    report = merge(Recipe(tuple(paths), method=method, faulty=2), tmp_path / "out")
    found = read_model(tmp_path / "out")
    v = np.array([entry["coefficient"] for entry in report.record["inputs"]])
    for name, value in found.items():
        stack = np.stack([model[name].astype(np.float64) for model in models])
        expected = np.tensordot(v, stack, 1) + (1 - v.sum()) * middle(stack)
        np.testing.assert_allclose(value, expected, atol=1e-6)
    if method == "byzantine_tolerant":
        from capibara.consensus.models import vote_models

        vote = vote_models(models, 2)
        np.testing.assert_allclose(v, vote.coefficients, atol=1e-6)
        for name, value in found.items():
            np.testing.assert_allclose(value, vote.merged[name], atol=1e-6)
    if method == "geometric_median":
        flat = [np.concatenate([m[n].ravel() for n in m]).astype(np.float64) for m in models]
        point = np.concatenate([found[n].ravel() for n in models[0]]).astype(np.float64)
        rng = np.random.default_rng(0)
        for step in 1e-2 * rng.standard_normal((50, point.size)):
            assert summed(point, flat) < summed(point + step, flat)


def test_a_liar_and_a_model_of_nan_do_not_move_the_vote(tmp_path):
    paths, models = write_models(tmp_path, 7)
    write_model(paths[2], {name: np.full_like(value, np.nan) for name, value in models[2].items()})
    write_model(paths[5], {name: -1e20 * np.ones_like(value) for name, value in models[5].items()})
    report = merge(Recipe(tuple(paths), method="byzantine_tolerant", faulty=2), tmp_path / "out")
    reasons = [entry["reason"] for entry in report.record["inputs"]]
    assert reasons[2] == "not_finite" and reasons[5] == "outvoted"
    honest = [models[i] for i in (0, 1, 3, 4, 6)]
    for name, value in read_model(tmp_path / "out").items():
        stack = np.stack([model[name] for model in honest])
        assert (np.abs(value - stack.mean(axis=0)) <= 3 * np.ptp(stack, axis=0).max()).all()


@pytest.mark.parametrize("method", ["uniform", "median", "byzantine_tolerant"])
@pytest.mark.parametrize("rounding", [{}, {"dtype": "bfloat16", "stochastic_rounding": True, "seed": 5}])
def test_blocks_and_tiles_change_no_bit(tmp_path, monkeypatch, method, rounding):
    paths, _ = write_models(tmp_path, 4)
    recipe = Recipe(tuple(paths), method=method, **rounding)
    whole = merge(recipe, tmp_path / "whole").record["digest"]
    monkeypatch.setattr(passes, "block_numbers", lambda jobs, n: 8)
    monkeypatch.setattr(kernels, "tile_numbers", lambda rows, precision: 3)
    assert merge(recipe, tmp_path / "blocks").record["digest"] == whole


def test_threads_change_no_bit(tmp_path, monkeypatch):
    paths, _ = write_models(tmp_path, 4)
    monkeypatch.setattr(passes, "block_numbers", lambda jobs, n: 4)
    recipe = Recipe(tuple(paths), method="byzantine_tolerant")
    digests = set()
    for workers in (1, 2, 5):
        monkeypatch.setattr(stream, "WORKERS", workers)
        monkeypatch.setattr(passes, "WORKERS", workers)
        digests.add(merge(recipe, tmp_path / f"out{workers}").record["digest"])
    assert len(digests) == 1


def test_digests_are_those_of_certificates(tmp_path):
    paths, models = write_models(tmp_path, 3, BF16)
    for method in ("uniform", "geometric_median"):
        record = merge(Recipe(tuple(paths), method=method), tmp_path / method).record
        assert [entry["digest"] for entry in record["inputs"]] == [digest_tree(model)[0] for model in models]
        digest, leaves = digest_tree(read_model(tmp_path / method))
        assert record["digest"] == digest and record["tensors"] == leaves


def test_shards_hold_the_same_tensors_in_files_of_the_size_asked_for(tmp_path):
    paths, _ = write_models(tmp_path, 2)
    single = merge(Recipe(tuple(paths)), tmp_path / "single")
    sharded = merge(Recipe(tuple(paths), shard_size=300), tmp_path / "sharded")
    assert sharded.record["tensors"] == single.record["tensors"]
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    found = read_model(tmp_path / "sharded")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    for file in files:
        tensors = read_model(tmp_path / "sharded" / file)
        assert all(index["weight_map"][name] == file for name in tensors)
        assert sum(value.nbytes for value in tensors.values()) <= 300 or len(tensors) == 1
    again = merge(Recipe((tmp_path / "sharded", tmp_path / "single")), tmp_path / "again")
    assert again.record["digest"] == single.record["digest"]


def test_a_folder_keeps_its_configuration_tokenizer_and_generation_files(tmp_path):
    a, b = (write_folder(tmp_path / n, random_model(s), torch_dtype="float32") for n, s in [("a", 0), ("b", 1)])
    merge(Recipe((a, b), dtype="bfloat16"), tmp_path / "out")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (a / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((a / "config.json").read_text()) | {"torch_dtype": "bfloat16"}


def test_the_card_names_method_digests_weights_and_what_is_not_certain(tmp_path):
    paths, _ = write_models(tmp_path, 2)
    record = merge(Recipe(tuple(paths), method="weighted", weights=(0.25, 0.75)), tmp_path / "out").record
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("`weighted`", "0.25", "0.75", record["digest"], "the weights were not found on data"):
        assert part in card
    assert all(entry["digest"][:32] in card for entry in record["inputs"])


def test_a_recipe_that_is_written_makes_the_same_bits(tmp_path):
    paths, _ = write_models(tmp_path, 3)
    options = {"dtype": "bfloat16", "stochastic_rounding": True, "seed": 9, "shard_size": 200}
    first = merge(Recipe(tuple(paths), method="weighted", weights=(0.1, 0.2, 0.7), **options), tmp_path / "out")
    again = merge(read_recipe(tmp_path / "out" / "recipe.toml"), tmp_path / "again")
    assert again.record["digest"] == first.record["digest"]
    for file in sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_integers_that_agree_are_copied(tmp_path):
    for seed, name in enumerate("ab"):
        write_model(tmp_path / f"{name}.safetensors", random_model(seed) | {"ids": np.arange(9)})
    merge(Recipe((tmp_path / "a.safetensors", tmp_path / "b.safetensors"), dtype="bfloat16"), tmp_path / "out")
    np.testing.assert_array_equal(read_model(tmp_path / "out")["ids"], np.arange(9))


def test_types_that_differ_are_merged_in_the_wider(tmp_path):
    a, b = random_model(0, BF16), random_model(1, np.float16)
    write_model(tmp_path / "a.safetensors", a)
    write_model(tmp_path / "b.safetensors", b)
    merge(Recipe((tmp_path / "a.safetensors", tmp_path / "b.safetensors")), tmp_path / "out.safetensors")
    for name, value in read_model(tmp_path / "out.safetensors").items():
        expected = (a[name].astype(np.float32) + b[name].astype(np.float32)) / np.float32(2)
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected)


def test_identical_models_merge_to_themselves(tmp_path):
    model = random_model(0, BF16)
    paths = tuple(write_model(tmp_path / f"{i}.safetensors", model) for i in range(5))
    for method in ("uniform", "median", "trimmed_mean", "geometric_median", "byzantine_tolerant"):
        record = merge(Recipe(paths, method=method), tmp_path / method).record
        assert record["digest"] == digest_tree(model)[0], method


def test_shards_and_files_of_other_orders_are_one_model(tmp_path):
    a, b = random_model(0), random_model(1)
    left = write_shards(tmp_path / "a", a)
    right = write_model(tmp_path / "b.safetensors", dict(reversed(b.items())))
    merge(Recipe((left, right)), tmp_path / "out")
    for name, value in read_model(tmp_path / "out").items():
        np.testing.assert_array_equal(value, (a[name] + b[name]) / np.float32(2))


def test_200_models_merge(tmp_path):
    shapes = {"w": (300, 7), "b": (5,)}
    models = [random_model(i, np.float32, shapes) for i in range(200)]
    paths = tuple(write_model(tmp_path / f"{i}.safetensors", model) for i, model in enumerate(models))
    for method, oracle in [("uniform", lambda stack: stack.mean(axis=0)), ("median", middle)]:
        merge(Recipe(paths, method=method), tmp_path / method)
        for name, value in read_model(tmp_path / method).items():
            stack = np.stack([model[name].astype(np.float64) for model in models])
            np.testing.assert_allclose(value, oracle(stack), atol=2e-6)


def test_liars_at_the_reference_do_not_blur_the_geometric_median(tmp_path):
    """With two liars of 1e15 among the three rows of the reference, float64 tells no honest row apart."""
    paths, models = write_models(tmp_path, 7)
    for i in (0, 3):
        write_model(paths[i], {name: np.full_like(value, 1e15) for name, value in models[i].items()})
    report = merge(Recipe(tuple(paths), method="geometric_median", faulty=2), tmp_path / "out")
    v = np.array([entry["coefficient"] for entry in report.record["inputs"]])
    assert v[0] < 1e-9 and v[3] < 1e-9
    truthful = [models[i] for i in (1, 2, 4, 5, 6)]
    rows = [np.concatenate([m[n].ravel() for n in m]).astype(np.float64) for m in truthful]
    honest = v[[1, 2, 4, 5, 6]] @ np.array(rows)
    # The pull of two rows in one direction at any distance, 2 of 7, moves the point by less than the honest spread.
    assert summed(honest, rows) < 1.2 * min(summed(row, rows) for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc here to read peak memory from")
def test_memory_stays_small_and_flat_in_the_size_of_the_models(tmp_path):
    """Peak memory in a process of its own: 256 MB and 16 MiB a model hold for 30 MB and for 500 MB files alike."""
    import subprocess
    import sys

    from capibara.merge.header import build_header

    code = (
        "import sys\nfrom pathlib import Path\nfrom capibara.merge.merge import merge\n"
        "from capibara.merge.recipe import Recipe\n"
        "merge(Recipe(tuple(map(Path, sys.argv[3:])), method=sys.argv[1]), sys.argv[2])\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )  # not ru_maxrss: a process inherits that of the one that started it
    peaks = {}
    for tensors in (1, 16):
        folder = tmp_path / str(tensors)
        folder.mkdir()
        header, _ = build_header([(f"w{i}", "BF16", (4096, 4096)) for i in range(tensors)], {})
        values = np.random.default_rng(0).standard_normal(2**24).astype(np.float32).view(np.uint32) >> 16
        paths = []
        for i in range(3):
            paths.append(folder / f"{i}.safetensors")
            with open(paths[-1], "wb") as file:
                file.write(header)
                for _ in range(tensors):
                    file.write(np.roll(values, i).astype(np.uint16).data)
        for method in ("uniform", "median"):
            command = [sys.executable, "-c", code, method, str(folder / method), *map(str, paths)]
            peaks[method, tensors] = 1024 * int(subprocess.run(command, check=True, capture_output=True).stdout)
    for method in ("uniform", "median"):
        assert peaks[method, 16] <= 256e6 + 3 * 2**24
        assert abs(peaks[method, 16] - peaks[method, 1]) <= 32e6
