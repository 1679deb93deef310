// A small C interface to the ExecuTorch runtime, so that a Python process (or anything with a C foreign interface) runs
// .pte programs without torch. Nothing is copied: a call is bound once to buffers of the caller's and run as often as
// needed. Every function that can fail returns null or a number other than 0 and leaves a message in edgekv_et_error().
#include <executorch/extension/module/module.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/executor/method_meta.h>
#include <executorch/runtime/platform/platform.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

// The wheel has this library but not its header.
namespace executorch::extension::threadpool {
class ThreadPool {
  public:
    size_t get_thread_count() const;
    bool _unsafe_reset_threadpool(uint32_t n_threads);
};
ThreadPool* get_threadpool();
struct pthreadpool* get_pthreadpool();
}  // namespace executorch::extension::threadpool
extern "C" void pthreadpool_parallelize_1d(
    struct executorch::extension::threadpool::pthreadpool*, void (*)(void*, size_t), void*, size_t, uint32_t);

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::extension::Module;
using executorch::runtime::BackendOptions;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::LoadBackendOptionsMap;
using executorch::runtime::Method;
using executorch::runtime::Program;
using executorch::runtime::Span;

constexpr int kMaxDims = 8;

thread_local std::string last_error;
// What the runtime logged last as an error: its return codes alone say little.
thread_local std::string last_log;

void keep_log(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message, size_t) {
    if (level == et_pal_log_level_t::kError || level == et_pal_log_level_t::kFatal) last_log = message;
}

const bool registered =
    executorch::runtime::register_pal(executorch::runtime::PalImpl::create(keep_log, __FILE__));

int fail(const std::string& what, Error error = Error::Ok) {
    last_error = what;
    if (error != Error::Ok) {
        char code[32];
        std::snprintf(code, sizeof code, " (error 0x%x)", static_cast<unsigned>(error));
        last_error += code;
        if (!last_log.empty()) last_error += ": " + last_log;
    }
    return error == Error::Ok ? -1 : static_cast<int>(error);
}

}  // namespace

extern "C" {

struct EdgekvTensor {
    void* data;
    int64_t size_bytes;  // of the buffer, which may be larger than the tensor
    int32_t dtype;       // executorch::runtime::etensor::ScalarType
    int32_t n_dims;
    int32_t sizes[kMaxDims];
};
}

namespace {

// A tensor whose description lives as long as the call.
struct BoundTensor {
    explicit BoundTensor(const EdgekvTensor& from) : size_bytes(from.size_bytes) {
        TensorImpl::StridesType stride = 1;
        for (int i = from.n_dims - 1; i >= 0; --i) {
            sizes[i] = from.sizes[i];
            order[i] = static_cast<TensorImpl::DimOrderType>(i);
            strides[i] = stride;
            stride *= sizes[i];
        }
        impl = std::make_unique<TensorImpl>(
            static_cast<ScalarType>(from.dtype), from.n_dims, sizes, from.data, order, strides);
    }
    TensorImpl::SizesType sizes[kMaxDims];
    TensorImpl::DimOrderType order[kMaxDims];
    TensorImpl::StridesType strides[kMaxDims];
    int64_t size_bytes;
    std::unique_ptr<TensorImpl> impl;
};

// A range of addresses that becomes memory where it is touched.
struct Unmap {
    size_t size = 0;
    void operator()(uint8_t* start) const { munmap(start, size); }
};
using Room = std::unique_ptr<uint8_t, Unmap>;

Room make_room(size_t size) {
    void* start = size == 0 ? MAP_FAILED
                            : mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    return Room(start == MAP_FAILED ? nullptr : static_cast<uint8_t*>(start), Unmap{size});
}

// A program and the room for what its methods compute on the way. ExecuTorch plans for the largest shapes, and a Module of its
// own fills all of that with zeros; here a step costs what it touches. One method runs at a time, so they share it.
struct OpenProgram {
    explicit OpenProgram(const char* path) : module(std::string(path), Module::LoadMode::Mmap) {}

    Error plan() {
        const auto names = module.method_names();
        if (!names.ok()) return names.error();
        std::vector<size_t> sizes;
        for (const auto& name : names.get()) {
            const auto meta = module.method_meta(name);
            if (!meta.ok()) return meta.error();
            sizes.resize(std::max(sizes.size(), meta->num_memory_planned_buffers()));
            for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
                const auto size = meta->memory_planned_buffer_size(i);
                if (!size.ok()) return size.error();
                sizes[i] = std::max(sizes[i], static_cast<size_t>(*size));
            }
        }
        for (const size_t size : sizes) {
            rooms.push_back(make_room(size));
            if (size != 0 && rooms.back() == nullptr) return Error::MemoryAllocationFailed;
            spans.emplace_back(rooms.back().get(), size);
        }
        memory = std::make_unique<HierarchicalAllocator>(Span<Span<uint8_t>>(spans.data(), spans.size()));
        return Error::Ok;
    }

    std::vector<Room> rooms;
    std::vector<Span<uint8_t>> spans;
    std::unique_ptr<HierarchicalAllocator> memory;
    Module module;  // last: its methods use the memory
};

struct Call {
    Method* method;
    std::vector<std::unique_ptr<BoundTensor>> inputs, outputs;
};

}  // namespace

