// A step's way through the pages on flash: each layer's pieces in order, read ahead into a ring of slots, checked by the thread
// that attends to them, without the interpreter in between.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "attention/attention.h"
#include "records/reader.h"

namespace edgekv {

// The pieces of one layer: piece i is the pages up to stops[i], of which rows [first_row[i], first_row[i + 1]) are on flash.
struct StreamPlan {
    int file = -1;
    int64_t payload_bytes = 0;
    std::vector<int64_t> stops, first_row;  // first_row has one entry more
    std::vector<int64_t> pages, places;     // of each row
    std::vector<uint8_t> heads;             // [rows, kHeadBytes]

    int64_t n_pieces() const { return static_cast<int64_t>(stops.size()); }
    int64_t n_pages() const { return stops.empty() ? 0 : stops.back(); }
    int64_t rows_in(int64_t piece) const { return first_row[piece + 1] - first_row[piece]; }
};

// One thread at a time; a second one waits.
class RecordStream {
  public:
    // rows: [n_slots * capacity, row_bytes], in `memory`; a piece has at most `capacity` rows, and at most `most` pieces are on
    // their way at a time. The reader outlives this.
    RecordStream(RecordReader& reader, uint8_t* rows, std::shared_ptr<void> memory, int64_t row_bytes, int64_t capacity,
              int n_slots, int n_layers, int64_t most);
    ~RecordStream() { forget(); }
    RecordStream(const RecordStream&) = delete;
    RecordStream& operator=(const RecordStream&) = delete;

    int64_t capacity() const { return capacity_; }
    int64_t row_bytes() const { return row_bytes_; }
    int n_layers() const { return static_cast<int>(plans_.size()); }
    // Reads of the file that brought what was attended to so far.
    int64_t reads() const { return reads_; }
    const RecordReader& reader() const { return reader_; }
    const StreamPlan& plan(int layer) const { return plans_[layer]; }
    // Replaces the plan of a layer, and forgets what was read ahead.
    void set_plan(int layer, StreamPlan plan);
    // Forgets what was read ahead: the memory is free for others.
    void forget();

    // Feeds the pages of a layer to a step that was begun. Returns the first row of the plan that is not what was written, or
    // -1; `error` becomes the errno of a read that failed. In both cases the step must not be finished.
    int64_t feed(Attention& attention, int layer, std::vector<PageRef>& refs, int* error);

  private:
    struct Ahead {
        int layer;
        int64_t piece;
        int slot;
        int64_t ticket;
    };

    void let_go();
    void request(int layer, int64_t piece);
    void fill();
    Ahead take(int layer, int64_t piece);

    std::mutex mutex_;
    RecordReader& reader_;
    uint8_t* const rows_;
    const std::shared_ptr<void> memory_;
    const int64_t row_bytes_, capacity_;
    std::vector<StreamPlan> plans_;
    const int64_t most_;  // requests that are on their way at a time
    std::vector<int> free_;
    std::deque<Ahead> ahead_;
    int next_layer_ = 0;  // what is requested next
    int64_t next_piece_ = 0;
    int64_t reads_ = 0;
};

}  // namespace edgekv
