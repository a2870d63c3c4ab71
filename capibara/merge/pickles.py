"""Arrays out of a `.pkl`, of which nothing is run: what `pickle_machine` read, as a tree with its arrays.

    file ─► machine ─► dicts, lists, tuples, arrays ─► tree           a leaf of any other kind, or a cycle ─► DataError
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capibara.errors import DataError
from capibara.merge.pickle_machine import Bounded, Machine, Shell
from capibara.types import PyTree

MOST_LEAVES, DEEPEST = 100_000, 64
"""Of a tree, counting what is referred to twice as two: a short pickle can describe a tree of 2^1000 leaves."""

def read_pickle(path: Path | str) -> PyTree:
    """The tree of arrays in a pickle: dicts (keys str or int), lists, tuples, with NumPy or JAX arrays at the leaves.

    Tolerates: any bytes. Memory is at most a few times the file's size, whatever shapes it claims.

    Raises:
      DataError: If there is no such file, it is not whole, or holds or asks for anything else, which the error names.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            machine = Machine(str(path), size)
            found = machine.run(Bounded(file, size))
            if file.tell() != size:
                raise DataError(f"{path} goes on for {size - file.tell():,} bytes after its pickle ends.")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from None
    return _tree(found, path)


def _tree(found: Any, path: Path) -> PyTree:
    """The tree with its arrays, each container visited once, counted as often as it occurs."""
    done: dict[int, tuple[Any, int]] = {}
    open_: set[int] = set()

    def visit(node: Any, place: str, depth: int) -> tuple[Any, int]:
        if id(node) in done:
            return done[id(node)]
        if id(node) in open_ or depth > DEEPEST:
            raise DataError(f"{path}: the container at {place[:80]!r} holds itself, or is deeper than {DEEPEST}.")
        open_.add(id(node))
        if isinstance(node, Shell) and node.array is not None:
            result: tuple[Any, int] = node.array, 1
        elif isinstance(node, dict):
            pairs = {key: visit(value, f"{place}.{key}".lstrip("."), depth + 1) for key, value in node.items()}
            result = {key: value for key, (value, _) in pairs.items()}, sum(count for _, count in pairs.values())
        elif isinstance(node, list | tuple):
            items = [visit(value, f"{place}.{i}".lstrip("."), depth + 1) for i, value in enumerate(node)]
            values = [value for value, _ in items]
            result = (values if type(node) is list else tuple(values)), sum(count for _, count in items)
        else:
            kind = "bytes" if type(node) in (bytes, bytearray) else type(node).__name__.strip("_").lower()
            where = f"at {place[:80]!r}" if place else "and nothing else"
            raise DataError(f"{path} holds a {kind} {where}; a checkpoint holds arrays. Save the parameters alone.")
        if result[1] > MOST_LEAVES:
            raise DataError(f"{path} describes more than {MOST_LEAVES:,} arrays; that is no model.")
        open_.discard(id(node))
        done[id(node)] = result
        return result

    tree, count = visit(found, "", 0)
    if not count:
        raise DataError(f"{path} holds no array.")
    return tree
