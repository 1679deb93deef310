// AMX: decoding in tiles. A run of INT8 pages is one piece of work: per head the scores of all its tokens, one softmax
// over them, one product with its values. Everything else is AVX-512.
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__AMX_INT8__) && defined(__AVX512VNNI__) && \
    defined(__AVX512VBMI__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "isa/avx512.h"
#include "isa/shared/page_layout.h"
#include "isa/amx_tiles.h"

namespace {

constexpr int kTileRows = 8;  // query rows, of two digits each: a tile has 16
constexpr int kTileDim = 256, kTilePage = 64;
constexpr int kTokens = kRunPages * kTilePage;

// Tile registers: up to four tiles of sums, then operands.
constexpr int kKeyDigits = 4, kValueDigits = 5, kKeys = 6, kValues = 7;

// Codes of this many rows make a tile, of n rows in all.
inline int tile_depth(int n) { return n % 64 == 0 ? 64 : n % 32 == 0 ? 32 : 16; }

// The pages of a run that any row may see.
struct Seen {
    int n = 0;
    int slot[kRunPages];
    const PageRef* ref[kRunPages];
    Mask128 live[kRunPages];
    bool all = true;  // every slot of every page, for every row
};

// What is fetched ahead: a head's keys and values in the pages of a run, a line of each page in turn. Memory answers
// that sooner than it answers a walk from one end to the other. Into the first cache: a head's part of a run is 32 KiB
// for channels of 64 and pages of 32.
struct Pieces {
    const char* keys[kRunPages];
    const char* values[kRunPages];
    int n = 0;          // pages
    int left = 0;       // lines of keys and lines of values yet to be asked for, in all pages at once
    int per_fetch = 1;  // so many that none is left when the work on this head is done

    void add(const Geometry& g, const HeadPage& at) {
        keys[n] = reinterpret_cast<const char*>(at.keys);
        values[n++] = reinterpret_cast<const char*>(at.values);
        for (int i = 0; i < g.dim; i += 32) prefetch(at.key_scales + i);
        for (int i = 0; i < g.page; i += 32) prefetch(at.value_scales + i);
    }
    void fetch() {
        for (int i = 0; i < per_fetch && left > 0; ++i, --left) {
            const char** at = left & 1 ? values : keys;
            for (int piece = 0; piece < n; ++piece, ++at) {
                _mm_prefetch(*at, _MM_HINT_T0);
                *at += 64;
            }
        }
    }
};

struct Work {
    alignas(64) float key_scales[kRunPages][kTileDim];
    alignas(64) float value_scales[kTokens];
    alignas(64) float scores[kTileRows][kTokens];
    alignas(64) float query_scale[kRunPages * kTileRows];   // [page][row]
    alignas(64) float query_factor[kRunPages * kTileRows];  // its inverse
    alignas(64) VF parts[kRunPages * kTileRows];
    // By page, without gaps between the pages of a smaller geometry.
    alignas(64) int8_t query_digits[kRunPages * 2 * kTileRows * kTileDim];
    alignas(64) int8_t value_digits[kRunPages * 2 * kTileRows * kTilePage];
    alignas(64) int32_t sums[kRunPages * kTilePage / 16 * 2 * kTileRows * 16];
    Pieces ahead;
};

template <int Dim, int Page>
struct Run {
    const Batch& b;
    const Geometry& g;
    const Seen& seen;
    Work& w;
    bool clamps = false;  // a score may be beyond the limit

    int dim() const { return Dim ? Dim : g.dim; }
    int page() const { return Page ? Page : g.page; }
    int8_t* query_digits(int p) const { return w.query_digits + p * 2 * b.rows * dim(); }
    int8_t* value_digits(int p) const { return w.value_digits + p * 2 * b.rows * page(); }
    // A tile's sums: [digits of a row][16 columns].
    int32_t* sums(int tile) const { return w.sums + tile * 2 * b.rows * 16; }

    // Queries times key scales, as digits with a scale per page and row.
    void scale_queries(int head) {
        const int rows = b.rows;
        const float* query = b.q + static_cast<size_t>(head) * rows * dim();
        for (int p = 0; p < seen.n; ++p) {
            float* scales = w.key_scales[p];
            load_halves(head_page(g, *seen.ref[p], head).key_scales, dim(), scales);
            for (int r = 0; r < rows; ++r) {
                VF high = vset(0.f);
                for (int c = 0; c < dim(); c += W) {
                    // The larger of two magnitudes.
                    high = _mm512_range_ps(high, vmul(vload(query + r * dim() + c), vload(scales + c)), 11);
                }
                w.parts[p * rows + r] = high;
            }
            w.ahead.fetch();
        }
        VF largest = vset(0.f);
        for (int i = 0; i < seen.n * rows; i += W) {
            const VF peak = vmax(rows_peak(w.parts + i), vset(1e-30f));
            largest = vmax(largest, peak);
            vstore(w.query_scale + i, vmul(peak, vset(1.f / kLargestDigits)));
            vstore(w.query_factor + i, vdiv(vset(kLargestDigits), peak));
        }
        clamps = vpeak(largest) * (127.f * kMaxDim) > kScoreLimit;
        for (int p = 0; p < seen.n; ++p) {
            const float* scales = w.key_scales[p];
            for (int r = 0; r < rows; ++r) {
                const VF factor = vset(w.query_factor[p * rows + r]);
                const float* q = query + r * dim();
                int8_t* to = query_digits(p) + 2 * r * dim();
                int c = 0;
                for (; c + 32 <= dim(); c += 32) {
                    put_digits(to + c, dim(), vmul(vload(q + c), vload(scales + c)),
                               vmul(vload(q + c + W), vload(scales + c + W)), factor);
                }
                if (c < dim()) put_digits(to + c, dim(), vmul(vload(q + c), vload(scales + c)), factor);
            }
            w.ahead.fetch();
        }
    }

    void multiply_keys(int head) {
        const int depth = tile_depth(dim()), tiles = page() / 16;
        const size_t stride = 4 * static_cast<size_t>(page());
        for (int p = 0; p < seen.n; ++p) {
            const uint8_t* codes = head_page(g, *seen.ref[p], head).keys;
            zero_sums(tiles);
            for (int r = 0; r < dim(); r += depth) {
                add_products<kKeyDigits, kKeys>(query_digits(p) + r, dim(), codes + static_cast<size_t>(r) * page(),
                                                stride, tiles);
                w.ahead.fetch();
            }
            store_sums(sums(p * tiles), 32 * b.rows, tiles);
            w.ahead.fetch();
        }
    }

    // Value scales of the live tokens; returns the largest.
    float load_value_scales(int head) {
        VF high = vset(1e-30f);
        for (int p = 0; p < seen.n; ++p) {
            float* scales = w.value_scales + p * page();
            load_halves(head_page(g, *seen.ref[p], head).value_scales, page(), scales);
            for (int c = 0; c < page(); c += W) {
                const VF x = vselect(vmask(seen.live[p].bits(c, W)), vload(scales + c), vset(0.f));
                vstore(scales + c, x);
                high = vmax(high, x);
            }
        }
        return vpeak(high);
    }

    // Scores become probabilities relative to the row's largest score, times the value scales, as digits.
    void soften(int row, VF factor, const State& out, float* mass) {
        const int token = row / g.group;
        float* s = w.scores[row];
        VF high = vset(-kScoreLimit);
        for (int p = 0; p < seen.n; ++p) {
            const VF scale = vset(w.query_scale[p * b.rows + row]);
            const Mask128 visible = b.visible(seen.live[p], seen.ref[p]->position, token);
            for (int c = 0; c < page(); c += W) {
                VF x = vmul(digits_sum(sums(p * (page() / 16) + c / 16) + 32 * row), scale);
                if (g.softcap > 0) x = vsoftcap(x, g.softcap);
                if (clamps) x = vmax(vmin(x, vset(kScoreLimit)), vset(-kScoreLimit));
                if (!seen.all) x = vselect(vmask(visible.bits(c, W)), x, vset(kMasked));
                vstore(s + p * page() + c, x);
                high = vmax(high, x);
            }
        }
        const float peak = vpeak(high);
        const VF base = vset(peak);
        VF total = vset(0.f);
        for (int p = 0; p < seen.n; ++p) {
            const float* scales = w.value_scales + p * page();
            int8_t* to = value_digits(p) + 2 * row * page();
            VF sum = vset(0.f), weights[kTilePage / W];
            for (int c = 0; c < page(); c += W) {
                const VF x = vload(s + p * page() + c);
                VF e = exp_of_lanes(vsub(x, base));
                if (!seen.all) e = vselect(vless(x, vset(kMasked / 2)), vset(0.f), e);
                sum = vadd(sum, e);
                weights[c / W] = vmul(e, vload(scales + c));
            }
            int c = 0;
            for (; c + 32 <= page(); c += 32) put_digits(to + c, page(), weights[c / W], weights[c / W + 1], factor);
            if (c < page()) put_digits(to + c, page(), weights[c / W], factor);
            total = vadd(total, sum);
            if (mass) mass[seen.slot[p]] = vsum(sum);
            if (row < 2) w.ahead.fetch();
            if (b.rows == 1) w.ahead.fetch();
        }
        out.peak[row] = peak;
        out.total[row] = vsum(total);
        if (mass) mass[kRunPages] = peak;
    }

    void multiply_values(int head, VF scale, const State& out) {
        const int depth = tile_depth(page());
        const size_t stride = 4 * static_cast<size_t>(dim());
        for (int c = 0; c < dim(); c += 64) {
            const int tiles = min_of(4, (dim() - c) / 16);
            zero_sums(tiles);
            for (int p = 0; p < seen.n; ++p) {
                const uint8_t* codes = head_page(g, *seen.ref[p], head).values + 4 * c;
                for (int r = 0; r < page(); r += depth) {
                    add_products<kValueDigits, kValues>(value_digits(p) + r, page(),
                                                        codes + static_cast<size_t>(r) * dim(), stride, tiles);
                    w.ahead.fetch();
                }
                w.ahead.fetch();
            }
            store_sums(sums(0), 32 * b.rows, tiles);
            for (int row = 0; row < b.rows; ++row) {
                float* to = out.acc + static_cast<size_t>(row) * dim() + c;
                for (int t = 0; t < tiles; ++t) {
                    vstore(to + 16 * t, vmul(digits_sum(sums(t) + 32 * row), scale));
                }
            }
        }
    }

    void attend(int head, const State& out, float* mass) {
        scale_queries(head);
        multiply_keys(head);
        const float largest = load_value_scales(head);
        const VF factor = vset(kLargestDigits / largest);
        for (int row = 0; row < b.rows; ++row) {
            soften(row, factor, out, mass ? mass + static_cast<size_t>(row) * kMassStride : nullptr);
        }
        multiply_values(head, vset(largest * (1.f / kLargestDigits)), out);
    }
};

bool fits_tiles(const Batch& b, const Seen& seen) {
    const Geometry& g = *b.g;
    if (!seen.n || b.rows > kTileRows || g.dim % 16 || g.page % 16 || g.page > kTilePage) return false;
    for (int p = 0; p < seen.n; ++p) {
        if (seen.ref[p]->kind != kWarm) return false;
    }
    return true;
}

template <int Dim, int Page>
void attend_run(const Batch& b, Heads part, const PageRef* pages, int n_pages, int n_after, const Seen& seen,
                const State& out, float* mass, Work& w) {
    const Geometry& g = *b.g;
    Run<Dim, Page> run{b, g, seen, w};
    const int lines = 2 * g.dim * g.page / 64;
    const int steps = g.dim / tile_depth(g.dim) + (g.dim + 63) / 64 * (1 + g.page / tile_depth(g.page));
    const int fetches = seen.n * (5 + steps);
    w.ahead.per_fetch = (lines + fetches - 1) / fetches;
    for (int head = part.first; head < part.end; ++head) {
        // The next head, and after the last one the first head of the next run.
        const bool last = head + 1 == g.n_kv_heads;
        w.ahead.n = 0;
        w.ahead.left = lines;
        for (int p = last ? n_pages : 0; p < (last ? n_pages + n_after : n_pages); ++p) {
            if (pages[p].kind != kWarm || !g.live(pages[p]).any()) continue;
            w.ahead.add(g, head_page(g, pages[p], last ? 0 : head + 1));
        }
        const size_t row = static_cast<size_t>(head) * b.rows;
        run.attend(head, out.at(row, g.dim), mass ? mass + row * kMassStride : nullptr);
    }
}

Seen seen_of(const Batch& b, const PageRef* pages, int n_pages) {
    const Geometry& g = *b.g;
    Seen seen;
    for (int p = 0; p < n_pages; ++p) {
        const Mask128 live = g.live(pages[p]);
        if (!b.visible(live, pages[p].position, 0).any()) continue;
        // The last token sees the least.
        const Mask128 least = b.visible(live, pages[p].position, b.n_new - 1);
        seen.all = seen.all && !Mask128::below(g.page).without(least).any();
        seen.slot[seen.n] = p;
        seen.ref[seen.n] = &pages[p];
        seen.live[seen.n++] = live;
    }
    return seen;
}

void decode_tiles(const Batch& b, Heads part, const PageRef* pages, int n_pages, int n_after, const State& out,
                  float* mass) {
    const Geometry& g = *b.g;
    const Seen seen = seen_of(b, pages, n_pages);
    if (!fits_tiles(b, seen)) {
        avx512_kernels()->decode_run(b, part, pages, n_pages, n_after, out, mass);
        return;
    }
    if (mass) {
        const size_t row_floats = static_cast<size_t>(b.rows) * kMassStride;
        for (size_t i = part.first * row_floats; i < part.end * row_floats; ++i) mass[i] = 0.f;
    }
    TileShapes shapes;
    for (int sums = 0; sums < 4; ++sums) shapes.set(sums, 2 * b.rows, 64);
    shapes.set(kKeyDigits, 2 * b.rows, tile_depth(g.dim));
    shapes.set(kValueDigits, 2 * b.rows, tile_depth(g.page));
    shapes.set(kKeys, tile_depth(g.dim) / 4, 64);
    shapes.set(kValues, tile_depth(g.page) / 4, 64);
    shapes.configure();
    Work w;
    for (VF& part : w.parts) part = vset(0.f);
    if (g.dim == 64 && g.page == 32) {
        attend_run<64, 32>(b, part, pages, n_pages, n_after, seen, out, mass, w);
    } else if (g.dim == 128 && g.page == 32) {
        attend_run<128, 32>(b, part, pages, n_pages, n_after, seen, out, mass, w);
    } else {
        attend_run<0, 0>(b, part, pages, n_pages, n_after, seen, out, mass, w);
    }
    TileShapes::release();
}

bool processor_has_tiles() {
    constexpr unsigned kVbmi = 1u << 1, kTiles = 1u << 24, kInt8 = 1u << 25;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux 5.16
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(c & kVbmi) || !(d & kTiles) || !(d & kInt8)) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

namespace edgekv {

const Kernels* amx_kernels() {
    static const Kernels* const kernels = []() -> const Kernels* {
        const Kernels* base = avx512_kernels();
        if (!base || !processor_has_tiles()) return nullptr;
        static Kernels made = *base;
        made.name = "amx";
        made.decode_run = decode_tiles;
        return &made;
    }();
    return kernels;
}

}  // namespace edgekv

#else
namespace edgekv {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace edgekv
#endif
