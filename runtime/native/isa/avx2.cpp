// AVX2 with FMA and F16C.
#include "half.h"
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace {

constexpr int W = 8;
constexpr int kProductRows = 6;
constexpr int kProductColumns = 2;
using VF = __m256;
using VI = __m256i;
using VM = __m256;

inline VF vset(float x) { return _mm256_set1_ps(x); }
inline VF vload(const float* p) { return _mm256_loadu_ps(p); }
inline void vstore(float* p, VF x) { _mm256_storeu_ps(p, x); }
inline VF vadd(VF a, VF b) { return _mm256_add_ps(a, b); }
inline VF vsub(VF a, VF b) { return _mm256_sub_ps(a, b); }
inline VF vmul(VF a, VF b) { return _mm256_mul_ps(a, b); }
inline VF vdiv(VF a, VF b) { return _mm256_div_ps(a, b); }
inline VF vfma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
inline VF vmax(VF a, VF b) { return _mm256_max_ps(a, b); }
inline VF vmin(VF a, VF b) { return _mm256_min_ps(a, b); }
inline VF vabs(VF a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
inline VF vround(VF a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float vsum(VF a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float vpeak(VF a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline VM vmask(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane));
}
inline VM vless(VF a, VF b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline VF vselect(VM m, VF yes, VF no) { return _mm256_blendv_ps(no, yes, m); }
inline VI vint(VF a) { return _mm256_cvtps_epi32(a); }
inline VF vfloat(VI a) { return _mm256_cvtepi32_ps(a); }
inline VI viload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void vistore(int32_t* p, VI x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline VF vpow2(VF n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(vint(n), _mm256_set1_epi32(127)), 23));
}
template <int J>
inline VI vbyte(VI a) {
    return _mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * J), 24);
}
inline VI vipack(VI a, VI b, VI c, VI d) {
    const VI low = _mm256_set1_epi32(255);
    const VI ab = _mm256_or_si256(_mm256_and_si256(a, low), _mm256_slli_epi32(_mm256_and_si256(b, low), 8));
    const VI cd = _mm256_or_si256(_mm256_slli_epi32(_mm256_and_si256(c, low), 16), _mm256_slli_epi32(d, 24));
    return _mm256_or_si256(ab, cd);
}
inline VF vload_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void vstore_half(uint16_t* p, VF x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0));
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace

#include "isa/shared/vector_math.h"

namespace {

struct Digits {
    alignas(32) int16_t value[kMaxDim];
};

// x times factor, which must be within the range of the digits. (The result is for instruction sets that need the sum.)
inline VF put_digits(Digits& d, const float* x, VF factor, int n) {
    for (int i = 0; i < n; i += W) {
        const VI v = vint(vmul(vload(x + i), factor));
        _mm_store_si128(reinterpret_cast<__m128i*>(d.value + i),
                        _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
    }
    return factor;
}
inline void put_sum(Digits&, float) {}

// Lane i of the result combines all lanes of rows[i].
inline VF rows_sum(const VF* rows) {
    const VF a = _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
    const VF b = _mm256_hadd_ps(_mm256_hadd_ps(rows[4], rows[5]), _mm256_hadd_ps(rows[6], rows[7]));
    return vadd(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
inline VF rows_peak(const VF* rows) {
    alignas(32) float peaks[W];
    for (int i = 0; i < W; ++i) peaks[i] = vpeak(rows[i]);
    return vload(peaks);
}

// N queries times V * 4 columns: vpmaddwd on codes widened to 16 bits (vpmaddubsw would saturate).
template <int N, int V>
inline void int8_block(const int8_t* m, int rows, size_t stride, const Digits* d, const float* scales, float* const* y,
                       const float* beta, int column, Ahead& ahead_of, int per_step) {
    Ahead ahead = ahead_of;
    __m256i sum[N][V];
    for (int q = 0; q < N; ++q) {
        for (int v = 0; v < V; ++v) sum[q][v] = _mm256_setzero_si256();
    }
    for (int r = 0; r < rows; r += 4, m += stride) {
        if (column == 0) ahead.lines(per_step);
        __m256i codes[V];
        for (int v = 0; v < V; ++v) {
            codes[v] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(m + 16 * v)));
        }
        for (int q = 0; q < N; ++q) {
            long long four;
            __builtin_memcpy(&four, d[q].value + r, 8);
            const __m256i x = _mm256_set1_epi64x(four);
            for (int v = 0; v < V; ++v) sum[q][v] = _mm256_add_epi32(sum[q][v], _mm256_madd_epi16(codes[v], x));
        }
    }
    for (int q = 0; q < N; ++q) {
        for (int v = 0; v < V; ++v) {
            const __m128i whole =
                _mm_hadd_epi32(_mm256_castsi256_si128(sum[q][v]), _mm256_extracti128_si256(sum[q][v], 1));
            float* at = y[q] + column + 4 * v;
            const __m128 product = _mm_mul_ps(_mm_cvtepi32_ps(whole), _mm_set1_ps(scales[q]));
            _mm_storeu_ps(at, beta ? _mm_fmadd_ps(_mm_loadu_ps(at), _mm_set1_ps(beta[q]), product) : product);
        }
    }
    ahead_of = ahead;
}

template <int N>
inline void int8_product(const int8_t* m, int rows, int columns, const Digits* d, const float* scales, float* const* y,
                         const float* beta, Ahead& ahead, int per_step) {
    constexpr int kWide = N <= 2 ? 4 : 2;
    const size_t stride = static_cast<size_t>(columns) * 4;
    int c = 0;
    for (; c + 4 * kWide <= columns; c += 4 * kWide) {
        int8_block<N, kWide>(m + 4 * c, rows, stride, d, scales, y, beta, c, ahead, per_step);
    }
    for (; c < columns; c += 4) int8_block<N, 1>(m + 4 * c, rows, stride, d, scales, y, beta, c, ahead, per_step);
}

uint64_t read_bytes(const uint8_t* data, size_t n) {
    __m256i a = _mm256_setzero_si256(), b = a;
    for (size_t i = 0; i + 64 <= n; i += 64) {
        a = _mm256_add_epi64(a, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i)));
        b = _mm256_add_epi64(b, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 32)));
    }
    alignas(32) uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi64(a, b));
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

}  // namespace

#include "isa/shared/page_layout.h"
#include "isa/shared/decode.h"
#include "isa/shared/blocked.h"
#include "isa/shared/checksum.h"
#include "isa/shared/quantise.h"
#include "isa/shared/operators.h"

namespace edgekv {

const Kernels* avx2_kernels() {
    static const Kernels kernels{"avx2",   decode_run, blocked_pages, blocked_own, merge,
                                 sum_mass, pack_warm,  to_half,       read_bytes, checksum,
                                 rms_norm, swiglu,     geglu, rotary};
    const bool usable =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return usable ? &kernels : nullptr;
}

}  // namespace edgekv

#else
namespace edgekv {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace edgekv
#endif
