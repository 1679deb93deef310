// One layer's paged attention: who computes what, on which thread, and in which order results are merged.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace edgekv {

// Cache-line aligned memory that only grows.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(raw_); }
    float* reserve(size_t n) {
        if (n > size_) {
            std::free(raw_);
            raw_ = std::malloc(n * sizeof(float) + 64);
            size_ = raw_ ? n : 0;
            if (!raw_) throw std::bad_alloc();
        }
        return data();
    }
    float* data() const { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(raw_) + 63) & ~uintptr_t{63}); }
    size_t bytes() const { return size_ * sizeof(float); }

  private:
    void* raw_ = nullptr;
    size_t size_ = 0;
};

class Attention {
  public:
    Attention(ThreadPool& pool, const Kernels& kernels, const Geometry& geometry, float scale, std::vector<float> sinks,
              int max_tokens);

    const Geometry& geometry() const { return g_; }
    int max_tokens() const { return max_tokens_; }
    // A step is begun, fed all its pages in logical order, and finished.
    bool begun() const { return n_new_ > 0; }
    int n_new() const { return n_new_; }
    int64_t next_page() const { return next_page_; }
    int64_t n_pages() const { return n_pages_; }
    size_t buffer_bytes() const;

    void begin(const float* q, const float* new_k, const float* new_v, const int64_t* positions, int n_new,
               int64_t window, int64_t n_pages, bool want_mass);
    // refs[start:stop) of the step's array; start is a multiple of kRunPages, stop too or the end. `before`, if there is one, is
    // called with each page right before it is attended to, on the thread that does; `after` when this thread is done with it, in
    // a step of few rows.
    void pages(const PageRef* refs, int64_t start, int64_t stop, const std::function<void(int64_t)>& before = nullptr,
               const std::function<void(int64_t)>& after = nullptr);
    // log_sum_exp [n_new, q_heads] or null: of all scores that a query saw, sinks included; -kScoreLimit for none.
    void finish(float* out, float* page_mass, float* log_sum_exp);

  private:
    void copy_padded(const float* from, size_t n, Buffer& buffer) const;
    State partial(int64_t run) const;
    void end_run(int64_t run, int parts);
    size_t state_rows() const { return static_cast<size_t>(g_.n_kv_heads) * batch_.rows; }
    void merge_pending(int head, int heads);
    void merge_pending_all();
    void finish_rows(int head, int row0, int row1, float* out, float* log_sum_exp);
    int row_block() const;

    ThreadPool& pool_;
    const Kernels& kernels_;
    Geometry g_;
    float scale_;
    std::vector<float> sinks_;  // one per query head, or empty
    int max_tokens_;

    Batch batch_{};
    int n_new_ = 0;
    bool decode_ = false;
    bool want_mass_ = false;
    int64_t n_pages_ = 0, next_page_ = 0;
    // Runs in blocks, the blocks' states in the order of the blocks: whoever finishes a block's last run merges it, while
    // its states are near. Blocks [merged_, finished_) are yet to be merged into the whole.
    int64_t runs_ = 0, merged_ = 0, finished_ = 0;
    int64_t slab_runs_ = 0;                             // runs whose partial states fit, whole blocks
    std::unique_ptr<std::atomic<int>[]> runs_done_;     // per block of the slab
    int64_t slab_blocks_ = 0;

    State state_{};
    Buffer query_, new_k_, new_v_, totals_, partials_, mass_, scratch_;
    std::vector<int64_t> positions_;
    std::vector<int32_t> first_own_;
};

}  // namespace edgekv
