"""The snippets of the public contract: which run, what they are given, and which are still to come.

    heading → Snippet(names that the snippet does not define, what must hold afterwards)

A snippet runs as written, from its imports to its last line, in a folder of its own. What changes is what the document
cannot supply: a local folder stands for `gs://capibara-data/`, and `plain` for strategies that are not there yet.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import small

from capibara.consensus.vocabulary import STRATEGIES
from capibara.core.model import ModularCapibaraModel, parameters
from capibara.data.demo import demo_folder
from capibara.training import ConsensusConfig, UnifiedTrainer
from capibara.training.replay import verify_run

Names = dict[str, Any]
FENCE = re.compile(r"^#+ (?P<heading>[^\n]+)$|^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
SMALL = {
    "CAPIBARA_MODEL__WIDTH": "16",
    "CAPIBARA_MODEL__NUM_LAYERS": "1",
    "CAPIBARA_DATA__SEQUENCE_LENGTH": "32",
    "CAPIBARA_DATA__HELD_OUT_FRACTION": "0.3",
}
"""The default preset in the size of a test; the environment is how a user would change it without touching the code."""


class Snippet(NamedTuple):
    """A snippet that runs.

    Attributes:
      supply: `(folder, monkeypatch) -> names`, called in the folder that the snippet runs in.
      check: What must hold of the names when it has run.
      ours: The same calls in our own words, for where the document is not at hand.
      warns: The one warning that it is meant to give, or None.
      slow: Whether it is for the slow lane.
    """

    supply: Callable[[Path, pytest.MonkeyPatch], Names]
    check: Callable[[Names, Path], None]
    ours: str
    warns: str | None = None
    slow: bool = False


def blocks(document: str) -> dict[str, str]:
    """Heading, without its number → the python block under it; a second block under a heading is an error."""
    found: dict[str, str] = {}
    heading = ""
    for match in FENCE.finditer(document):
        if match["heading"]:
            heading = re.sub(r"^\d+\. ", "", match["heading"])
        elif match["language"] == "python":
            assert heading not in found, f"two blocks under {heading!r}"
            found[heading] = match["code"]
    return found


def localised(code: str, folder: Path) -> str:
    """The snippet with a folder of text for the bucket, and `plain` for every strategy that is not there yet."""

    def known(match: re.Match[str]) -> str:
        return re.sub(r'"(\w+)"', lambda name: name[0] if name[1] in STRATEGIES else '"plain"', match[0])

    code = re.sub(r"strategies=\[[^\]]*\]", known, code)
    return code.replace('"gs://capibara-data/"', repr(str(folder / "text")))


def three_models(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """Three models from different seeds."""
    return {f"model{i}": ModularCapibaraModel(small.config(), seed=i) for i in (1, 2, 3)}


def is_their_mean(names: Names, folder: Path) -> None:
    """f = 0 of three, so that nobody is outvoted and each counts a third."""
    given = [parameters(names[f"model{i}"]) for i in (1, 2, 3)]
    for name, leaf in parameters(names["consensus_model"]).items():
        mean = np.mean([params[name] for params in given], axis=0)
        np.testing.assert_allclose(leaf, mean, rtol=1e-4, atol=1e-6)
    assert names["consensus"].last_result.num_faulty == 0


def text_and_small_preset(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """Twelve speeches in `text/`."""
    for name, value in SMALL.items():
        patch.setenv(name, value)
    small.speeches(folder / "text", 0, 12, 12_000)
    return {}


def has_agreed(names: Names, folder: Path) -> None:
    """Ten epochs committed, the model better than at the start by more than two standard errors, every vote on file."""
    results = names["results"]
    assert results.rounds > 1 and {entry["outcome"] for entry in results.history} == {"committed"}
    change, se = results.after.against(results.before)
    assert change < -2 * se
    assert verify_run(results.run_path, expect=results.head).ok
    assert names["consensus_system"].session.plan.config.num_tolerated == 2


def folders_and_configuration(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """`data/train`, `data/eval` and `config/development/config.toml`."""
    patch.setenv("CAPIBARA_DATA__SEQUENCE_LENGTH", SMALL["CAPIBARA_DATA__SEQUENCE_LENGTH"])
    small.speeches(folder / "data" / "train", 0, 2, 3000)
    small.speeches(folder / "data" / "eval", 8, 1, 3000)
    (folder / "config" / "development").mkdir(parents=True)
    (folder / "config" / "development" / "config.toml").write_text(
        "[model]\nwidth = 16\nnum_layers = 1\nnum_heads = 2\nhidden = 16\n"
    )
    return {}


def has_trained(names: Names, folder: Path) -> None:
    """Ten epochs are on disk, with the log, and the model is better than it was on the evaluation text."""
    run, model = folder / "checkpoints", names["trainer"].model
    log = (run / "logs" / "training.log").read_text()
    assert "eval loss at the start" in log and "lower by more than two standard errors" in log
    loaded = ModularCapibaraModel.load(run / "model")
    for name, leaf in parameters(model).items():
        np.testing.assert_array_equal(parameters(loaded)[name], leaf)
    assert names["model"] is model


def waits_longer(names: Names, folder: Path) -> None:
    """The two values, and the defaults beside them."""
    config = names["consensus_config"]
    assert (config.consensus_timeout, config.max_retries) == (600, 5)
    assert config == ConsensusConfig(max_retries=5)


def sees_128(names: Names, folder: Path) -> None:
    """Sixteen sequences at a time, eight times a step."""
    training = names["trainer"].config.training
    assert (training.batch_size, training.accumulation_steps) == (128, 8) and training.gradient_checkpointing


def held_out_batch() -> dict[str, np.ndarray]:
    """Sixteen sequences of a speech, as bytes."""
    first = min((demo_folder() / "speeches").glob("*.txt")).read_bytes()[: 16 * 33]
    text = np.frombuffer(first, np.uint8).astype(np.int32).reshape(16, 33)
    return {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "segments": np.ones((16, 32), np.int32),
        "positions": np.tile(np.arange(32, dtype=np.int32), (16, 1)),
        "mask": np.ones((16, 32), bool),
    }


def models_and_validation(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """A list of three models, and held-out text."""
    return {"models": list(three_models(folder, patch).values()), "val_data": held_out_batch()}


def is_certified(names: Names, folder: Path) -> None:
    """Weights with a gap, and a merge no worse than the best model on the validation data."""
    weights = names["optimal_weights"]
    assert weights.certificate == "global_convex" and np.asarray(weights).sum() == pytest.approx(1)
    assert weights.merged_loss <= min(weights.losses) + 1e-6
    assert isinstance(names["merged_model"], ModularCapibaraModel)


def three_pickles(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """Three pickled checkpoints, dicts of NumPy arrays."""
    for i, model in enumerate(three_models(folder, patch).values(), 1):
        arrays = {name: np.asarray(leaf) for name, leaf in parameters(model).items()}
        (folder / f"checkpoint_epoch_{i}.pkl").write_bytes(pickle.dumps(arrays))
    return {"val_data": held_out_batch()}


def is_the_mean_of_the_pickles(names: Names, folder: Path) -> None:
    """The uniform soup."""
    given = [pickle.loads((folder / f"checkpoint_epoch_{i}.pkl").read_bytes()) for i in (1, 2, 3)]
    for name, leaf in names["souped_model"].items():
        np.testing.assert_allclose(leaf, np.mean([one[name] for one in given], axis=0), rtol=1e-5, atol=1e-7)


def model_and_text(folder: Path, patch: pytest.MonkeyPatch) -> Names:
    """A small model and a folder of two short speeches."""
    patch.setenv("CAPIBARA_DATA__SEQUENCE_LENGTH", "32")
    patch.setenv("CAPIBARA_DATA__HELD_OUT_FRACTION", "0.3")
    small.speeches(folder / "text", 0, 40, 300)
    model = ModularCapibaraModel(small.config())
    return {"model": model, "train_data": "text", "before": dict(parameters(model))}


def three_arrays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    return dict(zip("qkv", np.random.default_rng(0).normal(size=(3, 2, 9, 4, 8)).astype(np.float32), strict=True))


def is_attention(names: Names, folder: Path) -> None:
    """Softmax over all keys, in float64, sequence by sequence and head by head."""
    for b, n in np.ndindex(2, 4):
        scores = names["q"][b, :, n].astype(np.float64) @ names["k"][b, :, n].T / np.sqrt(8)
        shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(names["attn_output"][b, :, n], shares @ names["v"][b, :, n], atol=2e-6)



def has_certified_steps(names: Names, folder: Path) -> None:
    """Steps were certified, and the text is better known than before."""
    result = names["strategy"].last_result
    assert names["strategy"].certificate == "conditional"
    assert any(entry["certified"] == 1 for entry in result.history) and result.after.loss < result.before.loss


COVERED = {
    "Byzantine-Tolerant Voting": Snippet(
        three_models,
        is_their_mean,
        """
