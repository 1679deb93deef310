// The small part of onnxruntime_c_api.h that is needed here, by position in its table of functions. The table only ever
// grows at its end; an older library says that it does not know the version.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgekv::onnx {

constexpr uint32_t kApiVersion = 17;  // the first with KernelContext_ParallelFor

using Table = void* const*;
using Status = void*;  // null is success

struct ApiBase {
    Table (*get_api)(uint32_t version);
    const char* (*get_version)();
};

// Of the ONNX Runtime in this process; null until RegisterCustomOps is called.
extern Table api;

enum Position {
    kCreateStatus = 0,
    kCreateEnv = 3,
    kCreateSessionFromArray = 8,
    kRun = 9,
    kCreateSessionOptions = 10,
    kCreateCustomOpDomain = 26,
    kCustomOpDomainAdd = 27,
    kAddCustomOpDomain = 28,
    kCreateTensorWithData = 49,
    kGetTensorMutableData = 51,
    kGetDimensionsCount = 61,
    kGetDimensions = 62,
    kGetTensorShapeElementCount = 64,
    kGetTensorTypeAndShape = 65,
    kCreateCpuMemoryInfo = 69,
    kKernelInfoGetAttributeInt64 = 86,
    kKernelContextGetInputCount = 88,
    kKernelContextGetInput = 90,
    kKernelContextGetOutput = 91,
    kReleaseStatus = 93,
    kReleaseTensorTypeAndShapeInfo = 99,
    kDisablePerSessionThreads = 120,
    kKernelContextParallelFor = 274,
};

// Calls the function at a position of the table.
template <int kPosition, typename Result = Status, typename... Args>
Result call(Args... args) {
    return reinterpret_cast<Result (*)(Args...)>(api[kPosition])(args...);
}

inline bool ok(Status status) {
    if (status) call<kReleaseStatus, void>(status);
    return !status;
}

inline Status failure(const char* message) {
    constexpr int kFail = 1;
    return call<kCreateStatus>(kFail, message);
}

enum ElementType { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt32 = 6 };

// struct OrtCustomOp as of version 16: later fields are not read. What an operator does not set is never called.
struct CustomOp {
    uint32_t version = 16;
    void* (*create_unused)(const CustomOp*, Table, const void* info) = nullptr;
    const char* (*name)(const CustomOp*) = nullptr;
    const char* (*provider)(const CustomOp*) = [](const CustomOp*) -> const char* { return nullptr; };
    int (*input_type)(const CustomOp*, size_t) = [](const CustomOp*, size_t) { return int{kFloat}; };
    size_t (*input_count)(const CustomOp*) = [](const CustomOp*) { return size_t{1}; };
    int (*output_type)(const CustomOp*, size_t) = [](const CustomOp*, size_t) { return int{kFloat}; };
    size_t (*output_count)(const CustomOp*) = [](const CustomOp*) { return size_t{1}; };
    void (*compute_unused)(void* kernel, void* context) = nullptr;
    void (*destroy)(void* kernel) = [](void*) {};
    int (*input_kind)(const CustomOp*, size_t) = [](const CustomOp*, size_t) { return 0; };  // 1: optional
    int (*output_kind)(const CustomOp*, size_t) = [](const CustomOp*, size_t) { return 0; };
    int (*input_memory)(const CustomOp*, size_t) = [](const CustomOp*, size_t) { return 0; };  // the default
    int (*variadic[4])(const CustomOp*) = {one, one, one, one};
    Status (*create)(const CustomOp*, Table, const void* info, void** kernel) = nullptr;
    Status (*compute)(void* kernel, void* context) = nullptr;

  private:
    static int one(const CustomOp*) { return 1; }
};

}  // namespace edgekv::onnx
