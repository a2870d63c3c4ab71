# cython: language_level=3
"""The native kernels for addresses in memory: no checks here, `arrays.py` makes them."""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libcpp cimport bool as is_true
from libcpp.vector cimport vector


cdef extern from "table.hpp" namespace "capibara" nogil:
    cdef enum Dtype:
        FLOAT32
        BFLOAT16
    cdef cppclass Kernels:
        const char* name
        int64_t (*multiply_adds)(int64_t rounds)
    const Kernels* const* usable()
    const Kernels& kernels()
    is_true use(const char* name)


cdef extern from "ffi.hpp" namespace "capibara" nogil:
    cdef cppclass Handler:
        const char* name
        void* function
    const Handler* handlers()


cdef extern from "parallel.hpp" namespace "capibara" nogil:
    cdef cppclass Threads:
        void allow(int64_t count)


cdef extern from "votes.hpp" namespace "capibara" nogil:
    void run_gram "capibara::gram"(
        Threads& pool, Dtype dtype, const vector[const void*]& rows, const double* weights, const float* centre,
        is_true wide, int64_t length, double* out
    ) except +
    void run_weighted_sum "capibara::weighted_sum"(
        Threads& pool, Dtype dtype, const vector[const void*]& rows, const double* weights, int64_t length, float* out
    ) except +
    void run_sorted_mean "capibara::sorted_mean"(
        Threads& pool, Dtype dtype, const vector[const void*]& rows, const int32_t* steps, int64_t num_steps,
        int64_t low, int64_t high, int64_t length, float* out
    ) except +
    void run_moved "capibara::moved"(
        Threads& pool, Dtype dtype, const float* start, const void* to, float share, int64_t length, float* out
    ) except +
    void run_rounded "capibara::rounded"(
        Threads& pool, Dtype dtype, const float* given, int64_t length, void* out
    ) except +


def sets():
    """Names of the instruction sets that were built and that this machine runs, best first."""
    names = []
    cdef const Kernels* const* one = usable()
    while one[0] != NULL:
        names.append(one[0].name.decode())
        one += 1
    return tuple(names)


def current():
    """The name of the set that runs."""
    return kernels().name.decode()


def choose(str name):
    """Makes another set run; False where it is not usable."""
    return use(name.encode())


def targets():
    """Name → capsule, for `jax.ffi.register_ffi_target`."""
    found = {}
    cdef const Handler* one = handlers()
    while one.name != NULL:
        found[one.name.decode()] = PyCapsule_New(one.function, "xla._CUSTOM_CALL_TARGET", NULL)
        one += 1
    return found


cdef vector[const void*] pointers(list addresses):
    cdef vector[const void*] found
    cdef uintptr_t address
    for address in addresses:
        found.push_back(<const void*> address)
    return found


cdef Dtype type_of(is_true is_bfloat16) noexcept nogil:
    return BFLOAT16 if is_bfloat16 else FLOAT32


def gram(
    list rows, bint is_bfloat16, uintptr_t weights, uintptr_t centre, bint wide, int64_t length,
    uintptr_t out, int64_t threads
):
    """Writes float64[n, n] at `out`; nothing is subtracted where `centre` is 0."""
    cdef vector[const void*] found = pointers(rows)
    cdef Threads pool
    pool.allow(threads)
    with nogil:
        run_gram(
            pool, type_of(is_bfloat16), found, <const double*> weights, <const float*> centre, wide, length,
            <double*> out
        )


def weighted_sum(list rows, bint is_bfloat16, uintptr_t weights, int64_t length, uintptr_t out, int64_t threads):
    """Writes float32[length] at `out`."""
    cdef vector[const void*] found = pointers(rows)
    cdef Threads pool
    pool.allow(threads)
    with nogil:
        run_weighted_sum(pool, type_of(is_bfloat16), found, <const double*> weights, length, <float*> out)


def sorted_mean(
    list rows, bint is_bfloat16, uintptr_t steps, int64_t num_steps, int64_t low, int64_t high, int64_t length,
    uintptr_t out, int64_t threads
):
    """Writes float32[length] at `out`."""
    cdef vector[const void*] found = pointers(rows)
    cdef Threads pool
    pool.allow(threads)
    with nogil:
        run_sorted_mean(
            pool, type_of(is_bfloat16), found, <const int32_t*> steps, num_steps, low, high, length, <float*> out
        )


def moved(
    uintptr_t start, uintptr_t to, bint is_bfloat16, float share, int64_t length, uintptr_t out, int64_t threads
):
    """Writes float32[length] at `out`, which may be `start`."""
    cdef Threads pool
    pool.allow(threads)
    with nogil:
        run_moved(pool, type_of(is_bfloat16), <const float*> start, <const void*> to, share, length, <float*> out)


def to_bfloat16(uintptr_t given, int64_t length, uintptr_t out, int64_t threads):
    """Writes bfloat16[length] at `out`."""
    cdef Threads pool
    pool.allow(threads)
    with nogil:
        run_rounded(pool, BFLOAT16, <const float*> given, length, <void*> out)


def multiply_adds(int64_t rounds):
    """Runs on the caller's thread, without the GIL; returns the number of operations."""
    cdef int64_t done
    with nogil:
        done = kernels().multiply_adds(rounds)
    return done
