// One row or a few, with the weights decoded in registers. See dense/neon.h.
#pragma once

#include "dense/neon.h"

namespace {

constexpr int kGroup = 8;          // blocks
constexpr int kHalf = 4;           // whose sums are the lanes of a vector
constexpr int kMaxRows = 3;        // more are sooner done as a chunk
constexpr int kRowsColumns = 64;   // of a task
constexpr int columns_at_once(int rows) { return rows == 1 ? 4 : 2; }

// A group of a row made ready. Codes in a product are 0..15: what their zero adds to it is taken off.
struct RowGroup {
    int8_t codes[kGroup][2][16];        // even places, odd places
    alignas(16) int32_t lifts[kGroup][4];  // -8 times the sum of codes, and zeros: where sums start if the zero is 8
    float scales[kGroup];
    int16_t sums[kGroup];               // of codes
};

alignas(16) constexpr int32_t kNoLifts[kHalf][4] = {};

inline int row_groups(int k) { return (dense_blocks(k) + kGroup - 1) / kGroup; }

size_t rows_ready_bytes(int rows, int k) { return static_cast<size_t>(rows) * row_groups(k) * sizeof(RowGroup); }

void rows_prepare(const float* x, int, int k, int row0, int row1, uint8_t* ready) {
    RowGroup* out = reinterpret_cast<RowGroup*>(ready) + static_cast<size_t>(row0) * row_groups(k);
    for (int row = row0; row < row1; ++row) {
        const float* const from = x + static_cast<size_t>(row) * k;
        for (int first = 0; first < k; first += kGroup * kDenseBlock, ++out) {
            for (int b = 0; b < kGroup; ++b) {
                const int at = first + b * kDenseBlock;
                const Quantised q = quantise(from + at, k - at);
                vst1q_s8(out->codes[b][0], q.even);
                vst1q_s8(out->codes[b][1], q.odd);
                vst1q_s32(out->lifts[b], vsetq_lane_s32(-8 * q.sum, vdupq_n_s32(0), 0));
                out->scales[b] = q.scale;
                out->sums[b] = static_cast<int16_t>(q.sum);
            }
        }
    }
}

// Lanes that add up to `start` plus the product of a block.
inline int32x4_t dots(int32x4_t start, int8x16_t low, int8x16_t high, const int8_t (*x)[16]) {
    const int8x16_t even = vld1q_s8(x[0]), odd = vld1q_s8(x[1]);
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(vdotq_s32(start, low, even), high, odd);
#else
    int16x8_t sum = vmull_s8(vget_low_s8(low), vget_low_s8(even));
    sum = vmlal_high_s8(sum, low, even);
    sum = vmlal_s8(sum, vget_low_s8(high), vget_low_s8(odd));
    return vpadalq_s16(start, vmlal_high_s8(sum, high, odd));
#endif
}

template <ScaleType kType>
inline float32x4_t load_scales(const uint8_t* p) {
    if constexpr (kType == ScaleType::kFloat) return vld1q_f32(reinterpret_cast<const float*>(p));
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}

// The zeros of eight blocks, from four bytes.
struct Zeros {
    uint8x16_t places;  // of each one's byte
    int16x8_t shifts;   // that leave its four bits at the top
    static Zeros make() {
        static constexpr uint8_t kPlaces[16] = {0, 99, 0, 99, 1, 99, 1, 99, 2, 99, 2, 99, 3, 99, 3, 99};
        static constexpr int16_t kShifts[8] = {12, 8, 12, 8, 12, 8, 12, 8};
        return {vld1q_u8(kPlaces), vld1q_s16(kShifts)};
    }
    int16x8_t load(const uint8_t* p) const {
        uint32_t bytes;
        std::memcpy(&bytes, p, sizeof bytes);
        const uint16x8_t words = vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(bytes)), places));
        return vreinterpretq_s16_u16(vshrq_n_u16(vshlq_u16(words, shifts), 12));
    }
};

// Where the weights of a column are, from some group on.
struct Column {
    const uint8_t *codes, *scales, *zeros;
};

// Moves on in the codes of the columns.
template <ScaleType kType, bool kZeros, int C, int R>
inline void group_product(Column (&columns)[C], const RowGroup* const (&x)[R], const Zeros& zeros,
                          float32x4_t (&sums)[C][R]) {
    constexpr size_t kScale = kType == ScaleType::kFloat ? sizeof(float) : sizeof(uint16_t);
    // Loading where two sums start is one instruction, and copying two registers is two: so the compiler is not to know that
    // they are the same for each column.
    const int32_t(*starts[R])[4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) starts[r] = kZeros ? kNoLifts : x[r]->lifts;
    int16x8_t zero[C];
    if constexpr (kZeros) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) zero[c] = zeros.load(columns[c].zeros);
    }
#pragma GCC unroll 2
    for (int first = 0; first < kGroup; first += kHalf) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            const float32x4_t scales = load_scales<kType>(columns[c].scales + first * kScale);
            const uint8x16x4_t packed = vld1q_u8_x4(columns[c].codes);
            move(columns[c].codes, sizeof packed);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                asm volatile("" : "+r"(starts[r]));
                int32x4_t dot[kHalf];
#pragma GCC unroll 4
                for (int b = 0; b < kHalf; ++b) dot[b] = vld1q_s32(starts[r][(kZeros ? 0 : first) + b]);
                asm("" : "+w"(dot[0]), "+w"(dot[1]), "+w"(dot[2]), "+w"(dot[3]));  // together
