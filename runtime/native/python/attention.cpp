// The Python module: argument checks, the GIL, nothing else. _kernels.pyi documents it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "dense/dense.h"
#include "kernels.h"
#include "engines/onnxruntime_threads.h"
#include "engines/operators.h"
#include "records/stream.h"
#include "thread_pool.h"
#include "python/views.h"

namespace edgekv {

Geometry make_geometry(int n_kv_heads, int group, int head_dim, int page_size, float softcap) {
    const auto check = [](const char* name, int value, int low, int high, int multiple) {
        if (value < low || value > high || value % multiple) {
            throw nb::value_error((std::string(name) + " must be " + std::to_string(low) + ".." + std::to_string(high) +
                                   (multiple > 1 ? " and a multiple of " + std::to_string(multiple) : "") + ", not " +
                                   std::to_string(value))
                                      .c_str());
        }
    };
    check("n_kv_heads", n_kv_heads, 1, 4096, 1);
    check("head_dim", head_dim, 4, kMaxDim, 4);
    check("page_size", page_size, 4, kMaxPage, 4);
    return {n_kv_heads, group, head_dim, page_size, pad16(head_dim), pad16(page_size), softcap};
}

namespace {

using Shape = std::initializer_list<int64_t>;

class PyAttention {
  public:
    PyAttention(nb::object pool, int n_q_heads, int n_kv_heads, int head_dim, int page_size, float scale, float softcap,
                nb::object sinks, int max_tokens, const std::string& isa)
        : pool_(std::move(pool)) {
        const Kernels* kernels = find_kernels(isa.c_str());
        if (!kernels) throw nb::value_error("isa (or EDGEKV_ISA) names no instruction set of this processor");
        if (n_kv_heads < 1 || n_q_heads < 1 || n_q_heads % n_kv_heads) {
            throw nb::value_error("n_q_heads must be a positive multiple of n_kv_heads");
        }
        if (max_tokens < 1) throw nb::value_error("max_tokens must be at least 1");
        if (!(softcap >= 0)) throw nb::value_error("softcap must not be negative");
        std::vector<float> sink_values;
        if (!sinks.is_none()) {
            View<float> view(sinks, "sinks", {n_q_heads});
            sink_values.assign(view.data(), view.data() + n_q_heads);
        }
        const Geometry g = make_geometry(n_kv_heads, n_q_heads / n_kv_heads, head_dim, page_size, softcap);
        attention_ = std::make_unique<Attention>(nb::cast<ThreadPool&>(pool_), *kernels, g, scale,
                                                 std::move(sink_values), max_tokens);
        isa_ = kernels->name;
    }

    void run(nb::handle q, nb::handle k, nb::handle v, nb::handle positions, nb::handle refs, nb::handle out,
             int64_t window, nb::handle page_mass, nb::handle log_sum_exp) {
        Use use(*this);
        RefsView pages(refs);
        Step step(*attention_, q, k, v, positions, window);
        View<float> to(out, "out", {step.n_new, step.q_heads, attention_->geometry().dim}, true);
        std::optional<View<float>> mass, sums;
        if (!page_mass.is_none()) mass.emplace(page_mass, "page_mass", Shape{pages.size()}, true);
        if (!log_sum_exp.is_none()) sums.emplace(log_sum_exp, "log_sum_exp", Shape{step.n_new, step.q_heads}, true);
        nb::gil_scoped_release released;
        whole(step, pages, to.data(), mass ? mass->data() : nullptr, sums ? sums->data() : nullptr);
    }

