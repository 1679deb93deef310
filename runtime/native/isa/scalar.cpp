// Portable C++: one lane. What runs where nothing better is known.
#include "half.h"
#include "kernels.h"

namespace {

constexpr int W = 1;
constexpr int kProductRows = 4;
constexpr int kProductColumns = 4;
using VF = float;
using VI = int32_t;
using VM = bool;

inline VF vset(float x) { return x; }
inline VF vload(const float* p) { return *p; }
inline void vstore(float* p, VF x) { *p = x; }
inline VF vadd(VF a, VF b) { return a + b; }
inline VF vsub(VF a, VF b) { return a - b; }
inline VF vmul(VF a, VF b) { return a * b; }
inline VF vdiv(VF a, VF b) { return a / b; }
inline VF vfma(VF a, VF b, VF c) { return a * b + c; }
inline VF vmax(VF a, VF b) { return a > b ? a : b; }  // b where a is a NaN
inline VF vmin(VF a, VF b) { return a < b ? a : b; }
inline VF vabs(VF a) { return bits_to_float(float_to_bits(a) & 0x7fffffff); }
// Half to even for |a| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
inline VF vround(VF a) {
    const float shifted = a + 12582912.f;
    return shifted - 12582912.f;
}
inline float vsum(VF a) { return a; }
inline float vpeak(VF a) { return a; }
inline VM vmask(uint32_t bits) { return bits & 1; }
inline VM vless(VF a, VF b) { return a < b; }
inline VF vselect(VM m, VF yes, VF no) { return m ? yes : no; }
inline VI vint(VF a) { return static_cast<int32_t>(vround(a)); }
inline VF vfloat(VI a) { return static_cast<float>(a); }
inline VI viload(const void* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return x;
}
inline void vistore(int32_t* p, VI x) { *p = x; }
inline VF vpow2(VF n) { return bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23); }
template <int J>
inline VI vbyte(VI a) {
    return static_cast<int8_t>(static_cast<uint32_t>(a) >> (8 * J));
}
inline VI vipack(VI a, VI b, VI c, VI d) {
    return static_cast<int32_t>((a & 255) | (b & 255) << 8 | (c & 255) << 16 | static_cast<uint32_t>(d) << 24);
}
inline VF vload_half(const uint16_t* p) { return half_to_float(*p); }
inline void vstore_half(uint16_t* p, VF x) { *p = float_to_half(x); }
inline void prefetch(const void*) {}

}  // namespace

#include "isa/shared/vector_math.h"

namespace {

struct Digits {
    int32_t value[kMaxDim];
};

// x times factor, which must be within the range of the digits. (The result is for instruction sets that need the sum.)
inline VF put_digits(Digits& d, const float* x, VF factor, int n) {
    for (int i = 0; i < n; ++i) d.value[i] = vint(x[i] * factor);
    return factor;
}
inline void put_sum(Digits&, float) {}
inline VF rows_sum(const VF* rows) { return rows[0]; }
inline VF rows_peak(const VF* rows) { return rows[0]; }

template <int N>
inline void int8_product(const int8_t* m, int rows, int columns, const Digits* d, const float* scales, float* const* y,
                         const float* beta, Ahead&, int) {
    for (int q = 0; q < N; ++q) {
        int32_t sum[kMaxDim] = {};
        for (int r = 0; r < rows; r += 4) {
            const int8_t* row = m + static_cast<size_t>(r) * columns;
            const int32_t* x = d[q].value + r;
            for (int c = 0; c < columns; ++c) {
                sum[c] += row[4 * c] * x[0] + row[4 * c + 1] * x[1] + row[4 * c + 2] * x[2] + row[4 * c + 3] * x[3];
            }
        }
        for (int c = 0; c < columns; ++c) {
            const float product = static_cast<float>(sum[c]) * scales[q];
            y[q][c] = beta ? y[q][c] * beta[q] + product : product;
        }
    }
}

uint64_t read_bytes(const uint8_t* data, size_t n) {
    uint64_t sum = 0;
    for (size_t i = 0; i + 8 <= n; i += 8) {
        uint64_t word;
        __builtin_memcpy(&word, data + i, 8);
        sum += word;
    }
    return sum;
}

}  // namespace

#include "isa/shared/page_layout.h"
#include "isa/shared/decode.h"
#include "isa/shared/blocked.h"
#include "isa/shared/checksum.h"
#include "isa/shared/quantise.h"
#include "isa/shared/operators.h"

namespace edgekv {

const Kernels* scalar_kernels() {
    static const Kernels kernels{"scalar",      decode_run, blocked_pages, blocked_own, merge,
                                 sum_mass, pack_warm,  to_half,       read_bytes, checksum,
                                 rms_norm, swiglu,     geglu, rotary};
    return &kernels;
}

}  // namespace edgekv
