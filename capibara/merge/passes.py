"""The two passes over the inputs: one that compares them, where the method needs it, and one that merges.

Both work block by block, tile by tile within a block; nothing depends on where blocks begin, but for the order in which
products are summed, which is fixed by the number of inputs and their types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from capibara.errors import ConfigError, DataError
from capibara.merge import kernels
from capibara.merge.cast import Rounding, is_finite
from capibara.merge.methods import METHODS, WHOLE, Decision, Method, decide, one_pass
from capibara.merge.output import Output
from capibara.merge.plan import Job
from capibara.merge.recipe import Recipe
from capibara.merge.stream import RING, WORKERS, Digests, Unit, block_numbers, leaf_hasher, stream, units_of
from capibara.merge.tensors import numpy_type

Progress = Callable[[str, int, int], None]
"""(what is being done, bytes read, bytes in all)."""


class Passes:
    """The passes of one merge.

    Args:
      recipe: What and how.
      jobs: The tensors.
      progress: Told of the bytes that have been read.

    Attributes:
      inputs: Name of a tensor → the digest of it in every input, of the tensors that have been read.
    """

    def __init__(self, recipe: Recipe, jobs: Sequence[Job], progress: Progress):
        self.recipe, self.jobs, self.progress = recipe, jobs, progress
        self.n = len(recipe.inputs) + (recipe.base is not None)
        wide = any(tensor.dtype == "F64" for job in jobs for tensor in job.inputs)
        self.precision = np.float64 if wide else np.float32
        each = [{tensor.dtype for tensor in job.inputs} for job in jobs if job.merged]
        self.plain = all(dtypes == {"BF16"} or dtypes == {"F32"} for dtypes in each)  # added as they lie in the files
        self.block = block_numbers(jobs, self.n)
        self.inputs: dict[str, list[str]] = {}

    def compare(self, method: Method) -> tuple[dict[str, np.ndarray], list[bool]]:
        """Products of the inputs' differences, by tensor or (under the empty name) of the whole.

        In a vote an input that holds NaN or an infinity is left out, and the others are compared anew: the median that
        they had been compared with was of all.

        Returns:
          Name → float64[n, n], and which inputs are finite.
        """
        m, digests = len(self.recipe.inputs), Digests()
        finite = np.ones(m, bool)
        with ThreadPoolExecutor(1) as pool:
            if method.reference in ("median", "first"):  # JAX starts, and compiles the vote, while the files are read
                pool.submit(decide, self.recipe, {"": np.eye(m)}, [True] * m)
            grams, bad = self._products(method, list(range(m)), digests)
        self._take(digests, range(len(self.jobs)))
        while bad.any() and method.reference in ("median", "first"):
            finite &= ~bad
            grams, bad = self._products(method, np.flatnonzero(finite).tolist(), None)
        keep = np.flatnonzero(finite)
        if method.reference == "first" and not kernels.conditioned(grams[""][np.ix_(keep, keep)]):
            grams, _ = self._products(method._replace(reference="median"), keep.tolist(), None)
        return grams, finite.tolist()

    def _products(
        self, method: Method, keep: list[int], digests: Digests | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Products of the inputs in `keep`, and which of them hold a number that is not finite."""
        if not keep:
            raise DataError("No input holds finite numbers only; there is nothing to merge.")
        reference = method.reference
        if reference == "base":
            reference = "zero" if self.recipe.base is None else len(self.recipe.inputs)
        scratch = self._scratch()
        short = reference == "first" and self.plain
        columns = kernels.tile_numbers(*((3, np.dtype(np.float32)) if short else (2 * self.n, np.dtype(np.float64))))
        grams: dict[str, np.ndarray] = {}
        bad = np.zeros(len(self.recipe.inputs), bool)
        whole = method.gram == WHOLE

        def work(which: int, unit: Unit, raws: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            job, rows = self.jobs[unit.job], scratch[which]
            total, wrong = np.zeros((len(keep), len(keep))), np.zeros(len(keep), bool)
            if job.merged:
                self._open(rows, job, raws)
                for first in range(0, unit.numbers, columns):
                    last = min(first + columns, unit.numbers)
                    part, flags = kernels.gram(rows, first, last, keep, reference)
                    total += part
                    wrong |= flags
            return total, wrong

        def sink(unit: Unit, result: tuple[np.ndarray, np.ndarray]) -> None:
            name = "" if whole else self.jobs[unit.job].name
            gram = grams.setdefault(name, np.zeros((len(bad), len(bad))))
            gram[np.ix_(keep, keep)] += result[0]
            bad[np.array(keep)[result[1]]] = True
            self._advance("comparing", unit)

        skip = frozenset(range(self.n)) - set(keep) if digests is None else frozenset()
        self._begin(range(len(self.jobs)))
        units = units_of(self.jobs, range(len(self.jobs)), self.block)
        stream(self.jobs, units, work, sink, digests=digests, skip=skip)
        return grams, bad

    def combine(self, output: Output, decision: Decision | None, done: set[str]) -> None:
        """Merges and writes the tensors that are not in `done`, in order."""
        todo = [j for j, job in enumerate(self.jobs) if job.name not in done]
        kernel = decision.kernel if decision else one_pass(self.recipe, self.jobs)
        digests = Digests() if decision is None else None
        scratch = self._scratch()
        rounding = {
            dtype: Rounding(dtype, stochastic=self.recipe.stochastic_rounding, seed=self.recipe.seed)
            for dtype in {job.dtype for job in self.jobs if job.merged}
        }
        whole_tensors = METHODS[self.recipe.method].whole_tensors
        summed = decision.middle == 0 if decision else self.recipe.method in ("uniform", "weighted")
        tile = kernels.tile_numbers(3 if summed and self.plain else 2 + self.n, np.dtype(self.precision))
        block = self.block
        if whole_tensors:
            tile = block = max(job.numbers for job in self.jobs)
        hashers: dict[int, Any] = {}
        tolerated = decision is not None and bool(decision.reasons)

        def work(which: int, unit: Unit, raws: list[np.ndarray]) -> np.ndarray:
            job, rows = self.jobs[unit.job], scratch[which]
            if not job.merged:
                return self._copied(job, raws)
            self._open(rows, job, raws)
            size = numpy_type(job.dtype).itemsize
            encoded = np.empty(unit.numbers * size, np.uint8)
            for first in range(0, unit.numbers, tile):
                last = min(first + tile, unit.numbers)
                with np.errstate(over="ignore", invalid="ignore"):
                    values = kernel(rows, first, last, job.name)
                to = rounding[job.dtype]
                bad = to.stochastic and not np.isfinite(values).all()  # random bits may turn a NaN into a number
                part = to.encode(values, job.name, unit.first + first)
                if bad or not is_finite(part, job.dtype):
                    if not np.isfinite(kernel(rows, first, last, job.name)).all():  # anew: encoding may write over it
                        raise self._not_finite(rows, job, first, last)
                    raise DataError(
                        f"Tensor {job.name!r} of the merge holds numbers too large for {numpy_type(job.dtype)}. Choose "
                        "--dtype float32."
                    )
                encoded[first * size : last * size] = part
            return encoded

        def sink(unit: Unit, encoded: np.ndarray) -> None:
            job = self.jobs[unit.job]
            if unit.first == 0:
                hashers[unit.job] = leaf_hasher(job.name, job.dtype, job.shape)
            hashers[unit.job].update(encoded.data)
            output.write(job.name, unit.first * numpy_type(job.dtype).itemsize, encoded)
            if unit.first + unit.numbers == job.numbers:
                self._take(digests, [unit.job])
                line = {"tensor": job.name, "digest": hashers.pop(unit.job).hexdigest()}
                output.finish(job.name, line | {"inputs": self.inputs[job.name]})
            self._advance("merging", unit)

        skip = frozenset[int]()
        if tolerated and decision is not None:
            needed = set(np.flatnonzero(decision.coefficients[""]))
            skip = frozenset() if decision.middle else frozenset(range(self.n)) - needed
        self._begin(todo)
        blocks = 2 if whole_tensors else RING
        stream(self.jobs, units_of(self.jobs, todo, block), work, sink, digests=digests, skip=skip, blocks=blocks)

    def _copied(self, job: Job, raws: list[np.ndarray]) -> np.ndarray:
        for i, raw in enumerate(raws[1:], 1):
            if not np.array_equal(raws[0], raw):
                raise ConfigError(
                    f"Tensor {job.name!r} holds {job.dtype}, which cannot be averaged, and differs between "
                    f"{self.recipe.inputs[0]} and {[*self.recipe.inputs, self.recipe.base][i]}."
                )
        return raws[0].copy()

    def _not_finite(self, rows: kernels.Rows, job: Job, first: int, last: int) -> DataError:
        paths = [*self.recipe.inputs, self.recipe.base]
        for i in range(self.n):
            if not np.isfinite(rows.row(i, first, last)).all():
                return DataError(
                    f"Tensor {job.name!r} of {paths[i]} holds NaN or an infinity, and so would the merge. "
                    "Leave that input out, or merge by 'byzantine_tolerant', which does."
                )
        return DataError(f"Tensor {job.name!r} of the merge holds numbers too large for {self.precision.__name__}.")

    def _scratch(self) -> list[kernels.Rows]:
        return [kernels.Rows(self.n, self.precision) for _ in range(WORKERS)]

    def _open(self, rows: kernels.Rows, job: Job, raws: list[np.ndarray]) -> None:
        dtypes = [tensor.dtype for tensor in job.inputs]
        rows.open(raws, dtypes, [numpy_type(dtype).itemsize for dtype in dtypes])

    def _take(self, digests: Digests | None, which: Iterable[int]) -> None:
        if digests is not None:
            for j in which:
                self.inputs[self.jobs[j].name] = [digests.done[j, i] for i in range(self.n)]

    def _begin(self, which: Iterable[int]) -> None:
        self.read, self.total = 0, sum(self.jobs[j].numbers * self._bytes_each(self.jobs[j]) for j in which)

    def _advance(self, what: str, unit: Unit) -> None:
        self.read += unit.numbers * self._bytes_each(self.jobs[unit.job])
        self.progress(what, self.read, self.total)

    def _bytes_each(self, job: Job) -> int:
        return sum(numpy_type(tensor.dtype).itemsize for tensor in job.inputs)
