// Rows as 8-bit numbers with one scale per block of 32, as accuracy level 4 of MatMulNBits has them.
#include "dense/dense.h"
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

#include <cmath>

namespace edgekv {
namespace {

constexpr int kColumns = 256;     // of a task
constexpr int kBlocks = 4;       // in a vector of 64 bytes of codes
constexpr int kGroupBlocks = 16; // in a vector of scales

// A row made ready, padded with zeros to whole groups of 16 blocks.
struct Row {
    const int8_t* codes;  // per 4 blocks: 64 numbers at even places of k, then the 64 at odd ones
    const float* scales;  // per 4 blocks: each scale four times
    const float* sums;    // per block: scale times the sum of its codes
};

struct Layout {
    size_t groups, codes_bytes, scales_bytes, bytes;
    explicit Layout(int k)
        : groups((dense_blocks(k) + kGroupBlocks - 1) / kGroupBlocks), codes_bytes(groups * 512),
          scales_bytes(groups * 256), bytes(codes_bytes + scales_bytes + groups * 64) {}
    Row row(const uint8_t* ready, int i) const {
        const uint8_t* at = ready + i * bytes;
        return {reinterpret_cast<const int8_t*>(at), reinterpret_cast<const float*>(at + codes_bytes),
                reinterpret_cast<const float*>(at + codes_bytes + scales_bytes)};
    }
};

size_t ready_bytes(int rows, int k) { return rows * Layout(k).bytes; }

void prepare_row(const float* x, int k, uint8_t* out, const Layout& layout) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    int8_t* const codes = reinterpret_cast<int8_t*>(out);
    float* const scales = reinterpret_cast<float*>(out + layout.codes_bytes);
    float* const sums = scales + layout.scales_bytes / sizeof(float);
    for (int b = 0; b < static_cast<int>(layout.groups) * kGroupBlocks; ++b) {
        const int left = k - b * kDenseBlock;
        const uint32_t mask = left >= kDenseBlock ? ~0u : left > 0 ? (1u << left) - 1 : 0;
        const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), x + b * kDenseBlock);
        const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), x + b * kDenseBlock + 16);
        const float peak = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
        const float scale = peak / 127.f;
        const __m512 inverse = _mm512_set1_ps(peak > 0.f ? 127.f / peak : 0.f);
        const __m512i even =
            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_permutex2var_ps(low, evens, high), inverse));
        const __m512i odd = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_permutex2var_ps(low, odds, high), inverse));
        int8_t* const at = codes + b / kBlocks * 128 + b % kBlocks * 16;
        _mm_store_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(even));
        _mm_store_si128(reinterpret_cast<__m128i*>(at + 64), _mm512_cvtepi32_epi8(odd));
        _mm_store_ps(scales + b * 4, _mm_set1_ps(scale));
        sums[b] = scale * static_cast<float>(_mm512_reduce_add_epi32(_mm512_add_epi32(even, odd)));
    }
}

void prepare(const float* x, int, int k, int row0, int row1, uint8_t* ready) {
    const Layout layout(k);
    for (int row = row0; row < row1; ++row) {
        prepare_row(x + static_cast<size_t>(row) * k, k, ready + row * layout.bytes, layout);
    }
}

// Weights come from memory, in the order of their addresses, but in steps that the processor's own prefetcher follows
// at half the speed only: it stops at the end of each 4 KiB.
constexpr size_t kFar = 16384, kNear = 2048;  // bytes ahead: to the second level, from there to the first

template <auto kHint>  // of GCC's enum, or an int
inline void prefetch(const void* p, size_t ahead) {
    _mm_prefetch(static_cast<const char*>(p) + ahead, kHint);
}

inline void prefetch_codes(const void* p) {
    prefetch<_MM_HINT_T1>(p, kFar);
    prefetch<_MM_HINT_T0>(p, kNear);
}

// Scales of up to 16 blocks, from that of block `at` of the matrix on; zeros where none are.
template <ScaleType kType>
inline __m512 load_scales(const void* scales, size_t at, __mmask16 present) {
    if constexpr (kType == ScaleType::kFloat) {
        const float* const p = static_cast<const float*>(scales) + at;
        prefetch<_MM_HINT_T1>(p, kFar / 4);
        return _mm512_maskz_loadu_ps(present, p);
    } else {
        const uint16_t* const p = static_cast<const uint16_t*>(scales) + at;
        prefetch<_MM_HINT_T1>(p, kFar / 8);
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(present, p)), 16));
    }
}

