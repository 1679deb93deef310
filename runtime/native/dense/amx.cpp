// Many rows at once, as products of bf16 tiles: half of a float's digits for rows and weights, sums in float. That is
// nearer to the true product than rows of 8 bits are, and the weights are decoded once for all rows.
#include "dense/dense.h"
#include "kernels.h"
#include "tile_shapes.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

namespace edgekv {
namespace {

constexpr int kTile = 16;           // rows and columns of a tile of sums
constexpr int kColumns = 2 * kTile; // of a task
constexpr int kMinRows = 20;      // fewer are sooner done one by one
constexpr size_t kTileBytes = 1024; // 16 rows of 64 bytes
constexpr int kPanelBlocks = 16;    // half a panel of 32 columns in the first-level cache

// Rows made ready: [rows / 16, blocks] tiles of 16 rows by 32 numbers.
size_t ready_bytes(int rows, int k) {
    return static_cast<size_t>((rows + kTile - 1) / kTile) * dense_blocks(k) * kTileBytes;
}

void prepare(const float* x, int, int k, int row0, int row1, uint8_t* ready) {
    const int n_blocks = dense_blocks(k);
    for (int row = row0; row < row0 + kTile; ++row) {
        uint8_t* at = ready + (static_cast<size_t>(row / kTile) * n_blocks) * kTileBytes + row % kTile * 64;
        const float* from = x + static_cast<size_t>(row) * k;
        for (int b = 0; b < n_blocks; ++b, at += kTileBytes) {
            const int left = row < row1 ? k - b * kDenseBlock : 0;
            const uint32_t mask = left >= kDenseBlock ? ~0u : (1u << left) - 1;
            const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from + b * kDenseBlock);
            const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + b * kDenseBlock + 16);
            _mm512_store_si512(at, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
        }
    }
}

// The codes of 16 columns in one block: four vectors of eight codes per column.
inline void load_codes(const uint8_t* const* columns, size_t at, __m512i out[4]) {
    __m512i quad[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const auto load = [&](int c) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns[c] + at)); };
        quad[i] = _mm512_inserti32x4(_mm512_castsi128_si512(load(i)), load(i + 4), 1);
        quad[i] = _mm512_inserti32x4(quad[i], load(i + 8), 2);
        quad[i] = _mm512_inserti32x4(quad[i], load(i + 12), 3);
    }
    // Each 128-bit lane holds a 4 x 4 matrix of words, to be transposed.
    const __m512i a = _mm512_unpacklo_epi32(quad[0], quad[1]), b = _mm512_unpackhi_epi32(quad[0], quad[1]);
    const __m512i c = _mm512_unpacklo_epi32(quad[2], quad[3]), d = _mm512_unpackhi_epi32(quad[2], quad[3]);
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
}

// Scales at `first` plus each of 16 places.
inline __m512 gather_scales(const Int4Weights& w, size_t first, const int32_t* places) {
    if (w.scale_type == ScaleType::kFloat) {
        return _mm512_i32gather_ps(_mm512_load_si512(places), static_cast<const float*>(w.scales) + first, 4);
    }
    // One by one: a gather reads four bytes each, also past the end of the last.
    const uint16_t* const scales = static_cast<const uint16_t*>(w.scales) + first;
    alignas(32) uint16_t found[kTile];
    for (int i = 0; i < kTile; ++i) found[i] = scales[places[i]];
    const __m256i halves = _mm256_load_si256(reinterpret_cast<const __m256i*>(found));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Decodes 16 columns from `col` into one tile per block, at every second place of the panel. Columns from n on repeat
// the last one.
void decode_columns(const Int4Weights& w, int col, uint8_t* panel) {
    const int n_blocks = dense_blocks(w.k);
    const size_t zeros_stride = (n_blocks + 1) / 2;
    const uint8_t *codes[kTile], *zeros[kTile];
    alignas(64) int32_t first_scale[kTile];
    for (int i = 0; i < kTile; ++i) {
        const int c = col + i < w.n ? i : w.n - 1 - col;
        codes[i] = w.codes + static_cast<size_t>(col + c) * n_blocks * 16;
        zeros[i] = w.zeros ? w.zeros + (col + c) * zeros_stride : nullptr;
        first_scale[i] = c * n_blocks;
    }
    const size_t first = static_cast<size_t>(col) * n_blocks;
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Two vectors of 16 numbers, interleaved.
    alignas(64) static const uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i pairs = _mm512_load_si512(kPairs);
    for (int b = 0; b < n_blocks; ++b, panel += 2 * kTileBytes) {
        const __m512 scale = gather_scales(w, first + b, first_scale);
        __m512 lift = _mm512_mul_ps(scale, _mm512_set1_ps(-8.f));
        if (w.zeros) {
            alignas(16) uint8_t zero[kTile];
            for (int i = 0; i < kTile; ++i) zero[i] = zeros[i][b / 2] >> (4 * (b & 1)) & 15;
            const __m512i wide = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(zero)));
            lift = _mm512_fnmadd_ps(scale, _mm512_cvtepi32_ps(wide), _mm512_setzero_ps());
        }
        __m512i words[4];
        load_codes(codes, static_cast<size_t>(b) * 16, words);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
            for (int pair = 0; pair < 4; ++pair) {
                // A permutation looks at the low four bits only: it is mask and conversion in one.
                const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(words[j], 8 * pair), numbers);
                const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(words[j], 8 * pair + 4), numbers);
                const __m512bh both =
                    _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(odd, scale, lift), _mm512_fmadd_ps(even, scale, lift));
                _mm512_store_si512(panel + (4 * j + pair) * 64,
                                   _mm512_permutexvar_epi16(pairs, reinterpret_cast<__m512i>(both)));
            }
        }
    }
}

