// Bindings of what is done to single pages.
#include <nanobind/nanobind.h>

#include <cerrno>
#include <cstdint>
#include <string>
#include <vector>

#include "pages/codec.h"
#include "kernels.h"
#include "records/reader.h"
#include "records/stream.h"
#include "thread_pool.h"
#include "python/views.h"

namespace edgekv {
namespace {

const Kernels& kernels() {
    static const Kernels* const found = find_kernels(nullptr);
    if (!found) throw nb::value_error("EDGEKV_ISA names no instruction set of this processor");
    return *found;
}

// A page: its address as an int, or a uint8 array of at least `bytes`.
class PageBytes {
  public:
    PageBytes(nb::handle page, const char* name, size_t bytes, bool writable) {
        if (PyLong_Check(page.ptr())) {
            data_ = static_cast<uint8_t*>(PyLong_AsVoidPtr(page.ptr()));
            if (PyErr_Occurred()) PyErr_Clear();
            if (!data_) throw nb::value_error((std::string(name) + " is not an address").c_str());
        } else {
            if (PyObject_GetBuffer(page.ptr(), &buffer_, PyBUF_SIMPLE | (writable ? PyBUF_WRITABLE : 0)) != 0) {
                PyErr_Clear();
                throw nb::value_error(
                    (std::string(name) + " must be an address or a contiguous " + (writable ? "writable " : "") +
                     "array")
                        .c_str());
            }
            if (static_cast<size_t>(buffer_.len) < bytes) {
                const auto has = buffer_.len;
                PyBuffer_Release(&buffer_);
                throw nb::value_error((std::string(name) + " has " + std::to_string(has) + " bytes, a page " +
                                       std::to_string(bytes))
                                          .c_str());
            }
            held_ = true;
            data_ = static_cast<uint8_t*>(buffer_.buf);
        }
        if (reinterpret_cast<uintptr_t>(data_) & 1) {
            if (held_) PyBuffer_Release(&buffer_);
            throw nb::value_error((std::string(name) + " must lie at an even address").c_str());
        }
    }
    ~PageBytes() {
        if (held_) PyBuffer_Release(&buffer_);
    }
    PageBytes(const PageBytes&) = delete;
    PageBytes& operator=(const PageBytes&) = delete;
    uint8_t* data() const { return data_; }

  private:
    uint8_t* data_ = nullptr;
    Py_buffer buffer_{};
    bool held_ = false;
};

void check_slots(int64_t n_slots, int page_size) {
    if (n_slots < 0 || n_slots > page_size) {
        throw nb::value_error(
            ("n_slots must be 0.." + std::to_string(page_size) + ", not " + std::to_string(n_slots)).c_str());
    }
}

void pack_warm(nb::handle hot, nb::handle out, int n_kv_heads, int head_dim, int page_size, int n_slots) {
    const Geometry g = make_geometry(n_kv_heads, 1, head_dim, page_size, 0);
    if (n_slots == -1) n_slots = page_size;
    check_slots(n_slots, page_size);
    PageBytes from(hot, "hot_page", g.hot_bytes(), false), to(out, "out", g.warm_bytes(), true);
    const Kernels& k = kernels();
    nb::gil_scoped_release released;
    k.pack_warm(g, from.data(), to.data(), Mask128::below(n_slots));
}

void pack_warm_many(ThreadPool& pool, nb::handle sources, nb::handle targets, nb::handle n_slots, int n_kv_heads,
                    int head_dim, int page_size) {
    const Geometry g = make_geometry(n_kv_heads, 1, head_dim, page_size, 0);
    View<uint64_t> from(sources, "sources", {-1});
    View<uint64_t> to(targets, "targets", {from.shape(0)});
    View<int64_t> slots(n_slots, "n_slots", {from.shape(0)});
    for (int64_t i = 0; i < from.shape(0); ++i) {
        check_slots(slots.data()[i], page_size);
        if (!from.data()[i] || !to.data()[i] || (from.data()[i] | to.data()[i]) & 1) {
            throw nb::value_error("sources and targets must be even addresses, not 0");
        }
    }
    const Kernels& k = kernels();
    nb::gil_scoped_release released;
    pool.run(static_cast<int>(from.shape(0)), [&](int i, int) {
        k.pack_warm(g, reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(from.data()[i])),
                    reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(to.data()[i])), Mask128::below(slots.data()[i]));
    });
}

bool write_hot_page(nb::handle page, int slot, nb::handle k, nb::handle v, int page_size) {
    View<float> keys(k, "k", {-1, -1, -1});
    View<float> values(v, "v", {keys.shape(0), keys.shape(1), keys.shape(2)});
    const Geometry g = make_geometry(static_cast<int>(keys.shape(1)), 1, static_cast<int>(keys.shape(2)), page_size, 0);
    const int n = static_cast<int>(keys.shape(0));
    if (slot < 0 || n < 0 || n > page_size - slot) throw nb::value_error("the tokens do not fit into the page");
    PageBytes to(page, "page", g.hot_bytes(), true);
    return write_hot(kernels(), g, to.data(), slot, keys.data(), values.data(), n);
}

