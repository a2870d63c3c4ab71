// Attention, forward and backward: views by strides, arrays that batches share, masks, biases and RoPE.
#pragma once

#include "attention_backward.hpp"
#include "guarded.hpp"

namespace guards {

template <class T>
constexpr double LOOSE = sizeof(T) == 2 ? 4e-2 : 1e-4;  // gradients read back a rounded output

// Heads of an array: batch b begins at number first[b].
template <class T>
struct Heads {
    Heads(T* from, int64_t batches, int64_t length, int64_t token_stride, int64_t size, bool shared = false)
        : data(from), first(batches), token(token_stride), head(size) {
        for (int64_t b = 0; b < batches; ++b) first[b] = shared ? 0 : b * length * token;
    }
    capibara::AttentionArray array() const { return {data, first.data(), token, head}; }
    double operator()(int64_t b, int64_t t, int64_t h, int64_t d) const { return to_float(data[first[b] + t * token + h * head + d]); }

    T* data;
    std::vector<int64_t> first;
    int64_t token, head;
};

// The same numbers in double, [batch, length, heads, size].
struct Wide {
    Wide(int64_t batch, int64_t t, int64_t h, int64_t d) : batches(batch), length(t), heads(h), size(d), data(batch * t * h * d) {}
    template <class T>
    Wide(const Heads<T>& x, int64_t batch, int64_t t, int64_t h, int64_t d) : Wide(batch, t, h, d) {
        each([&](int64_t b, int64_t i, int64_t g, double* row) {
            for (int64_t e = 0; e < size; ++e) row[e] = x(b, i, g, e);
        });
    }
    double* row(int64_t b, int64_t t, int64_t h) { return data.data() + ((b * length + t) * heads + h) * size; }
    template <class Function>
    void each(const Function& function) {
        for (int64_t b = 0; b < batches; ++b)
            for (int64_t t = 0; t < length; ++t)
                for (int64_t h = 0; h < heads; ++h) function(b, t, h, row(b, t, h));
    }
    void turn(const capibara::AttentionAngles& angles, int64_t offset, double sign) {
        if (!angles.cos) return;
        const int64_t half = size / 2;
        each([&](int64_t b, int64_t t, int64_t, double* x) {
            for (int64_t d = 0; d < half; ++d) {
                const int64_t at = angles.cos_first[b] + (t + offset) * half + d;
                const double p = x[d], q = x[half + d], c = angles.cos[at], s = sign * angles.sin[at];
                x[d] = p * c - q * s, x[half + d] = q * c + p * s;
            }
        });
    }
    template <class T>
    void equals(const Heads<T>& found, const char* claim) {
        each([&](int64_t b, int64_t t, int64_t h, double* x) {
            for (int64_t d = 0; d < size; ++d) compare(found(b, t, h, d), x[d], LOOSE<T>, claim);
        });
    }

