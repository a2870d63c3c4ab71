"""Learning-rate schedules: a linear warm-up, then cosine, warm-up–stable–decay (WSD) or a constant."""

from __future__ import annotations

import optax

from capibara.errors import ConfigError, unknown_name

SCHEDULES = ("cosine", "wsd", "constant")


def schedule(
    name: str,
    peak: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    min_ratio: float = 0.1,
    decay_fraction: float = 0.2,
) -> optax.Schedule:
    """step → learning rate.

    Args:
      name: `cosine` (to `min_ratio · peak` at `total_steps`), `wsd` (constant, then linear to `min_ratio · peak` over
        the last `decay_fraction` of the steps; Hu et al. 2024, MiniCPM §4) or `constant`.
      peak: Learning rate after warm-up.
      total_steps: Steps of the whole training, warm-up included.
      warmup_steps: Linear from 0; cut to half of `total_steps` where the training is shorter than that.
      min_ratio: Final learning rate over the peak.
      decay_fraction: Share of the steps that decay, for `wsd`; cut to the steps after the warm-up.

    Raises:
      ConfigError: For an unknown name or no steps.
    """
    if name not in SCHEDULES:
        raise ConfigError(unknown_name("schedule", name, SCHEDULES))
    if total_steps < 1:
        raise ConfigError(f"A schedule needs at least 1 step; got {total_steps}.")
    warmup = min(warmup_steps, total_steps // 2)
    rest = total_steps - warmup
    if name == "cosine":
        after = optax.cosine_decay_schedule(peak, max(rest, 1), alpha=min_ratio)
    elif name == "wsd":
        decay = min(max(round(total_steps * decay_fraction), 1), rest)
        stable = rest - decay
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, peak * min_ratio, decay)], [stable]
        )
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after
