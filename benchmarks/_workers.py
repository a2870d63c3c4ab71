"""Processes that stay alive and take turns: a setting that holds for a process is compared without starting it anew."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence


class Worker:
    """A process that answers one line for every line that it is sent; see `answer`.

    Args:
      command: Behind the interpreter.
      variables: Set in its environment.

    Attributes:
      cpu_s: CPU seconds of all runs that it has told of.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str] | None = None):
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | dict(variables or {}),
        )  # fmt: skip
        self.cpu_s = 0.0

    def run(self) -> list[str]:
        """One run; the words of its answer after the first, which is its CPU seconds."""
        cpu_s, *rest = self.ask("run").split()
        self.cpu_s += float(cpu_s)
        return rest

    def ask(self, word: str) -> str:
        """The line that answers a word."""
        assert self.process.stdin and self.process.stdout
        print(word, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"A worker ended early, with exit code {self.process.wait()}.")
        return answer

    def close(self) -> str:
        """Ends the process; its last answer."""
        answer = self.ask("end")
        self.process.wait()
        return answer


def hold_to_one_core() -> None:
    """The last core that this process may use, before JAX counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
