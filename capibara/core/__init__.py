"""The model and its configuration; importing loads no JAX until the model is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capibara.core.config import ModularConfig
    from capibara.core.model import ModularCapibaraModel

__all__ = ["ModularCapibaraModel", "ModularConfig"]

_HOMES = {"ModularCapibaraModel": "capibara.core.model", "ModularConfig": "capibara.core.config"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(sorted(_HOMES))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
