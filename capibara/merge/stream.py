"""Every input is read once, from front to back, while what was read before is worked on and what was worked on written.

    2 readers ── pread, digest ──► ring of blocks ──► 2 workers ── kernel ──► in order ──► the caller's `sink`

A block is the same range of numbers of one tensor in every input. Memory: `RING` blocks of every input, whatever the
size of the models. The order in which `sink` sees results does not depend on threads.
"""

from __future__ import annotations

import heapq
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from capibara.errors import DataError
from capibara.merge.plan import Job
from capibara.merge.tensors import Loaded, Rows, Stored, Tensor, numpy_type

READERS = 2
WORKERS = 2
RING = 4
"""Blocks of every input in memory: two being read, two being worked on."""

RING_BYTES = 2**26
"""Of all blocks of all inputs together, down to `SMALLEST` numbers a block."""

LARGEST, SMALLEST = 2**20, 2**14
AHEAD = 16
"""Results that may wait for the sink."""

OPEN_FILES = 128
"""Of one reader at a time: 200 sharded inputs must not exhaust the process's descriptors."""


class Unit(NamedTuple):
    """One block: `numbers` numbers from `first` on of the tensor of job number `job`."""

    job: int
    first: int
    numbers: int


class Digests:
    """BLAKE3 of every tensor of every input, in the form of `capibara.consensus.certificate.digest_leaf`.

    Attributes:
      done: (job, input) → hex.
    """

    def __init__(self) -> None:
        self.done: dict[tuple[int, int], str] = {}
        self._open: dict[int, Any] = {}

    def update(self, jobs: Sequence[Job], unit: Unit, i: int, raw: memoryview) -> None:
        """Takes the bytes of a block of input i; blocks come in order."""
        job = jobs[unit.job]
        tensor = job.inputs[i]
        if unit.first == 0:
            self._open[i] = leaf_hasher(job.name, tensor.dtype, tensor.shape)
        self._open[i].update(raw)
        if unit.first + unit.numbers == job.numbers:
            self.done[unit.job, i] = self._open.pop(i).hexdigest()


def leaf_hasher(name: str, dtype: str, shape: tuple[int, ...]) -> Any:
    """A hasher that has taken what comes before the bytes of a leaf in `digest_leaf`."""
    return blake3(f"{name}\0{numpy_type(dtype).name}\0{','.join(map(str, shape))}\0".encode())


def block_numbers(jobs: Sequence[Job], num_inputs: int) -> int:
    """Numbers of one block: a power of two that keeps the ring within `RING_BYTES`."""
    widest = max((numpy_type(tensor.dtype).itemsize for job in jobs for tensor in job.inputs), default=4)
    fits = RING_BYTES // (RING * max(num_inputs, 1) * widest)
    return min(LARGEST, max(SMALLEST, 2 ** (fits.bit_length() - 1)))


def units_of(jobs: Sequence[Job], which: Sequence[int], block: int) -> list[Unit]:
    """The blocks of the jobs numbered `which`, in order; a tensor without numbers has one empty block."""
    return [
        Unit(j, first, min(block, jobs[j].numbers - first))
        for j in which
        for first in range(0, max(jobs[j].numbers, 1), block)
    ]


