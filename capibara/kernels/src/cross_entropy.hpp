// Cross-entropy of a linear head, forward and gradients, on tiles of the vocabulary: no array of all logits.
//
//     L = W Hᵀ    loss = log Σ exp L − L[target]    G = pull · softmax(L) − weight · onehot    dH = Gᵀ W    dW += G H
//
// A chunk of tokens has its logits below each other, [V, tokens]: sums over the vocabulary are then sums of vectors, and
// all three products read the arrays as they lie. Pass 1 makes a tile of logits and, while it is in the cache, replaces it
// by exp(L − the tile's highest); pass 2 scales the tile to gradients and multiplies it both ways while it is there. dW is
// added to in place. A task is a segment of the vocabulary: it owns rows of dW and a partial dH, which are summed in order.
// Milakov & Gimelshein 2018 (running softmax); Wijmans et al. 2024 (cut cross-entropy).
#pragma once

#include "scratch.hpp"
#include "tiles.hpp"

namespace CAPIBARA_ISA {

using capibara::CrossEntropy;

// Rows of the head as floats, `wide` apart with zeros behind the last column: the array itself where it is like that.
template <class T>
struct HeadRows {
    const CrossEntropy& call;
    const int64_t wide;
    const bool direct;
    Scratch scratch;

    explicit HeadRows(const CrossEntropy& c)
        : call(c), wide(round_up(c.width, W)), direct(sizeof(T) == 4 && !c.narrow && wide == c.width), scratch(direct ? 0 : c.tile * wide) {}

    const float* at(int64_t row, int64_t count) {
        const T* from = static_cast<const T*>(call.head) + row * call.width;
        if (direct) return reinterpret_cast<const float*>(from);
        for (int64_t i = 0; i < count; ++i) {
            float* out = scratch.data + i * wide;
            for (int64_t d = 0; d < call.width; ++d) {
                float x = to_float(from[i * call.width + d]);
                uint16_t less;
                if (call.narrow) from_float(x, &less), x = to_float(less);
                out[d] = x;
            }
            for (int64_t d = call.width; d < wide; ++d) out[d] = 0;
        }
        return scratch.data;
    }
    void fetch(Ahead& ahead, int which, int64_t row, int64_t count) const {
        ahead.fetch(which, static_cast<const float*>(call.head) + row * call.width * sizeof(T) / 4, count * call.width * sizeof(T) / 4);
    }
};

inline Panels across(const CrossEntropy& call) { return {call.hidden_columns, call.width, call.room}; }
inline Panels along(const CrossEntropy& call) { return {call.hidden_rows, call.tokens, call.width}; }

// The chunk's hidden states in both layouts, its targets and weights.
template <class T>
void cross_entropy_begin(const CrossEntropy& call, int64_t) {
    const T* hidden = static_cast<const T*>(call.hidden);
    const Panels columns = across(call);
    constexpr int64_t BLOCK = 16;  // of columns: what is written stays in the first-level cache
    for (int64_t first = 0; first < call.room; first += NR) {
        const int64_t width = columns.vectors(first) * W;
        for (int64_t from = 0; from < call.width; from += BLOCK) {
            const int64_t end = call.width - from < BLOCK ? call.width : from + BLOCK;
            for (int64_t t = first; t < first + width; ++t)
                for (int64_t d = from; d < end; ++d)
                    columns.at(first, d)[t - first] = t < call.tokens ? to_float(hidden[t * call.width + d]) : 0.0f;
        }
    }
    if (call.kept) {
        Scratch row(call.width);
        const auto read = [&](int64_t t, float* out) {
            for (int64_t d = 0; d < call.width; ++d) out[d] = to_float(hidden[t * call.width + d]);
        };
        pack(read, row.data, along(call));
    }
    for (int64_t t = 0; t < call.room; ++t) {
        int64_t target = t < call.tokens ? call.targets[t] : -1 - call.vocabulary;
        if (target < 0) target += call.vocabulary;
        call.places[t] = target < 0 || target >= call.vocabulary ? -1 : static_cast<int32_t>(target);
        call.chosen[t] = __builtin_nanf("");  // stays for a target outside of the vocabulary
    }
}

inline Vec any_exponential(Vec x) {  // for x of any size; what is finite stays finite
    Vec found = exponential(x > 88.0f ? all(88.0f) : x);
    return x == __builtin_inff() ? all(__builtin_inff()) : found;
}

// Of VECTORS · W tokens: the tile's highest logit, exp(logit − highest), and their sum. Where the highest is infinite,
// it is recorded, but 0 is subtracted.
template <int VECTORS>
inline void tile_shares(float* tile, int64_t rows, int64_t apart, float* tops, float* sums) {
    Vec top[VECTORS], sum[VECTORS];
    for (int j = 0; j < VECTORS; ++j) top[j] = load(tile + j * W), sum[j] = Vec{};
    for (int64_t v = 1; v < rows; ++v)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) top[j] = larger(load(tile + v * apart + j * W), top[j]);
    bool finite = true;
    for (int j = 0; j < VECTORS; ++j) {
        store(tops + j * W, top[j]);
        for (int i = 0; i < W; ++i) finite = finite && top[j][i] - top[j][i] == 0;
        top[j] = top[j] - top[j] == 0.0f ? top[j] : Vec{};
    }
    for (int64_t v = 0; v < rows; ++v)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) {
            float* at = tile + v * apart + j * W;
            const Vec x = load(at) - top[j], share = finite ? exponential(x) : any_exponential(x);
            sum[j] += share;
            store(at, share);
        }
    for (int j = 0; j < VECTORS; ++j) store(sums + j * W, sum[j]);
}

