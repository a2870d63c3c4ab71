"""Fixtures of the mathematics' tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """What JAX compiled since the list was last cleared, by its own log."""
    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Finished XLA compilation" in record.getMessage():
                found.append(record.getMessage())

    listener, logger = Listener(), logging.getLogger("jax")
    logger.addHandler(listener)
    with jax.log_compiles():
        yield found
    logger.removeHandler(listener)