def stream(
    jobs: Sequence[Job],
    units: Sequence[Unit],
    work: Callable[[int, Unit, list[np.ndarray]], Any],
    sink: Callable[[Unit, Any], None],
    *,
    digests: Digests | None = None,
    skip: frozenset[int] = frozenset(),
    blocks: int = RING,
) -> None:
    """Reads, works, and hands over in order; the first error of any thread ends all and is raised here.

    Args:
      jobs: The tensors.
      units: Blocks, in order; those of a tensor lie together.
      work: (number of the worker, block, bytes uint8 of every input) → a result that keeps none of the bytes.
      sink: Takes the results in the order of `units`, in the caller's thread.
      digests: Where the inputs' digests go; None computes none.
      skip: Inputs that are not read; their bytes are what they are.
      blocks: Of every input in memory.
    """
    if not units:
        return
    num_inputs = len(jobs[units[0].job].inputs)
    largest = max(unit.numbers for unit in units)
    sizes = [
        max(numpy_type(jobs[unit.job].inputs[i].dtype).itemsize for unit in units) for i in range(num_inputs)
    ]
    ring = [[np.empty(largest * size, np.uint8) for size in sizes] for _ in range(min(blocks, len(units)))]
    read = [i for i in range(num_inputs) if i not in skip]
    shares = [read[r::READERS] for r in range(READERS) if read[r::READERS]] or [[]]
    free = [[threading.Semaphore(1) for _ in ring] for _ in shares]
    room, lock = threading.Semaphore(AHEAD), threading.Lock()
    missing = [len(shares)] * len(units)
    todo: SimpleQueue[int | None] = SimpleQueue()
    results: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()
    stopped = threading.Event()

    def bytes_of(number: int, i: int) -> np.ndarray:
        unit = units[number]
        size = numpy_type(jobs[unit.job].inputs[i].dtype).itemsize
        return ring[number % len(ring)][i][: unit.numbers * size]

    def reader(which: int) -> None:
        with Reader() as source:
            for number, unit in enumerate(units):
                free[which][number % len(ring)].acquire()
                if stopped.is_set():
                    return
                for i in shares[which]:
                    raw = bytes_of(number, i).data
                    source.read(i, jobs[unit.job].inputs[i], unit.first, raw)
                    if digests is not None:
                        digests.update(jobs, unit, i, raw)
                with lock:
                    missing[number] -= 1
                    whole = not missing[number]
                if whole:
                    todo.put(number)

    def worker(which: int) -> None:
        while (number := todo.get()) is not None and not stopped.is_set():
            room.acquire()
            result = work(which, units[number], [bytes_of(number, i) for i in range(num_inputs)])
            for slots in free:
                slots[number % len(ring)].release()
            results.put((number, result, None))

    def guarded(body: Callable[[int], None], which: int) -> None:
        try:
            body(which)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            results.put((-1, None, error))

    bodies = [(reader, which) for which in range(len(shares))] + [(worker, which) for which in range(WORKERS)]
    threads = [threading.Thread(target=guarded, args=pair, daemon=True) for pair in bodies]
    for thread in threads:
        thread.start()
    try:
        for number, result in _in_order(results, len(units)):
            sink(units[number], result)
            room.release()
    finally:
        stopped.set()
        for _ in range(WORKERS):
            todo.put(None)
            room.release()
        for semaphore in (slot for slots in free for slot in slots):
            semaphore.release()
        for thread in threads:
            thread.join()


def _in_order(
    results: SimpleQueue[tuple[int, Any, BaseException | None]], count: int
) -> Iterator[tuple[int, Any]]:
    waiting: list[tuple[int, int]] = []
    kept: dict[int, Any] = {}
    following = 0
    while following < count:
        number, result, error = results.get()
        if error is not None:
            raise error
        kept[number] = result
        heapq.heappush(waiting, (number, number))
        while waiting and waiting[0][0] == following:
            heapq.heappop(waiting)
            yield following, kept.pop(following)
            following += 1


class Reader:
    """Open files, and arrays that had to be loaded whole, of one thread; a context."""

    def __init__(self) -> None:
        self.opened: dict[Path, int] = {}
        self.loaded: dict[int, tuple[Tensor, np.ndarray]] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self.opened.values():
            os.close(descriptor)

    def read(self, i: int, tensor: Tensor, first: int, raw: memoryview) -> None:
        """Fills `raw` with the bytes of a tensor of input i from number `first` on."""
        place, size = tensor.place, numpy_type(tensor.dtype).itemsize
        if isinstance(place, Stored):
            self._fill(place.path, place.offset + first * size, raw)
        elif isinstance(place, Loaded):
            kept = self.loaded.get(i)
            if kept is None or kept[0] is not tensor:
                self.loaded.pop(i, None)
                kept = self.loaded[i] = (tensor, place.load())
            flat = kept[1].reshape(-1).view(np.uint8)
            raw[:] = flat[first * size : first * size + len(raw)].data
        else:
            self._gather(i, place, first, raw, size)

    def _gather(self, i: int, place: Rows, first: int, raw: memoryview, size: int) -> None:
        """Row by row, each from where the map says."""
        width = max(1, place.own.numbers // max(place.own.shape[0], 1))
        done, position = 0, first
        while done < len(raw):
            row, column = divmod(position, width)
            count = min(width - column, (len(raw) - done) // size)
            mapped = int(place.rows[row])
            tensor, start = (place.own, mapped) if mapped >= 0 else (place.first, row)
            key = i if mapped >= 0 else -1 - i
            self.read(key, tensor, start * width + column, raw[done : done + count * size])
            done, position = done + count * size, position + count

    def _fill(self, path: Path, offset: int, raw: memoryview) -> None:
        descriptor = self.opened.get(path)
        if descriptor is None:
            if len(self.opened) >= OPEN_FILES:
                os.close(self.opened.pop(next(iter(self.opened))))
            try:
                descriptor = self.opened[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        done = 0
        while done < len(raw):
            try:
                count = os.preadv(descriptor, [raw[done:]], offset + done)
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
            if count == 0:
                raise DataError(f"{path} has become shorter while it was read.")
            done += count
