#include "attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace edgekv {
namespace {

// Up to this many query rows per KV head a WARM page is attended to in INT8 where it lies; above, as float tiles.
constexpr int kDecodeRows = 16;
// Partial states kept before they are merged: enough for long contiguous shares per thread, small beside the cache.
constexpr size_t kSlabFloats = 1 << 19;

// Runs whose states are merged by themselves, before they join the rest.
constexpr int64_t kBlockRuns = 4;
// Fewer runs per thread than this are cut in two, by heads: otherwise one thread would often wait for the other.
constexpr int kFewRuns = 8, kMaxParts = 2;

// Up to this many partial rows are merged by the caller alone: handing them out would take longer.
constexpr size_t kInlineMerges = 512;

// One thread decodes a layer of this many bytes in about the time that waking a helper takes (30 to 50 us where the
// helper's core has gone idle, as it does while an engine runs). An engine's thread is awake: 5 to 10 us.
constexpr size_t kAloneBytes = size_t{1} << 20, kAloneBytesLent = size_t{1} << 17;

State state_in(float* base, size_t rows) { return {base, base + rows, base + 2 * rows}; }

size_t state_floats(size_t rows, int dim_pad) {
    return (rows * (dim_pad + 2) + 15) / 16 * 16;
}

}  // namespace

Attention::Attention(ThreadPool& pool, const Kernels& kernels, const Geometry& geometry, float scale,
                     std::vector<float> sinks, int max_tokens)
    : pool_(pool), kernels_(kernels), g_(geometry), scale_(scale), sinks_(std::move(sinks)), max_tokens_(max_tokens) {
    for (float& sink : sinks_) sink = std::min(std::max(sink, -kScoreLimit), kScoreLimit);
    const size_t tile = 2 * static_cast<size_t>(kTileColumns) * g_.dim_pad + kRowBlock * kTileColumns;
    scratch_.reserve(tile * pool_.size());
    positions_.resize(max_tokens_);
    first_own_.resize(max_tokens_);
}

size_t Attention::buffer_bytes() const {
    return query_.bytes() + new_k_.bytes() + new_v_.bytes() + totals_.bytes() + partials_.bytes() + mass_.bytes() +
           scratch_.bytes();
}

void Attention::copy_padded(const float* from, size_t n, Buffer& buffer) const {
    float* to = buffer.reserve(n * g_.dim_pad);
    if (g_.dim == g_.dim_pad) {
        std::memcpy(to, from, n * g_.dim * sizeof(float));
        return;
    }
    for (size_t i = 0; i < n; ++i, from += g_.dim, to += g_.dim_pad) {
        std::memcpy(to, from, g_.dim * sizeof(float));
        std::fill(to + g_.dim, to + g_.dim_pad, 0.f);
    }
}

void Attention::begin(const float* q, const float* new_k, const float* new_v, const int64_t* positions, int n_new,
                      int64_t window, int64_t n_pages, bool want_mass) {
    const int rows = n_new * g_.group;
    const size_t n_rows = static_cast<size_t>(g_.n_kv_heads) * rows;
    float* query = query_.reserve(n_rows * g_.dim_pad);
    for (int h = 0; h < g_.n_kv_heads; ++h) {
        for (int row = 0; row < rows; ++row) {
            const int t = row / g_.group;
            const float* from =
                q + (static_cast<size_t>(t) * g_.n_kv_heads * g_.group + h * g_.group + row % g_.group) * g_.dim;
            float* to = query + (static_cast<size_t>(h) * rows + row) * g_.dim_pad;
            for (int c = 0; c < g_.dim; ++c) {
                const float x = from[c] * scale_;
                const float y = x < kScoreLimit ? x : kScoreLimit;
                to[c] = y > -kScoreLimit ? y : -kScoreLimit;
            }
            for (int c = g_.dim; c < g_.dim_pad; ++c) to[c] = 0.f;
        }
    }
    copy_padded(new_k, static_cast<size_t>(n_new) * g_.n_kv_heads, new_k_);
    copy_padded(new_v, static_cast<size_t>(n_new) * g_.n_kv_heads, new_v_);
    std::memcpy(positions_.data(), positions, n_new * sizeof(int64_t));
    int first = 0;
    for (int t = 0; t < n_new; ++t) {
        while (window > 0 && first < t && positions_[t] - positions_[first] >= window) ++first;
        first_own_[t] = first;
    }
    batch_ = {&g_,           n_new,         rows, window, query, new_k_.data(), new_v_.data(), positions_.data(),
              first_own_.data()};

    state_ = state_in(totals_.reserve(state_floats(n_rows, g_.dim_pad)), n_rows);
    std::fill(state_.peak, state_.peak + n_rows, -kScoreLimit);
    std::fill(state_.total, state_.total + n_rows, 0.f);
    std::fill(state_.acc, state_.acc + n_rows * g_.dim_pad, 0.f);
    decode_ = rows <= kDecodeRows;
    n_pages_ = n_pages;
    next_page_ = 0;
    runs_ = (n_pages + kRunPages - 1) / kRunPages;
    merged_ = finished_ = 0;
    if (decode_) {
        const size_t one = state_floats(n_rows, g_.dim_pad);
        const int64_t wanted = std::max<int64_t>(static_cast<int64_t>(kSlabFloats / one), 4 * pool_.size());
        const int64_t blocks = (std::min<int64_t>(wanted, runs_) + kBlockRuns - 1) / kBlockRuns;
        slab_runs_ = blocks * kBlockRuns;
        partials_.reserve(one * slab_runs_);
        if (blocks > slab_blocks_) {
            runs_done_ = std::make_unique<std::atomic<int>[]>(blocks);
            slab_blocks_ = blocks;
        }
        for (int64_t block = 0; block < blocks; ++block) runs_done_[block].store(0, std::memory_order_relaxed);
    }
    want_mass_ = want_mass;
    if (want_mass) mass_.reserve(static_cast<size_t>(runs_) * n_rows * kMassStride);
    n_new_ = n_new;
}

