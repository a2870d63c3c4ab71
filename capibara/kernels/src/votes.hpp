// The kernels of vote and merge on any pool: blocks that depend on the length only, combined in their order.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel.hpp"
#include "table.hpp"

namespace capibara {

// A multiple of 4096 numbers, at least 64 Ki, and at most 1024 blocks in all.
inline int64_t block_of(int64_t length) {
    const int64_t least = length / 1024 + 1;
    return least <= 65536 ? 65536 : (least + 4095) / 4096 * 4096;
}

inline int64_t blocks_of(int64_t length) { return (length + block_of(length) - 1) / block_of(length); }

// out[n, n] in float64, of the rows less the centre where there is one; a row of weight 0 is not read, and its row
// and column are 0. Without weights all are read.
template <class Pool, class Weight>
void gram(Pool& pool, Dtype dtype, const std::vector<const void*>& rows, const Weight* weights, const float* centre,
          bool wide, int64_t length, double* out) {
    const int64_t n = static_cast<int64_t>(rows.size());
    std::vector<const void*> read;
    std::vector<int64_t> place;
    for (int64_t i = 0; i < n; ++i)
        if (!weights || weights[i] != 0) read.push_back(rows[i]), place.push_back(i);
    const int64_t m = static_cast<int64_t>(read.size()), tasks = m ? blocks_of(length) : 0;
    std::vector<double> partial(static_cast<size_t>(tasks * m * m));
    const Gram call{read.data(), m, length, block_of(length), partial.data(), centre, wide};
    const auto kernel = kernels().gram.of[dtype];
    parallel_for(pool, tasks, [&](int64_t task) { kernel(call, task); });
    for (int64_t i = 0; i < n * n; ++i) out[i] = 0;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = i; j < m; ++j) {
            double total = 0;
            for (int64_t task = 0; task < tasks; ++task) total += partial[(task * m + i) * m + j];
            out[place[i] * n + place[j]] = out[place[j] * n + place[i]] = total;
        }
}

// out[length] in float32; a row of weight 0 is not read.
template <class Pool, class Weight>
void weighted_sum(Pool& pool, Dtype dtype, const std::vector<const void*>& rows, const Weight* weights, int64_t length, float* out) {
    std::vector<const void*> read;
    std::vector<double> share;
    for (size_t i = 0; i < rows.size(); ++i)
        if (weights[i] != 0) read.push_back(rows[i]), share.push_back(weights[i]);
    const WeightedSum call{read.data(), share.data(), static_cast<int64_t>(read.size()), length, block_of(length), out};
    const auto kernel = kernels().weighted_sum.of[dtype];
    parallel_for(pool, blocks_of(length), [&](int64_t task) { kernel(call, task); });
}

// out[length] in float32, of at most MOST_SORTED rows.
template <class Pool>
void sorted_mean(Pool& pool, Dtype dtype, const std::vector<const void*>& rows, const int32_t* steps, int64_t num_steps,
                 int64_t low, int64_t high, int64_t length, float* out) {
    const int64_t n = static_cast<int64_t>(rows.size());
    const SortedMean call{rows.data(), steps, n, num_steps, low, high, length, block_of(length), out};
    const auto kernel = kernels().sorted_mean.of[dtype];
    parallel_for(pool, blocks_of(length), [&](int64_t task) { kernel(call, task); });
}

// out[length] in float32; `dtype` is that of `to`.
template <class Pool>
void moved(Pool& pool, Dtype dtype, const float* from, const void* to, float share, int64_t length, float* out) {
    const Moved call{from, to, share, length, block_of(length), out};
    const auto kernel = kernels().moved.of[dtype];
    parallel_for(pool, blocks_of(length), [&](int64_t task) { kernel(call, task); });
}

// out[length] of `dtype`.
template <class Pool>
void rounded(Pool& pool, Dtype dtype, const float* in, int64_t length, void* out) {
    const Rounded call{in, length, block_of(length), out};
    const auto kernel = kernels().rounded.of[dtype];
    parallel_for(pool, blocks_of(length), [&](int64_t task) { kernel(call, task); });
}

}  // namespace capibara
