// NEON (AArch64), with or without the dot-product instructions: isa/neon.cpp and isa/neon_dot.cpp include this, each
// compiled for its own processors.
#pragma once

#include <arm_neon.h>

#include "half.h"
#include "kernels.h"

namespace {

constexpr int W = 4;
constexpr int kProductRows = 6;
constexpr int kProductColumns = 4;
using VF = float32x4_t;
using VI = int32x4_t;
using VM = uint32x4_t;

inline VF vset(float x) { return vdupq_n_f32(x); }
inline VF vload(const float* p) { return vld1q_f32(p); }
inline void vstore(float* p, VF x) { vst1q_f32(p, x); }
inline VF vadd(VF a, VF b) { return vaddq_f32(a, b); }
inline VF vsub(VF a, VF b) { return vsubq_f32(a, b); }
inline VF vmul(VF a, VF b) { return vmulq_f32(a, b); }
inline VF vdiv(VF a, VF b) { return vdivq_f32(a, b); }
inline VF vfma(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
inline VF vmax(VF a, VF b) { return vmaxnmq_f32(a, b); }  // the number where one is a NaN
inline VF vmin(VF a, VF b) { return vminnmq_f32(a, b); }
inline VF vabs(VF a) { return vabsq_f32(a); }
inline VF vround(VF a) { return vrndnq_f32(a); }
inline float vsum(VF a) { return vaddvq_f32(a); }
inline float vpeak(VF a) { return vmaxnmvq_f32(a); }
inline VM vmask(uint32_t bits) {
    const uint32_t lane[4] = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(bits), vld1q_u32(lane));
}
inline VM vless(VF a, VF b) { return vcltq_f32(a, b); }
inline VF vselect(VM m, VF yes, VF no) { return vbslq_f32(m, yes, no); }
inline VI vint(VF a) { return vcvtnq_s32_f32(a); }
inline VF vfloat(VI a) { return vcvtq_f32_s32(a); }
inline VI viload(const void* p) { return vreinterpretq_s32_s8(vld1q_s8(static_cast<const int8_t*>(p))); }
inline void vistore(int32_t* p, VI x) { vst1q_s32(p, x); }
inline VF vpow2(VF n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vint(n), vdupq_n_s32(127)), 23)); }
template <int J>
inline VI vbyte(VI a) {
    return vshrq_n_s32(vshlq_n_s32(a, 24 - 8 * J), 24);
}
inline VI vipack(VI a, VI b, VI c, VI d) {
    const VI low = vdupq_n_s32(255);
    const VI ab = vorrq_s32(vandq_s32(a, low), vshlq_n_s32(vandq_s32(b, low), 8));
    const VI cd = vorrq_s32(vshlq_n_s32(vandq_s32(c, low), 16), vshlq_n_s32(d, 24));
    return vorrq_s32(ab, cd);
}
inline VF vload_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void vstore_half(uint16_t* p, VF x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace

#include "isa/shared/vector_math.h"

namespace {


// Lane i of the result combines all lanes of rows[i].
inline VF rows_sum(const VF* rows) {
    return vpaddq_f32(vpaddq_f32(rows[0], rows[1]), vpaddq_f32(rows[2], rows[3]));
}
inline VF rows_peak(const VF* rows) {
    return vpmaxnmq_f32(vpmaxnmq_f32(rows[0], rows[1]), vpmaxnmq_f32(rows[2], rows[3]));
}

#ifdef __ARM_FEATURE_DOTPROD

// 16-bit numbers as two signed bytes, high * 256 + low.
struct Digits {
    alignas(16) int8_t high[kMaxDim];
    alignas(16) int8_t low[kMaxDim];
};

// x times factor, which must be within the range of the digits. (The result is for instruction sets that need the sum.)
inline VF put_digits(Digits& d, const float* x, VF factor, int n) {
    for (int i = 0; i < n; i += 8) {
        const int16x8_t v = vcombine_s16(vmovn_s32(vint(vmul(vload(x + i), factor))),
                                         vmovn_s32(vint(vmul(vload(x + i + 4), factor))));
        vst1_s8(d.high + i, vshrn_n_s16(vaddq_s16(v, vdupq_n_s16(128)), 8));
        vst1_s8(d.low + i, vmovn_s16(v));  // v - 256 * high, modulo 256
    }
    return factor;
}

struct Operand {
    int8x16_t high, low;
};
inline int8x16_t four(const int8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(x));
}
inline Operand operand(const Digits& d, int r) { return {four(d.high + r), four(d.low + r)}; }
// Sums of four columns.
struct Sums {
    VI high, low;
    void clear() { high = low = vdupq_n_s32(0); }
    void add(int8x16_t codes, const Operand& x) {
        high = vdotq_s32(high, codes, x.high);
        low = vdotq_s32(low, codes, x.low);
    }
    VI value() const { return vaddq_s32(vshlq_n_s32(high, 8), low); }
};

#else

struct Digits {
    alignas(16) int16_t value[kMaxDim];
};

// x times factor, which must be within the range of the digits. (The result is for instruction sets that need the sum.)
inline VF put_digits(Digits& d, const float* x, VF factor, int n) {
    for (int i = 0; i < n; i += 4) vst1_s16(d.value + i, vmovn_s32(vint(vmul(vload(x + i), factor))));
    return factor;
}

using Operand = int16x4_t;
inline Operand operand(const Digits& d, int r) { return vld1_s16(d.value + r); }
// Sums of four columns: one vector per column, over its four rows.
struct Sums {
    VI column[4];
    void clear() { column[0] = column[1] = column[2] = column[3] = vdupq_n_s32(0); }
    void add(int8x16_t codes, const Operand& x) {
        const int16x8_t a = vmovl_s8(vget_low_s8(codes)), b = vmovl_s8(vget_high_s8(codes));
        column[0] = vmlal_s16(column[0], vget_low_s16(a), x);
        column[1] = vmlal_s16(column[1], vget_high_s16(a), x);
        column[2] = vmlal_s16(column[2], vget_low_s16(b), x);
        column[3] = vmlal_s16(column[3], vget_high_s16(b), x);
    }
    VI value() const { return vpaddq_s32(vpaddq_s32(column[0], column[1]), vpaddq_s32(column[2], column[3])); }
};

#endif

inline void put_sum(Digits&, float) {}

// N queries times V * 4 columns.
template <int N, int V>
inline void int8_block(const int8_t* m, int rows, size_t stride, const Digits* d, const float* scales, float* const* y,
                       const float* beta, int column, Ahead& ahead_of, int per_step) {
    Ahead ahead = ahead_of;
    Sums sums[N][V];
    for (int q = 0; q < N; ++q) {
        for (int v = 0; v < V; ++v) sums[q][v].clear();
    }
    for (int r = 0; r < rows; r += 4, m += stride) {
        if (column == 0) ahead.lines(per_step);
        int8x16_t codes[V];
        for (int v = 0; v < V; ++v) codes[v] = vld1q_s8(m + 16 * v);
        for (int q = 0; q < N; ++q) {
            const Operand x = operand(d[q], r);
            for (int v = 0; v < V; ++v) sums[q][v].add(codes[v], x);
        }
    }
    for (int q = 0; q < N; ++q) {
        for (int v = 0; v < V; ++v) {
            float* at = y[q] + column + 4 * v;
            const VF product = vmul(vfloat(sums[q][v].value()), vset(scales[q]));
            vstore(at, beta ? vfma(vload(at), vset(beta[q]), product) : product);
        }
    }
    ahead_of = ahead;
}

template <int N>
inline void int8_product(const int8_t* m, int rows, int columns, const Digits* d, const float* scales, float* const* y,
                         const float* beta, Ahead& ahead, int per_step) {
#ifdef __ARM_FEATURE_DOTPROD
    constexpr int kWide = N <= 2 ? 4 : 2;
#else
    constexpr int kWide = N <= 2 ? 2 : 1;
#endif
    const size_t stride = static_cast<size_t>(columns) * 4;
    int c = 0;
    for (; c + 4 * kWide <= columns; c += 4 * kWide) {
        int8_block<N, kWide>(m + 4 * c, rows, stride, d, scales, y, beta, c, ahead, per_step);
    }
    for (; c < columns; c += 4) int8_block<N, 1>(m + 4 * c, rows, stride, d, scales, y, beta, c, ahead, per_step);
}

uint64_t read_bytes(const uint8_t* data, size_t n) {
    uint64x2_t a = vdupq_n_u64(0), b = a;
    for (size_t i = 0; i + 32 <= n; i += 32) {
        a = vaddq_u64(a, vreinterpretq_u64_u8(vld1q_u8(data + i)));
        b = vaddq_u64(b, vreinterpretq_u64_u8(vld1q_u8(data + i + 16)));
    }
    return vaddvq_u64(vaddq_u64(a, b));
}

}  // namespace

#include "isa/shared/page_layout.h"
#include "isa/shared/decode.h"
#include "isa/shared/blocked.h"
#include "isa/shared/checksum.h"
#include "isa/shared/quantise.h"
#include "isa/shared/operators.h"
