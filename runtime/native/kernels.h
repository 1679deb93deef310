// What the instruction-set files offer to the rest, and the data that they share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgekv {

constexpr int kRunPages = 8;  // pages per run: the unit of work and of merging
constexpr int kMaxDim = 256;
constexpr int kMaxPage = 128;
constexpr int kTileColumns = 128;  // keys that the blocked path handles at a time
constexpr int kRowBlock = 24;      // query rows that it handles at a time
// Per query row and run: the mass of each page relative to the row's peak at the end of the run, then that peak.
constexpr int kMassStride = kRunPages + 1;
// Scores are clamped to +-kScoreLimit, so that a masked score stays below every real one without an infinity.
constexpr float kScoreLimit = 1e30f;
constexpr float kMasked = -3e38f;

// One row of the PAGE_REF array of runtime/kernels.py.
struct PageRef {
    uint64_t data;
    uint64_t mask[2];
    int64_t position;
    uint16_t n_slots;
    uint8_t kind;
    uint8_t reserved[13];
};
static_assert(sizeof(PageRef) == 48 && offsetof(PageRef, position) == 24 && offsetof(PageRef, kind) == 34,
              "PageRef must match PAGE_REF in runtime/kernels.py");

enum PageKind : uint8_t { kHot = 0, kWarm = 1 };

struct Mask128 {
    uint64_t word[2];
    bool any() const { return (word[0] | word[1]) != 0; }
    bool test(int i) const { return word[i >> 6] >> (i & 63) & 1; }
    // Up to 16 bits from a multiple of that many.
    uint32_t bits(int start, int count) const {
        return static_cast<uint32_t>(word[start >> 6] >> (start & 63)) & ((1u << count) - 1);
    }
    // The first n bits.
    static Mask128 below(int64_t n) {
        Mask128 m{{0, 0}};
        if (n >= 128) return Mask128{{~uint64_t{0}, ~uint64_t{0}}};
        if (n >= 64) {
            m.word[0] = ~uint64_t{0};
            n -= 64;
            m.word[1] = n > 0 ? (uint64_t{1} << n) - 1 : 0;
        } else if (n > 0) {
            m.word[0] = (uint64_t{1} << n) - 1;
        }
        return m;
    }
    Mask128 operator&(const Mask128& o) const { return {{word[0] & o.word[0], word[1] & o.word[1]}}; }
    Mask128 without(const Mask128& o) const { return {{word[0] & ~o.word[0], word[1] & ~o.word[1]}}; }
};

inline int pad16(int n) { return (n + 15) & ~15; }

struct Geometry {
    int n_kv_heads, group, dim, page;
    int dim_pad, page_pad;
    float softcap;

    size_t elements() const { return static_cast<size_t>(n_kv_heads) * dim * page; }
    size_t hot_bytes() const { return 4 * elements(); }
    size_t warm_bytes() const { return 2 * elements() + 2 * static_cast<size_t>(n_kv_heads) * (dim + page); }
    Mask128 live(const PageRef& ref) const {
        if (ref.data == 0) return {{0, 0}};
        const int n = ref.n_slots < page ? ref.n_slots : page;
        return Mask128{{ref.mask[0], ref.mask[1]}} & Mask128::below(n);
    }
};

// The new tokens of one call.
struct Batch {
    const Geometry* g;
    int n_new;
    int rows;                  // query rows per KV head: n_new * group, token by token
    int64_t window;            // 0: none
    const float* q;            // [n_kv_heads, rows, dim_pad], times the softmax scale
    const float* new_k;        // [n_new, n_kv_heads, dim_pad]
    const float* new_v;        // [n_new, n_kv_heads, dim_pad]
    const int64_t* positions;  // [n_new]
    const int32_t* first_own;  // [n_new]: the first new token inside the window

    // The slots of a page at `position` that the query of token t may see.
    Mask128 visible(Mask128 live, int64_t position, int t) const {
        if (window == 0) return live;
        const int64_t hidden = positions[t] - window + 1 - position;
        return hidden <= 0 ? live : live.without(Mask128::below(hidden));
    }
};

// A softmax in progress, one entry per query row: the largest score, the sum of exponentials relative to it, and the
// sum of values weighted by them.
struct State {
    float* peak;   // [n]
    float* total;  // [n]
    float* acc;    // [n, dim_pad]
    State at(size_t row, int dim_pad) const { return {peak + row, total + row, acc + row * dim_pad}; }
};

// KV heads [first, end).
struct Heads {
    int first, end;
};

struct Kernels {
    const char* name;

    // Attends the rows of some heads to a run of pages, from an empty state. out and mass, [n_kv_heads * rows,
    // kMassStride] or null, are those of all heads. n_after pages follow those of the run in memory, to be fetched ahead.
    void (*decode_run)(const Batch&, Heads, const PageRef* pages, int n_pages, int n_after, const State& out,
                       float* mass);
    // Continues the state of rows [row0, row1) of a head with n_pages pages from the start of a run. mass points to
    // the first run's; the next run's lies mass_run_stride floats further.
    void (*blocked_pages)(const Batch&, int head, int row0, int row1, const PageRef* pages, int n_pages,
                          const State& state, float* mass, size_t mass_run_stride, float* scratch);
    // Continues it with the new tokens themselves, causally.
    void (*blocked_own)(const Batch&, int head, int row0, int row1, const State& state, float* scratch);
    // into += from, for n rows.
    void (*merge)(const State& into, const State& from, int n, int dim_pad);
    // page_mass share of n rows of one run: out[i] += sum over rows of mass[row][i] / total[row].
    void (*sum_mass)(const float* mass, const State& state, int n, float* out);

    // Quantises a HOT page to a WARM one; slots outside `live` count as zero.
    void (*pack_warm)(const Geometry&, const uint8_t* hot, uint8_t* warm, Mask128 live);
    // float to fp16, saturating at +-65504; returns the largest magnitude of x.
    float (*to_half)(const float* x, uint16_t* out, size_t n);
    // Sums the bytes, to measure what a mere read costs.
    uint64_t (*read)(const uint8_t* data, size_t n);
    // XXH3-64 of n > 240 bytes.
    uint64_t (*checksum)(const uint8_t* data, size_t n);

    // See isa/shared/operators.h.
    void (*rms_norm)(const float* x, const float* residual, const float* weight, float eps, int n, float* y,
                     float* total);
    void (*swiglu)(const float* gate, const float* up, float* y, size_t n);
    void (*geglu)(const float* gate, const float* up, float* y, size_t n);
    void (*rotary)(const float* x, const float* cos, const float* sin, int heads, int dim, int half, float* y);
};

const Kernels* amx_kernels();  // null where the processor (or the build) lacks it
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* neon_dot_kernels();
const Kernels* neon_kernels();
const Kernels* scalar_kernels();

// The one named by EDGEKV_ISA, or else the best that this processor runs; null for an unknown or unusable name.
const Kernels* find_kernels(const char* name);

}  // namespace edgekv