#pragma GCC unroll 4
                for (int b = 0; b < kHalf; ++b) {
                    const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(packed.val[b], vdupq_n_u8(15)));
                    const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(packed.val[b], 4));
                    dot[b] = dots(dot[b], low, high, x[r]->codes[first + b]);
                }
                int32x4_t all = vpaddq_s32(vpaddq_s32(dot[0], dot[1]), vpaddq_s32(dot[2], dot[3]));
                if constexpr (kZeros) {
                    const int16x8_t row_sums = vld1q_s16(x[r]->sums);
                    all = first ? vmlsl_high_s16(all, zero[c], row_sums)
                                : vmlsl_s16(all, vget_low_s16(zero[c]), vget_low_s16(row_sums));
                }
                const float32x4_t scale = vmulq_f32(scales, vld1q_f32(x[r]->scales + first));
                sums[c][r] = vfmaq_f32(sums[c][r], vcvtq_f32_s32(all), scale);
            }
        }
    }
}

// C columns times R rows at a time, while there are C of them; returns where it ends.
template <ScaleType kType, bool kZeros, int C, int R>
int columns_product(const Int4Weights& w, const RowGroup* rows, int col, int col1, float* y) {
    constexpr size_t kScale = kType == ScaleType::kFloat ? sizeof(float) : sizeof(uint16_t);
    const size_t n_blocks = dense_blocks(w.k), zeros_stride = (n_blocks + 1) / 2, n_groups = row_groups(w.k);
    const size_t rest = n_blocks % kGroup;
    const Zeros zeros = Zeros::make();
    Column columns[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
        columns[c] = {w.codes + (col + c) * n_blocks * 16,
                      static_cast<const uint8_t*>(w.scales) + (col + c) * n_blocks * kScale,
                      kZeros ? w.zeros + (col + c) * zeros_stride : nullptr};
    }
    for (; col + C <= col1; col += C) {
        const RowGroup* x[R];
        float32x4_t sums[C][R];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[c][r] = vdupq_n_f32(0.f);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) x[r] = rows + r * n_groups;
        for (size_t left = n_blocks / kGroup; left; --left) {
            group_product<kType, kZeros, C, R>(columns, x, zeros, sums);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                columns[c].scales += kGroup * kScale;
                if constexpr (kZeros) columns[c].zeros += kGroup / 2;
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) ++x[r];
        }
        if (rest) {  // as a whole group: rows have zeros there, scales too
            alignas(16) uint8_t codes[C][kGroup * 16] = {}, scales[C][kGroup * kScale] = {}, zero[C][kGroup / 2] = {};
            Column copies[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                std::memcpy(codes[c], columns[c].codes, rest * 16);
                std::memcpy(scales[c], columns[c].scales, rest * kScale);
                if constexpr (kZeros) std::memcpy(zero[c], columns[c].zeros, (rest + 1) / 2);
                copies[c] = {codes[c], scales[c], zero[c]};
            }
            group_product<kType, kZeros, C, R>(copies, x, zeros, sums);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            float* const to = y + static_cast<size_t>(r) * w.n + col;
            if constexpr (C == 4) {
                vst1q_f32(to, vpaddq_f32(vpaddq_f32(sums[0][r], sums[1][r]), vpaddq_f32(sums[2][r], sums[3][r])));
            } else {
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) to[c] = vaddvq_f32(sums[c][r]);
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            move(columns[c].codes, (C - 1) * n_blocks * 16 + rest * 16);
            move(columns[c].scales, ((C - 1) * n_blocks + rest) * kScale);
            if constexpr (kZeros) move(columns[c].zeros, C * zeros_stride - n_blocks / kGroup * (kGroup / 2));
        }
    }
    return col;
}

template <ScaleType kType, bool kZeros, int R>
void rows_product(const Int4Weights& w, const RowGroup* rows, int col0, int col1, float* y) {
    const int rest = columns_product<kType, kZeros, columns_at_once(R), R>(w, rows, col0, col1, y);
    columns_product<kType, kZeros, 1, R>(w, rows, rest, col1, y);
}

template <ScaleType kType, bool kZeros>
void rows_product(const Int4Weights& w, const RowGroup* rows, int n_rows, int col0, int col1, float* y) {
    for (int row = 0; row < n_rows; row += kMaxRows) {
        const RowGroup* const from = rows + static_cast<size_t>(row) * row_groups(w.k);
        float* const to = y + static_cast<size_t>(row) * w.n;
        switch (n_rows - row) {
            case 1: rows_product<kType, kZeros, 1>(w, from, col0, col1, to); break;
            case 2: rows_product<kType, kZeros, 2>(w, from, col0, col1, to); break;
            default: rows_product<kType, kZeros, 3>(w, from, col0, col1, to);
        }
    }
}

void rows_product(const Int4Weights& w, const uint8_t* ready, int rows, int col0, int col1, float* y, uint8_t*) {
    const RowGroup* const from = reinterpret_cast<const RowGroup*>(ready);
    if (w.scale_type == ScaleType::kFloat) {
        w.zeros ? rows_product<ScaleType::kFloat, true>(w, from, rows, col0, col1, y)
                : rows_product<ScaleType::kFloat, false>(w, from, rows, col0, col1, y);
    } else {
        w.zeros ? rows_product<ScaleType::kBf16, true>(w, from, rows, col0, col1, y)
                : rows_product<ScaleType::kBf16, false>(w, from, rows, col0, col1, y);
    }
}

DenseKernels rows_kernels(const char* name) {
    return {name, kRowsColumns, 1, rows_ready_bytes, rows_prepare, [](int, int) { return size_t{0}; }, rows_product};
}

}  // namespace
