"""Pickles of arrays are read as `pickle` reads them; anything else is refused, and nothing of it runs."""

from __future__ import annotations

import collections
import pickle
import subprocess
import sys
from pathlib import Path

import exploits
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from capibara.errors import DataError
from capibara.merge.pickles import read_pickle

HERE = Path(__file__).parent


def tree() -> dict:
    """Every honest way that an array comes in."""
    return {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "nested": {"list": [np.zeros(2, ml_dtypes.bfloat16), (np.float32(2.5),)], 7: np.array([True, False])},
        "swapped": np.arange(3, dtype=">f4"),
        "empty": np.zeros((0, 3)),
        "scalar": np.array(5, np.int64),
        "ordered": collections.OrderedDict(z=np.zeros(3, np.int8), a=np.ones(2, np.float16)),
        "jax": jnp.ones((2, 2)),
        "text in bytes": np.frombuffer(bytes(range(256)), np.uint8),
    }


def write(folder: Path, data: bytes) -> Path:
    path = folder / "a.pkl"
    path.write_bytes(data)
    return path


def same(ours, theirs) -> None:
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        theirs = np.asarray(theirs)
        assert ours.dtype == theirs.dtype.newbyteorder("=") and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_come_out_as_pickle_gives_them(tmp_path: Path, protocol: int):
    same(read_pickle(write(tmp_path, pickle.dumps(tree(), protocol))), tree())


@pytest.mark.parametrize("protocol", [0, 2])
def test_files_of_numpy_1_are_read(tmp_path: Path, protocol: int):
    given = {"w": np.arange(4.0), "s": np.float64(3)}
    old = pickle.dumps(given, protocol).replace(b"cnumpy._core.", b"cnumpy.core.")
    assert b"numpy._core" not in old
    same(read_pickle(write(tmp_path, old)), given)


def test_two_names_for_one_array_are_two_leaves(tmp_path: Path):
    tied = np.arange(4.0)
    given = {"head": tied, "embedding": tied}
    same(read_pickle(write(tmp_path, pickle.dumps(given))), given)


@pytest.mark.parametrize("name", exploits.RUN_CODE)
def test_an_exploit_is_refused_and_nothing_of_it_runs(tmp_path: Path, name: str):
    """In a process of its own, which then unpickles the same bytes to show that they do run."""
    command = [sys.executable, str(HERE / "exploits.py"), name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Nothing of it was run" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_no_pickle_takes_more_memory_or_time_than_its_size(tmp_path: Path):
    """Every bomb in one process that may have 1 GiB beside what it begins with, and a minute."""
    code = (
        "import resource, sys, signal\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import exploits\n"
        "from capibara.errors import DataError\n"
        "from capibara.merge.pickles import read_pickle\n"
        "import ml_dtypes\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)\n"
        "signal.alarm(60)\n"
        "for name, data in exploits.FILL_MEMORY.items():\n"
        f"    path = Path({str(tmp_path)!r}, name + '.pkl')\n"
        "    path.write_bytes(data)\n"
        "    try: read_pickle(path)\n"
        "    except DataError as error: assert 'MemoryError' not in str(error), (name, error)\n"
        "    else: sys.exit(name + ' was read')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_damage_is_an_error_or_another_tree(tmp_path: Path):
    """Cut at every third byte, and 300 flipped bytes: nothing but DataError, and never a hang."""
    whole = pickle.dumps({"w": np.arange(3, dtype=np.float32), "b": [np.zeros(2)]}, 4)
    for end in range(0, len(whole), 3):
        with pytest.raises(DataError):
            read_pickle(write(tmp_path, whole[:end]))
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            read_pickle(write(tmp_path, bytes(data)))
        except DataError:
            continue


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"step": 3, "w": np.zeros(2)}, "holds a int at 'step'"),
        ({"w": np.zeros(2), "name": "x"}, "holds a str at 'name'"),
        ({"w": np.array([1, "x"], dtype=object)}, "dtype 'O8'"),
        ({"w": np.array(["a", "b"])}, "dtype 'U1'"),
        ({"w": np.zeros(2, [("x", "f4")])}, "array"),
        ({(1, 2): np.zeros(2)}, "key of type tuple"),
        ({"w": {1.0, 2.0}}, "EMPTY_SET"),
        ({"a": Path("x")}, "pathlib"),
        ({}, "holds no array"),
        (3, "holds a int and nothing else"),
    ],
)
def test_what_is_no_tree_of_arrays_is_refused_by_name(tmp_path: Path, given, says: str):
    with pytest.raises(DataError, match=says):
        read_pickle(write(tmp_path, pickle.dumps(given, 4)))


def test_hints_say_what_to_save_instead(tmp_path: Path):
    with pytest.raises(DataError, match="save the state with safetensors"):
        read_pickle(write(tmp_path, b"ctorch._utils\n_rebuild_tensor_v2\n."))
    with pytest.raises(DataError, match="to_pure_dict"):
        read_pickle(write(tmp_path, b"cflax.nnx.statelib\nState\n."))


def test_a_file_that_goes_on_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="goes on for 5 bytes"):
        read_pickle(write(tmp_path, pickle.dumps(np.zeros(2)) + b"extra"))
    with pytest.raises(DataError, match="cannot be read"):
        read_pickle(tmp_path / "absent.pkl")
