"""A run from configuration to result: builds the parts, trains in a run directory, evaluates, and says what came out.

    open_session(config) -> Session.train() -> ConsensusResults
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.core.config import ModularConfig
from capibara.core.model import ModularCapibaraModel, objective, parameters, with_parameters
from capibara.data.batches import open_source
from capibara.loop import Evaluation, evaluate
from capibara.round import RoundPlan, RoundState
from capibara.run.directory import Run
from capibara.run.metrics import MetricsWriter
from capibara.run.progress import Display
from capibara.run.rounds import checkpoint, resume_state, rounds
from capibara.training.build import build_plan
