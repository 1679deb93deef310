// Chunks on the matrix products of i8mm; single rows have nothing to gain from them.
#include "dense/dense.h"
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)
#include "dense/neon.h"

#ifdef __linux__
#include <sys/auxv.h>
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1 << 13)
#endif
#endif

namespace edgekv {
namespace {

// A product takes eight numbers of two rows and of two columns; its sums are [row][column].
struct MatrixTile {
    static constexpr int kPairs = kPanel / 2, kRowPairs = kTileRows / 2;

    // [eight][row][8]
    static int place(int row, int eight) { return eight * 8 * kTileRows + row * 8; }
    static void put_scale(float* scales, int row, float scale, int) { scales[2 * row] = scales[2 * row + 1] = scale; }

    // [eight][column][8]; the scales of two columns twice
    static void unpack(const uint8x16_t* packed, uint8x8_t zeros, const float* scales, PanelBlock& out) {
        const uint8x16_t all_zeros = vcombine_u8(zeros, zeros);
        for (int pair = 0; pair < kPairs; ++pair) {
            const uint64x2_t a = vreinterpretq_u64_u8(packed[2 * pair]), b = vreinterpretq_u64_u8(packed[2 * pair + 1]);
            const uint8x16_t places = vcombine_u8(vdup_n_u8(2 * pair), vdup_n_u8(2 * pair + 1));
            const uint8x16_t zero = vqtbl1q_u8(all_zeros, places);
            int8_t* const to = out.codes + pair * 16;
            decode(vreinterpretq_u8_u64(vtrn1q_u64(a, b)), zero, to, to + 2 * kPairs * 16);
            decode(vreinterpretq_u8_u64(vtrn2q_u64(a, b)), zero, to + kPairs * 16, to + 3 * kPairs * 16);
            const float32x2_t both = vld1_f32(scales + 2 * pair);
            vst1q_f32(out.scales + 4 * pair, vcombine_f32(both, both));
        }
    }

    // Eight numbers of two pairs of rows and of four pairs of columns.
    static void step(int8x16_t upper, int8x16_t lower, const int8x16x4_t& w, int32x4_t (*sums)[kPairs]) {
#pragma GCC unroll 4
        for (int c = 0; c < kPairs; ++c) {
            sums[0][c] = vmmlaq_s32(sums[0][c], upper, w.val[c]);
            sums[1][c] = vmmlaq_s32(sums[1][c], lower, w.val[c]);
        }
    }

    static Sums multiply(const RowsBlock* rows, const PanelBlock* panel, int n_blocks) {
        float32x4_t total[kRowPairs][kPairs];
        for (auto& pairs : total) {
            for (auto& sum : pairs) sum = vdupq_n_f32(0.f);
        }
        const int8_t *from = rows->codes, *w = panel->codes;
        for (; n_blocks; --n_blocks) {
            int32x4_t dot[kRowPairs][kPairs];
            for (auto& pairs : dot) {
                for (auto& sum : pairs) sum = vdupq_n_s32(0);
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const int8x16x4_t x = next_four(from);
                step(x.val[0], x.val[1], next_four(w), dot);
                step(x.val[2], x.val[3], next_four(w), dot);
            }
            const float* const row_scales = reinterpret_cast<const float*>(from);
            const float* const scales = reinterpret_cast<const float*>(w);
#pragma GCC unroll 2
            for (int r = 0; r < kRowPairs; ++r) {
#pragma GCC unroll 4
                for (int c = 0; c < kPairs; ++c) {
                    const float32x4_t scale = vmulq_f32(vld1q_f32(scales + 4 * c), vld1q_f32(row_scales + 4 * r));
                    total[r][c] = vfmaq_f32(total[r][c], vcvtq_f32_s32(dot[r][c]), scale);
                }
            }
            move(from, sizeof(RowsBlock::scales));
            move(w, sizeof(PanelBlock::scales));
        }
        Sums sums;
#pragma GCC unroll 2
        for (int r = 0; r < kRowPairs; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const float64x2_t left = vreinterpretq_f64_f32(total[r][2 * v]);
                const float64x2_t right = vreinterpretq_f64_f32(total[r][2 * v + 1]);
                sums.at[2 * r][v] = vreinterpretq_f32_f64(vtrn1q_f64(left, right));
                sums.at[2 * r + 1][v] = vreinterpretq_f32_f64(vtrn2q_f64(left, right));
            }
        }
        return sums;
    }
};

bool processor_has_i8mm() {
#ifdef __linux__
    return getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#else
    return false;
#endif
}

}  // namespace

const DenseKernels* dense_neon_i8mm_chunk() {
    static const DenseKernels kernels = Chunk<MatrixTile>::kernels("neon-i8mm");
    static const bool usable = neon_dot_kernels() && processor_has_i8mm();
    return usable ? &kernels : nullptr;
}

}  // namespace edgekv

#else
namespace edgekv {
const DenseKernels* dense_neon_i8mm_chunk() { return nullptr; }
}  // namespace edgekv
#endif