    int64_t batches, length, heads, size;
    std::vector<double> data;
};

template <class T>
void attention(bool before) {
    const int64_t B = drawn(1, 2), K = drawn(1, 2), N = K * drawn(1, 3), D = drawn(1, 9) == 1 ? 130 : drawn(1, 70);
    const int64_t edges[] = {drawn(1, 20), 47, 48, 49, 95, 96, 97, 255, 256, 257, drawn(1, 300)};
    const int64_t Tq = edges[drawn(0, 10)], S = drawn(0, 1) ? Tq : edges[drawn(0, 10)];
    const bool causal = drawn(0, 1), segmented = drawn(0, 1), biased = drawn(0, 1), wide = sizeof(T) == 4 || drawn(0, 1);
    const bool packed = Tq == S && drawn(0, 1), shared = !packed && drawn(0, 3) == 0;
    const int64_t window = drawn(0, 2) ? 0 : drawn(1, 300), across = packed ? N + 2 * K : N, kv = packed ? across : K;

    Guarded<T> q_room(B * Tq * across * D, before), k_room(packed ? 0 : (shared ? 1 : B) * S * K * D, before), v_room(k_room.count, before);
    Guarded<T> dq_room(q_room.count, before), dk_room(packed ? 0 : B * S * K * D, before), dv_room(dk_room.count, before);
    Guarded<T> out_room(B * Tq * N * D, before), grad_room(out_room.count, before);
    const Heads<T> q(q_room.data, B, Tq, across * D, D), k(packed ? q_room.data + N * D : k_room.data, B, S, kv * D, D, shared);
    const Heads<T> v(packed ? q_room.data + (N + K) * D : v_room.data, B, S, kv * D, D, shared);
    const Heads<T> dq(dq_room.data, B, Tq, across * D, D), dk(packed ? dq_room.data + N * D : dk_room.data, B, S, kv * D, D);
    const Heads<T> dv(packed ? dq_room.data + (N + K) * D : dv_room.data, B, S, kv * D, D);
    const Heads<T> out(out_room.data, B, Tq, N * D, D), grad(grad_room.data, B, Tq, N * D, D);
    Guarded<float> partition(B * N * Tq, before);
    std::vector<int64_t> at_partition(B), at_q_ids(B), at_k_ids(B), at_bias(B), at_angles(B);

    capibara::AttentionShape shape{B, Tq, S, N, K, D, 1 / std::sqrt(static_cast<float>(D)), causal, window, {}, {}, {}, {}};
    Guarded<int32_t> q_ids(B * Tq, before), k_ids(B * S, before);
    if (segmented) shape.query_segments = {q_ids.data, at_q_ids.data()}, shape.key_segments = {k_ids.data, at_k_ids.data()};
    const int64_t b_axis = drawn(0, 1) ? B : 1, n_axis = drawn(0, 1) ? N : 1, t_axis = drawn(0, 1) ? Tq : 1, s_axis = drawn(0, 1) ? S : 1;
    const int64_t numbers = biased ? b_axis * n_axis * t_axis * s_axis : 0;
    Guarded<float> bias(wide ? numbers : 0, before), dbias(numbers, before);
    Guarded<T> narrow(wide ? 0 : numbers, before);
    for (int64_t i = 0; i < numbers; ++i) {
        dbias.data[i] = 0;
        if (drawn(0, 9) == 0) wide ? from_float(NEVER, bias.data + i) : from_float(NEVER, narrow.data + i);
    }
    void* added = wide ? static_cast<void*>(bias.data) : narrow.data;
    const capibara::AttentionBias strides{added, wide, at_bias.data(), n_axis > 1 ? t_axis * s_axis : 0, t_axis > 1 ? s_axis : 0, s_axis > 1};
    if (biased) shape.bias = strides;
    const bool turned = D % 2 == 0 && Tq <= S && drawn(0, 1), one_turn = drawn(0, 1);
    Guarded<float> cos(turned ? (one_turn ? 1 : B) * S * (D / 2) : 0, before), sin(cos.count, before);
    if (turned) shape.angles = {cos.data, sin.data, at_angles.data(), at_angles.data()};
    for (int64_t b = 0; b < B; ++b) {
        at_partition[b] = b * N * Tq, at_q_ids[b] = b * Tq, at_k_ids[b] = b * S;
        at_bias[b] = b_axis > 1 ? b * n_axis * t_axis * s_axis : 0, at_angles[b] = one_turn ? 0 : b * S * (D / 2);
    }
    for (int64_t i = 0; i < cos.count; ++i) cos.data[i] = std::cos(3 * sin.data[i]), sin.data[i] = std::sin(3 * sin.data[i]);

    const capibara::AttentionForward forward{shape, q.array(), k.array(), v.array(), out.array(), partition.data};
    for (int64_t task = 0; task < B * N; ++task) attention_forward<T>(forward, task);
    capibara::AttentionBackward backward{shape, q.array(), k.array(), v.array(), out.array(), grad.array(), dq.array(), dk.array(), dv.array(),
                                         {partition.data, at_partition.data()}, {}, 1, 1};
    if (biased) {
        backward.dbias = strides, backward.dbias.data = dbias.data, backward.dbias.wide = true;
        backward.batches_together = b_axis == 1 ? B : 1, backward.heads_together = n_axis == 1 ? K : 1;
    }
    const int64_t tasks = B / backward.batches_together * (K / backward.heads_together);
    for (int64_t task = 0; task < tasks; ++task) attention_backward<T>(backward, task);

    Wide queries(q, B, Tq, N, D), keys(k, B, S, K, D), values(v, B, S, K, D), pull(grad, B, Tq, N, D);
    Wide o(B, Tq, N, D), to_q(B, Tq, N, D), to_k(B, S, K, D), to_v(B, S, K, D);
    std::vector<double> share(S), to_bias(numbers), steps(numbers);
    queries.turn(shape.angles, S - Tq, 1), keys.turn(shape.angles, 0, 1);
    queries.each([&](int64_t b, int64_t t, int64_t h, const double* query) {
        const int64_t here = t + S - Tq, g = h / (N / K);
        const auto place = [&](int64_t s) { return at_bias[b] + h * strides.head + t * strides.query + s * strides.key; };
        double highest = -INFINITY, total = 0, delta = 0, *mixed = o.row(b, t, h), *slopes = to_q.row(b, t, h), *pulled = pull.row(b, t, h);
        for (int64_t s = 0; s < S; ++s) {
            const bool seen = (!causal || s <= here) && (!window || s > here - window) &&
                              (!segmented || q_ids.data[b * Tq + t] == k_ids.data[b * S + s]);
            double score = 0;
            for (int64_t d = 0; d < D; ++d) score += query[d] * keys.row(b, s, g)[d];
            score = score * shape.scale + (!biased ? 0 : wide ? bias[place(s)] : narrow[place(s)]);
            share[s] = seen ? score : -INFINITY;
            highest = std::fmax(highest, share[s]);
        }
        for (double& x : share) total += x = x == -INFINITY ? 0 : std::exp(x - highest);
        if (total == 0) return;
        for (int64_t s = 0; s < S; ++s)
            for (int64_t d = 0; d < D; ++d) mixed[d] += share[s] / total * values.row(b, s, g)[d];
        for (int64_t d = 0; d < D; ++d) delta += mixed[d] * pulled[d];
        for (int64_t s = 0; s < S; ++s) {
            const double p = share[s] / total, *key = keys.row(b, s, g), *value = values.row(b, s, g);
            double slope = -delta, *key_slopes = to_k.row(b, s, g), *value_slopes = to_v.row(b, s, g);
            for (int64_t d = 0; d < D; ++d) slope += pulled[d] * value[d];
            for (int64_t d = 0; d < D; ++d) {
                slopes[d] += p * slope * shape.scale * key[d];
                key_slopes[d] += p * slope * shape.scale * query[d];
                value_slopes[d] += p * pulled[d];
            }
            if (biased) to_bias[place(s)] += p * slope, steps[place(s)] += p;
        }
    });
    to_q.turn(shape.angles, S - Tq, -1), to_k.turn(shape.angles, 0, -1);
    o.equals(out, "attention is the formula");
    to_q.equals(dq, "the gradient of the queries is the formula");
    to_k.equals(dk, "the gradient of the keys is the formula");
    to_v.equals(dv, "the gradient of the values is the formula");
    for (int64_t i = 0; i < numbers; ++i)  // errors add up as steps of a random walk
        compare(dbias[i], to_bias[i], LOOSE<T> * (1 + std::sqrt(steps[i])), "the gradient of the bias is the formula");
}

}  // namespace guards