State Attention::partial(int64_t run) const {
    const size_t n = state_rows();
    return state_in(partials_.data() + run % slab_runs_ * state_floats(n, g_.dim_pad), n);
}

// Merges the run's block if this was the last part of its runs; the block's state is then its first run's.
void Attention::end_run(int64_t run, int parts) {
    const int64_t block = run / kBlockRuns, first = block * kBlockRuns;
    const int64_t n = std::min(kBlockRuns, runs_ - first);
    std::atomic<int>& done = runs_done_[block % (slab_runs_ / kBlockRuns)];
    // A run in one part counts as many.
    if (done.fetch_add(kMaxParts / parts, std::memory_order_acq_rel) + kMaxParts / parts < n * kMaxParts) return;
    done.store(0, std::memory_order_relaxed);
    for (int64_t i = 1; i < n; ++i) {
        kernels_.merge(partial(first), partial(first + i), static_cast<int>(state_rows()), g_.dim_pad);
    }
}

void Attention::merge_pending(int head, int heads) {
    const size_t row = static_cast<size_t>(head) * batch_.rows;
    for (int64_t block = merged_; block < finished_; ++block) {
        kernels_.merge(state_.at(row, g_.dim_pad), partial(block * kBlockRuns).at(row, g_.dim_pad),
                       heads * batch_.rows, g_.dim_pad);
    }
}

void Attention::merge_pending_all() {
    if (merged_ == finished_) return;
    pool_.run(g_.n_kv_heads, [this](int head, int) { merge_pending(head, 1); });
    merged_ = finished_;
}

int Attention::row_block() const {
    const int blocks = std::max(1, 8 * pool_.size() / g_.n_kv_heads);
    const int block = (batch_.rows + blocks - 1) / blocks;
    return std::max((block + kRowBlock - 1) / kRowBlock * kRowBlock, 4 * kRowBlock);
}

void Attention::pages(const PageRef* refs, int64_t start, int64_t stop, const std::function<void(int64_t)>& before,
                      const std::function<void(int64_t)>& after) {
    next_page_ = stop;
    const size_t mass_stride = state_rows() * kMassStride;
    float* mass = want_mass_ ? mass_.data() : nullptr;
    if (!decode_) {
        if (before) pool_.run(static_cast<int>(stop - start), [&](int page, int) { before(start + page); });
        const int block = row_block(), blocks = (batch_.rows + block - 1) / block;
        float* run_mass = mass ? mass + start / kRunPages * mass_stride : nullptr;
        const size_t tile = 2 * static_cast<size_t>(kTileColumns) * g_.dim_pad + kRowBlock * kTileColumns;
        pool_.run(g_.n_kv_heads * blocks, [&](int item, int thread) {
            const int head = item / blocks, row0 = item % blocks * block;
            const int row1 = std::min(row0 + block, batch_.rows);
            const size_t first = static_cast<size_t>(head) * batch_.rows;
            kernels_.blocked_pages(batch_, head, row0, row1, refs + start, static_cast<int>(stop - start),
                                   state_.at(first, g_.dim_pad), run_mass ? run_mass + first * kMassStride : nullptr,
                                   mass_stride, scratch_.data() + thread * tile);
        });
        return;
    }
    const int64_t end_of_runs = (stop + kRunPages - 1) / kRunPages;
    for (int64_t run = start / kRunPages; run < end_of_runs;) {
        merge_pending_all();
        // As far as the slab has room, next to the runs of a block that the last piece left unfinished.
        const int64_t end = std::min(end_of_runs, run / kBlockRuns * kBlockRuns + slab_runs_);
        const int64_t n_runs = end - run;
        const bool whole = before || g_.n_kv_heads % kMaxParts || n_runs >= kFewRuns * pool_.size();
        const int parts = whole ? 1 : kMaxParts;
        const int heads = g_.n_kv_heads / parts;
        const auto decode = [&, run](int item, int) {
            const int64_t index = run + item / parts, first = index * kRunPages;
            const int head = item % parts * heads;
            const int n = static_cast<int>(std::min<int64_t>(kRunPages, stop - first));
            const int following = static_cast<int>(std::min<int64_t>(kRunPages, stop - first - n));
            for (int page = 0; before && page < n; ++page) before(first + page);
            kernels_.decode_run(batch_, {head, head + heads}, refs + first, n, following, partial(index),
                                mass ? mass + index * mass_stride : nullptr);
            for (int page = 0; after && page < n; ++page) after(first + page);
            end_run(index, parts);
        };
        const int items = static_cast<int>(n_runs) * parts;
        const size_t bytes = 2 * g_.elements() * static_cast<size_t>(std::min(stop, end * kRunPages) - run * kRunPages);
        if (bytes <= (pool_.lent() ? kAloneBytesLent : kAloneBytes)) {
            for (int item = 0; item < items; ++item) decode(item, 0);
        } else {
            pool_.run(items, decode);
        }
        run = end;
        finished_ = end == runs_ ? (runs_ + kBlockRuns - 1) / kBlockRuns : end / kBlockRuns;
    }
}