// 16 zeros, from 8 bytes.
inline __m512 load_zeros(const uint8_t* p, int n_blocks) {
    const __mmask16 mask = static_cast<__mmask16>((1u << ((n_blocks + 1) / 2)) - 1);
    const __m128i words = _mm_cvtepu8_epi16(_mm_maskz_loadu_epi8(mask, p));
    const __m128i bytes = _mm_and_si128(_mm_or_si128(words, _mm_slli_epi16(words, 4)), _mm_set1_epi8(15));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

inline float sum(__m512 v) { return _mm512_reduce_add_ps(v); }

// C columns times R rows.
template <ScaleType kType, int C, int R>
inline void block(const Int4Weights& w, const Row* rows, int col, float* y, size_t stride) {
    const int n_blocks = dense_blocks(w.k);
    const size_t codes_stride = static_cast<size_t>(n_blocks) * 16, zeros_stride = (n_blocks + 1) / 2;
    const uint8_t* codes[C];
    size_t first[C];
    __m512 acc[C][R];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
        codes[c] = w.codes + (col + c) * codes_stride;
        first[c] = static_cast<size_t>(col + c) * n_blocks;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[c][r] = _mm512_setzero_ps();
    }
    const __m512i low_half = _mm512_set1_epi8(15);
    const __m512 eight = _mm512_set1_ps(8.f);
    for (int b = 0; b < n_blocks; b += kGroupBlocks) {
        const int left = n_blocks - b < kGroupBlocks ? n_blocks - b : kGroupBlocks;
        const __mmask16 present = static_cast<__mmask16>((1u << left) - 1);
        __m512 scale[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            scale[c] = load_scales<kType>(w.scales, first[c] + b, present);
            const __m512 zero = w.zeros ? load_zeros(w.zeros + (col + c) * zeros_stride + b / 2, left) : eight;
            const __m512 lift = _mm512_mul_ps(scale[c], zero);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                acc[c][r] = _mm512_fnmadd_ps(lift, _mm512_load_ps(rows[r].sums + b), acc[c][r]);
            }
        }
        __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        for (int v = 0; v < left; v += kBlocks) {
            const int here = left - v < kBlocks ? left - v : kBlocks;
            const __mmask8 whole = static_cast<__mmask8>((1u << (2 * here)) - 1);
            const size_t at = static_cast<size_t>(b + v) * 16;
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                const __m512i pair = _mm512_maskz_loadu_epi64(whole, codes[c] + at);
                prefetch_codes(codes[c] + at);
                const __m512i even = _mm512_and_si512(pair, low_half);
                const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low_half);
                const __m512 scale_of = _mm512_permutexvar_ps(spread, scale[c]);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const int8_t* x = rows[r].codes + 2 * kBlocks * at / 4;
                    __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, _mm512_load_si512(x));
                    dot = _mm512_dpbusd_epi32(dot, odd, _mm512_load_si512(x + 64));
                    const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_load_ps(rows[r].scales + 4 * (b + v)));
                    acc[c][r] = _mm512_fmadd_ps(part, scale_of, acc[c][r]);
                }
            }
            spread = _mm512_add_epi32(spread, _mm512_set1_epi32(kBlocks));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) y[r * stride + col + c] = sum(acc[c][r]);
    }
}

template <ScaleType kType, int R>
void rows_product(const Int4Weights& w, const Row* rows, int col0, int col1, float* y) {
    int col = col0;
    for (; col + 4 <= col1; col += 4) block<kType, 4, R>(w, rows, col, y, w.n);
    for (; col < col1; ++col) block<kType, 1, R>(w, rows, col, y, w.n);
}

template <ScaleType kType>
void columns_product(const Int4Weights& w, const uint8_t* ready, int n_rows, int col0, int col1, float* y) {
    const Layout layout(w.k);
    for (int row = 0; row < n_rows;) {
        Row rows[4];
        const int left = n_rows - row < 4 ? n_rows - row : 4;
        for (int r = 0; r < left; ++r) rows[r] = layout.row(ready, row + r);
        float* const at = y + static_cast<size_t>(row) * w.n;
        if (left == 4) {
            rows_product<kType, 4>(w, rows, col0, col1, at);
            row += 4;
        } else if (left >= 2) {
            rows_product<kType, 2>(w, rows, col0, col1, at);
            row += 2;
        } else {
            rows_product<kType, 1>(w, rows, col0, col1, at);
            row += 1;
        }
    }
}

void product(const Int4Weights& w, const uint8_t* ready, int rows, int col0, int col1, float* y, uint8_t*) {
    if (w.scale_type == ScaleType::kFloat) {
        columns_product<ScaleType::kFloat>(w, ready, rows, col0, col1, y);
    } else {
        columns_product<ScaleType::kBf16>(w, ready, rows, col0, col1, y);
    }
}

}  // namespace

const DenseKernels* dense_avx512() {
    static const DenseKernels kernels{"avx512", kColumns, 1, ready_bytes, prepare,
                                      [](int, int) { return size_t{0}; }, product};
    return avx512_kernels() ? &kernels : nullptr;
}

}  // namespace edgekv

#else
namespace edgekv {
const DenseKernels* dense_avx512() { return nullptr; }
}  // namespace edgekv
#endif