template <class Function>
inline void each_tile(const CrossEntropy& call, int64_t segment, const Function& function) {
    const int64_t tiles = (call.vocabulary + call.tile - 1) / call.tile;
    for (int64_t i = segment * tiles / call.segments; i < (segment + 1) * tiles / call.segments; ++i) {
        const int64_t row = i * call.tile, left = call.vocabulary - row;
        function(i, row, left < call.tile ? left : call.tile);
    }
}

// Pass 1: shares [V, room] (or one tile a segment, where they are not kept), highest and sum of every tile.
template <class T>
void cross_entropy_scores(const CrossEntropy& call, int64_t segment) {
    HeadRows<T> head(call);
    const Panels hidden = across(call);
    Ahead ahead;
    each_tile(call, segment, [&](int64_t index, int64_t row, int64_t rows) {
        const float* weights = head.at(row, rows);
        float* tile = call.shares + (call.kept ? row : segment * call.tile) * call.room;
        const int64_t left = call.vocabulary - row - rows, coming = left < call.tile ? left : call.tile;
        head.fetch(ahead, 0, row + rows, coming);
        ahead.fetch(1, tile + rows * call.room, call.kept ? coming * call.room : 0);
        for (int64_t t = 0; t < call.room; t += NR) {
            const int vectors = hidden.vectors(t);
            tile_columns(vectors, rows, call.width, weights, head.wide, 1, hidden.at(t, 0), vectors * W, tile + t, call.room, false, ahead);
            for (int64_t i = t; i < t + vectors * W; ++i)
                if (call.places[i] >= row && call.places[i] < row + rows) call.chosen[i] = tile[(call.places[i] - row) * call.room + i];
            float *tops = call.tops + index * call.room + t, *sums = call.sums + index * call.room + t;
            switch (vectors) {
                case 1: tile_shares<1>(tile + t, rows, call.room, tops, sums); break;
                case 2: tile_shares<2>(tile + t, rows, call.room, tops, sums); break;
                case 3: tile_shares<3>(tile + t, rows, call.room, tops, sums); break;
                case 4: tile_shares<4>(tile + t, rows, call.room, tops, sums); break;
            }
        }
    });
}

