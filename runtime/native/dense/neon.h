// Products with 4-bit weights on NEON (AArch64): rows are 8-bit numbers with a scale per block, as in portable.cpp.
// neon.cpp, neon_dot.cpp and neon_i8mm.cpp include this, each compiled for its own processors.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "dense/dense.h"

namespace {

using namespace edgekv;

struct Quantised {
    int8x16_t even, odd;  // the numbers at even places of the block, and at odd ones, as the low and high halves of codes are
    float scale;
    int sum;
};

// `left` numbers, at most a block; zeros follow.
inline Quantised quantise(const float* x, int left) {
    float padded[kDenseBlock];
    if (left < kDenseBlock) {
        std::memset(padded, 0, sizeof padded);
        if (left > 0) std::memcpy(padded, x, left * sizeof(float));
        x = padded;
    }
    float32x4x2_t pairs[4];
    float32x4_t peaks = vdupq_n_f32(0.f);
    for (int i = 0; i < 4; ++i) {
        pairs[i] = vld2q_f32(x + 8 * i);
        peaks = vmaxnmq_f32(peaks, vmaxnmq_f32(vabsq_f32(pairs[i].val[0]), vabsq_f32(pairs[i].val[1])));
    }
    const float peak = vmaxnmvq_f32(peaks), inverse = peak > 0.f ? 127.f / peak : 0.f;
    int8x16_t codes[2];
    for (int odd = 0; odd < 2; ++odd) {
        int16x4_t narrow[4];
        for (int i = 0; i < 4; ++i) narrow[i] = vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(pairs[i].val[odd], inverse)));
        codes[odd] = vcombine_s8(vqmovn_s16(vcombine_s16(narrow[0], narrow[1])), vqmovn_s16(vcombine_s16(narrow[2], narrow[3])));
    }
    return {codes[0], codes[1], peak / 127.f, vaddlvq_s16(vpadalq_s8(vpaddlq_s8(codes[0]), codes[1]))};
}

template <ScaleType kType>
inline float load_scale(const void* scales, size_t at) {
    if constexpr (kType == ScaleType::kFloat) return static_cast<const float*>(scales)[at];
    const uint32_t bits = uint32_t{static_cast<const uint16_t*>(scales)[at]} << 16;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return scale;
}

// A chunk: the weights of a panel of columns are decoded once, into a thread's working memory, and tiles of sums
// of rows by columns stay in registers over all blocks.
constexpr int kTileRows = 4, kPanel = 8;  // columns
constexpr int kChunkColumns = 16;         // of a task: a cache line of the result

// Four rows in one block. The order of codes and what else is in scales[] is that of a Tile.
struct RowsBlock {
    int8_t codes[kTileRows * kDenseBlock];
    float scales[2 * kTileRows];
};
// Eight columns in one block.
struct PanelBlock {
    int8_t codes[kPanel * kDenseBlock];
    float scales[2 * kPanel];
};

struct Sums {
    float32x4_t at[kTileRows][2];  // two vectors of columns
};

// Each Tile has these functions:
//   place(row, eight)   where 8 of a row's 32 numbers are in RowsBlock::codes: first 16 even ones, then 16 odd ones
//   put_scale(row, ...) writes RowsBlock::scales
//   unpack(...)         decodes eight columns of a block: 16 bytes of codes each, their zeros (8 bytes) and scales
//   multiply(...)       of rows and a panel, over all blocks
template <class Tile>
struct Chunk {
    static constexpr int kMinRows = 4;

    static size_t ready_bytes(int rows, int k) {
        return static_cast<size_t>((rows + kTileRows - 1) / kTileRows) * dense_blocks(k) * sizeof(RowsBlock);
    }

    static void prepare(const float* x, int, int k, int row0, int row1, uint8_t* ready) {
        const int n_blocks = dense_blocks(k);
        for (int first = row0; first < row1; first += kTileRows) {
            RowsBlock* const out = reinterpret_cast<RowsBlock*>(ready) + static_cast<size_t>(first / kTileRows) * n_blocks;
            for (int row = 0; row < kTileRows; ++row) {
                const float* from = x + static_cast<size_t>(first + row) * k;
                for (int b = 0; b < n_blocks; ++b) {
                    const Quantised q = quantise(from + b * kDenseBlock, first + row < row1 ? k - b * kDenseBlock : 0);
                    vst1_s8(out[b].codes + Tile::place(row, 0), vget_low_s8(q.even));
                    vst1_s8(out[b].codes + Tile::place(row, 1), vget_high_s8(q.even));
                    vst1_s8(out[b].codes + Tile::place(row, 2), vget_low_s8(q.odd));
                    vst1_s8(out[b].codes + Tile::place(row, 3), vget_high_s8(q.odd));
                    Tile::put_scale(out[b].scales, row, q.scale, q.sum);
                }
            }
        }
    }

