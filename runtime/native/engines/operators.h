// The operators of a decoder's dense part as plain functions, for an engine that has its own tensors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dense/dense.h"

namespace edgekv {

// All matrices are dense and in rows of tokens. Shared as an address with the ExecuTorch shim, which repeats it: its
// first field changes with it.
struct Operators {
    int64_t version;
    // y[rows, n] = x[rows, k] times transposed weights, plus bias[n] if there is one. codes [n, k / 2], scales
    // [n, k / 32] bf16; weight = scale * (code - 8).
    void (*linear_int4)(const float* x, const uint8_t* codes, const void* scales, const float* bias, int rows, int n,
                        int k, float* y);
    // Of each row: y = x * weight / sqrt(mean(x * x) + eps). With a residual, x is x + residual, which total gets.
    void (*rms_norm)(const float* x, const float* residual, const float* weight, float eps, int rows, int k, float* y,
                     float* total);
    // y = gate / (1 + exp(-gate)) * up, of n numbers.
    void (*swiglu)(const float* gate, const float* up, int64_t n, float* y);
    // y = gelu(gate) * up, of n numbers; gelu in its tanh approximation.
    void (*geglu)(const float* gate, const float* up, int64_t n, float* y);
    // x [tokens, heads, dim]; cos, sin [tokens, half]: rotates channel i with channel i + half.
    void (*rotary)(const float* x, const float* cos, const float* sin, int tokens, int heads, int dim, int half,
                   float* y);
};

// The operators, on so many threads of their own, which wait for work awake while a token is computed.
const Operators& operators(int n_threads);

// Lends those threads (ThreadPool::Executor), so that attention finds them awake, and no others in their way.
// The calling thread does it all before operators() was called.
bool operator_threads(void (*task)(void* context, size_t i), void* context, size_t count);
extern const Fork operator_fork;

}  // namespace edgekv
