// NumPy arrays (anything with the buffer protocol) as checked views. Every complaint is a ValueError that names the
// argument, what was wanted and what came.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "kernels.h"

namespace edgekv {

namespace nb = nanobind;

template <typename T>
struct Format;
template <>
struct Format<float> {
    static constexpr const char *codes = "f", *name = "float32";
};
template <>
struct Format<int64_t> {
    static constexpr const char *codes = "lq", *name = "int64";
};
template <>
struct Format<uint64_t> {
    static constexpr const char *codes = "LQ", *name = "uint64";
};
template <>
struct Format<uint16_t> {  // the bits of fp16
    static constexpr const char *codes = "e", *name = "float16";
};
template <>
struct Format<int8_t> {
    static constexpr const char *codes = "b", *name = "int8";
};
template <>
struct Format<uint8_t> {
    static constexpr const char *codes = "B", *name = "uint8";
};

// Holds the buffer for its own life, so that the array cannot be resized or freed while a kernel reads it.
template <typename T>
class View {
  public:
    // shape: the wanted extents, -1 for any.
    View(nb::handle object, const char* name, std::initializer_list<int64_t> shape, bool writable = false) {
        const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(object.ptr(), &buffer_, flags) != 0) {
            PyErr_Clear();
            fail(name, std::string("must be a C-contiguous ") + (writable ? "writable " : "") + Format<T>::name +
                           " array");
        }
        held_ = true;
        const char* format = buffer_.format ? buffer_.format : "B";
        if (*format == '<' || *format == '=' || *format == '@') ++format;
        bool known = false;
        for (const char* c = Format<T>::codes; *c; ++c) known |= format[0] == *c && format[1] == 0;
        if (!known || buffer_.itemsize != static_cast<Py_ssize_t>(sizeof(T))) {
            fail(name, std::string("must be ") + Format<T>::name + ", not of buffer format '" + format + "'");
        }
        bool fits = buffer_.ndim == static_cast<int>(shape.size());
        int axis = 0;
        for (int64_t n : shape) {
            if (fits && n >= 0) fits = buffer_.shape[axis] == n;
            ++axis;
        }
        if (!fits) fail(name, "must have shape " + text(shape) + ", not " + shape_text());
    }
    ~View() {
        if (held_) PyBuffer_Release(&buffer_);
    }
    View(const View&) = delete;
    View& operator=(const View&) = delete;

    T* data() const { return static_cast<T*>(buffer_.buf); }
    int64_t shape(int axis) const { return buffer_.shape[axis]; }

  private:
    [[noreturn]] void fail(const char* name, const std::string& what) {
        if (held_) PyBuffer_Release(&buffer_);
        held_ = false;
        throw nb::value_error((std::string(name) + " " + what).c_str());
    }
    static std::string text(std::initializer_list<int64_t> shape) {
        std::string s = "[";
        for (int64_t n : shape) s += (s.size() > 1 ? ", " : "") + (n < 0 ? std::string("any") : std::to_string(n));
        return s + "]";
    }
    std::string shape_text() const {
        std::string s = "[";
        for (int i = 0; i < buffer_.ndim; ++i) s += (i ? ", " : "") + std::to_string(buffer_.shape[i]);
        return s + "]";
    }

    Py_buffer buffer_{};
    bool held_ = false;
};

// A 1-D PAGE_REF array (or its bytes). The format of a structured array is not parsed: that would cost more than a
// small call; the item size tells it from everything else.
class RefsView {
  public:
    explicit RefsView(nb::handle object) {
        if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_SIMPLE) != 0) {
            PyErr_Clear();
            throw nb::value_error("refs must be a C-contiguous 1-D PAGE_REF array");
        }
        const bool bytes = buffer_.itemsize == 1 && buffer_.len % sizeof(PageRef) == 0;
        if (buffer_.itemsize != static_cast<Py_ssize_t>(sizeof(PageRef)) && !bytes) {
            PyBuffer_Release(&buffer_);
            throw nb::value_error("refs must be a C-contiguous 1-D PAGE_REF array");
        }
    }
    ~RefsView() { PyBuffer_Release(&buffer_); }
    RefsView(const RefsView&) = delete;
    RefsView& operator=(const RefsView&) = delete;
    const PageRef* data() const { return static_cast<const PageRef*>(buffer_.buf); }
    int64_t size() const { return static_cast<int64_t>(buffer_.len / sizeof(PageRef)); }

  private:
    Py_buffer buffer_{};
};

// The checked geometry of a cache.
Geometry make_geometry(int n_kv_heads, int group, int head_dim, int page_size, float softcap);

void bind_pages(nb::module_& m);
nb::dict build_facts();

}  // namespace edgekv
