#include "thread_pool.h"

#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace edgekv {
namespace {

inline void pause_core() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until ready() or the time is over; returns ready().
template <typename Ready>
bool spin(std::chrono::microseconds time, Ready&& ready) {
    const auto limit = std::chrono::steady_clock::now() + time;
    do {
        for (int i = 0; i < 64; ++i) {
            if (ready()) return true;
            pause_core();
        }
    } while (std::chrono::steady_clock::now() < limit);
    return ready();
}

}  // namespace

ThreadPool::ThreadPool(int n_threads, Executor executor, std::chrono::microseconds spin)
    : n_threads_(n_threads < 1 ? 1 : n_threads), executor_(executor), spin_(spin), shares_(new Share[n_threads_]),
      owner_(static_cast<int64_t>(::getpid())), helpers_(new Helpers) {
    if (executor_) return;
    for (int thread = 1; thread < n_threads_; ++thread) helpers_->threads.emplace_back([this, thread] { helper(thread); });
}

ThreadPool::~ThreadPool() {
    if (owner_ != static_cast<int64_t>(::getpid())) {
        helpers_.release();
        return;
    }
    {
        std::lock_guard<std::mutex> guard(helpers_->sleep_mutex);
        stop_.store(true);
        generation_.fetch_add(1);
    }
    helpers_->wake.notify_all();
    for (auto& thread : helpers_->threads) thread.join();
}

void ThreadPool::dispatch(int n_items, void* context, Invoke invoke) {
    std::lock_guard<std::mutex> job(job_mutex_);
    context_ = context;
    invoke_ = invoke;
    remaining_.store(n_items);
    for (int thread = 0; thread < n_threads_; ++thread) {
        const uint64_t first = static_cast<uint64_t>(n_items) * thread / n_threads_;
        const uint64_t end = static_cast<uint64_t>(n_items) * (thread + 1) / n_threads_;
        shares_[thread].range.store(first | end << 32, std::memory_order_release);
    }
    if (executor_) {
        const auto task = [](void* pool, size_t thread) { static_cast<ThreadPool*>(pool)->work(static_cast<int>(thread)); };
        // When it cannot, this thread does it all: whoever works takes what the others left.
        if (!executor_(task, this, static_cast<size_t>(n_threads_))) work(0);
        while (remaining_.load() != 0) pause_core();  // never; the load makes what the others wrote visible here
        return;
    }
    generation_.fetch_add(1);  // seq_cst: ordered against a helper's asleep_ count, so no wake-up is lost
    if (asleep_.load() > 0) {
        std::lock_guard<std::mutex> guard(helpers_->sleep_mutex);
        helpers_->wake.notify_all();
    }
    work(0);
    const auto finished = [this] { return remaining_.load() == 0; };
    if (spin(spin_, finished)) return;
    std::unique_lock<std::mutex> lock(helpers_->sleep_mutex);
    caller_asleep_.store(true);
    helpers_->done.wait(lock, finished);
    caller_asleep_.store(false);
}

void ThreadPool::work(int thread) {
    for (int turn = 0; turn < n_threads_; ++turn) {
        auto& share = shares_[(thread + turn) % n_threads_].range;
        for (;;) {
            uint64_t range = share.load(std::memory_order_relaxed);
            uint32_t first, end;
            uint64_t rest;
            do {
                first = static_cast<uint32_t>(range);
                end = static_cast<uint32_t>(range >> 32);
                if (first >= end) break;
                rest = turn == 0 ? range + 1 : range - (uint64_t{1} << 32);
            } while (!share.compare_exchange_weak(range, rest, std::memory_order_acquire, std::memory_order_relaxed));
            if (first >= end) break;
            invoke_(context_, static_cast<int>(turn == 0 ? first : end - 1), thread);
            if (remaining_.fetch_sub(1) == 1 && caller_asleep_.load()) {
                std::lock_guard<std::mutex> guard(helpers_->sleep_mutex);
                helpers_->done.notify_one();
            }
        }
    }
}

void ThreadPool::helper(int thread) {
    uint32_t seen = 0;
    for (;;) {
        const auto called = [this, &seen] { return generation_.load() != seen; };
        if (!spin(spin_, called)) {
            std::unique_lock<std::mutex> lock(helpers_->sleep_mutex);
            asleep_.fetch_add(1);
            helpers_->wake.wait(lock, called);
            asleep_.fetch_sub(1);
        }
        seen = generation_.load();
        if (stop_.load()) return;
        work(thread);
    }
}

}  // namespace edgekv
