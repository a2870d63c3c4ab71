"""The smallest run of the command: four nodes, 12 thousand numbers, a made-up language; a round takes milliseconds.

    folder = tiny_text.make(tmp_path);  tiny_text.capibara("train", folder / "tiny.toml", "--run", folder / "runs/a")
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG = """
[model]
vocab_size = 257
width = 16
num_layers = 1
num_heads = 2
[data]
path = "{text}"
sequence_length = 32
[training]
num_rounds = {rounds}
batch_size = 2
warmup_steps = 2
eval_sequences = 8
[consensus]
num_nodes = 4
local_steps = 2
keep_deltas = true
"""
WORDS = "the people of this nation will find peace and work in every state and the law shall stand".split()
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from capibara.cli import main; main()"
"""A shell starts what it runs in the background with interrupts ignored; a test may itself run there."""


def make(folder: Path, *, rounds: int = 3, documents: int = 60) -> Path:
    """Writes `tiny.toml` and the text that it names into a folder, and returns the folder."""
    generator = random.Random(0)
    (folder / "text").mkdir(parents=True)
    for number in range(documents):
        sentences = (" ".join(generator.choice(WORDS) for _ in range(60)) + "." for _ in range(20))
        (folder / "text" / f"{number}.txt").write_text("\n\n".join(sentences))
    (folder / "tiny.toml").write_text(CONFIG.format(text=folder / "text", rounds=rounds))
    return folder


def start(*arguments: Any, first: str = "", **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, its outputs piped; `first` is Python that the process runs before it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CAPIBARA_")}
    return subprocess.Popen([sys.executable, "-c", f"{first}\n{MAIN}", *map(str, arguments)], env=environment, **pipes)


def capibara(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, to its end."""
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout=280)
    assert "Traceback" not in (err or ""), err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
