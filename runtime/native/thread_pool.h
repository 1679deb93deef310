// A small fork-join pool. The caller works too; helpers spin for a short while after each job, then sleep, because
// between two attention calls the cores belong to the engine that runs the dense layers.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace edgekv {

class ThreadPool {
  public:
    // Calls task(context, i) for each i in [0, count), in parallel; returns when all are done, or false if it cannot.
    using Task = void (*)(void* context, size_t i);
    using Executor = bool (*)(Task task, void* context, size_t count);

    // With an executor the pool has no helpers: it works on the threads of an engine. Those spin between the engine's
    // calls, so that helpers would find no free core, and the engine's threads would be woken again after each job.
    // `spin`: how long who waits stays awake. Waking a sleeping thread costs several microseconds; waiting longer than
    // this would starve the threads of an engine that has its own.
    explicit ThreadPool(int n_threads, Executor executor = nullptr,
                        std::chrono::microseconds spin = std::chrono::microseconds(30));
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return n_threads_; }
    bool lent() const { return executor_ != nullptr; }

    // Calls fn(item, thread) for every item in [0, n_items). A thread starts on its own contiguous share, in order,
    // and then takes items from the end of the others' shares. Returns when all are done.
    template <typename F>
    void run(int n_items, F&& fn) {
        if (n_items <= 0) return;
        if (n_threads_ == 1 || n_items == 1) {
            std::lock_guard<std::mutex> guard(job_mutex_);
            for (int i = 0; i < n_items; ++i) fn(i, 0);
            return;
        }
        dispatch(n_items, const_cast<void*>(static_cast<const void*>(&fn)), [](void* context, int item, int thread) {
            (*static_cast<std::remove_reference_t<F>*>(context))(item, thread);
        });
    }

  private:
    using Invoke = void (*)(void*, int, int);
    // One cache line each, so that taking an item does not disturb the neighbours. Whoever takes an item takes it from
    // the job that is running now, and that job cannot end before the item is done: a helper that comes late, from an
    // earlier job, does no harm, and nobody waits for a helper that the system has not scheduled.
    struct alignas(64) Share {
        std::atomic<uint64_t> range{0};  // first item in the low half, end in the high half
    };

    void dispatch(int n_items, void* context, Invoke invoke);
    void work(int thread);
    void helper(int thread);

    int n_threads_;
    Executor executor_;
    std::chrono::microseconds spin_;
    std::unique_ptr<Share[]> shares_;
    std::mutex job_mutex_;  // one job at a time, whoever calls

    void* context_ = nullptr;
    Invoke invoke_ = nullptr;
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<int> remaining_{0};  // items not yet done
    alignas(64) std::atomic<int> asleep_{0};
    std::atomic<bool> caller_asleep_{false};
    std::atomic<bool> stop_{false};
    struct Helpers {
        std::mutex sleep_mutex;
        std::condition_variable wake;
        std::condition_variable done;
        std::vector<std::thread> threads;
    };
    const int64_t owner_;               // the process
    std::unique_ptr<Helpers> helpers_;  // of which a forked child has none: there it is left as it lies
};

}  // namespace edgekv