    // run(), with the pages on flash fed from a stream; returns the first row of the plan that is bad, or -1.
    int64_t stream(RecordStream& rows, int layer, nb::handle q, nb::handle k, nb::handle v, nb::handle positions,
                   nb::handle refs, nb::handle out, int64_t window, nb::handle page_mass) {
        Use use(*this);
        RefsView view(refs);
        Step step(*attention_, q, k, v, positions, window);
        View<float> to(out, "out", {step.n_new, step.q_heads, attention_->geometry().dim}, true);
        std::optional<View<float>> mass;
        if (!page_mass.is_none()) mass.emplace(page_mass, "page_mass", Shape{view.size()}, true);
        if (!rows.reader().ours()) throw std::runtime_error("a forked process cannot read through the reader of its parent");
        if (layer < 0 || layer >= rows.n_layers()) throw nb::value_error("layer is out of range");
        if (rows.plan(layer).n_pages() != view.size()) throw nb::value_error("refs must be the pages of the plan");
        if (rows.row_bytes() < kPayloadAt + static_cast<int64_t>(attention_->geometry().warm_bytes())) {
            throw nb::value_error("the rows are shorter than a page");
        }
        check_alignment(view, 0, view.size());
        int error = 0;
        int64_t bad = -1;
        {
            nb::gil_scoped_release released;
            std::vector<PageRef> pages(view.data(), view.data() + view.size());
            step.begin(view.size(), mass.has_value());
            bad = rows.feed(*attention_, layer, pages, &error);
            if (bad < 0 && !error) attention_->finish(to.data(), mass ? mass->data() : nullptr, nullptr);
        }
        if (error) {
            errno = error;
            PyErr_SetFromErrno(PyExc_OSError);
            throw nb::python_error();
        }
        return bad;
    }

    void begin(nb::handle q, nb::handle k, nb::handle v, nb::handle positions, int64_t window, int64_t n_pages,
               bool want_mass) {
        Use use(*this);
        if (n_pages < 0) throw nb::value_error("n_pages must not be negative");
        Step step(*attention_, q, k, v, positions, window);
        nb::gil_scoped_release released;
        step.begin(n_pages, want_mass);
        want_mass_ = want_mass;
    }

    void pages(nb::handle refs, int64_t start, int64_t stop) {
        Use use(*this);
        if (!attention_->begun()) throw nb::value_error("pages() before begin()");
        RefsView view(refs);
        if (view.size() != attention_->n_pages()) throw nb::value_error("refs must have as many rows as begin() said");
        if (start != attention_->next_page()) throw nb::value_error("start must be where the last piece stopped");
        if (stop < start || stop > view.size() || (stop % kRunPages && stop != view.size())) {
            throw nb::value_error("stop must be a multiple of RUN_PAGES from start on, or the number of pages");
        }
        check_alignment(view, start, stop);
        nb::gil_scoped_release released;
        attention_->pages(view.data(), start, stop);
    }

    void finish(nb::handle out, nb::handle page_mass, nb::handle log_sum_exp) {
        Use use(*this);
        if (!attention_->begun()) throw nb::value_error("finish() before begin()");
        if (attention_->next_page() != attention_->n_pages()) throw nb::value_error("finish() before the last page");
        const Geometry& g = attention_->geometry();
        View<float> to(out, "out", {attention_->n_new(), g.n_kv_heads * g.group, g.dim}, true);
        std::optional<View<float>> mass, sums;
        if (!page_mass.is_none()) {
            if (!want_mass_) throw nb::value_error("page_mass was not asked for in begin()");
            mass.emplace(page_mass, "page_mass", Shape{attention_->n_pages()}, true);
        }
        if (!log_sum_exp.is_none()) {
            sums.emplace(log_sum_exp, "log_sum_exp", Shape{attention_->n_new(), g.n_kv_heads * g.group}, true);
        }
        nb::gil_scoped_release released;
        attention_->finish(to.data(), mass ? mass->data() : nullptr, sums ? sums->data() : nullptr);
    }

    std::string isa() const { return isa_; }
    size_t buffer_bytes() const { return attention_->buffer_bytes(); }

