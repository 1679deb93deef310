// Attention of a few query rows to pages where they lie. A WARM page is multiplied as integers: the page's scales are
// folded into the float operand (query or probability), which then becomes 16-bit fixed point. Keys and values need
// the same product: y[c] = sum over r of codes[r/4][c][r%4] * x[r].
#pragma once

namespace {

// Up to this many query rows are carried through a page together, step by step: each step is short and its rows are
// independent, so the processor overlaps them, and what is one number per row is computed in vectors of rows.
constexpr int kRows = 16;

// The heads whose rows go together.
struct Chunk {
    int head0, heads, rows;  // rows per head
    HeadPage at[kRows];  // per head
    int per_row, per_key_step, per_value_step;  // cache lines to fetch ahead
    int n() const { return heads * rows; }
};

// Extents that are known when compiled, for the usual geometries; 0 where they are not.
template <int DimPad, int PagePad>
struct Extents {
    static int dim(const Geometry& g) { return DimPad ? DimPad : g.dim_pad; }
    static int page(const Geometry& g) { return PagePad ? PagePad : g.page_pad; }
};

struct Work {
    Ahead ahead;
    Digits digits[kRows];
    alignas(64) float scores[kRows][kMaxPage];
    alignas(64) float key_scales[kMaxDim];
    alignas(64) float value_scales[kRows][kMaxPage];  // per head, times the largest digits, over their largest
    alignas(64) VF parts[kRows];                      // per row: lanes to be summed, or whose maximum is sought
    alignas(64) float score_scale[kRows], value_scale[kRows];
    alignas(64) float base[kRows], keep[kRows], add[kRows];
};

// Per row the sum, or the maximum, of the lanes in parts.
inline void sum_parts(const VF* parts, float* out) {
    for (int i = 0; i < kRows; i += W) vstore(out + i, rows_sum(parts + i));
}
inline void peak_parts(const VF* parts, float* out) {
    for (int i = 0; i < kRows; i += W) vstore(out + i, rows_peak(parts + i));
}

constexpr float kLargestDigits = 32639.f;  // 127 * 256 + 127

// Queries times key scales, as digits.
template <typename E>
inline void scale_queries(const Batch& b, const Chunk& chunk, Work& w) {
    const Geometry& g = *b.g;
    const int dim = E::dim(g);
    alignas(64) float scaled[kRows][kMaxDim];
    alignas(64) float peaks[kRows], factors[kRows];
    const float* query = b.q + static_cast<size_t>(chunk.head0) * b.rows * dim;
    for (int h = 0, row = 0; h < chunk.heads; ++h) {
        load_halves(chunk.at[h].key_scales, g.dim, w.key_scales);
        for (int r = 0; r < chunk.rows; ++r, ++row, query += dim) {
            VF high = vset(0.f);
            for (int c = 0; c < dim; c += W) {
                const VF x = vmul(vload(query + c), vload(w.key_scales + c));
                vstore(scaled[row] + c, x);
                high = vmax(high, vabs(x));
            }
            w.parts[row] = high;
            w.ahead.lines(chunk.per_row);
        }
    }
    peak_parts(w.parts, peaks);
    for (int i = 0; i < kRows; i += W) {
        const VF peak = vmax(vload(peaks + i), vset(1e-30f));
        vstore(factors + i, vdiv(vset(kLargestDigits), peak));
        vstore(w.score_scale + i, vmul(peak, vset(1.f / kLargestDigits)));
    }
    for (int row = 0; row < chunk.n(); ++row) {
        w.parts[row] = put_digits(w.digits[row], scaled[row], vset(factors[row]), dim);
        w.ahead.lines(chunk.per_row);
    }
    sum_parts(w.parts, factors);
    for (int row = 0; row < chunk.n(); ++row) put_sum(w.digits[row], factors[row]);
}

template <typename E>
inline void scale_values(const Geometry& g, const Chunk& chunk, Mask128 live, Work& w) {
    const int page = E::page(g);
    for (int h = 0; h < chunk.heads; ++h) {
        float* scales = w.value_scales[h];
        load_halves(chunk.at[h].value_scales, g.page, scales);
        VF high = vset(1e-30f);
        for (int c = 0; c < page; c += W) {
            const VF x = vselect(vmask(live.bits(c, W)), vload(scales + c), vset(0.f));
            vstore(scales + c, x);
            high = vmax(high, x);
        }
        const float peak = vpeak(high);
        const VF factor = vset(kLargestDigits / peak);
        for (int c = 0; c < page; c += W) vstore(scales + c, vmul(vload(scales + c), factor));
        w.value_scale[h] = peak * (1.f / kLargestDigits);
    }
}

// Scores become exponentials relative to the row's largest score in this page, and then the operand of the product
// with the values: digits for a WARM page. Peaks and totals are updated; keep and add become what earlier sums and
// this page's are to be multiplied by.
template <typename E, bool kWarmPage>
inline void soften(const Batch& b, Mask128 live, int64_t position, const Chunk& chunk, const State& out, float* mass,
                   int slot, Work& w) {
    const Geometry& g = *b.g;
    const int page = E::page(g), n = chunk.n();
    alignas(64) float peaks[kRows] = {}, sums[kRows], totals[kRows] = {};
    for (int row = 0; row < n; ++row) {
        VF high = vset(-kScoreLimit);
        const Mask128 seen = b.window ? b.visible(live, position, row % chunk.rows / g.group) : live;
        float* s = w.scores[row];
        for (int c = 0; c < page; c += W) {
            VF x = vload(s + c);
            if (g.softcap > 0) x = vsoftcap(x, g.softcap);
            x = vmax(vmin(x, vset(kScoreLimit)), vset(-kScoreLimit));
            x = vselect(vmask(seen.bits(c, W)), x, vset(kMasked));
            vstore(s + c, x);
            high = vmax(high, x);
        }
        peaks[row] = out.peak[row];
        totals[row] = out.total[row];
        w.parts[row] = high;
        w.ahead.lines(chunk.per_row);
    }
    peak_parts(w.parts, w.base);
    for (int i = 0; i < kRows; i += W) {
        const VF base = vload(w.base + i), old_peak = vload(peaks + i), peak = vmax(base, old_peak);
        vstore(w.keep + i, vexp(vsub(old_peak, peak)));
        vstore(w.add + i, vexp(vsub(base, peak)));
        vstore(peaks + i, peak);
    }
    for (int h = 0, row = 0; h < chunk.heads; ++h) {
        const float* scales = w.value_scales[h];
        for (int r = 0; r < chunk.rows; ++r, ++row) {
            float* s = w.scores[row];
            const VF base = vset(w.base[row]);
            VF sum = vset(0.f);
            for (int c = 0; c < page; c += W) {
                const VF e = vexp(vsub(vload(s + c), base));
                sum = vadd(sum, e);
                vstore(s + c, kWarmPage ? vmul(e, vload(scales + c)) : vmul(e, vset(w.add[row])));
            }
            w.parts[row] = sum;
            w.ahead.lines(chunk.per_row);
        }
    }
    sum_parts(w.parts, sums);
    for (int i = 0; i < kRows; i += W) {
        const VF sum = vmul(vload(sums + i), vload(w.add + i));
        vstore(totals + i, vfma(vload(totals + i), vload(w.keep + i), sum));
        vstore(sums + i, sum);
    }
    for (int row = 0; row < n; ++row) {
        out.peak[row] = peaks[row];
        out.total[row] = totals[row];
        if (mass) {
            float* m = mass + static_cast<size_t>(row) * kMassStride;
            if (w.keep[row] != 1.f) {
                for (int i = 0; i < slot; ++i) m[i] *= w.keep[row];
            }
            m[slot] = sums[row];
        }
    }
    if (!kWarmPage) return;
    for (int row = 0; row < n; ++row) {
        w.parts[row] = put_digits(w.digits[row], w.scores[row], vset(1.f), page);
        w.ahead.lines(chunk.per_row);
    }
    sum_parts(w.parts, sums);
    for (int row = 0; row < n; ++row) put_sum(w.digits[row], sums[row]);
}

// Calls f<N>(row) for groups of at most four of n rows.
template <typename F>
inline void by_rows(int n, F&& f) {
    int row = 0;
    for (; row + 4 <= n; row += 4) f.template operator()<4>(row);
    if (n - row == 3) f.template operator()<3>(row);
    if (n - row == 2) f.template operator()<2>(row);
    if (n - row == 1) f.template operator()<1>(row);
}

struct HeadProducts {
    const Geometry& g;
    Work& w;
    const Chunk& chunk;
    HeadPage at;
    Mask128 live;
    bool warm;
    int first;           // row of the chunk
    const float* query;  // of the head
    float* acc;          // of the head
};

struct KeyProduct {
    HeadProducts& p;
    template <int N>
    void operator()(int row) {
        float* y[N];
        const float* x[N];
        for (int i = 0; i < N; ++i) {
            y[i] = p.w.scores[p.first + row + i];
            x[i] = p.query + static_cast<size_t>(row + i) * p.g.dim_pad;
        }
        if (p.warm) {
            int8_product<N>(reinterpret_cast<const int8_t*>(p.at.keys), p.g.dim, p.g.page, p.w.digits + p.first + row,
                            p.w.score_scale + p.first + row, y, nullptr, p.w.ahead, p.chunk.per_key_step);
        } else {
            half_product<N>(reinterpret_cast<const uint16_t*>(p.at.keys), p.g.dim, p.g.page, nullptr, x, y, nullptr,
                            p.w.ahead, p.chunk.per_key_step);
        }
    }
};

struct ValueProduct {
    HeadProducts& p;
    int head;  // of the chunk
    template <int N>
    void operator()(int row) {
        const int first = p.first + row;
        float* y[N];
        const float* x[N];
        float scales[N];
        for (int i = 0; i < N; ++i) {
            y[i] = p.acc + static_cast<size_t>(row + i) * p.g.dim_pad;
            x[i] = p.w.scores[first + i];
            scales[i] = p.w.value_scale[head] * p.w.add[first + i];
        }
        if (p.warm) {
            int8_product<N>(reinterpret_cast<const int8_t*>(p.at.values), p.g.page, p.g.dim, p.w.digits + first, scales,
                            y, p.w.keep + first, p.w.ahead, p.chunk.per_value_step);
        } else {
            half_product<N>(reinterpret_cast<const uint16_t*>(p.at.values), p.g.page, p.g.dim, &p.live, x, y,
                            p.w.keep + first, p.w.ahead, p.chunk.per_value_step);
        }
    }
};

template <typename E, bool kWarmPage>
inline void decode_chunk(const Batch& b, const PageRef& ref, Mask128 live, const Chunk& chunk, const State& out,
                         float* mass, int slot, Work& w) {
    const Geometry& g = *b.g;
    if (kWarmPage) {
        scale_queries<E>(b, chunk, w);
        scale_values<E>(g, chunk, live, w);
    }
    HeadProducts p{g, w, chunk, {}, live, kWarmPage, 0, nullptr, nullptr};
    for (int h = 0; h < chunk.heads; ++h) {
        p.at = chunk.at[h];
        p.first = h * chunk.rows;
        p.query = b.q + static_cast<size_t>(chunk.head0 + h) * b.rows * g.dim_pad;
        by_rows(chunk.rows, KeyProduct{p});
    }
    soften<E, kWarmPage>(b, live, ref.position, chunk, out, mass, slot, w);
    for (int h = 0; h < chunk.heads; ++h) {
        p.at = chunk.at[h];
        p.first = h * chunk.rows;
        p.acc = out.acc + static_cast<size_t>(h) * chunk.rows * g.dim_pad;
        by_rows(chunk.rows, ValueProduct{p, h});
    }
    w.ahead.lines(1 << 20);
}

inline int steps(int lines, int n) { return lines > n ? (lines + n / 2) / n : 1; }

void decode_run(const Batch& b, Heads part, const PageRef* pages, int n_pages, int n_after, const State& out,
                float* mass) {
    const Geometry& g = *b.g;
    const size_t first = static_cast<size_t>(part.first) * b.rows, n = static_cast<size_t>(part.end) * b.rows;
    for (size_t i = first; i < n; ++i) {
        out.peak[i] = -kScoreLimit;
        out.total[i] = 0.f;
    }
    for (size_t i = first * g.dim_pad; i < n * g.dim_pad; ++i) out.acc[i] = 0.f;
    if (mass) {
        for (size_t i = first * kMassStride; i < n * kMassStride; ++i) mass[i] = 0.f;
    }
    Work w;
    w.ahead = {nullptr, nullptr};
    for (int i = 0; i < kRows; ++i) w.parts[i] = vset(0.f);
    Chunk chunk;
    chunk.rows = b.rows;
    const int heads = kRows / b.rows;
    for (int p = 0; p < n_pages; ++p) {
        const PageRef& ref = pages[p];
        const Mask128 live = g.live(ref);
        if (!b.visible(live, ref.position, 0).any()) continue;
        const PageRef* after = p + 1 < n_pages + n_after ? &pages[p + 1] : nullptr;
        const char* ahead = after ? reinterpret_cast<const char*>(static_cast<uintptr_t>(after->data)) : nullptr;
        const size_t bytes = !ahead ? 0 : after->kind == kHot ? g.hot_bytes() : g.warm_bytes();
        for (int head = part.first; head < part.end; head += heads) {
            chunk.head0 = head;
            chunk.heads = min_of(heads, part.end - head);
            for (int h = 0; h < chunk.heads; ++h) chunk.at[h] = head_page(g, ref, head + h);
            // Half of this chunk's share of the next page during the products, half during the rest.
            const size_t share = (bytes * chunk.heads / g.n_kv_heads + 63) / 64 * 64;
            const size_t skipped = (bytes * head / g.n_kv_heads) / 64 * 64;
            w.ahead = {ahead + skipped, ahead + min_of(static_cast<int>(skipped + share), static_cast<int>(bytes))};
            const int half = static_cast<int>(share / 128);
            chunk.per_row = (half + 5 * chunk.n() - 1) / (5 * chunk.n());
            chunk.per_key_step = steps(half / (2 * chunk.heads), g.dim / (ref.kind == kHot ? 1 : 4));
            chunk.per_value_step = steps(half / (2 * chunk.heads), g.page / (ref.kind == kHot ? 1 : 4));
            const size_t row = static_cast<size_t>(head) * b.rows;
            const State state = out.at(row, g.dim_pad);
            float* m = mass ? mass + row * kMassStride : nullptr;
            if (ref.kind == kHot) {
                decode_chunk<Extents<0, 0>, false>(b, ref, live, chunk, state, m, p, w);
            } else if (g.dim_pad == 64 && g.page_pad == 32) {
                decode_chunk<Extents<64, 32>, true>(b, ref, live, chunk, state, m, p, w);
            } else if (g.dim_pad == 128 && g.page_pad == 32) {
                decode_chunk<Extents<128, 32>, true>(b, ref, live, chunk, state, m, p, w);
            } else {
                decode_chunk<Extents<0, 0>, true>(b, ref, live, chunk, state, m, p, w);
            }
        }
    }
    if (mass) {
        for (size_t i = first; i < n; ++i) mass[i * kMassStride + kRunPages] = out.peak[i];
    }
}

void merge(const State& into, const State& from, int n, int dim_pad) {
    alignas(64) float keep[16], add[16];
    for (int first = 0; first < n; first += 16) {
        const int rows = min_of(16, n - first);
        for (int i = 0; i < rows; ++i) {
            keep[i] = into.peak[first + i];
            add[i] = from.peak[first + i];
            into.peak[first + i] = keep[i] > add[i] ? keep[i] : add[i];
        }
        for (int i = rows; i < 16; ++i) keep[i] = add[i] = 0.f;
        for (int i = 0; i < 16; i += W) {
            const VF a = vload(keep + i), b = vload(add + i), peak = vmax(a, b);
            vstore(keep + i, vexp(vsub(a, peak)));
            vstore(add + i, vexp(vsub(b, peak)));
        }
        for (int i = 0; i < rows; ++i) {
            const size_t row = first + i;
            into.total[row] = into.total[row] * keep[i] + from.total[row] * add[i];
            float* x = into.acc + row * dim_pad;
            const float* y = from.acc + row * dim_pad;
            for (int c = 0; c < dim_pad; c += W) {
                vstore(x + c, vfma(vload(y + c), vset(add[i]), vmul(vload(x + c), vset(keep[i]))));
            }
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