extern "C" {

const char* edgekv_et_error() { return last_error.c_str(); }

int edgekv_et_set_threads(int n_threads) {
    auto* pool = executorch::extension::threadpool::get_threadpool();
    if (pool == nullptr) return fail("ExecuTorch was built without a thread pool");
    if (static_cast<int>(pool->get_thread_count()) == n_threads) return 0;
    return pool->_unsafe_reset_threadpool(static_cast<uint32_t>(n_threads)) ? 0 : fail("the thread pool was not resized");
}

// Calls task(context, i) for each i in [0, count) on the runtime's threads; for others who need threads between calls.
bool edgekv_et_parallel(void (*task)(void*, size_t), void* context, size_t count) {
    pthreadpool_parallelize_1d(executorch::extension::threadpool::get_pthreadpool(), task, context, count, 0);
    return true;
}

// Opens a program, mapped into memory. packed_cache: file for packed weights, or empty for none.
void* edgekv_et_open(const char* path, const char* packed_cache) {
    last_log.clear();
    auto program = std::make_unique<OpenProgram>(path);
    BackendOptions<4> options;
    LoadBackendOptionsMap map;
    (void)options.set_option("weight_cache_enabled", true);
    (void)options.set_option("workspace_sharing_mode", 2);
    if (packed_cache != nullptr && *packed_cache != 0) {
        (void)options.set_option("packed_cache_path", packed_cache);
        (void)options.set_option("save_weight_cache_on_disk", true);
    }
    (void)map.set_options("XnnpackBackend", options.view());
    Error error = program->module.load(map, Program::Verification::InternalConsistency);
    if (error == Error::Ok) error = program->plan();
    if (error != Error::Ok) {
        fail("the program was not loaded", error);
        return nullptr;
    }
    return program.release();
}

void edgekv_et_close(void* program) { delete static_cast<OpenProgram*>(program); }

int edgekv_et_has_backend(const char* name) { return executorch::runtime::get_backend_class(name) != nullptr; }

int edgekv_et_has_method(void* program, const char* name) {
    auto names = static_cast<OpenProgram*>(program)->module.method_names();
    return names.ok() && names.get().count(name) != 0;
}

void* edgekv_et_method(void* program, const char* name) {
    last_log.clear();
    auto* opened = static_cast<OpenProgram*>(program);
    auto& module = opened->module;
    const Error error = module.load_method(name, opened->memory.get());
    if (error != Error::Ok) {
        fail(std::string("method ") + name + " was not loaded", error);
        return nullptr;
    }
    auto method = module.method(name);
    return method.ok() ? *method : nullptr;
}

// Describes input or output `index` of a method, at its largest. Returns 0 if there is one.
int edgekv_et_describe(void* method, int is_output, int index, EdgekvTensor* into) {
    const auto meta = static_cast<Method*>(method)->method_meta();
    const size_t count = is_output ? meta.num_outputs() : meta.num_inputs();
    if (index < 0 || static_cast<size_t>(index) >= count) return -1;
    const auto tensor = is_output ? meta.output_tensor_meta(index) : meta.input_tensor_meta(index);
    if (!tensor.ok() || tensor->sizes().size() > kMaxDims) return -1;
    into->dtype = static_cast<int32_t>(tensor->scalar_type());
    into->n_dims = static_cast<int32_t>(tensor->sizes().size());
    for (int i = 0; i < into->n_dims; ++i) into->sizes[i] = tensor->sizes()[i];
    into->size_bytes = static_cast<int64_t>(tensor->nbytes());
    return 0;
}

// Binds a method to buffers that must outlive the call.
void* edgekv_et_bind(
    void* method, const EdgekvTensor* inputs, int n_inputs, const EdgekvTensor* outputs, int n_outputs) {
    auto call = std::make_unique<Call>();
    call->method = static_cast<Method*>(method);
    if (static_cast<size_t>(n_inputs) != call->method->inputs_size() ||
        static_cast<size_t>(n_outputs) != call->method->outputs_size()) {
        fail("the method has " + std::to_string(call->method->inputs_size()) + " inputs and " +
             std::to_string(call->method->outputs_size()) + " outputs");
        return nullptr;
    }
    for (int i = 0; i < n_inputs; ++i) call->inputs.push_back(std::make_unique<BoundTensor>(inputs[i]));
    for (int i = 0; i < n_outputs; ++i) call->outputs.push_back(std::make_unique<BoundTensor>(outputs[i]));
    return call.release();
}

void edgekv_et_unbind(void* call) { delete static_cast<Call*>(call); }

// Runs calls one after the other; stops at the first that fails.
int edgekv_et_run(void* const* calls, int n_calls) {
    for (int c = 0; c < n_calls; ++c) {
        auto& call = *static_cast<Call*>(calls[c]);
        last_log.clear();
        for (size_t i = 0; i < call.inputs.size(); ++i) {
            const Error error = call.method->set_input(EValue(Tensor(call.inputs[i]->impl.get())), i);
            if (error != Error::Ok) return fail("input " + std::to_string(i) + " was refused", error);
        }
        for (size_t i = 0; i < call.outputs.size(); ++i) {
            auto& output = *call.outputs[i];
            const Error error = call.method->set_output_data_ptr(
                output.impl->mutable_data(), static_cast<size_t>(output.size_bytes), i);
            if (error != Error::Ok) return fail("output " + std::to_string(i) + " was refused", error);
        }
        const Error error = call.method->execute();
        if (error != Error::Ok) return fail("the method failed", error);
    }
    return 0;
}

// Sizes of output `index` after a run, for methods whose shapes vary; returns the number of dimensions.
int edgekv_et_output_sizes(void* method, int index, int32_t* sizes) {
    const auto& value = static_cast<Method*>(method)->get_output(index);
    if (!value.isTensor()) return -1;
    const auto& tensor = value.toTensor();
    for (int i = 0; i < tensor.dim() && i < kMaxDims; ++i) sizes[i] = static_cast<int32_t>(tensor.size(i));
    return static_cast<int>(tensor.dim());
}

}  // extern "C"