  private:
    // One call at a time: the GIL is free during a call, so a second thread could enter.
    struct Use {
        explicit Use(PyAttention& owner) : owner(owner) {
            if (owner.busy_.exchange(true)) throw std::runtime_error("this Attention is in use by another thread");
        }
        ~Use() { owner.busy_.store(false); }
        PyAttention& owner;
    };

    struct Step {
        Step(Attention& a, nb::handle q, nb::handle k, nb::handle v, nb::handle positions, int64_t window)
            : attention(a),
              q_heads(a.geometry().n_kv_heads * a.geometry().group),
              q(q, "q", {-1, q_heads, a.geometry().dim}),
              n_new(this->q.shape(0)),
              k(k, "new_k", {n_new, a.geometry().n_kv_heads, a.geometry().dim}),
              v(v, "new_v", {n_new, a.geometry().n_kv_heads, a.geometry().dim}),
              positions(positions, "positions", {n_new}),
              window(window) {
            if (n_new < 1 || n_new > a.max_tokens()) {
                throw nb::value_error(("q must have 1.." + std::to_string(a.max_tokens()) + " tokens, not " +
                                       std::to_string(n_new))
                                          .c_str());
            }
            if (window < 0) throw nb::value_error("window must not be negative");
            for (int64_t t = 1; t < n_new; ++t) {
                if (this->positions.data()[t] <= this->positions.data()[t - 1]) {
                    throw nb::value_error("positions must increase");
                }
            }
        }
        void begin(int64_t n_pages, bool want_mass) {
            attention.begin(q.data(), k.data(), v.data(), positions.data(), static_cast<int>(n_new), window, n_pages,
                            want_mass);
        }
        Attention& attention;
        int q_heads;
        View<float> q;
        int64_t n_new;
        View<float> k, v;
        View<int64_t> positions;
        int64_t window;
    };

    static void check_alignment(const RefsView& refs, int64_t start, int64_t stop) {
        for (int64_t i = start; i < stop; ++i) {
            if (refs.data()[i].data & 1 || refs.data()[i].kind > kWarm) {
                throw nb::value_error(
                    ("refs[" + std::to_string(i) + "] has an odd address or an unknown kind").c_str());
            }
        }
    }

    void whole(Step& step, const RefsView& refs, float* out, float* mass, float* log_sum_exp) {
        for (int64_t i = 0; i < refs.size(); ++i) {
            if (refs.data()[i].data & 1 || refs.data()[i].kind > kWarm) throw_bad_ref(i);
        }
        step.begin(refs.size(), mass != nullptr);
        if (refs.size() > 0) attention_->pages(refs.data(), 0, refs.size());
        attention_->finish(out, mass, log_sum_exp);
    }

    [[noreturn]] static void throw_bad_ref(int64_t i) {
        nb::gil_scoped_acquire held;
        throw nb::value_error(("refs[" + std::to_string(i) + "] has an odd address or an unknown kind").c_str());
    }

