// Where things lie in a page, and the product with an fp16 page.
#pragma once

namespace {

// y[c] = sum over live r of m[r][c] * x[r], or beta * y[c] + that, for an fp16 matrix; rows outside `live` may hold
// anything.
template <int N>
inline void half_product(const uint16_t* m, int rows, int columns, const Mask128* live, const float* const* x,
                         float* const* y, const float* beta, Ahead& ahead, int per_step) {
    const auto put = [&](int q, int c, VF sum) {
        vstore(y[q] + c, beta ? vfma(vload(y[q] + c), vset(beta[q]), sum) : sum);
    };
    int c = 0;
    for (; c + 2 * W <= columns; c += 2 * W) {
        VF sum[N][2];
        for (int q = 0; q < N; ++q) sum[q][0] = sum[q][1] = vset(0.f);
        for (int r = 0; r < rows; ++r) {
            const size_t at = static_cast<size_t>(r) * columns + c;
            if (c == 0) ahead.lines(per_step);
            if (live && !live->test(r)) continue;
            const VF a = vload_half(m + at), b = vload_half(m + at + W);
            for (int q = 0; q < N; ++q) {
                const VF w = vset(x[q][r]);
                sum[q][0] = vfma(w, a, sum[q][0]);
                sum[q][1] = vfma(w, b, sum[q][1]);
            }
        }
        for (int q = 0; q < N; ++q) {
            put(q, c, sum[q][0]);
            put(q, c + W, sum[q][1]);
        }
    }
    for (; c < columns; c += W) {
        const int n = min_of(W, columns - c);
        VF sum[N];
        for (int q = 0; q < N; ++q) sum[q] = vset(0.f);
        for (int r = 0; r < rows; ++r) {
            if (live && !live->test(r)) continue;
            const uint16_t* from = m + static_cast<size_t>(r) * columns + c;
            alignas(64) uint16_t part[W] = {};
            if (n < W) {
                for (int i = 0; i < n; ++i) part[i] = from[i];
                from = part;
            }
            const VF a = vload_half(from);
            for (int q = 0; q < N; ++q) sum[q] = vfma(vset(x[q][r]), a, sum[q]);
        }
        for (int q = 0; q < N; ++q) put(q, c, sum[q]);
    }
}

// Where one head's part of a page lies.
struct HeadPage {
    const uint8_t* keys;
    const uint8_t* values;
    const uint16_t* key_scales;    // WARM only
    const uint16_t* value_scales;  // WARM only
};

inline HeadPage head_page(const Geometry& g, const PageRef& ref, int head) {
    const uint8_t* base = reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(ref.data));
    const size_t one = static_cast<size_t>(g.dim) * g.page, all = g.elements();
    if (ref.kind == kHot) return {base + 2 * head * one, base + 2 * (all + head * one), nullptr, nullptr};
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(base + 2 * all);
    return {base + head * one, base + all + head * one, scales + static_cast<size_t>(head) * g.dim,
            scales + static_cast<size_t>(g.n_kv_heads) * g.dim + static_cast<size_t>(head) * g.page};
}

}  // namespace
