"""metrics.jsonl: no line is lost, and NaN is a number again when it is read."""

from __future__ import annotations

import math

import numpy as np

from capibara.run.metrics import MetricsWriter, read_metrics


def test_lines_come_back_with_their_time_and_their_numbers(tmp_path):
    losses = [1.5, math.inf, -math.inf]
    values = {"round": 3, "loss": math.nan, "node_loss": losses, "name": "nano", "deep": {"x": math.nan}}
    with MetricsWriter(tmp_path / "m.jsonl", clock=lambda: 12.5) as metrics:
        metrics.write(**values, count=np.int64(4), mean=np.float32(0.5), rows=np.float32([1, np.nan]))
    (line,) = read_metrics(tmp_path / "m.jsonl")
    assert line["time"] == 12.5
    assert (line["round"], line["name"], line["count"], line["mean"]) == (3, "nano", 4, 0.5)
    assert math.isnan(line["loss"]) and math.isnan(line["deep"]["x"]) and math.isnan(line["rows"][1])
    assert line["node_loss"] == losses


def test_the_file_is_json_that_any_reader_takes(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        metrics.write(loss=math.nan)
    assert '"loss": "nan"' in (tmp_path / "m.jsonl").read_text()


def test_every_line_is_there_before_the_file_is_closed(tmp_path):
    metrics = MetricsWriter(tmp_path / "m.jsonl")
    for step in range(3):
        metrics.write(step=step)
        assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == list(range(step + 1))
    metrics.__exit__()


def test_a_torn_line_costs_only_itself(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        metrics.write(step=0)
    with open(tmp_path / "m.jsonl", "ab") as file:
        file.write(b'{"step": 1, "name": "\xc3')
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [0]
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        metrics.write(step=2)
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [0, 2]


def test_no_file_is_no_lines(tmp_path):
    assert list(read_metrics(tmp_path / "none.jsonl")) == []