    nb::object pool_;  // kept alive
    std::unique_ptr<Attention> attention_;
    std::atomic<bool> busy_{false};
    bool want_mass_ = false;
    std::string isa_;
};

double read_seconds(ThreadPool& pool, nb::handle array) {
    View<uint8_t> view(array, "array", {-1});
    const Kernels* kernels = find_kernels(nullptr);
    if (!kernels) throw nb::value_error("EDGEKV_ISA names no instruction set of this processor");
    constexpr int64_t kPart = 1 << 18;
    const int64_t n = view.shape(0);
    const int parts = static_cast<int>((n + kPart - 1) / kPart);
    std::atomic<uint64_t> sum{0};
    nb::gil_scoped_release released;
    const auto start = std::chrono::steady_clock::now();
    pool.run(parts, [&](int part, int) {
        const int64_t first = part * kPart, end = first + kPart < n ? first + kPart : n;
        sum.fetch_add(kernels->read(view.data() + first, static_cast<size_t>(end - first)), std::memory_order_relaxed);
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string isa() {
    const Kernels* kernels = find_kernels(nullptr);
    if (!kernels) throw nb::value_error("EDGEKV_ISA names no instruction set of this processor");
    return kernels->name;
}

nb::tuple available_isas() {
    nb::list names;
    for (auto choice : {amx_kernels, avx512_kernels, avx2_kernels, neon_dot_kernels, neon_kernels, scalar_kernels}) {
        if (const Kernels* kernels = choice()) names.append(nb::str(kernels->name));
    }
    return nb::tuple(names);
}

}  // namespace
}  // namespace edgekv

NB_MODULE(_kernels, m) {
    using namespace edgekv;
    // What a daemon thread holds when the process ends is not leaked by us, and a report of it on stderr is nobody's help.
    nb::set_leak_warnings(false);
    m.attr("RUN_PAGES") = kRunPages;
    m.def("isa", &isa);
    m.def("build", &build_facts);
    m.def("available_isas", &available_isas);
    m.def("dense_names", &dense_names);
    m.def("operators", [](int n_threads) { return reinterpret_cast<uintptr_t>(&operators(n_threads)); },
          nb::arg("n_threads"));
    m.def("operator_threads", [] { return reinterpret_cast<uintptr_t>(&operator_threads); });
    m.def("read_seconds", &read_seconds, nb::arg("pool"), nb::arg("array"));

    m.def("onnxruntime_executor", [] { return reinterpret_cast<uintptr_t>(onnxruntime_executor()); });

    nb::class_<ThreadPool>(m, "ThreadPool")
        .def(
            "__init__",
            [](ThreadPool* self, int n_threads, uintptr_t executor) {
                if (n_threads < 1 || n_threads > 256) throw nb::value_error("n_threads must be 1..256");
                new (self) ThreadPool(n_threads, reinterpret_cast<ThreadPool::Executor>(executor));
            },
            nb::arg("n_threads"), nb::arg("executor") = 0)
        .def_prop_ro("n_threads", &ThreadPool::size);

    nb::class_<PyAttention>(m, "Attention")
        .def(nb::init<nb::object, int, int, int, int, float, float, nb::object, int, const std::string&>(),
             nb::arg("pool"), nb::arg("n_q_heads"), nb::arg("n_kv_heads"), nb::arg("head_dim"), nb::arg("page_size"),
             nb::arg("scale"), nb::arg("softcap") = 0.0f, nb::arg("sinks") = nb::none(), nb::arg("max_tokens") = 512,
             nb::arg("isa") = "")
        .def("run", &PyAttention::run, nb::arg("q"), nb::arg("new_k"), nb::arg("new_v"), nb::arg("positions"),
             nb::arg("refs"), nb::arg("out"), nb::arg("window") = 0, nb::arg("page_mass") = nb::none(),
             nb::arg("log_sum_exp") = nb::none())
        .def("begin", &PyAttention::begin, nb::arg("q"), nb::arg("new_k"), nb::arg("new_v"), nb::arg("positions"),
             nb::arg("window"), nb::arg("n_pages"), nb::arg("want_mass") = false)
        .def("pages", &PyAttention::pages, nb::arg("refs"), nb::arg("start"), nb::arg("stop"))
        .def("stream", &PyAttention::stream, nb::arg("rows"), nb::arg("layer"), nb::arg("q"), nb::arg("new_k"),
             nb::arg("new_v"), nb::arg("positions"), nb::arg("refs"), nb::arg("out"), nb::arg("window") = 0,
             nb::arg("page_mass") = nb::none())
        .def("finish", &PyAttention::finish, nb::arg("out"), nb::arg("page_mass") = nb::none(),
             nb::arg("log_sum_exp") = nb::none())
        .def_prop_ro("isa", &PyAttention::isa)
        .def_prop_ro("buffer_bytes", &PyAttention::buffer_bytes);

    bind_pages(m);
}