void bounds(nb::handle refs, nb::handle low, nb::handle high, int page_size) {
    RefsView view(refs);
    const int64_t n = view.size();
    View<uint16_t> least(low, "low", {n, -1, -1}, true);
    View<uint16_t> most(high, "high", {n, least.shape(1), least.shape(2)}, true);
    const Geometry g =
        make_geometry(static_cast<int>(least.shape(1)), 1, static_cast<int>(least.shape(2)), page_size, 0);
    nb::gil_scoped_release released;
    const size_t one = static_cast<size_t>(g.n_kv_heads) * g.dim;
    for (int64_t i = 0; i < n; ++i) page_bounds(g, view.data()[i], least.data() + i * one, most.data() + i * one);
}

void sum_rows(const Kernels& k, const uint8_t* rows, int64_t n, int64_t row_bytes, int64_t start, int64_t stop,
              uint64_t* sums) {
    for (int64_t i = 0; i < n; ++i) {
        sums[i] = k.checksum(rows + i * row_bytes + start, static_cast<size_t>(stop - start));
    }
}

void check_span(int64_t start, int64_t stop, int64_t row_bytes) {
    if (start < 0 || stop > row_bytes || stop - start <= 240) {
        throw nb::value_error("start and stop must name more than 240 bytes of a row");
    }
}

// XXH3-64 of bytes [start, stop) of each row.
void checksums(nb::handle rows, int64_t start, int64_t stop, nb::handle out) {
    View<uint8_t> view(rows, "rows", {-1, -1});
    View<uint64_t> sums(out, "out", {view.shape(0)}, true);
    check_span(start, stop, view.shape(1));
    const Kernels& k = kernels();
    nb::gil_scoped_release released;
    sum_rows(k, view.data(), view.shape(0), view.shape(1), start, stop, sums.data());
}

// A buffer for whoever writes to it in the background: it goes when the last of them lets go, on any thread.
std::shared_ptr<View<uint8_t>> shared_rows(nb::handle rows, int64_t n) {
    return {new View<uint8_t>(rows, "rows", {n, -1}, true), [](View<uint8_t>* view) {
                nb::gil_scoped_acquire held;
                delete view;
            }};
}

void check_process(const RecordReader& reader) {
    if (!reader.ours()) throw std::runtime_error("a forked process cannot read through the reader of its parent");
}

class PyRecordReader {
  public:
    PyRecordReader(int depth, const char* how) {
        if (depth < 1) throw nb::value_error("depth must be 1 or more");
        reader_ = RecordReader::open(kernels(), depth, how);
        if (!reader_) throw nb::value_error((std::string("this system does not read rows with '") + how + "'").c_str());
    }

    ~PyRecordReader() {
        if (!reader_->ours()) reader_.release();  // what it would wait for is the parent's
    }

    const char* how() const { return reader_->how(); }
    RecordReader& reader() { return *reader_; }

    int64_t submit(int file, nb::handle places, nb::handle rows, nb::handle heads, int64_t payload_bytes) {
        check_process(*reader_);
        View<int64_t> place(places, "places", {-1});
        const int64_t n = place.shape(0);
        const auto view = shared_rows(rows, n);
        View<uint8_t> head(heads, "heads", {n, kHeadBytes});
        check_span(kSummedFrom, kPayloadAt + payload_bytes, view->shape(1));
        if (n == 0) throw nb::value_error("nothing to read");
        return reader_->submit({file, {place.data(), place.data() + n}, view->data(), view->shape(1), view,
                                {head.data(), head.data() + n * kHeadBytes}, payload_bytes});
    }

    nb::bytes wait(int64_t ticket, nb::handle pool) {
        check_process(*reader_);
        ThreadPool* const checks = pool.is_none() ? nullptr : nb::cast<ThreadPool*>(pool);
        RowRequest request;
        int error;
        {
            nb::gil_scoped_release released;
            error = reader_->wait(ticket, checks, &request);
        }
        if (error) {
            errno = error;
            PyErr_SetFromErrno(PyExc_OSError);
            throw nb::python_error();
        }
        return nb::bytes(request.good.data(), request.good.size());
    }

  private:
    std::unique_ptr<RecordReader> reader_;
};

