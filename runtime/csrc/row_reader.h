// Reads records of page files on threads of its own and checks them, without the interpreter.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.h"

namespace edgekv {

// What a record must begin with: magic, checksum, then what the checksum covers. edgekv/runtime/record.py writes it.
constexpr int kHeadBytes = 36, kSumAt = 8, kSummedFrom = 16, kPayloadAt = 64;

struct RowRequest {
    int file;
    std::vector<int64_t> places;  // counted in rows
    uint8_t* rows;
    int64_t row_bytes;
    const uint8_t* heads;  // [n, kHeadBytes]; the checksum in it does not count
    int64_t payload_bytes;
    uint8_t* good;  // [n]: 1 where the row is the record that was expected
};

class RowReader {
  public:
    RowReader(const Kernels& kernels, int n_threads);
    ~RowReader();
    RowReader(const RowReader&) = delete;
    RowReader& operator=(const RowReader&) = delete;

    // Starts a request, whose memory must stay until it was waited for; neighbours are read in one call.
    int64_t submit(RowRequest request);
    // Waits, and returns 0 or the errno of a read that failed.
    int wait(int64_t ticket);

  private:
    struct Open {
        RowRequest request;
        int64_t left;
        int error;
    };
    struct Run {
        int64_t ticket, start, stop;
    };

    void work();
    static int read_run(const Kernels& kernels, const RowRequest& request, int64_t start, int64_t stop);

    const Kernels& kernels_;
    std::mutex mutex_;
    std::condition_variable work_, done_;
    std::deque<Run> queue_;
    std::map<int64_t, Open> open_;
    int64_t next_ = 0;
    bool ends_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace edgekv
