// Rows read by the kernel itself through io_uring: the thread that asks is also the one that waits, so that nobody has to be
// woken, and no thread of ours takes a core from those that compute. Plain system calls (io_uring(7)), no library.
#include "records/reader.h"

// Android ends an app that makes these calls.
#if defined(__linux__) && !defined(__ANDROID__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#define EDGEKV_URING 1
#endif
#endif

#ifdef EDGEKV_URING

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>

namespace edgekv {
namespace {

// Of <linux/io_uring.h> since 5.19: what completed is noted when this thread enters the system, not by interrupting it.
constexpr unsigned kCoopTaskrun = 1U << 8;
constexpr unsigned kEntries = 64;

int setup(unsigned entries, io_uring_params* params) {
    return static_cast<int>(::syscall(SYS_io_uring_setup, entries, params));
}

// The two queues that are shared with the kernel.
class Ring {
  public:
    ~Ring() {
        if (queues_ != MAP_FAILED) ::munmap(queues_, queues_bytes_);
        if (entries_ != MAP_FAILED) ::munmap(entries_, entries_bytes_);
        if (file_ >= 0) ::close(file_);
    }

    bool open() {
        io_uring_params params;
        for (unsigned flags : {kCoopTaskrun, 0U}) {
            std::memset(&params, 0, sizeof params);
            params.flags = flags;
            file_ = setup(kEntries, &params);  // the descriptor is closed on exec
            if (file_ >= 0) break;
        }
        if (file_ < 0) return false;
        // Before 5.6 there is no plain read, before 5.4 the queues lie in two mappings.
        if (!(params.features & IORING_FEAT_SINGLE_MMAP) || !(params.features & IORING_FEAT_RW_CUR_POS)) return false;
        queues_bytes_ = std::max(params.sq_off.array + params.sq_entries * sizeof(uint32_t),
                                 params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
        entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
        constexpr int access = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
        queues_ = ::mmap(nullptr, queues_bytes_, access, flags, file_, IORING_OFF_SQ_RING);
        entries_ = ::mmap(nullptr, entries_bytes_, access, flags, file_, IORING_OFF_SQES);
        if (queues_ == MAP_FAILED || entries_ == MAP_FAILED) return false;
        auto* const base = static_cast<uint8_t*>(queues_);
        sq_tail_ = reinterpret_cast<uint32_t*>(base + params.sq_off.tail);
        sq_array_ = reinterpret_cast<uint32_t*>(base + params.sq_off.array);
        sq_mask_ = *reinterpret_cast<uint32_t*>(base + params.sq_off.ring_mask);
        cq_head_ = reinterpret_cast<uint32_t*>(base + params.cq_off.head);
        cq_tail_ = reinterpret_cast<uint32_t*>(base + params.cq_off.tail);
        cq_mask_ = *reinterpret_cast<uint32_t*>(base + params.cq_off.ring_mask);
        results_ = reinterpret_cast<io_uring_cqe*>(base + params.cq_off.cqes);
        return true;
    }

    // There must be room: no more than kEntries between two calls of enter.
    void add_read(int file, void* to, unsigned bytes, int64_t offset, uint64_t name) {
        const uint32_t tail = *sq_tail_, at = tail & sq_mask_;
        auto& entry = static_cast<io_uring_sqe*>(entries_)[at];
        std::memset(&entry, 0, sizeof entry);
        entry.opcode = IORING_OP_READ;
        entry.fd = file;
        entry.addr = reinterpret_cast<uint64_t>(to);
        entry.len = bytes;
        entry.off = static_cast<uint64_t>(offset);
        entry.user_data = name;
        sq_array_[at] = at;
        __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
        ++added_;
    }

    // Hands over what was added, and waits until so many results are there; returns 0 or an errno.
    int enter(unsigned least) {
        for (;;) {
            const auto count = ::syscall(SYS_io_uring_enter, file_, added_, least, IORING_ENTER_GETEVENTS, nullptr, 0);
            if (count >= 0) {
                added_ -= static_cast<unsigned>(count);
                if (!added_) return 0;
            } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) {
                return errno;
            }
        }
    }

    template <typename F>
    void reap(F&& result) {
        uint32_t head = *cq_head_;
        for (; head != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE); ++head) {
            const io_uring_cqe& entry = results_[head & cq_mask_];
            result(entry.user_data, entry.res);
        }
        __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
    }

  private:
    int file_ = -1;
    void *queues_ = MAP_FAILED, *entries_ = MAP_FAILED;
    size_t queues_bytes_ = 0, entries_bytes_ = 0;
    uint32_t *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
    uint32_t sq_mask_ = 0, cq_mask_ = 0;
    io_uring_cqe* results_ = nullptr;
    unsigned added_ = 0;
};

class UringRows final : public RecordReader {
  public:
    explicit UringRows(const Kernels& kernels) : RecordReader(kernels), runs_(kEntries) {
        for (uint64_t name = 0; name < kEntries; ++name) free_.push_back(name);
    }

    // The kernel writes to the memory of the requests: everything in flight has to land first.
    ~UringRows() override {
        queue_.clear();
        while (free_.size() < kEntries && !failed_) step(1);
        if (failed_) abandon();
    }

    bool open() { return ring_.open(); }
    const char* how() const override { return "io_uring"; }

  protected:
    void start(const std::vector<Run>& runs) override {
        if (failed_) {
            for (const Run& run : runs) done(run, failed_);
            return;
        }
        queue_.insert(queue_.end(), runs.begin(), runs.end());
        step(0);
    }

    // The lock is kept: a second thread that asks meanwhile waits as long.
    void finish(Open& open, std::unique_lock<std::mutex>&) override {
        collect();
        while (open.left && !failed_) step(1);
        if (open.left) open.error = failed_;
    }

  private:
    // Starts what is queued, as far as the ring has room, waits for so many results, and takes note of those that are there.
    void step(unsigned least) {
        while (!queue_.empty() && !free_.empty()) {
            const uint64_t name = free_.back();
            free_.pop_back();
            runs_[name] = queue_.front();
            queue_.pop_front();
            read(name);
        }
        failed_ = ring_.enter(least);
        collect();
    }

    void read(uint64_t name) {
        constexpr int64_t most = 1 << 30;  // of one read; the length of a request has 32 bits
        const Run& run = runs_[name];
        ring_.add_read(run.open->request.file, run.at(), static_cast<unsigned>(std::min(run.missing(), most)), run.offset(), name);
    }

    void collect() {
        ring_.reap([this](uint64_t name, int32_t result) {
            Run& run = runs_[name];
            if (result > 0) run.got += result;
            if (result == -EINTR || result == -EAGAIN || (result > 0 && run.missing())) {
                queue_.push_front(run);  // the rest of it
            } else {
                done(run, result < 0 ? -result : 0);  // no more bytes: the file ends here
            }
            free_.push_back(name);
        });
    }

    Ring ring_;
    std::vector<Run> runs_;  // in flight, by name
    std::vector<uint64_t> free_;
    std::deque<Run> queue_;
    int failed_ = 0;  // errno of the ring itself, for good: nobody knows what of it is still to come
};

}  // namespace

std::unique_ptr<RecordReader> open_uring(const Kernels& kernels) {
    auto reader = std::make_unique<UringRows>(kernels);
    return reader->open() ? std::move(reader) : nullptr;
}

}  // namespace edgekv

#else

namespace edgekv {
std::unique_ptr<RecordReader> open_uring(const Kernels&) { return nullptr; }
}  // namespace edgekv

#endif
