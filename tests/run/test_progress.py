"""What a person sees while a run goes on."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from capibara.run.progress import Display, duration
from capibara.run.report import kept_out


class Clock:
    """Seconds, as the test sets them."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def line(round_: int, reasons: tuple[str, ...] = ("backed", "late", "outvoted", "outvoted")) -> dict[str, Any]:
    nodes = [{"id": node, "reason": reason} for node, reason in enumerate(reasons)]
    return {"round": round_, "outcome": "committed", "nodes": nodes, "quorum": {"backing": reasons.count("backed")}}


def shown(width: int, *, terminal: bool) -> tuple[Display, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=width, force_terminal=terminal, _environ={"TERM": "xterm"})
    return Display(4, 4, 20, console=console, clock=clock), out, clock


def test_a_round_is_one_line_however_narrow_the_screen():
    display, out, clock = shown(40, terminal=False)
    clock.now += 10
    display.round_ends(line(0), 2.5, 50_000, 2.75)
    display.note("word " * 40)
    assert out.getvalue().splitlines() == [
        "round 1/4  step 20  loss 2.5000  test 2.7500  5,000 tokens/s  0:30 left  backing 1/4  committed  "
        "(1 late; 2, 3 outvoted)",
        "word " * 40,
    ]


def test_the_time_left_forgets_the_round_that_compiled_once_there_is_another():
    display, _, clock = shown(80, terminal=False)
    for round_, seconds in enumerate((60, 4, 6)):
        clock.now += seconds
        display.round_ends(line(round_), 1.0, 1, None)
    assert display.seconds_left() == pytest.approx(5)


def test_the_live_line_says_round_phase_step_loss_speed_time_left_and_backing(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    display, _, clock = shown(200, terminal=True)
    assert display.live is not None
    display.phase_begins("train")
    assert display.line().plain[2:] == "round 1/4  train, compiling  0:00 elapsed"
    clock.now += 10
    display.round_ends(line(0), 2.5, 50_000, None)
    display.phase_begins("final_gate")
    clock.now += 3
    assert display.line().plain[2:] == (
        "round 2/4  final gate  step 20  loss 2.5000  5,000 tokens/s  0:30 left  backing 1/4  0:13 elapsed"
    )


def test_on_a_terminal_the_live_line_leaves_only_the_rounds_behind(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    display, out, clock = shown(60, terminal=True)
    with display:
        display.phase_begins("train")
        clock.now += 1
        display.round_ends(line(0), 2.5, 1000, None)
    assert "round 1/4  step 20  loss 2.5000  1,000 tokens/s" in out.getvalue()
    assert out.getvalue().endswith("\x1b[1A\x1b[2K") or "\x1b[2K" in out.getvalue().rsplit("outvoted)", 1)[1]


@pytest.mark.parametrize("finished, told", [(0, ""), (2, "2 of 4 rounds are on disk; going on.\n")])
def test_a_resumed_run_says_where_it_stands(finished, told):
    display, out, _ = shown(80, terminal=False)
    display.start_at(finished)
    assert out.getvalue() == told


def test_a_silent_display_says_nothing(capsys):
    display = Display(4, 4, 20, enabled=False)
    with display:
        display.note("hush")
        display.round_ends(line(0), 2.5, 1000, None)
    assert capsys.readouterr() == ("", "")


def test_nodes_are_kept_out_by_reason():
    assert kept_out(["backed", "low_quality", "late", "low_quality"]) == "1, 3 low quality; 2 late"
    assert kept_out(["backed"]) == ""


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (750, "12:30"), (3723, "1:02:03")])
def test_durations(seconds, text):
    assert duration(seconds) == text
