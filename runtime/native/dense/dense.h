// Products of rows with a matrix of 4-bit weights, and a bias, as the operator MatMulNBits of ONNX Runtime stores it, or XNNPACK.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgekv {

constexpr int kDenseBlock = 32;  // weights that share a scale

inline int dense_blocks(int k) { return (k + kDenseBlock - 1) / kDenseBlock; }

enum class ScaleType { kFloat, kBf16 };

// [n, k] weights: scale * (code - zero), one scale and one zero per block of 32 along k.
struct Int4Weights {
    const uint8_t* codes;  // [n, blocks, 16]: the first of two codes is the low half of a byte
    const void* scales;    // [n, blocks]
    const uint8_t* zeros;  // [n, (blocks + 1) / 2], two to a byte; null: 8
    int n, k;
    ScaleType scale_type;
    const float* bias = nullptr;  // [n], added to every row; null: none
};

struct DenseKernels {
    const char* name;
    // The outputs of one task are this many columns, at most.
    int columns;
    // From this many rows on, worth using; otherwise the next kernels.
    int min_rows;
    // Bytes of rows made ready for product().
    size_t (*ready_bytes)(int rows, int k);
    // Makes rows [row0, row1) ready; row0 is a multiple of 16.
    void (*prepare)(const float* x, int rows, int k, int row0, int row1, uint8_t* ready);
    // Bytes that one call of product() works in.
    size_t (*work_bytes)(int rows, int k);
    // y[rows, n] without bias at columns [col0, col1); col0 is a multiple of `columns`.
    void (*product)(const Int4Weights&, const uint8_t* ready, int rows, int col0, int col1, float* y, uint8_t* work);
};

const DenseKernels* dense_amx();     // bf16 tiles; null where the processor (or the build) lacks them
const DenseKernels* dense_avx512();  // rows as 8-bit numbers, one scale per block
// Rows as 8-bit numbers too, decoded in registers for a few rows, and once for all rows of a chunk.
const DenseKernels* dense_neon();
const DenseKernels* dense_neon_chunk();
const DenseKernels* dense_neon_dot();        // with dot products
const DenseKernels* dense_neon_dot_chunk();
const DenseKernels* dense_neon_i8mm_chunk();  // with products of 8-bit matrices
const DenseKernels* dense_portable();  // nothing special, and slow

// Calls task(context, i) for each i in [0, count), in parallel where that pays.
struct Fork {
    void (*call)(void* pool, void (*task)(void* context, size_t i), size_t count, void* context);
    void* pool;
};

// Names of the kernels that are used here: "avx512", "avx512 amx", "neon", "neon-dot" or "neon-dot neon-i8mm"; empty where
// there are none that are worth it, or where EDGEKV_ISA names another instruction set.
const char* dense_names();

// y[rows, n] = x[rows, k] times the transposed weights, plus the bias, with the best kernels there are.
void dense(const Int4Weights&, const float* x, int rows, float* y, const Fork&);

}  // namespace edgekv
