"""The mixture's shares in a round: found on a split of their own, held by the leash, recorded and repeated."""

from __future__ import annotations

from pathlib import Path

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from bigram import OBJECTIVE
from hypothesis import given
from hypothesis import strategies as st
from rows import as_row, as_stack, cases

from capibara.consensus import merging, voting
from capibara.consensus.aggregate import chain
from capibara.consensus.ballot import open_ballot
from capibara.consensus.convex import mixture
from capibara.consensus.convex_shares import SCORE, convex_optimization, mixture_shares, recorded_shares
from capibara.consensus.evidence import held_out, read_logs
from capibara.consensus.simplex import kl_penalty
from capibara.core.config import ModularConfig
from capibara.errors import CertificateError, ConfigError
from capibara.round import run_round
from capibara.round_state import first_state
from capibara.training.replay import vote_again

LANGUAGE = bigram.chain(0)
DATA = bigram.text(LANGUAGE, 30)


def deltas() -> tuple[dict, dict]:
    """θ = 0 and four nodes' tables as deltas, one of them broken."""
    tables = [bigram.table(LANGUAGE, noise=0.3 + 0.3 * i, seed=i)["W"] for i in range(4)]
    tables[2][0, 0] = np.nan
    return {"W": jnp.zeros((bigram.V, bigram.V))}, {"W": jnp.asarray(np.stack(tables))}


def test_the_shares_are_the_mixtures_of_the_rows_that_back():
    params, stack = deltas()
    found = mixture_shares(OBJECTIVE, params, stack, np.array([True, True, True, False]), DATA)
    assert found is not None
    shares, entry = found
    logs = [read_logs(OBJECTIVE, {"W": stack["W"][i]}, held_out(DATA))[0] for i in (0, 1)]
    wanted = mixture(np.stack(logs, axis=1), penalty=kl_penalty(0.01, np.full(2, 0.5)))
    np.testing.assert_allclose(shares, [*wanted.weights, 0, 0], atol=1e-7)
    assert entry["gap"] < 1e-6 and entry["targets"] == DATA["mask"].sum() and entry["shares"] == shares.tolist()


def test_where_no_row_has_finite_losses_there_are_no_shares():
    params, stack = deltas()
    assert mixture_shares(OBJECTIVE, params, stack, np.array([False, False, True, False]), DATA) is None


def test_without_shares_rows_count_by_their_weights():
    stack = as_stack(np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
    ballot = open_ballot(stack, np.ones(5))
    plain = [chain(voting.majority(), merge=merge).apply(ballot, ((),), None)[0] for merge in
             (convex_optimization(), merging.uniform())]  # fmt: skip
    np.testing.assert_allclose(as_row(plain[0]), as_row(plain[1]), rtol=1e-6)
    nobody = ballot._replace(scores={SCORE: np.zeros(5)})
    again = chain(voting.majority(), merge=convex_optimization()).apply(nobody, ((),), None)[0]
    np.testing.assert_array_equal(as_row(again), as_row(plain[0]))


@given(cases(), st.integers(0, 2**32 - 1))
def test_no_shares_lead_out_of_the_leash(case, seed):
    """Whatever a liar's share: the merged Δ is within τ of the centre."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(case.n, 0.2))
    ballot = open_ballot(as_stack(case.deltas), np.ones(case.n), {SCORE: shares})
    aggregator = chain(voting.byzantine_tolerant(case.f, merge_rows="own"), merge=convex_optimization())
    delta, verdict, _ = aggregator.apply(ballot, aggregator.init({}), jax.random.key(0))
    assert verdict.centre is not None and verdict.tau is not None
    strayed = np.linalg.norm(as_row(delta) - verdict.centre @ case.deltas.astype(np.float64))
    scale = np.linalg.norm(case.deltas.astype(np.float64), axis=1)[verdict.backing].max()
    assert strayed <= verdict.tau + 1e-5 * scale


def test_a_round_merges_by_shares_and_its_vote_is_repeated_from_its_line(tmp_path: Path):
    plan = tiny.plan(merge_strategy="convex_optimization", seed=3)
    _, record = run_round(plan, first_state(plan, tiny.first_params()))
    line = record.line
    entry = line["extensions"]["convex_optimization"]
    assert line["outcome"] == "committed" and entry["gap"] < 1e-6
    count = plan.config.verification_rounds * plan.config.gate_sequences
    batch = tiny.Points().held_out("merge", round=0, draw=0, count=count)
    found = mixture_shares(tiny.OBJECTIVE, tiny.first_params(), record.stack, np.ones(5, bool), batch)
    assert found is not None
    np.testing.assert_allclose(entry["shares"], found[0], atol=1e-9)
    assert np.std(entry["shares"]) > 1e-3  # the nodes differ

    config = ModularConfig(consensus=plan.config)
    (tmp_path / "config.toml").write_text(config.to_toml())
    stack = jax.tree.map(np.asarray, record.stack)
    replay = vote_again(tmp_path)
    reasons, coefficients, delta = replay(line, stack)
    assert reasons == [node["reason"] for node in line["nodes"]]
    np.testing.assert_allclose(coefficients, [node["coefficient"] for node in line["nodes"]], atol=1e-9)
    np.testing.assert_allclose(delta["w"], record.delta["w"], rtol=1e-6)
    forged = {**line, "extensions": {"convex_optimization": entry | {"shares": [1.0, 0.0, 0.0, 0.0, 0.0]}}}
    assert np.abs(replay(forged, stack)[1] - coefficients).max() > 1e-3
    broken = {**line, "extensions": {"convex_optimization": entry | {"shares": [0.5, 0.5]}}}
    with pytest.raises(CertificateError, match="cannot be replayed: There are 5 models"):
        replay(broken, stack)


def test_shares_that_are_none_are_refused():
    line = {"nodes": [{}] * 2, "extensions": {"convex_optimization": {"shares": [2.0, -1.0]}}}
    with pytest.raises(ConfigError, match=r"shares\[1\] is -1.0"):
        recorded_shares(line)
    assert recorded_shares({"nodes": [{}], "extensions": {}}) == {}
