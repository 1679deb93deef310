// The vectors of AVX-512, for the instruction sets that have them: each isa_*.cpp that includes this is compiled for
// its own processors.
#pragma once

#include <immintrin.h>

#include "half.h"
#include "kernels.h"

namespace {

constexpr int W = 16;
constexpr int kProductRows = 6;
constexpr int kProductColumns = 4;
using VF = __m512;
using VI = __m512i;
using VM = __mmask16;

inline VF vset(float x) { return _mm512_set1_ps(x); }
inline VF vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, VF x) { _mm512_storeu_ps(p, x); }
inline VF vadd(VF a, VF b) { return _mm512_add_ps(a, b); }
inline VF vsub(VF a, VF b) { return _mm512_sub_ps(a, b); }
inline VF vmul(VF a, VF b) { return _mm512_mul_ps(a, b); }
inline VF vdiv(VF a, VF b) { return _mm512_div_ps(a, b); }
inline VF vfma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
inline VF vmax(VF a, VF b) { return _mm512_max_ps(a, b); }
inline VF vmin(VF a, VF b) { return _mm512_min_ps(a, b); }
inline VF vabs(VF a) { return _mm512_abs_ps(a); }
inline VF vround(VF a) { return _mm512_roundscale_ps(a, 8); }
inline float vsum(VF a) { return _mm512_reduce_add_ps(a); }
inline float vpeak(VF a) { return _mm512_reduce_max_ps(a); }
inline VM vmask(uint32_t bits) { return static_cast<VM>(bits); }
inline VM vless(VF a, VF b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline VF vselect(VM m, VF yes, VF no) { return _mm512_mask_blend_ps(m, no, yes); }
inline VI vint(VF a) { return _mm512_cvtps_epi32(a); }
inline VF vfloat(VI a) { return _mm512_cvtepi32_ps(a); }
inline VI viload(const void* p) { return _mm512_loadu_si512(p); }
inline void vistore(int32_t* p, VI x) { _mm512_storeu_si512(p, x); }
inline VF vpow2(VF n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(vint(n), _mm512_set1_epi32(127)), 23));
}
template <int J>
inline VI vbyte(VI a) {
    return _mm512_srai_epi32(_mm512_slli_epi32(a, 24 - 8 * J), 24);
}
inline VI vipack(VI a, VI b, VI c, VI d) {
    const VI low = _mm512_set1_epi32(255);
    const VI ab = _mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi32(_mm512_and_si512(b, low), 8));
    const VI cd = _mm512_or_si512(_mm512_slli_epi32(_mm512_and_si512(c, low), 16), _mm512_slli_epi32(d, 24));
    return _mm512_or_si512(ab, cd);
}
inline VF vload_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void vstore_half(uint16_t* p, VF x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace

#include "isa/shared/vector_math.h"

namespace {

// Lane i of the result combines all lanes of rows[i].
template <typename F>
inline VF combine_rows(const VF* rows, F&& f) {
    VF a[8], b[4];
    for (int i = 0; i < 8; ++i) {
        a[i] = f(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]), _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = f(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    const VF c = f(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
    const VF d = f(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
    return f(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}
inline VF rows_sum(const VF* rows) {
    return combine_rows(rows, [](VF a, VF b) { return vadd(a, b); });
}
inline VF rows_peak(const VF* rows) {
    return combine_rows(rows, [](VF a, VF b) { return vmax(a, b); });
}

}  // namespace

