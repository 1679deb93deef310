// For processors without dot products: products of bytes, added up as 16-bit numbers within a block.
#include "dense/dense.h"
#include "kernels.h"

#ifdef __aarch64__
#include "dense/neon_rows.h"

namespace edgekv {
namespace {

// 32 products of a weight of -8..7 with a number of -127..127 add up to a 16-bit number: columns are decoded as if their
// zero were 8, and what their own adds comes after.
struct PlainTile {
    // [row][32]
    static int place(int row, int eight) { return row * kDenseBlock + eight * 8; }
    static void put_scale(float* scales, int row, float scale, int sum) {
        scales[row] = scale;
        scales[kTileRows + row] = scale * static_cast<float>(sum);
    }

    // [column][32]; scales, then scales times 8 less the zero
    static void unpack(const uint8x16_t* packed, uint8x8_t zeros, const float* scales, PanelBlock& out) {
        for (int c = 0; c < kPanel; ++c) {
            int8_t* const to = out.codes + c * kDenseBlock;
            decode(packed[c], vdupq_n_u8(8), to, to + 16);
        }
        const int16x8_t lifts = vreinterpretq_s16_u16(vsubl_u8(vdup_n_u8(8), zeros));
        const int32x4_t wide[2] = {vmovl_s16(vget_low_s16(lifts)), vmovl_high_s16(lifts)};
        for (int v = 0; v < 2; ++v) {
            const float32x4_t scale = vld1q_f32(scales + 4 * v);
            vst1q_f32(out.scales + 4 * v, scale);
            vst1q_f32(out.scales + kPanel + 4 * v, vmulq_f32(scale, vcvtq_f32_s32(wide[v])));
        }
    }

    static int16x8_t dots(const int8_t* x, const int8_t* w) {
        const int8x16_t even = vld1q_s8(x), odd = vld1q_s8(x + 16), low = vld1q_s8(w), high = vld1q_s8(w + 16);
        int16x8_t sum = vmull_s8(vget_low_s8(low), vget_low_s8(even));
        sum = vmlal_high_s8(sum, low, even);
        sum = vmlal_s8(sum, vget_low_s8(high), vget_low_s8(odd));
        return vmlal_high_s8(sum, high, odd);
    }

    template <int kRow>
    static void add(float32x4_t (*sums)[2], const RowsBlock& rows, const PanelBlock& panel) {
        int16x8_t dot[kPanel];
#pragma GCC unroll 8
        for (int c = 0; c < kPanel; ++c) dot[c] = dots(rows.codes + kRow * kDenseBlock, panel.codes + c * kDenseBlock);
        const int16x8_t left = vpaddq_s16(vpaddq_s16(dot[0], dot[1]), vpaddq_s16(dot[2], dot[3]));
        const int16x8_t right = vpaddq_s16(vpaddq_s16(dot[4], dot[5]), vpaddq_s16(dot[6], dot[7]));
        const int16x8_t all = vpaddq_s16(left, right);
        const int32x4_t wide[2] = {vmovl_s16(vget_low_s16(all)), vmovl_high_s16(all)};
        const float32x4_t row_scales = vld1q_f32(rows.scales), row_sums = vld1q_f32(rows.scales + kTileRows);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            float32x4_t& sum = sums[kRow][v];
            const float32x4_t scale = vmulq_laneq_f32(vld1q_f32(panel.scales + 4 * v), row_scales, kRow);
            sum = vfmaq_f32(sum, vcvtq_f32_s32(wide[v]), scale);
            sum = vfmaq_laneq_f32(sum, vld1q_f32(panel.scales + kPanel + 4 * v), row_sums, kRow);
        }
    }

    static Sums multiply(const RowsBlock* rows, const PanelBlock* panel, int n_blocks) {
        float32x4_t sums[kTileRows][2];
        for (auto& row : sums) row[0] = row[1] = vdupq_n_f32(0.f);
        for (; n_blocks; --n_blocks, ++rows, ++panel) {
            add<0>(sums, *rows, *panel);
            add<1>(sums, *rows, *panel);
            add<2>(sums, *rows, *panel);
            add<3>(sums, *rows, *panel);
        }
        Sums out;
        std::memcpy(&out, sums, sizeof out);
        return out;
    }
};

}  // namespace

const DenseKernels* dense_neon() {
    static const DenseKernels kernels = rows_kernels("neon");
    return &kernels;
}

const DenseKernels* dense_neon_chunk() {
    static const DenseKernels kernels = Chunk<PlainTile>::kernels("neon");
    return &kernels;
}

}  // namespace edgekv

#else
namespace edgekv {
const DenseKernels* dense_neon() { return nullptr; }
const DenseKernels* dense_neon_chunk() { return nullptr; }
}  // namespace edgekv
#endif
