// Memory of one task, in lines of a cache.
#pragma once

#include <cstdlib>

#include "panels.hpp"

namespace CAPIBARA_ISA {

struct Scratch {
    explicit Scratch(int64_t count) : data(static_cast<float*>(std::aligned_alloc(64, round_up(count * 4 + 64, 64)))), next(data) {}
    ~Scratch() { std::free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* take(int64_t count) {
        float* found = next;
        next += round_up(count, 16);
        return found;
    }
    float *data, *next;
};

}  // namespace CAPIBARA_ISA
