#include "dense/dense.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace edgekv {
namespace {

constexpr int kRowsPerTask = 16;

// Memory that a thread keeps for its next call.
class Scratch {
  public:
    // At least n bytes, aligned to a cache line; what was in them is lost.
    uint8_t* at_least(size_t n) {
        if (n > size_) {
            size_ = 0;
            bytes_.reset();
            bytes_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (n + 63) & ~size_t{63})));
            if (!bytes_) throw std::bad_alloc();
            size_ = n;
        }
        return bytes_.get();
    }

  private:
    std::unique_ptr<uint8_t, decltype(&std::free)> bytes_{nullptr, &std::free};
    size_t size_ = 0;
};

// A function, since a lambda that names a thread_local variable of the function around it would not initialise it.
Scratch& work_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

template <typename F>
void fork(const Fork& fork, size_t count, F&& body) {
    if (count == 1) return body(0);
    fork.call(fork.pool, [](void* context, size_t i) { (*static_cast<F*>(context))(i); }, count, &body);
}

// What the instruction set in use has: kernels for many rows, where they are others than those for a few.
struct Used {
    const char* names;
    const DenseKernels *few, *many;

    const DenseKernels& at(int rows) const { return many && rows >= many->min_rows ? *many : *few; }
};

Used used() {
    const Kernels* const chosen = find_kernels(nullptr);
    if (chosen && (chosen == amx_kernels() || chosen == avx512_kernels()) && dense_avx512()) {
        if (chosen == amx_kernels() && dense_amx()) return {"avx512 amx", dense_avx512(), dense_amx()};
        return {"avx512", dense_avx512(), nullptr};
    }
    if (chosen && chosen == neon_dot_kernels()) {
        if (dense_neon_i8mm_chunk()) return {"neon-dot neon-i8mm", dense_neon_dot(), dense_neon_i8mm_chunk()};
        return {"neon-dot", dense_neon_dot(), dense_neon_dot_chunk()};
    }
    if (chosen && chosen == neon_kernels()) return {"neon", dense_neon(), dense_neon_chunk()};
    return {"", dense_portable(), nullptr};
}

}  // namespace

const char* dense_names() { return used().names; }

void dense(const Int4Weights& weights, const float* x, int rows, float* y, const Fork& pool) {
    static thread_local Scratch rows_scratch;
    const DenseKernels& kernels = used().at(rows);
    uint8_t* const ready = rows_scratch.at_least(kernels.ready_bytes(rows, weights.k));
    const int row_tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
    fork(pool, row_tasks, [&](size_t i) {
        const int row0 = static_cast<int>(i) * kRowsPerTask;
        const int row1 = row0 + kRowsPerTask < rows ? row0 + kRowsPerTask : rows;
        kernels.prepare(x, rows, weights.k, row0, row1, ready);
    });
    const int column_tasks = (weights.n + kernels.columns - 1) / kernels.columns;
    fork(pool, column_tasks, [&](size_t i) {
        const int col0 = static_cast<int>(i) * kernels.columns;
        const int col1 = col0 + kernels.columns < weights.n ? col0 + kernels.columns : weights.n;
        uint8_t* const work = work_scratch().at_least(kernels.work_bytes(rows, weights.k));
        kernels.product(weights, ready, rows, col0, col1, y, work);
        if (!weights.bias) return;
        for (int row = 0; row < rows; ++row) {
            float* const at = y + static_cast<size_t>(row) * weights.n;
            for (int c = col0; c < col1; ++c) at[c] += weights.bias[c];
        }
    });
}

}  // namespace edgekv