// The compiler does not know that tile instructions read and write memory: GCC before 13 drops stores to it.
inline void tiles_touch(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// Adds to the sums of 32 rows by 32 columns, or starts them.
void tiles(const uint8_t* upper, const uint8_t* lower, const uint8_t* panel, int n_blocks, bool first, float* sums) {
    constexpr size_t kStride = kColumns * sizeof(float);
    float* const at[4] = {sums, sums + kTile, sums + kTile * kColumns, sums + kTile * kColumns + kTile};
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, at[0], kStride);
        _tile_loadd(1, at[1], kStride);
        _tile_loadd(2, at[2], kStride);
        _tile_loadd(3, at[3], kStride);
    }
    for (int b = 0; b < n_blocks; ++b) {
        const size_t now = b * kTileBytes;
        _tile_loadd(4, upper + now, 64);
        _tile_loadd(6, panel + 2 * now, 64);
        _tile_loadd(7, panel + 2 * now + kTileBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, lower + now, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, at[0], kStride);
    _tile_stored(1, at[1], kStride);
    _tile_stored(2, at[2], kStride);
    _tile_stored(3, at[3], kStride);
    tiles_touch(sums);
}

size_t panel_bytes(int k) { return dense_blocks(k) * 2 * kTileBytes; }

size_t work_bytes(int rows, int k) {
    const size_t rows_of_tiles = static_cast<size_t>(rows + kColumns - 1) / kColumns * kColumns;
    return panel_bytes(k) + rows_of_tiles * kColumns * sizeof(float);
}

void product(const Int4Weights& w, const uint8_t* ready, int rows, int col0, int col1, float* y, uint8_t* work) {
    const int n_blocks = dense_blocks(w.k), row_tiles = (rows + kTile - 1) / kTile;
    uint8_t* const panel = work;
    // In order of their rows: tiles in the result would be far apart, and all in the same few lines of the cache.
    float* const sums = reinterpret_cast<float*>(work + panel_bytes(w.k));
    decode_columns(w, col0, panel);
    decode_columns(w, col0 + kTile < col1 ? col0 + kTile : col0, panel + kTileBytes);
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.set(tile, kTile, 64);
    tiles_touch(panel);
    shapes.configure();
    const size_t row_stride = n_blocks * kTileBytes;
    for (int block = 0; block < n_blocks; block += kPanelBlocks) {
        const int n = n_blocks - block < kPanelBlocks ? n_blocks - block : kPanelBlocks;
        for (int tile = 0; tile < row_tiles; tile += 2) {
            const uint8_t* const upper = ready + tile * row_stride + block * kTileBytes;
            const uint8_t* const lower = tile + 1 < row_tiles ? upper + row_stride : upper;
            tiles(upper, lower, panel + 2 * block * kTileBytes, n, block == 0, sums + tile * kTile * kColumns);
        }
    }
    TileShapes::release();
    // Past the caches: at this number of rows the result is larger than they are, and fetching its lines first costs.
    const bool whole = col1 - col0 == kColumns && w.n % kTile == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
    for (int row = 0; row < rows; ++row) {
        const float* const from = sums + row * kColumns;
        float* const to = y + static_cast<size_t>(row) * w.n + col0;
        if (whole) {
            _mm512_stream_ps(to, _mm512_load_ps(from));
            _mm512_stream_ps(to + 16, _mm512_load_ps(from + 16));
        } else {
            std::memcpy(to, from, (col1 - col0) * sizeof(float));
        }
    }
    _mm_sfence();  // before another thread is told
}

// Beside the tiles themselves, which amx_kernels() has found and asked the system for.
bool processor_has_bf16() {
    constexpr unsigned kTileBf16 = 1u << 22, kAvx512Bf16 = 1u << 5;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTileBf16)) return false;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16);
}

}  // namespace

const DenseKernels* dense_amx() {
    static const DenseKernels kernels{"amx", kColumns, kMinRows, ready_bytes, prepare, work_bytes, product};
    static const bool usable = amx_kernels() && processor_has_bf16();
    return usable ? &kernels : nullptr;
}

}  // namespace edgekv

#else
namespace edgekv {
const DenseKernels* dense_amx() { return nullptr; }
}  // namespace edgekv
#endif
