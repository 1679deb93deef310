// AVX-512 with VNNI.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "isa/avx512.h"

namespace {

// 16-bit numbers as two signed bytes, high * 256 + low.
struct Digits {
    alignas(64) int8_t high[kMaxDim];
    alignas(64) int8_t low[kMaxDim];
    int32_t sum;
};

// x times factor, which must be within the range of the digits; returns lanes whose sum is the digits'.
inline VF put_digits(Digits& d, const float* x, VF factor, int n) {
    VI sum = _mm512_setzero_si512();
    const VI ones = _mm512_set1_epi16(1), half = _mm512_set1_epi16(128);
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        // As 16-bit numbers, then as bytes; packing works within 128-bit lanes, so the groups of four end up permuted.
        const VI v = _mm512_packs_epi32(vint(vmul(vload(x + i), factor)), vint(vmul(vload(x + i + 16), factor)));
        const VI high = _mm512_srai_epi16(_mm512_add_epi16(v, half), 8);
        const VI low = _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8);
        const VI both = _mm512_packs_epi16(high, low);
        const VI order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const VI sorted = _mm512_permutexvar_epi32(order, both);
        _mm256_store_si256(reinterpret_cast<__m256i*>(d.high + i), _mm512_castsi512_si256(sorted));
        _mm256_store_si256(reinterpret_cast<__m256i*>(d.low + i), _mm512_extracti64x4_epi64(sorted, 1));
        sum = _mm512_dpwssd_epi32(sum, v, ones);
    }
    for (; i < n; i += 16) {
        const VI v = vint(vmul(vload(x + i), factor));
        const VI high = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
        __m128i h = _mm512_cvtepi32_epi8(high), l = _mm512_cvtepi32_epi8(v);  // v - 256 * high, modulo 256
        // Keep the compiler from fusing conversion and store: vpmovdb to memory is microcoded on some processors.
        asm("" : "+v"(h), "+v"(l));
        _mm_store_si128(reinterpret_cast<__m128i*>(d.high + i), h);
        _mm_store_si128(reinterpret_cast<__m128i*>(d.low + i), l);
        sum = _mm512_add_epi32(sum, v);
    }
    return vfloat(sum);
}
inline void put_sum(Digits& d, float sum) { d.sum = static_cast<int32_t>(sum); }

inline __m512i broadcast4(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

// N queries times V * 16 columns. vpdpbusd wants one unsigned operand: codes + 128, and 128 * the digits' sum less.
template <int N, int V>
inline void int8_block(const int8_t* m, int rows, size_t stride, __mmask16 tail, const Digits* d, const float* scales,
                       float* const* y, const float* beta, int column, Ahead& ahead_of, int per_step) {
    Ahead ahead = ahead_of;
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i high[N][V], low[N][V];
#pragma GCC unroll 4
    for (int q = 0; q < N; ++q) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            high[q][v] = _mm512_setzero_si512();
            low[q][v] = _mm512_set1_epi32(-128 * d[q].sum);
        }
    }
    for (int r = 0; r < rows; r += 4, m += stride) {
        if (column == 0) ahead.lines(per_step);
        __m512i codes[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            // Pages arrive in the second-level cache; from there to the first they are asked for this far ahead.
            _mm_prefetch(reinterpret_cast<const char*>(m + 64 * v + 1024), _MM_HINT_T0);
            codes[v] = V == 1 ? _mm512_maskz_loadu_epi32(tail, m) : _mm512_loadu_si512(m + 64 * v);
            codes[v] = _mm512_xor_si512(codes[v], offset);
        }
#pragma GCC unroll 4
        for (int q = 0; q < N; ++q) {
            const __m512i h = broadcast4(d[q].high + r), l = broadcast4(d[q].low + r);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                high[q][v] = _mm512_dpbusd_epi32(high[q][v], codes[v], h);
                low[q][v] = _mm512_dpbusd_epi32(low[q][v], codes[v], l);
            }
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < N; ++q) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[q][v], 8), low[q][v]);
            float* at = y[q] + column + 16 * v;
            const VF product = vmul(vfloat(whole), vset(scales[q]));
            vstore(at, beta ? vfma(vload(at), vset(beta[q]), product) : product);
        }
    }
    ahead_of = ahead;
}

// y = scale * (codes product digits), or beta * y + that.
template <int N>
inline void int8_product(const int8_t* m, int rows, int columns, const Digits* d, const float* scales, float* const* y,
                         const float* beta, Ahead& ahead, int per_step) {
    const size_t stride = static_cast<size_t>(columns) * 4;
    constexpr __mmask16 kAll = 0xffff;
    int c = 0;
    for (; N <= 2 && c + 64 <= columns; c += 64) {
        int8_block<N, 4>(m + 4 * c, rows, stride, kAll, d, scales, y, beta, c, ahead, per_step);
    }
    for (; c + 32 <= columns; c += 32) {
        int8_block<N, 2>(m + 4 * c, rows, stride, kAll, d, scales, y, beta, c, ahead, per_step);
    }
    for (; c < columns; c += 16) {
        const __mmask16 tail = columns - c >= 16 ? kAll : static_cast<__mmask16>((1u << (columns - c)) - 1);
        int8_block<N, 1>(m + 4 * c, rows, stride, tail, d, scales, y, beta, c, ahead, per_step);
    }
}

uint64_t read_bytes(const uint8_t* data, size_t n) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, e = a;
    size_t i = 0;
    for (; i + 256 <= n; i += 256) {
        a = _mm512_add_epi64(a, _mm512_loadu_si512(data + i));
        b = _mm512_add_epi64(b, _mm512_loadu_si512(data + i + 64));
        c = _mm512_add_epi64(c, _mm512_loadu_si512(data + i + 128));
        e = _mm512_add_epi64(e, _mm512_loadu_si512(data + i + 192));
    }
    return static_cast<uint64_t>(
        _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, e))));
}

}  // namespace

#include "isa/shared/page_layout.h"
#include "isa/shared/decode.h"
#include "isa/shared/blocked.h"
#include "isa/shared/checksum.h"
#include "isa/shared/quantise.h"
#include "isa/shared/operators.h"

namespace edgekv {

const Kernels* avx512_kernels() {
    static const Kernels kernels{"avx512",      decode_run, blocked_pages, blocked_own, merge,
                                 sum_mass, pack_warm,  to_half,       read_bytes, checksum,
                                 rms_norm, swiglu,     geglu, rotary};
    const bool usable = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    return usable ? &kernels : nullptr;
}

}  // namespace edgekv

#else
namespace edgekv {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace edgekv
#endif
