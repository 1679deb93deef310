// Reads records of page files in the background, and checks them, without the interpreter.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace edgekv {

// What a record must begin with: magic, checksum, then what the checksum covers. edgekv/runtime/record.py writes it.
constexpr int kHeadBytes = 36, kSumAt = 8, kSummedFrom = 16, kPayloadAt = 64;

// What is read, and everything that reading writes to: it belongs to the reader until the last read of it has ended, whoever
// has lost interest meanwhile.
struct RowRequest {
    int file = -1;
    std::vector<int64_t> places;  // counted in rows
    uint8_t* rows = nullptr;
    int64_t row_bytes = 0;
    std::shared_ptr<void> memory;  // what the rows lie in
    std::vector<uint8_t> heads;    // [n, kHeadBytes]; the checksum in it does not count
    int64_t payload_bytes = 0;
    std::vector<uint8_t> good = {};  // [n]: 1 where the row is the record that was expected; the reader makes it
    int64_t n_runs = 0;              // reads of the file that it takes; the reader counts them
};

// Who reads: rows that lie side by side in a file come in one read. When it goes, it waits for what is in flight.
class RecordReader {
  public:
    // The best that the system allows ("io_uring", "threads"), or the one that is named; null if it cannot be had.
    // Reads that are in flight at a time: `depth` with threads, all that were submitted with io_uring.
    static std::unique_ptr<RecordReader> open(const Kernels& kernels, int depth, const std::string& how);
    virtual ~RecordReader() = default;
    RecordReader(const RecordReader&) = delete;
    RecordReader& operator=(const RecordReader&) = delete;

    virtual const char* how() const = 0;
    // Whether this process made it. A forked child has neither its threads nor a ring of its own: it must leave it alone.
    bool ours() const;
    int64_t submit(RowRequest request);
    // Waits, hands back the request with what came of it checked, on the threads of a pool or, without one, on this one, and
    // returns 0 or the errno of a read that failed.
    int wait(int64_t ticket, ThreadPool* pool, RowRequest* request);
    // The two halves of it: waits and hands back the request, then says of one row, on any thread, whether it is good.
    int arrive(int64_t ticket, RowRequest* request);
    void check(RowRequest& request, int64_t row) const;
    // Requests that are on their way, as far as is known: what came is noted when one is submitted or waited for.
    int64_t unfinished();
    // This thread will not look at a row again: its cache lines leave this core, so that who fills the row next finds them
    // in the cache that all cores share. (Where a drive is virtual, that is another core, and a line that it has to fetch
    // back from here costs it more than the copying.)
    static void leave(const RowRequest& request, int64_t row);

  protected:
    struct Open {
        RowRequest request;
        int64_t left;  // runs that are not done
        int error;
    };
    // Rows [start, stop) of a request, neighbours in the file, of which `got` bytes are there.
    struct Run {
        Open* open;
        int64_t start, stop, got;

        uint8_t* at() const { return open->request.rows + start * open->request.row_bytes + got; }
        int64_t offset() const {
            return open->request.places[static_cast<size_t>(start)] * open->request.row_bytes + got;
        }
        int64_t missing() const { return (stop - start) * open->request.row_bytes - got; }
    };

    explicit RecordReader(const Kernels& kernels);
    // Starts runs; called with the mutex held.
    virtual void start(const std::vector<Run>& runs) = 0;
    // Returns when nothing of a request is left; called with the mutex held.
    virtual void finish(Open& open, std::unique_lock<std::mutex>& lock) = 0;
    // Notes that a run came as far as it will; called with the mutex held.
    static void done(const Run& run, int error);
    // Nobody can say any more what is in flight: the memory of all requests stays for as long as the process.
    void abandon();

    std::mutex mutex_;

  private:
    const Kernels& kernels_;
    const int64_t owner_;           // the process
    std::map<int64_t, Open> open_;  // an entry stays where it is until it was waited for
    int64_t next_ = 0;
};

std::unique_ptr<RecordReader> open_uring(const Kernels& kernels);  // null where the system has none
std::unique_ptr<RecordReader> open_threads(const Kernels& kernels, int n_threads);

}  // namespace edgekv
