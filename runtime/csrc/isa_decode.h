// Attention of a few query rows to pages where they lie. A WARM page is multiplied as integers: the page's scales are
// folded into the float operand (query or probability), which then becomes 16-bit fixed point. Keys and values need
// the same product: y[c] = sum over r of codes[r/4][c][r%4] * x[r].
#pragma once

namespace {

// y[c] = sum over live r of m[r][c] * x[r] for an fp16 matrix; rows outside `live` may hold anything.
template <int N>
inline void half_product(const uint16_t* m, int rows, int columns, const Mask128* live, const float* const* x,
                         float* const* y, const uint16_t* next) {
    int c = 0;
    for (; c + 2 * W <= columns; c += 2 * W) {
        VF sum[N][2];
        for (int q = 0; q < N; ++q) sum[q][0] = sum[q][1] = vset(0.f);
        for (int r = 0; r < rows; ++r) {
            const size_t at = static_cast<size_t>(r) * columns + c;
            prefetch(next + at);
            if (live && !live->test(r)) continue;
            const VF a = vload_half(m + at), b = vload_half(m + at + W);
            for (int q = 0; q < N; ++q) {
                const VF w = vset(x[q][r]);
                sum[q][0] = vfma(w, a, sum[q][0]);
                sum[q][1] = vfma(w, b, sum[q][1]);
            }
        }
        for (int q = 0; q < N; ++q) {
            vstore(y[q] + c, sum[q][0]);
            vstore(y[q] + c + W, sum[q][1]);
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
        for (int q = 0; q < N; ++q) vstore(y[q] + c, sum[q]);
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

struct DecodeHead {
    const Batch* batch;
    HeadPage at, next;  // next: what to prefetch meanwhile
    Mask128 live;
    int64_t position;
    int head;
    const float* key_scales;    // [dim_pad], WARM only
    const float* value_scales;  // [page_pad], zero where dead
    State out;                  // of the head
    float* mass;                // of the head, or null
    int slot;                   // of the page in its run
};

template <int N>
inline void decode_rows(const DecodeHead& d, int row0, bool warm) {
    const Batch& b = *d.batch;
    const Geometry& g = *b.g;
    alignas(64) float scores[N][kMaxPage];
    alignas(64) float sums[N][kMaxDim];
    alignas(64) float scaled[kMaxDim];
    float* score_rows[N];
    float* sum_rows[N];
    const float* query_rows[N];
    for (int i = 0; i < N; ++i) {
        score_rows[i] = scores[i];
        sum_rows[i] = sums[i];
        query_rows[i] = b.q + (static_cast<size_t>(d.head) * b.rows + row0 + i) * g.dim_pad;
    }
    Digits digits[N];
    float scales[N];
    if (warm) {
        for (int i = 0; i < N; ++i) {
            for (int c = 0; c < g.dim_pad; c += W) {
                vstore(scaled + c, vmul(vload(query_rows[i] + c), vload(d.key_scales + c)));
            }
            scales[i] = to_digits(scaled, g.dim_pad, digits[i]);
        }
        int8_product<N>(reinterpret_cast<const int8_t*>(d.at.keys), g.dim, g.page, digits, scales, score_rows,
                        reinterpret_cast<const int8_t*>(d.next.keys));
    } else {
        half_product<N>(reinterpret_cast<const uint16_t*>(d.at.keys), g.dim, g.page, nullptr, query_rows, score_rows,
                        reinterpret_cast<const uint16_t*>(d.next.keys));
    }
    float factors[N];
    const float* weight_rows[N];
    for (int i = 0; i < N; ++i) {
        const int row = row0 + i;
        const Mask128 seen = b.visible(d.live, d.position, row / g.group);
        factors[i] = softmax_row(scores[i], &seen, 1, g.page_pad, g.softcap, d.out.peak[row], d.out.total[row],
                                 d.mass ? d.mass + static_cast<size_t>(row) * kMassStride : nullptr, &d.slot);
        weight_rows[i] = scores[i];
    }
    if (warm) {
        for (int i = 0; i < N; ++i) {
            for (int c = 0; c < g.page_pad; c += W) {
                vstore(scores[i] + c, vmul(vload(scores[i] + c), vload(d.value_scales + c)));
            }
            scales[i] = to_digits(scores[i], g.page_pad, digits[i]);
        }
        int8_product<N>(reinterpret_cast<const int8_t*>(d.at.values), g.page, g.dim, digits, scales, sum_rows,
                        reinterpret_cast<const int8_t*>(d.next.values));
    } else {
        half_product<N>(reinterpret_cast<const uint16_t*>(d.at.values), g.page, g.dim, &d.live, weight_rows, sum_rows,
                        reinterpret_cast<const uint16_t*>(d.next.values));
    }
    for (int i = 0; i < N; ++i) {
        float* acc = d.out.acc + static_cast<size_t>(row0 + i) * g.dim_pad;
        const VF factor = vset(factors[i]);
        for (int c = 0; c < g.dim_pad; c += W) {
            vstore(acc + c, vfma(vload(acc + c), factor, vload(sums[i] + c)));
        }
    }
}

void decode_run(const Batch& b, const PageRef* pages, int n_pages, const PageRef* next, const State& out, float* mass,
                float*) {
    const Geometry& g = *b.g;
    const size_t n = static_cast<size_t>(g.n_kv_heads) * b.rows;
    for (size_t i = 0; i < n; ++i) {
        out.peak[i] = -kScoreLimit;
        out.total[i] = 0.f;
    }
    for (size_t i = 0; i < n * g.dim_pad; ++i) out.acc[i] = 0.f;
    if (mass) {
        for (size_t i = 0; i < n * kMassStride; ++i) mass[i] = 0.f;
    }
    constexpr int kAhead = 2;  // heads to prefetch ahead: a page's worth would push the current one out of the L1 cache
    alignas(64) float key_scales[kMaxDim], value_scales[kMaxPage];
    for (int p = 0; p < n_pages; ++p) {
        const PageRef& ref = pages[p];
        DecodeHead d{&b, {}, {}, g.live(ref), ref.position, 0, key_scales, value_scales, out, mass, p};
        if (!b.visible(d.live, ref.position, 0).any()) continue;
        const PageRef* after = p + 1 < n_pages ? &pages[p + 1] : next;
        if (after && after->data == 0) after = nullptr;
        const bool warm = ref.kind != kHot;
        for (int head = 0; head < g.n_kv_heads; ++head) {
            d.at = head_page(g, ref, head);
            if (head + kAhead < g.n_kv_heads) {
                d.next = head_page(g, ref, head + kAhead);
            } else {
                const int wrapped = head + kAhead - g.n_kv_heads;
                d.next = after && wrapped < g.n_kv_heads ? head_page(g, *after, wrapped) : d.at;
            }
            d.head = head;
            d.out = out.at(static_cast<size_t>(head) * b.rows, g.dim_pad);
            d.mass = mass ? mass + static_cast<size_t>(head) * b.rows * kMassStride : nullptr;
            if (warm) {
                load_halves(d.at.key_scales, g.dim, key_scales);
                load_halves(d.at.value_scales, g.page, value_scales);
                for (int c = 0; c < g.page_pad; c += W) {
                    const VM keep = vmask(d.live.bits(c, W));
                    vstore(value_scales + c, vselect(keep, vload(value_scales + c), vset(0.f)));
                }
            }
            int row = 0;
            for (; row + 4 <= b.rows; row += 4) {
                decode_rows<4>(d, row, warm);
                d.next = d.at;
            }
            if (b.rows - row == 3) decode_rows<3>(d, row, warm);
            if (b.rows - row == 2) decode_rows<2>(d, row, warm);
            if (b.rows - row == 1) decode_rows<1>(d, row, warm);
        }
    }
    if (mass) {
        for (size_t i = 0; i < n; ++i) mass[i * kMassStride + kRunPages] = out.peak[i];
    }
}

void merge(const State& into, const State& from, int n, int dim_pad) {
    for (int i = 0; i < n; ++i) {
        if (from.total[i] == 0.f) continue;
        const float peak = from.peak[i] > into.peak[i] ? from.peak[i] : into.peak[i];
        const float keep = exp_of(into.peak[i] - peak), add = exp_of(from.peak[i] - peak);
        into.peak[i] = peak;
        into.total[i] = into.total[i] * keep + from.total[i] * add;
        float* x = into.acc + static_cast<size_t>(i) * dim_pad;
        const float* y = from.acc + static_cast<size_t>(i) * dim_pad;
        for (int c = 0; c < dim_pad; c += W) {
            vstore(x + c, vfma(vload(y + c), vset(add), vmul(vload(x + c), vset(keep))));
        }
    }
}

void sum_mass(const float* mass, const State& state, int n, float* out) {
    for (int i = 0; i < n; ++i) {
        const float* row = mass + static_cast<size_t>(i) * kMassStride;
        if (state.total[i] == 0.f) continue;
        const float share = exp_of(row[kRunPages] - state.peak[i]) / state.total[i];
        for (int p = 0; p < kRunPages; ++p) out[p] += row[p] * share;
    }
}

}  // namespace
