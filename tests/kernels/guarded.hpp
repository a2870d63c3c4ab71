// Arrays that end or begin at a page that may not be touched, drawn sizes, and comparison with plain formulas in double.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "few_rows.hpp"

namespace guards {

using namespace CAPIBARA_ISA;

inline std::mt19937 generator(7);

inline int64_t drawn(int64_t low, int64_t high) { return low + static_cast<int64_t>(generator() % static_cast<uint32_t>(high - low + 1)); }

inline void require(bool holds, const char* claim) {
    if (!holds) std::fprintf(stderr, "not true: %s\n", claim), std::exit(1);
}

inline void draw(float x, double* out) { *out = x; }
inline void draw(float x, int32_t* out) { *out = static_cast<int32_t>(x); }
inline void draw(float x, int8_t* out) { *out = static_cast<int8_t>(30 * x); }
inline void draw(float x, float* out) { *out = x; }
inline void draw(float x, uint16_t* out) { from_float(x, out); }

// Normal numbers between two forbidden pages: behind the last of them directly, or (`first`) before the first.
template <class T>
struct Guarded {
    Guarded(int64_t length, bool first) : count(length), page(sysconf(_SC_PAGESIZE)) {
        const int64_t bytes = count * static_cast<int64_t>(sizeof(T)), used = (bytes + page - 1) / page * page;
        whole = used + 2 * page;
        memory = static_cast<char*>(mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        require(memory != MAP_FAILED, "the system gives memory");
        require(!mprotect(memory, page, PROT_NONE) && !mprotect(memory + page + used, page, PROT_NONE), "the system guards pages");
        data = reinterpret_cast<T*>(memory + page + (first ? 0 : used - bytes));
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < count; ++i) draw(normal(generator), data + i);
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(memory, whole); }
    double operator[](int64_t i) const { return to_float(data[i]); }

    int64_t count, page, whole;
    char* memory;
    T* data;
};

template <class T>
constexpr double ROUNDED = sizeof(T) == 2 ? 4e-3 : 1e-4;  // a result's rounding to bfloat16; sums of float32

inline void compare(double found, double wanted, double loose, const char* claim) {
    if (std::fabs(found - wanted) <= loose * (1 + std::fabs(wanted))) return;
    std::fprintf(stderr, "%g instead of %g\n", found, wanted);
    require(false, claim);
}

template <class T>
void compare(const Guarded<T>& found, const std::vector<double>& wanted, const char* claim) {
    require(found.count == static_cast<int64_t>(wanted.size()), "as many are found as are wanted");
    for (int64_t i = 0; i < found.count; ++i) compare(found[i], wanted[i], ROUNDED<T>, claim);
}

}  // namespace guards
