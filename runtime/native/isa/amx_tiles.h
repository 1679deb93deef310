// The tiles of AMX, and the digits that go in: a tile of digits, one row each, times tiles of codes, [rows/4, 16
// columns, 4]. Included after isa/avx512.h.
//
// The instructions are written as assembly because the compiler's own say nothing of the memory that they touch: GCC 12
// removes stores that only a tile reads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tile_shapes.h"

namespace {

constexpr float kLargestDigits = 32639.f;  // 127 * 256 + 127

// exp(x) for x <= 0, to a part in ten million; x below about -87 counts as -87.
inline VF exp_of_lanes(VF x) {
    const VF shift = vset(12582912.f);  // 1.5 * 2^23: the sum's low bits are the nearest integer
    x = vmax(x, vset(-87.f));
    const VF shifted = vfma(x, vset(1.44269504f), shift);
    const VF f = vfma(x, vset(1.44269504f), vsub(shift, shifted));
    VF p = vset(1.32647264e-3f);  // 2^f for |f| <= 1/2, fitted with p(0) = 1 for the least largest relative error
    p = vfma(p, f, vset(9.6715127e-3f));
    p = vfma(p, f, vset(5.55073375e-2f));
    p = vfma(p, f, vset(2.40222421e-1f));
    p = vfma(p, f, vset(6.93146978e-1f));
    p = vfma(p, f, vset(1.f));
    const VI exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}

// 32 numbers within +-kLargestDigits as bytes, high * 256 + low: high at `to`, low a row further.
inline void put_digits(int8_t* to, size_t row, VF a, VF b, VF factor) {
    // Rounded with 128 added, so that the upper byte is the high digit and the lower byte less 128 the low one.
    const VF half = vset(128.f);
    const VI v = _mm512_packs_epi32(vint(vfma(a, factor, half)), vint(vfma(b, factor, half)));
    // Packing works within lanes of 128 bits: lane i has numbers 4i to 4i+3 of a and then of b.
    const VI order = _mm512_set_epi8(
        62, 60, 58, 56, 46, 44, 42, 40, 30, 28, 26, 24, 14, 12, 10, 8, 54, 52, 50, 48, 38, 36, 34, 32, 22, 20, 18, 16,
        6, 4, 2, 0, 63, 61, 59, 57, 47, 45, 43, 41, 31, 29, 27, 25, 15, 13, 11, 9, 55, 53, 51, 49, 39, 37, 35, 33, 23,
        21, 19, 17, 7, 5, 3, 1);
    const VI sorted = _mm512_permutexvar_epi8(order, _mm512_xor_si512(v, _mm512_set1_epi16(128)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(sorted));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + row), _mm512_extracti64x4_epi64(sorted, 1));
}

// The same of 16 numbers.
inline void put_digits(int8_t* to, size_t row, VF a, VF factor) {
    const VI v = vint(vfma(a, factor, vset(128.f)));
    const __m128i high = _mm512_cvtepi32_epi8(_mm512_srai_epi32(v, 8));
    const __m128i low = _mm512_cvtepi32_epi8(_mm512_xor_si512(v, _mm512_set1_epi32(128)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), high);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + row), low);
}

// What 16 columns of a row add up to: the sums of its high digits, then of its low ones.
inline VF digits_sum(const int32_t* sums) {
    return vfloat(_mm512_add_epi32(_mm512_slli_epi32(viload(sums), 8), viload(sums + 16)));
}

template <int T>
inline void tile_load(const void* at, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* at, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(at), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
// C += A * B in 32 bits, signed bytes.
template <int C, int A, int B>
inline void tile_multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// Sums are in the first n tiles, at most four, for 16 columns each.
inline void zero_sums(int n) {
    tile_zero<0>();
    if (n > 1) tile_zero<1>();
    if (n > 2) tile_zero<2>();
    if (n > 3) tile_zero<3>();
}
// Adds a tile of digits times n tiles of codes that lie side by side; A and B are the tiles to load them into.
template <int A, int B>
inline void add_products(const int8_t* digits, size_t digits_stride, const uint8_t* codes, size_t stride, int n) {
    tile_load<A>(digits, digits_stride);
    tile_load<B>(codes, stride);
    tile_multiply<0, A, B>();
    if (n > 1) {
        tile_load<B>(codes + 64, stride);
        tile_multiply<1, A, B>();
    }
    if (n > 2) {
        tile_load<B>(codes + 128, stride);
        tile_multiply<2, A, B>();
    }
    if (n > 3) {
        tile_load<B>(codes + 192, stride);
        tile_multiply<3, A, B>();
    }
}
// Stores n tiles of sums, each `step` numbers after the one before.
inline void store_sums(int32_t* to, size_t step, int n) {
    tile_store<0>(to, 64);
    if (n > 1) tile_store<1>(to + step, 64);
    if (n > 2) tile_store<2>(to + 2 * step, 64);
    if (n > 3) tile_store<3>(to + 3 * step, 64);
}

}  // namespace