// Partition and loss of every token, from the tiles in their order; both are infinite or NaN where a logit is.
inline void cross_entropy_merge(const CrossEntropy& call, int64_t) {
    const int64_t tiles = (call.vocabulary + call.tile - 1) / call.tile;
    for (int64_t t = 0; t < call.room; t += W) {
        Vec top = load(call.tops + t), sum{};
        for (int64_t i = 1; i < tiles; ++i) top = larger(load(call.tops + i * call.room + t), top);
        const Vec base = top - top == 0.0f ? top : Vec{};
        for (int64_t i = 0; i < tiles; ++i)
            sum += load(call.sums + i * call.room + t) * any_exponential(load(call.tops + i * call.room + t) - base);
        for (int i = 0; i < W && t + i < call.tokens; ++i) {
            const float partition = base[i] + __builtin_logf(sum[i]);
            call.partition[t + i] = partition;
            call.losses[t + i] = partition - call.chosen[t + i];
        }
    }
}

// Pass 2: gradients of the logits in the place of their shares, then both products.
template <class T>
void cross_entropy_slopes(const CrossEntropy& call, int64_t segment) {
    HeadRows<T> head(call);
    const Panels hidden = along(call);
    const bool padded = head.wide != call.width;  // rows of dW are then not whole vectors
    Scratch scratch(call.room + (padded ? call.tile * head.wide : 0));
    float *factors = scratch.take(call.room), *part = scratch.take(0);
    float* to_hidden = call.to_hidden + segment * call.tokens * head.wide;
    bool begun = false;
    Ahead ahead;
    each_tile(call, segment, [&](int64_t index, int64_t row, int64_t rows) {
        float *tile = call.shares + row * call.room, *tops = call.tops + index * call.room;
        for (int64_t t = 0; t < call.room; ++t) {
            const bool used = t < call.tokens;
            const float base = tops[t] == -NEVER ? 0.0f : tops[t];
            factors[t] = used ? base - call.partition[t] : NEVER;
        }
        for (int64_t t = 0; t < call.room; t += W) store(factors + t, any_exponential(load(factors + t)));
        for (int64_t t = 0; t < call.tokens; ++t) factors[t] *= call.weights[t] * (1 + 2 * call.z_loss * call.partition[t]);
        for (int64_t v = 0; v < rows; ++v)
            for (int64_t t = 0; t < call.room; t += W) store(tile + v * call.room + t, load(tile + v * call.room + t) * load(factors + t));
        for (int64_t t = 0; t < call.tokens; ++t)
            if (call.places[t] >= row && call.places[t] < row + rows) tile[(call.places[t] - row) * call.room + t] -= call.weights[t];
        const float* weights = head.at(row, rows);
        float* to_head = call.to_head + row * call.width;
        const int64_t left = call.vocabulary - row - rows, coming = left < call.tile ? left : call.tile;
        head.fetch(ahead, 0, row + rows, coming);
        ahead.fetch(1, tile + rows * call.room, coming * call.room);
        ahead.fetch(2, to_head + rows * call.width, coming * call.width);
        for (int64_t d = 0; d < call.width; d += NR) {
            const int vectors = hidden.vectors(d);
            tile_columns(vectors, call.tokens, rows, tile, 1, call.room, weights + d, head.wide, to_hidden + d, head.wide, begun, ahead);
            tile_columns(vectors, rows, call.tokens, tile, call.room, 1, hidden.at(d, 0), vectors * W, (padded ? part : to_head) + d, head.wide,
                        !padded && !call.first, ahead);
        }
        if (padded)
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t d = 0; d < call.width; ++d) {
                    float* out = to_head + i * call.width + d;
                    *out = call.first ? part[i * head.wide + d] : *out + part[i * head.wide + d];
                }
        begun = true;
    });
}

// dH: the segments' parts, summed in order and rounded once.
template <class T>
void cross_entropy_end(const CrossEntropy& call, int64_t) {
    const int64_t wide = round_up(call.width, W), apart = call.tokens * wide;
    for (int64_t t = 0; t < call.tokens; ++t) {
        T* out = static_cast<T*>(call.hidden_out) + t * call.width;
        for (int64_t d = 0; d < call.width; d += W) {
            const float* part = call.to_hidden + t * wide + d;
            Vec sum = load(part);
            for (int64_t s = 1; s < call.segments; ++s) sum += load(part + s * apart);
            const int64_t used = call.width - d < W ? call.width - d : W;
            for (int64_t i = 0; i < used; ++i) from_float(sum[i], out + d + i);
        }
    }
}

}  // namespace CAPIBARA_ISA
