"""Simulated attacks, by name or as objects: `get_attack("scale:-10")`."""

from __future__ import annotations

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
      ConfigError: For an unknown name, a strength that is no number, or one where none is taken.
    """
    if isinstance(spec, Attack):
        return spec
    name, _, strength = str(spec).partition(":")
    if name not in ATTACKS:
        raise ConfigError(unknown_name("attack", name, ATTACKS))
    if not strength:
        return ATTACKS[name]()
    if name in WITHOUT_STRENGTH:
        raise ConfigError(f"The attack {name!r} takes no strength; got {spec!r}. Write {name!r}.")
    if name == "optimised":
        if strength not in ("alie", "ipm"):
            raise ConfigError(f"The attack 'optimised' takes 'alie' or 'ipm' as its strength; got {strength!r}.")
        return optimised(strength)
    try:
        return ATTACKS[name](float(strength))
    except ValueError:
        raise ConfigError(f"The strength of the attack {name!r} is a number; got {strength!r}, e.g. scale:-10.") from None


__all__ = ["ATTACKS", "Attack", "AttackView", "get_attack"]
