// Attention of many query rows (prefill): keys and values of a few pages become float tiles once, and blocks of rows
// are multiplied with them. The conversion is shared by all rows, so INT8 pages cost what fp16 pages cost.
#pragma once

namespace {

struct Tile {
    float* keys;     // [dim_pad, kTileColumns]
    float* values;   // [kTileColumns, dim_pad]
    float* weights;  // [kRowBlock, kTileColumns]
};

inline Tile tile_in(float* scratch, const Geometry& g) {
    const size_t n = static_cast<size_t>(kTileColumns) * g.dim_pad;
    return {scratch, scratch + n, scratch + 2 * n};
}

// One page as columns [column, column + page_pad) of the tile.
inline void fill_tile(const Geometry& g, const PageRef& ref, int head, Mask128 live, const Tile& tile, int column) {
    const HeadPage at = head_page(g, ref, head);
    float* values = tile.values + static_cast<size_t>(column) * g.dim_pad;
    alignas(64) float scales[kMaxDim];
    if (ref.kind != kHot) {
        load_halves(at.key_scales, g.dim, scales);
        expand_codes(reinterpret_cast<const int8_t*>(at.keys), g.dim, g.page, scales, tile.keys + column, kTileColumns);
        load_halves(at.value_scales, g.page, scales);
        expand_codes(reinterpret_cast<const int8_t*>(at.values), g.page, g.dim, scales, values, g.dim_pad);
    } else {
        const uint16_t* k = reinterpret_cast<const uint16_t*>(at.keys);
        const uint16_t* v = reinterpret_cast<const uint16_t*>(at.values);
        for (int i = 0; i < g.dim; ++i) {
            load_halves(k + static_cast<size_t>(i) * g.page, g.page,
                        tile.keys + static_cast<size_t>(i) * kTileColumns + column);
        }
        for (int i = 0; i < g.page; ++i) {
            if (live.test(i)) {
                load_halves(v + static_cast<size_t>(i) * g.dim, g.dim, values + static_cast<size_t>(i) * g.dim_pad);
            }
        }
    }
    // A dead slot's weight is zero, but zero times a NaN is not.
    for (int i = 0; i < g.page_pad; ++i) {
        if (i < g.page && live.test(i)) continue;
        for (int c = 0; c < g.dim_pad; c += W) vstore(values + static_cast<size_t>(i) * g.dim_pad + c, vset(0.f));
    }
}

void blocked_pages(const Batch& b, int head, int row0, int row1, const PageRef* pages, int n_pages, const State& state,
                   float* mass, size_t mass_run_stride, float* scratch) {
    const Geometry& g = *b.g;
    const Tile tile = tile_in(scratch, g);
    int per_tile = kRunPages;
    while (per_tile * g.page_pad > kTileColumns) per_tile /= 2;
    for (int run = 0; run < n_pages; run += kRunPages) {
        float* run_mass = mass ? mass + static_cast<size_t>(run / kRunPages) * mass_run_stride : nullptr;
        if (run_mass) {
            for (size_t i = static_cast<size_t>(row0) * kMassStride; i < static_cast<size_t>(row1) * kMassStride; ++i) {
                run_mass[i] = 0.f;
            }
        }
        const int run_end = min_of(run + kRunPages, n_pages);
        for (int first = run; first < run_end; first += per_tile) {
            int parts = 0;
            int slots[kRunPages];
            Mask128 live[kRunPages];
            int64_t positions[kRunPages];
            for (int p = first; p < min_of(first + per_tile, run_end); ++p) {
                const Mask128 m = g.live(pages[p]);
                // The first row's token is the earliest, so its window reaches furthest back.
                if (!b.visible(m, pages[p].position, row0 / g.group).any()) continue;
                fill_tile(g, pages[p], head, m, tile, parts * g.page_pad);
                slots[parts] = p - run;
                live[parts] = m;
                positions[parts++] = pages[p].position;
            }
            if (!parts) continue;
            const int columns = parts * g.page_pad;
            for (int row = row0; row < row1; row += kRowBlock) {
                const int n = min_of(kRowBlock, row1 - row);
                product(b.q + (static_cast<size_t>(head) * b.rows + row) * g.dim_pad, g.dim_pad, tile.keys,
                        kTileColumns, n, columns, g.dim, tile.weights, kTileColumns, nullptr);
                float factors[kRowBlock];
                for (int i = 0; i < n; ++i) {
                    Mask128 seen[kRunPages];
                    for (int part = 0; part < parts; ++part) {
                        seen[part] = b.visible(live[part], positions[part], (row + i) / g.group);
                    }
                    factors[i] = softmax_row(tile.weights + i * kTileColumns, seen, parts, g.page_pad, g.softcap,
                                             state.peak[row + i], state.total[row + i],
                                             run_mass ? run_mass + static_cast<size_t>(row + i) * kMassStride : nullptr,
                                             slots);
                }
                product(tile.weights, kTileColumns, tile.values, g.dim_pad, n, g.dim_pad, columns,
                        state.acc + static_cast<size_t>(row) * g.dim_pad, g.dim_pad, factors);
            }
        }
        if (run_mass) {
            for (int row = row0; row < row1; ++row) {
                run_mass[static_cast<size_t>(row) * kMassStride + kRunPages] = state.peak[row];
            }
        }
    }
}

// The new tokens themselves when they are few: no tile is worth filling.
inline void own_few(const Batch& b, int head, const State& state) {
    const Geometry& g = *b.g;
    const size_t stride = static_cast<size_t>(g.n_kv_heads) * g.dim_pad, at = static_cast<size_t>(head) * g.dim_pad;
    for (int row = 0; row < b.rows; ++row) {
        const int t = row / g.group, first = b.first_own[t];
        const float* q = b.q + (static_cast<size_t>(head) * b.rows + row) * g.dim_pad;
        alignas(64) float scores[16];
        for (int j = 0; j < 16; ++j) scores[j] = 0.f;
        for (int j = first; j <= t; ++j) {
            const float* k = b.new_k + j * stride + at;
            VF sum = vset(0.f);
            for (int c = 0; c < g.dim_pad; c += W) sum = vfma(vload(q + c), vload(k + c), sum);
            scores[j] = vsum(sum);
        }
        const Mask128 seen = Mask128::below(t + 1).without(Mask128::below(first));
        const float factor = softmax_row(scores, &seen, 1, 16, g.softcap, state.peak[row], state.total[row], nullptr,
                                         nullptr);
        float* acc = state.acc + static_cast<size_t>(row) * g.dim_pad;
        for (int c = 0; c < g.dim_pad; c += W) {
            VF sum = vmul(vload(acc + c), vset(factor));
            for (int j = first; j <= t; ++j) sum = vfma(vset(scores[j]), vload(b.new_v + j * stride + at + c), sum);
            vstore(acc + c, sum);
        }
    }
}

void blocked_own(const Batch& b, int head, int row0, int row1, const State& state, float* scratch) {
    const Geometry& g = *b.g;
    if (b.rows <= 16) {
        own_few(b, head, state);
        return;
    }
    const Tile tile = tile_in(scratch, g);
    const int t0 = row0 / g.group, t1 = (row1 - 1) / g.group;
    // Tiles start at fixed tokens, so that a row's sums do not depend on which rows share its task.
    for (int first = b.first_own[t0] / kTileColumns * kTileColumns; first <= t1; first += kTileColumns) {
        const int tokens = min_of(kTileColumns, t1 + 1 - first);
        const int columns = pad16(tokens);
        for (int j = 0; j < columns; ++j) {
            float* value = tile.values + static_cast<size_t>(j) * g.dim_pad;
            const size_t at = (static_cast<size_t>(first + j) * g.n_kv_heads + head) * g.dim_pad;
            for (int c = 0; c < g.dim_pad; ++c) {
                value[c] = j < tokens ? b.new_v[at + c] : 0.f;
                tile.keys[static_cast<size_t>(c) * kTileColumns + j] = j < tokens ? b.new_k[at + c] : 0.f;
            }
        }
        for (int row = row0; row < row1; row += kRowBlock) {
            const int n = min_of(kRowBlock, row1 - row);
            // Columns after the block's last token are masked for all of its rows.
            const int used = min_of(columns, pad16((row + n - 1) / g.group + 1 - first));
            if (used <= 0) continue;
            product(b.q + (static_cast<size_t>(head) * b.rows + row) * g.dim_pad, g.dim_pad, tile.keys, kTileColumns, n,
                    used, g.dim, tile.weights, kTileColumns, nullptr);
            float factors[kRowBlock];
            for (int i = 0; i < n; ++i) {
                const int t = (row + i) / g.group;
                const Mask128 seen = Mask128::below(t + 1 - first).without(Mask128::below(b.first_own[t] - first));
                factors[i] = softmax_row(tile.weights + i * kTileColumns, &seen, 1, used, g.softcap,
                                         state.peak[row + i], state.total[row + i], nullptr, nullptr);
            }
            product(tile.weights, kTileColumns, tile.values, g.dim_pad, n, g.dim_pad, used,
                    state.acc + static_cast<size_t>(row) * g.dim_pad, g.dim_pad, factors);
        }
    }
}

}  // namespace