from capibara.training.advanced_consensus_algorithms import ByzantineConsensus
consensus = ByzantineConsensus(fault_tolerance=0.33, verification_rounds=3)
consensus_model = consensus.vote(models=[model1, model2, model3])
""",
        warns="3 models tolerate f = 0 wrong ones",
    ),
    "Meta-Consensus Architecture": Snippet(
        text_and_small_preset,
        has_agreed,
        """
from capibara.training import ConsensusConfig, MetaConsensusSystem
consensus_system = MetaConsensusSystem(
    ConsensusConfig(
        num_nodes=8, voting_strategy="byzantine_tolerant", merge_strategy="weighted_average",
        quality_threshold=0.85, consensus_threshold=0.75,
    )
)
results = consensus_system.train(data_path="gs://capibara-data/", num_epochs=2, strategies=["plain"])
""",
        slow=True,
    ),
    "Basic Training (CPU/GPU)": Snippet(
        folders_and_configuration,
        has_trained,
        """
from capibara.core import ModularCapibaraModel, ModularConfig
from capibara.training import UnifiedTrainer
model = ModularCapibaraModel(ModularConfig.from_toml("config/development/config.toml"))
trainer = UnifiedTrainer(model=model, learning_rate=3e-3, batch_size=32)
trainer.train(train_data="data/train/", eval_data="data/eval/", num_epochs=3, checkpoint_dir="checkpoints/")
""",
    ),
    'Error: "Consensus timeout"': Snippet(
        lambda folder, patch: {"ConsensusConfig": ConsensusConfig},
        waits_longer,
        "consensus_config = ConsensusConfig(consensus_timeout=600, max_retries=5)",
    ),
    'Error: "Out of memory"': Snippet(
        lambda folder, patch: {"UnifiedTrainer": UnifiedTrainer},
        sees_128,
        "trainer = UnifiedTrainer(batch_size=16, gradient_accumulation_steps=8, use_gradient_checkpointing=True)",
    ),
    "Convex Optimization Consensus": Snippet(
        models_and_validation,
        is_certified,
        """
