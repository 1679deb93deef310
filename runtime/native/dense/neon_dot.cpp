#include "dense/dense.h"
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "dense/neon_rows.h"

namespace edgekv {
namespace {

// Sums of four columns are the lanes of a vector: a product takes four numbers of a row, by their place in a vector, and
// the same four of four columns.
struct DotTile {
    static constexpr int kFours = 4;  // in a half of a block

    // [half][row][16]
    static int place(int row, int eight) { return eight / 2 * 16 * kTileRows + row * 16 + eight % 2 * 8; }
    static void put_scale(float* scales, int row, float scale, int) { scales[row] = scale; }

    // [half][four][column][4]
    static void unpack(const uint8x16_t* packed, uint8x8_t zeros, const float* scales, PanelBlock& out) {
        static constexpr uint8_t kSpread[2][16] = {{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3},
                                                   {4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7}};
        const uint8x16_t all_zeros = vcombine_u8(zeros, zeros);
        for (int v = 0; v < 2; ++v) {
            uint32x4_t in[4];
            for (int c = 0; c < 4; ++c) in[c] = vreinterpretq_u32_u8(packed[4 * v + c]);
            const uint64x2_t even01 = vreinterpretq_u64_u32(vtrn1q_u32(in[0], in[1]));
            const uint64x2_t even23 = vreinterpretq_u64_u32(vtrn1q_u32(in[2], in[3]));
            const uint64x2_t odd01 = vreinterpretq_u64_u32(vtrn2q_u32(in[0], in[1]));
            const uint64x2_t odd23 = vreinterpretq_u64_u32(vtrn2q_u32(in[2], in[3]));
            const uint64x2_t fours[kFours] = {vtrn1q_u64(even01, even23), vtrn1q_u64(odd01, odd23),
                                              vtrn2q_u64(even01, even23), vtrn2q_u64(odd01, odd23)};
            const uint8x16_t zero = vqtbl1q_u8(all_zeros, vld1q_u8(kSpread[v]));
            for (int four = 0; four < kFours; ++four) {
                int8_t* const to = out.codes + four * 32 + v * 16;
                decode(vreinterpretq_u8_u64(fours[four]), zero, to, to + kFours * 32);
            }
        }
        std::memcpy(out.scales, scales, kPanel * sizeof(float));
    }

    // Two fours, each of two vectors of columns.
    template <int kFour>
    static void step(const int8x16x4_t& x, const int8x16x4_t& w, int32x4_t (*sums)[2]) {
#pragma GCC unroll 4
        for (int row = 0; row < kTileRows; ++row) {
            sums[row][0] = vdotq_laneq_s32(sums[row][0], w.val[0], x.val[row], kFour);
            sums[row][1] = vdotq_laneq_s32(sums[row][1], w.val[1], x.val[row], kFour);
            sums[row][0] = vdotq_laneq_s32(sums[row][0], w.val[2], x.val[row], kFour + 1);
            sums[row][1] = vdotq_laneq_s32(sums[row][1], w.val[3], x.val[row], kFour + 1);
        }
    }

    static Sums multiply(const RowsBlock* rows, const PanelBlock* panel, int n_blocks) {
        float32x4_t sums[kTileRows][2];
        for (auto& row : sums) row[0] = row[1] = vdupq_n_f32(0.f);
        const int8_t *from = rows->codes, *w = panel->codes;
        for (; n_blocks; --n_blocks) {
            int32x4_t dot[kTileRows][2];
            for (auto& row : dot) row[0] = row[1] = vdupq_n_s32(0);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const int8x16x4_t x = next_four(from);
                step<0>(x, next_four(w), dot);
                step<2>(x, next_four(w), dot);
            }
            const float* const scales = reinterpret_cast<const float*>(w);
            const float32x4_t row_scales = vld1q_f32(reinterpret_cast<const float*>(from));
            add<0>(sums, dot, row_scales, scales);
            add<1>(sums, dot, row_scales, scales);
            add<2>(sums, dot, row_scales, scales);
            add<3>(sums, dot, row_scales, scales);
            move(from, sizeof(RowsBlock::scales));
            move(w, sizeof(PanelBlock::scales));
        }
        Sums out;
        std::memcpy(&out, sums, sizeof out);
        return out;
    }

    template <int kRow>
    static void add(float32x4_t (*sums)[2], const int32x4_t (*dot)[2], float32x4_t row_scales, const float* scales) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            const float32x4_t scale = vmulq_laneq_f32(vld1q_f32(scales + 4 * v), row_scales, kRow);
            sums[kRow][v] = vfmaq_f32(sums[kRow][v], vcvtq_f32_s32(dot[kRow][v]), scale);
        }
    }
};

}  // namespace

const DenseKernels* dense_neon_dot() {
    static const DenseKernels kernels = rows_kernels("neon-dot");
    return neon_dot_kernels() ? &kernels : nullptr;
}

const DenseKernels* dense_neon_dot_chunk() {
    static const DenseKernels kernels = Chunk<DotTile>::kernels("neon-dot");
    return neon_dot_kernels() ? &kernels : nullptr;
}

}  // namespace edgekv

#else
namespace edgekv {
const DenseKernels* dense_neon_dot() { return nullptr; }
const DenseKernels* dense_neon_dot_chunk() { return nullptr; }
}  // namespace edgekv
#endif
