"""The shape of the code: imports go one way and start nothing, each side effect has one place, all is explained."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "capibara"

LAYERS = (
    ("errors",),
    ("types",),
    ("tree", "files", "runtime"),
    ("kernels",),
    ("consensus", "transforms"),
    ("core",),
    ("strategies",),
    ("loop", "engines.base"),
    ("round_state",),
    ("round",),
    ("engines", "data", "run", "monitor", "tpu", "hf"),
    ("merge",),
    ("training",),
    ("cli_output",),
    ("cli_merge",),
    ("cli",),
)
"""A module imports from earlier layers and from its own package, nothing else."""

LIGHT = (
    "capibara",
    "capibara.errors",
    "capibara.types",
    "capibara.tree",
    "capibara.files",
    "capibara.runtime",
    "capibara.cli",
    "capibara.cli_merge",
    "capibara.cli_output",
    "capibara.consensus.vocabulary",
    "capibara.consensus.section",
    "capibara.consensus.config",
    "capibara.consensus.certificate",
    "capibara.kernels",
    "capibara.kernels.library",
    "capibara.kernels.arrays",
    "capibara.kernels.reference",
    "capibara.core.config",
    "capibara.core.toml",
    "capibara.data.source",
    "capibara.data.split",
    "capibara.data.prepare",
    "capibara.run.directory",
    "capibara.merge.merge",
    "capibara.merge.sources",
)
"""Importable without JAX."""

STARTS_JAX = ("jnp.", "np.random.", "jax.numpy.", "jax.random.", "jax.device", "jax.local_device", "nnx.Rngs")
LARGEST_FILE = 400


def module_name(path: Path) -> str:
    """`capibara/engines/base.py` → `engines.base`; an `__init__` is its package; the root has the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}


def layer(name: str) -> int:
    """The layer of a module: that of its own name, or of its package."""
    for candidate in (name, name.split(".")[0]):
        for number, names in enumerate(LAYERS):
            if candidate in names:
                return number
    raise AssertionError(f"capibara.{name} stands in no layer of {Path(__file__).name}")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name, without `capibara.`, of each module of ours that a tree imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "capibara":
            base = (node.module or "").removeprefix("capibara").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield node.lineno, inner if inner in MODULES else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "capibara":
                    yield node.lineno, alias.name.removeprefix("capibara").lstrip(".")


def dotted(node: ast.AST) -> str:
    """`jax.random.key` of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that is evaluated when the module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Lambda):
            continue
        yield child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            outside = [*child.decorator_list, *child.args.defaults, *filter(None, child.args.kw_defaults)]
            for part in outside:
                yield part
                yield from run_at_import(part)
        else:
            yield from run_at_import(child)


def where(name: str, line: int) -> str:
    """`capibara/engines/base.py:12`."""
    return f"{MODULES[name].relative_to(ROOT)}:{line}"


def test_imports_go_one_way():
    wrong = []
    for name, tree in TREES.items():
        if not name:
            continue
        for line, other in imported(tree):
            same_package = name.split(".")[0] == other.split(".")[0] and layer(other) <= layer(name)
            if other and not same_package and layer(other) >= layer(name):
                wrong.append(f"{where(name, line)} imports capibara.{other}")
    assert not wrong, "\n".join(wrong)


def test_core_takes_no_mathematics_from_consensus():
    """The model knows the configuration and the digests of consensus, not its rules."""
    wrong = [
        f"{where(name, line)} imports capibara.{other}"
        for name, tree in TREES.items()
        if name.split(".")[0] == "core"
        for line, other in imported(tree)
        if other.split(".")[0] == "consensus" and f"capibara.{other}" not in LIGHT
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_starts_jax_at_import():
    wrong = [
        f"{where(name, node.lineno)} calls {dotted(node.func)} at import"
        for name, tree in TREES.items()
        for node in run_at_import(tree)
        if isinstance(node, ast.Call) and dotted(node.func).startswith(STARTS_JAX)
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_every_module_starts_no_backend():
    """`jax_num_cpu_devices` can be set only while no backend has started."""
    names = [f"capibara.{name}".rstrip(".") for name in MODULES]
    code = (
        "import importlib, jax\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert jax.device_count() == 3\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_light_modules_and_help_load_no_jax():
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'jax' in sys.modules: sys.exit(f'{name} imports jax')\n"
        "from capibara.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "if 'jax' in sys.modules: sys.exit('capibara --help imports jax')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("what", "names", "allowed"),
    [
        ("writes to standard output", ("print", "sys.stdout", "click.echo"), ("cli_output",)),
        ("opens sockets", ("socket", "http.server", "asyncio"), ("monitor", "engines")),
    ],
)
def test_each_side_effect_has_one_place(what: str, names: tuple[str, ...], allowed: tuple[str, ...]):
    wrong = []
    for name, tree in TREES.items():
        if name.split(".")[0] in allowed:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.Name | ast.Attribute):
                continue
            used = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [dotted(node)]
            wrong += [f"{where(name, node.lineno)} {what}: {use}" for use in used if use in names]
    assert not wrong, "\n".join(wrong)


def test_only_runtime_and_tpu_flags_change_the_environment():
    changes = ("os.environ.setdefault", "os.environ.update", "os.environ.pop", "os.putenv", "os.unsetenv")
    wrong = []
    for name, tree in TREES.items():
        if name in ("runtime", "tpu.flags"):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Subscript | ast.Call):
                continue
            if isinstance(node, ast.Subscript):
                changed = dotted(node.value) == "os.environ" and not isinstance(node.ctx, ast.Load)
            else:
                changed = dotted(node.func) in changes
            if changed:
                wrong.append(f"{where(name, node.lineno)} changes the environment")
    assert not wrong, "\n".join(wrong)


def test_everything_public_is_explained():
    """Modules, public classes and functions, and public methods of public classes have a docstring."""
    wrong = []
    for name, tree in TREES.items():
        if not ast.get_docstring(tree) and tree.body:
            wrong.append(f"{where(name, 1)} has no module docstring")
        scopes: list[ast.Module | ast.ClassDef] = [tree]
        while scopes:
            for node in scopes.pop().body:
                if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                if node.name.startswith("_"):
                    continue
                if not ast.get_docstring(node):
                    wrong.append(f"{where(name, node.lineno)} {node.name} has no docstring")
                if isinstance(node, ast.ClassDef):
                    scopes.append(node)
    assert not wrong, "\n".join(wrong)


def test_a_module_is_one_idea():
    """Files are 80–250 lines as a rule; one that outgrows the limit wants to be two."""
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert not {name: lines for name, lines in long.items() if lines > LARGEST_FILE}
