"""A vote is repeated from its certificate and the deltas, lots and all."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from capibara.engines.inline import InlineEngine
from capibara.round import run_round
from capibara.round_state import first_state
from capibara.training.replay import vote_again


@pytest.mark.parametrize("merge", ["dare", "della", "task_arithmetic", "rda"])
def test_a_round_under_a_named_merge_commits_and_can_be_repeated(tmp_path, merge):
    """Lots hang on the seed, the round and the draw, which the configuration and the certificate hold."""
    plan = tiny.plan(engine=InlineEngine(clock=lambda: 0.0), merge_strategy=merge, seed=3)
    state = first_state(plan, tiny.first_params())
    for _ in range(2):
        state, record = run_round(plan, state)
        assert record.line["outcome"] == "committed" and record.line["leash"] <= 1
    lines = [f"num_nodes = {plan.config.num_nodes}", f'merge_strategy = "{merge}"', f"seed = {plan.config.seed}"]
    (tmp_path / "config.toml").write_text("\n".join(["[consensus]", *lines, ""]))
    stack = {name: np.asarray(leaf) for name, leaf in record.stack.items()}
    reasons, coefficients, delta = vote_again(tmp_path)(record.line, stack)
    assert reasons == [node["reason"] for node in record.line["nodes"]]
    for name, leaf in record.delta.items():
        assert delta[name].tobytes() == np.asarray(leaf).tobytes()
    assert (coefficients is None) == (merge != "task_arithmetic")
