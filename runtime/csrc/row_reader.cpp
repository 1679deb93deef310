#include "row_reader.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace edgekv {

RowReader::RowReader(const Kernels& kernels, int n_threads) : kernels_(kernels) {
    for (int i = 0; i < n_threads; ++i) threads_.emplace_back([this] { work(); });
}

RowReader::~RowReader() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        ends_ = true;
        queue_.clear();
    }
    work_.notify_all();
    for (auto& thread : threads_) thread.join();
}

int64_t RowReader::submit(RowRequest request) {
    const int64_t n = static_cast<int64_t>(request.places.size());
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t ticket = next_++;
    int64_t runs = 0;
    for (int64_t start = 0, stop = 1; stop <= n; ++stop) {
        if (stop < n && request.places[stop] == request.places[stop - 1] + 1) continue;
        queue_.push_back({ticket, start, stop});
        ++runs;
        start = stop;
    }
    open_.emplace(ticket, Open{std::move(request), runs, 0});
    if (runs == 1) {
        work_.notify_one();
    } else {
        work_.notify_all();
    }
    return ticket;
}

int RowReader::wait(int64_t ticket) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto found = open_.find(ticket);
    if (found == open_.end()) return EINVAL;
    done_.wait(lock, [&] { return found->second.left == 0; });
    const int error = found->second.error;
    open_.erase(found);
    return error;
}

void RowReader::work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        work_.wait(lock, [this] { return ends_ || !queue_.empty(); });
        if (ends_) return;
        const Run run = queue_.front();
        queue_.pop_front();
        Open& open = open_.at(run.ticket);  // stays where it is until it was waited for
        lock.unlock();
        const int error = read_run(kernels_, open.request, run.start, run.stop);
        lock.lock();
        if (error) open.error = error;
        if (--open.left == 0) done_.notify_all();
    }
}

int RowReader::read_run(const Kernels& kernels, const RowRequest& request, int64_t start, int64_t stop) {
    uint8_t* const at = request.rows + start * request.row_bytes;
    const int64_t wanted = (stop - start) * request.row_bytes;
    const int64_t offset = request.places[static_cast<size_t>(start)] * request.row_bytes;
    int64_t got = 0;
    std::memset(request.good + start, 0, static_cast<size_t>(stop - start));
    while (got < wanted) {
        const auto count = ::pread(request.file, at + got, static_cast<size_t>(wanted - got), static_cast<off_t>(offset + got));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return errno;
        if (count == 0) break;  // the file ends here
        got += count;
    }
    for (int64_t i = 0; i < got / request.row_bytes; ++i) {
        const uint8_t* const row = at + i * request.row_bytes;
        const uint8_t* const head = request.heads + (start + i) * kHeadBytes;
        uint64_t sum;
        std::memcpy(&sum, row + kSumAt, sizeof sum);
        const size_t summed = static_cast<size_t>(kPayloadAt - kSummedFrom + request.payload_bytes);
        request.good[start + i] = std::memcmp(row, head, kSumAt) == 0 &&
                                  std::memcmp(row + kSummedFrom, head + kSummedFrom, kHeadBytes - kSummedFrom) == 0 &&
                                  sum == kernels.checksum(row + kSummedFrom, summed);
    }
    return 0;
}

}  // namespace edgekv
