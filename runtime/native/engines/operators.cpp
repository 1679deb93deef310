#include "engines/operators.h"

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>

#include "kernels.h"
#include "thread_pool.h"

namespace edgekv {
namespace {

constexpr int kVersion = 2;
constexpr auto kSpin = std::chrono::microseconds(300);  // longer than what lies between two operators of a token
constexpr int64_t kChunk = 8192;  // numbers that are worth a task

// One pool per process, as the engines have that call the operators. One of another size takes its place; the former
// stays, since somebody may be at work in it.
std::atomic<ThreadPool*> pool{nullptr};

void choose_pool(int n_threads) {
    static std::mutex mutex;
    static std::map<int, ThreadPool*> pools;
    std::lock_guard<std::mutex> guard(mutex);
    ThreadPool*& one = pools[n_threads];
    if (!one) one = new ThreadPool(n_threads, nullptr, kSpin);
    pool = one;
}

template <typename F>
void run(int n_items, F&& body) {
    if (ThreadPool* now = pool) {
        now->run(n_items, [&](int i, int) { body(i); });
    } else {
        for (int i = 0; i < n_items; ++i) body(i);
    }
}

// body(first, end) over parts of [0, n), of `width` numbers each.
template <typename F>
void in_parts(int64_t n, int64_t width, F&& body) {
    const int64_t part = kChunk / width > 0 ? kChunk / width : 1;
    run(static_cast<int>((n + part - 1) / part), [&](int i) {
        const int64_t first = i * part;
        body(first, first + part < n ? first + part : n);
    });
}

void linear_int4(const float* x, const uint8_t* codes, const void* scales, const float* bias, int rows, int n, int k,
                 float* y) {
    dense(Int4Weights{codes, scales, nullptr, n, k, ScaleType::kBf16, bias}, x, rows, y, operator_fork);
}

void rms_norm(const float* x, const float* residual, const float* weight, float eps, int rows, int k, float* y,
              float* total) {
    const Kernels& kernels = *find_kernels(nullptr);
    in_parts(rows, k, [&](int64_t first, int64_t end) {
        for (int64_t at = first * k; at < end * k; at += k) {
            kernels.rms_norm(x + at, residual ? residual + at : nullptr, weight, eps, k, y + at,
                             residual ? total + at : nullptr);
        }
    });
}

template <auto Kernels::*kKernel>
void gated(const float* gate, const float* up, int64_t n, float* y) {
    const auto kernel = find_kernels(nullptr)->*kKernel;
    in_parts(n, 1, [&](int64_t first, int64_t end) {
        kernel(gate + first, up + first, y + first, static_cast<size_t>(end - first));
    });
}

void rotary(const float* x, const float* cos, const float* sin, int tokens, int heads, int dim, int half, float* y) {
    const Kernels& kernels = *find_kernels(nullptr);
    const int64_t width = int64_t{heads} * dim;
    in_parts(tokens, width, [&](int64_t first, int64_t end) {
        for (int64_t t = first; t < end; ++t) {
            kernels.rotary(x + t * width, cos + t * half, sin + t * half, heads, dim, half, y + t * width);
        }
    });
}

}  // namespace

const Operators& operators(int n_threads) {
    static const Operators table{kVersion,          linear_int4, rms_norm, gated<&Kernels::swiglu>,
                                 gated<&Kernels::geglu>, rotary};
    choose_pool(n_threads);
    return table;
}

bool operator_threads(void (*task)(void* context, size_t i), void* context, size_t count) {
    run(static_cast<int>(count), [&](int i) { task(context, static_cast<size_t>(i)); });
    return true;
}

const Fork operator_fork{[](void*, void (*task)(void*, size_t), size_t count, void* context) {
                             operator_threads(task, context, count);
                         },
                         nullptr};

}  // namespace edgekv
