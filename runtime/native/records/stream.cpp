#include "records/stream.h"

#include <utility>

namespace edgekv {

RecordStream::RecordStream(RecordReader& reader, uint8_t* rows, std::shared_ptr<void> memory, int64_t row_bytes,
                     int64_t capacity, int n_slots, int n_layers, int64_t most)
    : reader_(reader),
      rows_(rows),
      memory_(std::move(memory)),
      row_bytes_(row_bytes),
      capacity_(capacity),
      plans_(static_cast<size_t>(n_layers)),
      most_(most) {
    for (int slot = n_slots; slot-- > 0;) free_.push_back(slot);
}

void RecordStream::set_plan(int layer, StreamPlan plan) {
    std::lock_guard<std::mutex> lock(mutex_);
    let_go();
    plans_[layer] = std::move(plan);
}

void RecordStream::forget() {
    if (!reader_.ours()) return;
    std::lock_guard<std::mutex> lock(mutex_);
    let_go();
}

void RecordStream::let_go() {
    for (const Ahead& ahead : ahead_) {
        RowRequest request;
        reader_.arrive(ahead.ticket, &request);
        free_.push_back(ahead.slot);
    }
    ahead_.clear();
}

void RecordStream::request(int layer, int64_t piece) {
    const StreamPlan& plan = plans_[layer];
    const int slot = free_.back();
    free_.pop_back();
    const int64_t first = plan.first_row[piece], stop = plan.first_row[piece + 1];
    const int64_t ticket =
        reader_.submit({plan.file, {plan.places.begin() + first, plan.places.begin() + stop},
                        rows_ + slot * capacity_ * row_bytes_, row_bytes_, memory_,
                        {plan.heads.begin() + first * kHeadBytes, plan.heads.begin() + stop * kHeadBytes},
                        plan.payload_bytes});
    ahead_.push_back({layer, piece, slot, ticket});
    next_layer_ = layer;
    next_piece_ = piece + 1;
}

// Requests what comes next, into the next step where this one ends, while there is a free slot and not too much on its way.
void RecordStream::fill() {
    int idle = 0;  // layers in a row of which nothing is on flash
    while (!free_.empty() && reader_.unfinished() < most_ && idle <= n_layers()) {
        const StreamPlan& plan = plans_[next_layer_];
        while (next_piece_ < plan.n_pieces() && !plan.rows_in(next_piece_)) ++next_piece_;
        if (next_piece_ < plan.n_pieces()) {
            // Nothing is read twice, where a whole step fits the ring.
            if (!ahead_.empty() && ahead_.front().layer == next_layer_ && ahead_.front().piece == next_piece_) return;
            request(next_layer_, next_piece_);
            idle = 0;
        } else {
            next_layer_ = (next_layer_ + 1) % n_layers();
            next_piece_ = 0;
            ++idle;
        }
    }
}

RecordStream::Ahead RecordStream::take(int layer, int64_t piece) {
    if (!ahead_.empty() && (ahead_.front().layer != layer || ahead_.front().piece != piece)) let_go();
    if (ahead_.empty()) request(layer, piece);
    const Ahead taken = ahead_.front();
    ahead_.pop_front();
    return taken;
}

int64_t RecordStream::feed(Attention& attention, int layer, std::vector<PageRef>& refs, int* error) {
    std::lock_guard<std::mutex> lock(mutex_);
    const StreamPlan& plan = plans_[layer];
    int64_t start = 0;
    for (int64_t piece = 0; piece < plan.n_pieces(); start = plan.stops[piece++]) {
        const int64_t stop = plan.stops[piece], first = plan.first_row[piece], count = plan.rows_in(piece);
        if (!count) {
            attention.pages(refs.data(), start, stop);
            continue;
        }
        const Ahead taken = take(layer, piece);
        RowRequest request;
        *error = reader_.arrive(taken.ticket, &request);
        if (!*error) {
            reads_ += request.n_runs;
            fill();
            std::vector<int64_t> row_of(static_cast<size_t>(stop - start), -1);
            for (int64_t row = 0; row < count; ++row) {
                const int64_t page = plan.pages[first + row];
                row_of[page - start] = row;
                refs[page].data = reinterpret_cast<uint64_t>(request.rows + row * row_bytes_ + kPayloadAt);
                refs[page].kind = kWarm;
            }
            attention.pages(
                refs.data(), start, stop,
                [&](int64_t page) {
                    if (row_of[page - start] >= 0) reader_.check(request, row_of[page - start]);
                },
                [&](int64_t page) {
                    if (row_of[page - start] >= 0) RecordReader::leave(request, row_of[page - start]);
                });
        }
        free_.push_back(taken.slot);
        if (*error) return -1;
        for (int64_t row = 0; row < count; ++row) {
            if (!request.good[row]) return first + row;
        }
        fill();
    }
    return -1;
}

}  // namespace edgekv
