"""Simulated attacks, by name or as objects: `get_attack("scale:-10")`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from capibara.consensus.attacks.base import Attack, AttackView
from capibara.consensus.attacks.data import label_flip
from capibara.consensus.attacks.optimised import optimised
from capibara.consensus.attacks.rows import alie, copy, gaussian, ipm, mimic, min_max, nan, scale, sign_flip, stale
from capibara.errors import ConfigError, unknown_name

ATTACKS: dict[str, Callable[..., Attack]] = {
    "alie": alie,
    "copy": copy,
    "gaussian": gaussian,
    "ipm": ipm,
    "label_flip": label_flip,
    "mimic": mimic,
    "min_max": min_max,
    "nan": nan,
    "optimised": optimised,
    "scale": scale,
    "sign_flip": sign_flip,
    "stale": stale,
}

WITHOUT_STRENGTH = ("copy", "label_flip", "nan", "stale")


def get_attack(spec: Any) -> Attack:
    """The attack that `name` or `name:strength` stands for; an `Attack` passes through.

    Raises:
      ConfigError: For an unknown name, a strength that is no finite number, or one where none is taken.
    """
    if isinstance(spec, Attack):
        return spec
    name, separator, strength = str(spec).partition(":")
    if name not in ATTACKS:
        raise ConfigError(unknown_name("attack", name, ATTACKS))
    if not separator:
        return ATTACKS[name]()
    if name in WITHOUT_STRENGTH:
        raise ConfigError(f"The attack {name!r} takes no strength; got {spec!r}. Write {name!r}.")
    if name == "optimised":
        return optimised(strength)
    return ATTACKS[name](_number(name, strength))


def _number(name: str, strength: str) -> float:
    try:
        number = float(strength)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"The strength of the attack {name!r} is a number; got {strength!r}. Write e.g. '{name}:2'.")
    return number


__all__ = ["ATTACKS", "Attack", "AttackView", "get_attack"]
