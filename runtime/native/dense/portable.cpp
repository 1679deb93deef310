// For processors without the instructions of the others, and as what they are compared with. Rows are 8-bit numbers
// with a scale per block here too, so that results differ in the order of sums only.
#include <cmath>
#include <cstring>

#include "dense/dense.h"

namespace edgekv {
namespace {

constexpr int kColumns = 64;  // of a task

// Rows made ready: per block 32 numbers, then their scale and the scaled sum.
struct Block {
    int8_t codes[kDenseBlock];
    float scale, sum;
};

size_t ready_bytes(int rows, int k) { return static_cast<size_t>(rows) * dense_blocks(k) * sizeof(Block); }

void prepare(const float* x, int, int k, int row0, int row1, uint8_t* ready) {
    const int n_blocks = dense_blocks(k);
    for (int row = row0; row < row1; ++row) {
        Block* out = reinterpret_cast<Block*>(ready) + static_cast<size_t>(row) * n_blocks;
        for (int first = 0; first < k; first += kDenseBlock, ++out) {
            const float* from = x + static_cast<size_t>(row) * k + first;
            const int n = k - first < kDenseBlock ? k - first : kDenseBlock;
            float peak = 0.f;
            for (int i = 0; i < n; ++i) peak = std::fmax(peak, std::fabs(from[i]));
            std::memset(out->codes, 0, sizeof out->codes);
            int sum = 0;
            for (int i = 0; i < n && peak > 0.f; ++i) {
                out->codes[i] = static_cast<int8_t>(std::nearbyint(from[i] * (127.f / peak)));
                sum += out->codes[i];
            }
            out->scale = peak / 127.f;
            out->sum = out->scale * static_cast<float>(sum);
        }
    }
}

float load_scale(const Int4Weights& w, size_t at) {
    if (w.scale_type == ScaleType::kFloat) return static_cast<const float*>(w.scales)[at];
    const uint32_t bits = uint32_t{static_cast<const uint16_t*>(w.scales)[at]} << 16;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return scale;
}

void product(const Int4Weights& w, const uint8_t* ready, int rows, int col0, int col1, float* y, uint8_t*) {
    const int n_blocks = dense_blocks(w.k);
    const Block* const blocks = reinterpret_cast<const Block*>(ready);
    for (int row = 0; row < rows; ++row) {
        for (int col = col0; col < col1; ++col) {
            const uint8_t* codes = w.codes + static_cast<size_t>(col) * n_blocks * 16;
            float sum = 0.f;
            for (int b = 0; b < n_blocks; ++b, codes += 16) {
                const Block& block = blocks[static_cast<size_t>(row) * n_blocks + b];
                int dot = 0;
                for (int i = 0; i < 16; ++i) {
                    dot += (codes[i] & 15) * block.codes[2 * i] + (codes[i] >> 4) * block.codes[2 * i + 1];
                }
                const size_t pairs = static_cast<size_t>(n_blocks + 1) / 2;
                const int zero = w.zeros ? w.zeros[col * pairs + b / 2] >> (4 * (b & 1)) & 15 : 8;
                const float scale = load_scale(w, static_cast<size_t>(col) * n_blocks + b);
                sum += scale * (block.scale * static_cast<float>(dot) - static_cast<float>(zero) * block.sum);
            }
            y[static_cast<size_t>(row) * w.n + col] = sum;
        }
    }
}

}  // namespace

const DenseKernels* dense_portable() {
    static const DenseKernels kernels{"portable", kColumns, 1, ready_bytes, prepare,
                                      [](int, int) { return size_t{0}; }, product};
    return &kernels;
}

}  // namespace edgekv