// Sinks join last; then the sums become averages.
void Attention::finish_rows(int head, int row0, int row1, float* out, float* log_sum_exp) {
    const State s = state_.at(static_cast<size_t>(head) * batch_.rows, g_.dim_pad);
    for (int row = row0; row < row1; ++row) {
        const int query_head = head * g_.group + row % g_.group;
        float factor = 1.f;
        if (!sinks_.empty()) {
            const float sink = sinks_[query_head], peak = std::max(s.peak[row], sink);
            factor = std::exp(s.peak[row] - peak);
            s.total[row] = s.total[row] * factor + std::exp(sink - peak);
            s.peak[row] = peak;
        }
        if (log_sum_exp) {
            const size_t at = static_cast<size_t>(row / g_.group) * g_.n_kv_heads * g_.group + query_head;
            log_sum_exp[at] = s.total[row] > 0 ? s.peak[row] + std::log(s.total[row]) : -kScoreLimit;
        }
        factor = s.total[row] > 0 ? factor / s.total[row] : 0.f;
        float* to = out + (static_cast<size_t>(row / g_.group) * g_.n_kv_heads * g_.group + query_head) * g_.dim;
        const float* acc = s.acc + static_cast<size_t>(row) * g_.dim_pad;
        for (int c = 0; c < g_.dim; ++c) to[c] = acc[c] * factor;
    }
}

void Attention::finish(float* out, float* page_mass, float* log_sum_exp) {
    const size_t tile = 2 * static_cast<size_t>(kTileColumns) * g_.dim_pad + kRowBlock * kTileColumns;
    const int block = decode_ ? batch_.rows : row_block();
    const int blocks = (batch_.rows + block - 1) / block;
    const int items = g_.n_kv_heads * blocks;
    const bool alone = decode_ && static_cast<size_t>(finished_ - merged_) * state_rows() <= kInlineMerges;
    if (alone) merge_pending(0, g_.n_kv_heads);
    const auto finish_block = [&](int item, int thread) {
        const int head = item / blocks, row0 = item % blocks * block;
        const int row1 = std::min(row0 + block, batch_.rows);
        if (!alone) merge_pending(head, 1);
        kernels_.blocked_own(batch_, head, row0, row1, state_.at(static_cast<size_t>(head) * batch_.rows, g_.dim_pad),
                             scratch_.data() + thread * tile);
        finish_rows(head, row0, row1, out, log_sum_exp);
    };
    if (alone) {
        for (int item = 0; item < items; ++item) finish_block(item, 0);
    } else {
        pool_.run(items, finish_block);
    }
    merged_ = finished_;
    if (want_mass_ && page_mass) {
        const int runs = static_cast<int>(runs_);
        const size_t n = state_rows();
        const float share = 1.f / static_cast<float>(n);
        const auto sum_run = [&](int run, int) {
            float sums[kRunPages] = {};
            kernels_.sum_mass(mass_.data() + run * n * kMassStride, state_, static_cast<int>(n), sums);
            const int64_t first = static_cast<int64_t>(run) * kRunPages;
            for (int64_t p = first; p < std::min<int64_t>(first + kRunPages, n_pages_); ++p) {
                page_mass[p] = sums[p - first] * share;
            }
        };
        if (runs * n <= kInlineMerges) {
            for (int run = 0; run < runs; ++run) sum_run(run, 0);
        } else {
            pool_.run(runs, sum_run);
        }
    }
    n_new_ = 0;
}

}  // namespace edgekv