void make_stream(RecordStream* self, PyRecordReader& reader, nb::handle rows, int64_t capacity, int n_layers, int64_t most) {
    const auto view = shared_rows(rows, -1);
    if (capacity < 1 || n_layers < 1 || view->shape(0) < capacity || view->shape(0) % capacity) {
        throw nb::value_error("rows must be one or more slots of capacity rows");
    }
    if (most < 1) throw nb::value_error("at least one piece must be on its way");
    const int n_slots = static_cast<int>(view->shape(0) / capacity);
    new (self) RecordStream(reader.reader(), view->data(), view, view->shape(1), capacity, n_slots, n_layers, most);
}

void plan_stream(RecordStream& self, int layer, int file, nb::handle stops, nb::handle counts, nb::handle pages,
                 nb::handle places, nb::handle heads, int64_t payload_bytes) {
    View<int64_t> stop(stops, "stops", {-1});
    View<int64_t> count(counts, "counts", {stop.shape(0)});
    View<int64_t> page(pages, "pages", {-1});
    View<int64_t> place(places, "places", {page.shape(0)});
    View<uint8_t> head(heads, "heads", {page.shape(0), kHeadBytes});
    if (layer < 0 || layer >= self.n_layers()) throw nb::value_error("layer is out of range");
    check_span(kSummedFrom, kPayloadAt + payload_bytes, self.row_bytes());
    StreamPlan plan;
    plan.file = file;
    plan.payload_bytes = payload_bytes;
    plan.stops.assign(stop.data(), stop.data() + stop.shape(0));
    plan.pages.assign(page.data(), page.data() + page.shape(0));
    plan.places.assign(place.data(), place.data() + place.shape(0));
    plan.heads.assign(head.data(), head.data() + page.shape(0) * kHeadBytes);
    plan.first_row.push_back(0);
    int64_t start = 0;
    for (int64_t i = 0; i < stop.shape(0); start = plan.stops[i++]) {
        const int64_t first = plan.first_row.back(), rows = count.data()[i];
        if (plan.stops[i] <= start || (plan.stops[i] % kRunPages && i + 1 < stop.shape(0)) || rows < 0 ||
            rows > self.capacity() || first + rows > page.shape(0)) {
            throw nb::value_error("stops must grow by whole runs, and a piece has at most capacity rows");
        }
        for (int64_t row = first; row < first + rows; ++row) {
            if (plan.pages[row] < start || plan.pages[row] >= plan.stops[i]) {
                throw nb::value_error("a row's page must lie in its piece");
            }
        }
        plan.first_row.push_back(first + rows);
    }
    nb::gil_scoped_release released;
    self.set_plan(layer, std::move(plan));
}

}  // namespace

void bind_pages(nb::module_& m) {
    m.attr("RECORD_LAYOUT") = nb::make_tuple(kHeadBytes, kSummedFrom, kPayloadAt);
    m.def("pack_warm", &pack_warm, nb::arg("hot_page"), nb::arg("out"), nb::arg("n_kv_heads"), nb::arg("head_dim"),
          nb::arg("page_size"), nb::arg("n_slots") = -1);
    m.def("pack_warm_many", &pack_warm_many, nb::arg("pool"), nb::arg("sources"), nb::arg("targets"),
          nb::arg("n_slots"), nb::arg("n_kv_heads"), nb::arg("head_dim"), nb::arg("page_size"));
    m.def("write_hot", &write_hot_page, nb::arg("page"), nb::arg("slot"), nb::arg("k"), nb::arg("v"),
          nb::arg("page_size"));
    nb::class_<PyRecordReader>(m, "RecordReader")
        .def(nb::init<int, const char*>(), nb::arg("depth"), nb::arg("how") = "")
        .def_prop_ro("how", &PyRecordReader::how)
        .def("submit", &PyRecordReader::submit, nb::arg("file"), nb::arg("places"), nb::arg("rows"), nb::arg("heads"),
             nb::arg("payload_bytes"))
        .def("wait", &PyRecordReader::wait, nb::arg("ticket"), nb::arg("pool") = nb::none());
    nb::class_<RecordStream>(m, "RecordStream")
        .def("__init__", &make_stream, nb::arg("reader"), nb::arg("rows"), nb::arg("capacity"), nb::arg("n_layers"),
             nb::arg("most"), nb::keep_alive<1, 2>())
        .def_prop_ro("reads", &RecordStream::reads)
        .def("plan", &plan_stream, nb::arg("layer"), nb::arg("file"), nb::arg("stops"), nb::arg("counts"),
             nb::arg("pages"), nb::arg("places"), nb::arg("heads"), nb::arg("payload_bytes"))
        .def("forget", [](RecordStream& self) {
            nb::gil_scoped_release released;
            self.forget();
        });
    m.def("checksums", &checksums, nb::arg("rows"), nb::arg("start"), nb::arg("stop"), nb::arg("out"));
    m.def("page_bounds", &bounds, nb::arg("refs"), nb::arg("low"), nb::arg("high"), nb::arg("page_size"));
}

}  // namespace edgekv
