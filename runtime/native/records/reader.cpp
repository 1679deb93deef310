#include "records/reader.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace edgekv {

std::unique_ptr<RecordReader> RecordReader::open(const Kernels& kernels, int depth, const std::string& how) {
    std::unique_ptr<RecordReader> reader;
    if (how.empty() || how == "io_uring") reader = open_uring(kernels);
    if (!reader && (how.empty() || how == "threads")) reader = open_threads(kernels, depth);
    return reader;
}

RecordReader::RecordReader(const Kernels& kernels)
    : kernels_(kernels), owner_(static_cast<int64_t>(::getpid())) {}

bool RecordReader::ours() const { return owner_ == static_cast<int64_t>(::getpid()); }

void RecordReader::abandon() { new std::map<int64_t, Open>(std::move(open_)); }

int64_t RecordReader::submit(RowRequest request) {
    const int64_t n = static_cast<int64_t>(request.places.size());
    request.good.assign(static_cast<size_t>(n), 0);
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t ticket = next_++;
    Open& open = open_.emplace(ticket, Open{std::move(request), 0, 0}).first->second;
    std::vector<Run> runs;
    for (int64_t first = 0, stop = 1; stop <= n; ++stop) {
        if (stop < n && open.request.places[stop] == open.request.places[stop - 1] + 1) continue;
        runs.push_back({&open, first, stop, 0});
        first = stop;
    }
    open.left = open.request.n_runs = static_cast<int64_t>(runs.size());
    start(runs);
    return ticket;
}

int RecordReader::arrive(int64_t ticket, RowRequest* request) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto entry = open_.extract(ticket);  // it is waited for once; its reads find it where it was
    if (!entry) return EINVAL;
    Open& open = entry.mapped();
    finish(open, lock);
    if (open.left) {  // the rest may still come
        const int error = open.error;
        open_.insert(std::move(entry));
        return error;
    }
    *request = std::move(open.request);
    return open.error;
}

int RecordReader::wait(int64_t ticket, ThreadPool* pool, RowRequest* request) {
    if (const int error = arrive(ticket, request)) return error;
    const int n = static_cast<int>(request->places.size());
    if (pool) {
        pool->run(n, [&](int row, int) { check(*request, row); });
    } else {
        for (int row = 0; row < n; ++row) check(*request, row);
    }
    return 0;
}

int64_t RecordReader::unfinished() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::count_if(open_.begin(), open_.end(), [](const auto& entry) { return entry.second.left > 0; });
}

void RecordReader::done(const Run& run, int error) {
    // A row that came in part, where the file ends, is not good.
    const int64_t whole = run.got / run.open->request.row_bytes;
    std::memset(run.open->request.good.data() + run.start, 1, static_cast<size_t>(whole));
    if (error) run.open->error = error;
    --run.open->left;
}

void RecordReader::check(RowRequest& request, int64_t at) const {
    if (!request.good[at]) return;
    const uint8_t* const row = request.rows + at * request.row_bytes;
    const uint8_t* const head = request.heads.data() + at * kHeadBytes;
    uint64_t sum;
    std::memcpy(&sum, row + kSumAt, sizeof sum);
    const size_t summed = static_cast<size_t>(kPayloadAt - kSummedFrom + request.payload_bytes);
    request.good[at] = std::memcmp(row, head, kSumAt) == 0 &&
                       std::memcmp(row + kSummedFrom, head + kSummedFrom, kHeadBytes - kSummedFrom) == 0 &&
                       sum == kernels_.checksum(row + kSummedFrom, summed);
}

void RecordReader::leave(const RowRequest& request, int64_t at) {
#if defined(__x86_64__)
    // CLDEMOTE (Intel SDM, volume 2A): a hint, and a NOP on processors that do not know it.
    const uint8_t* const row = request.rows + at * request.row_bytes;
    for (int64_t line = 0; line < kPayloadAt + request.payload_bytes; line += 64) {
        asm volatile(".byte 0x0f, 0x1c, 0x00" : : "a"(row + line) : "memory");
    }
#else
    (void)request, (void)at;
#endif
}

}  // namespace edgekv