    static size_t work_bytes(int, int k) { return dense_blocks(k) * sizeof(PanelBlock); }

    template <ScaleType kType>
    static void unpack(const Int4Weights& w, int col, PanelBlock* panel) {
        const int n_blocks = dense_blocks(w.k);
        const uint8_t *codes[kPanel], *zeros[kPanel] = {};
        size_t scales[kPanel];
        for (int c = 0; c < kPanel; ++c) {
            const size_t at = col + c < w.n ? col + c : w.n - 1;  // columns from n on repeat the last one
            codes[c] = w.codes + at * n_blocks * 16;
            scales[c] = at * n_blocks;
            if (w.zeros) zeros[c] = w.zeros + at * ((n_blocks + 1) / 2);
        }
        for (int b = 0; b < n_blocks; ++b) {
            uint8x16_t packed[kPanel];
            alignas(16) float scale[kPanel];
            uint8_t zero[kPanel];
            for (int c = 0; c < kPanel; ++c) {
                packed[c] = vld1q_u8(codes[c] + b * 16);
                scale[c] = load_scale<kType>(w.scales, scales[c] + b);
                zero[c] = w.zeros ? zeros[c][b / 2] >> (4 * (b & 1)) & 15 : 8;
            }
            Tile::unpack(packed, vld1_u8(zero), scale, panel[b]);
        }
    }

    static void product(const Int4Weights& w, const uint8_t* ready, int rows, int col0, int col1, float* y, uint8_t* work) {
        const int n_blocks = dense_blocks(w.k);
        PanelBlock* const panel = reinterpret_cast<PanelBlock*>(work);
        for (int col = col0; col < col1; col += kPanel) {
            if (w.scale_type == ScaleType::kFloat) {
                unpack<ScaleType::kFloat>(w, col, panel);
            } else {
                unpack<ScaleType::kBf16>(w, col, panel);
            }
            const RowsBlock* from = reinterpret_cast<const RowsBlock*>(ready);
            const int n_columns = col1 - col < kPanel ? col1 - col : kPanel;
            for (int first = 0; first < rows; first += kTileRows, from += n_blocks) {
                const Sums sums = Tile::multiply(from, panel, n_blocks);
                const int n_rows = rows - first < kTileRows ? rows - first : kTileRows;
                for (int row = 0; row < n_rows; ++row) {
                    float* const to = y + static_cast<size_t>(first + row) * w.n + col;
                    if (n_columns == kPanel) {
                        vst1q_f32(to, sums.at[row][0]);
                        vst1q_f32(to + 4, sums.at[row][1]);
                    } else {
                        std::memcpy(to, &sums.at[row], n_columns * sizeof(float));
                    }
                }
            }
        }
    }

    static DenseKernels kernels(const char* name) {
        return {name, kChunkColumns, kMinRows, ready_bytes, prepare, work_bytes, product};
    }
};

// So that the compiler does not make an address of its own from every offset.
template <typename T>
inline void move(const T*& at, size_t n) {
    at += n;
    asm("" : "+r"(at));
}

// Four vectors: one instruction loads them and moves on.
inline int8x16x4_t next_four(const int8_t*& at) {
    const int8x16x4_t four = vld1q_s8_x4(at);
    move(at, sizeof four);
    return four;
}

// Signed weights from packed codes: two vectors, of low halves and of high ones.
inline void decode(uint8x16_t packed, uint8x16_t zero, int8_t* low, int8_t* high) {
    vst1q_s8(low, vreinterpretq_s8_u8(vsubq_u8(vandq_u8(packed, vdupq_n_u8(15)), zero)));
    vst1q_s8(high, vreinterpretq_s8_u8(vsubq_u8(vshrq_n_u8(packed, 4), zero)));
}

}  // namespace