from capibara.training.convexity_controller import ConvexityController
controller = ConvexityController(lambda_reg=0.01, max_iterations=100)
optimal_weights = controller.optimize(models=models, validation_data=val_data)
merged_model = controller.merge(models, optimal_weights)
""",
        slow=True,
    ),
    "Incremental Soup Strategy": Snippet(
        three_pickles,
        is_the_mean_of_the_pickles,
        """
from capibara.training import IncrementalSoupStrategy
soup = IncrementalSoupStrategy(merging_method="uniform", evaluation_metric="perplexity")
for epoch in (1, 2, 3):
    soup.add_checkpoint(f"checkpoint_epoch_{epoch}.pkl")
souped_model = soup.merge(validation_data=val_data)
""",
    ),
    "Convexity Training Strategy": Snippet(
        model_and_text,
        has_certified_steps,
        """
from capibara.training import ConvexityTrainingStrategy
strategy = ConvexityTrainingStrategy(regularization=0.01, convex_constraint=True, use_proximal_gradient=True)
model = strategy.train(model=model, train_data=train_data, epochs=2)
""",
        slow=True,
    ),
    "Cython Kernels": Snippet(
        three_arrays,
        is_attention,
        """
from capibara.training.cython_kernels import fast_attention, optimized_matmul, sparse_softmax
attn_output = fast_attention(q, k, v)
""",
    ),
}

TO_COME = {
    "Federated Consensus": "FederatedConsensusStrategy",
    "Hierarchical Training Strategy": "HierarchicalTrainingPipeline",
    "HuggingFace Consensus Strategy": "HuggingFaceConsensusStrategy",
    "TPU v6e-64 Configuration": "TPUv6eTrainer",
    "TPU v6e Optimizations": "TPUv6ConsensusOptimizer",
    "Training with Meta-Consensus (TPU)": "the strategies hierarchical and convexity",
    "Training with All Strategies": "IntegratedConsensusStrategy",
    "Real-Time Monitoring": "MonitoringDashboard",
    "Data Preprocessing": "DataPreprocessor",
    "Gradient Checkpointing": "enable_gradient_checkpointing",
    "Mixed Precision Training": "MixedPrecisionTrainer",
    "Available Metrics": "TrainingMetrics",
    "Integration with Weights & Biases": "WandbIntegration",
}
"""What a snippet waits for. One that runs moves up to `COVERED`."""
