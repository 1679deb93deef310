// MatMulNBits for ONNX Runtime, on the kernels of dense/dense.h. Sessions with these options take it instead of their own
// operator of that name: the graph stays what it is, and runs without us too.
#include <memory>

#include "engines/onnxruntime_api.h"
#include "engines/operators.h"

#if defined(_WIN32)
#define EDGEKV_EXPORT __declspec(dllexport)
#else
#define EDGEKV_EXPORT __attribute__((visibility("default")))
#endif

namespace edgekv {
namespace onnx {

Table api = nullptr;

}  // namespace onnx

namespace {

using namespace onnx;

constexpr int kMaxRank = 8;

enum Input { kRows, kCodes, kScales, kZeros, kGroupIndex, kBias, kInputs };

struct Shape {
    int64_t dims[kMaxRank];
    size_t rank = 0;

    Status read(const void* value) {
        void* info = nullptr;
        if (Status status = call<kGetTensorTypeAndShape>(value, &info)) return status;
        Status status = call<kGetDimensionsCount>(static_cast<const void*>(info), &rank);
        if (!status && rank > kMaxRank) status = failure("MatMulNBits: more than 8 dimensions");
        if (!status) status = call<kGetDimensions>(static_cast<const void*>(info), dims, rank);
        call<kReleaseTensorTypeAndShapeInfo, void>(info);
        return status;
    }
    int64_t elements() const {
        int64_t n = 1;
        for (size_t i = 0; i < rank; ++i) n *= dims[i];
        return n;
    }
};

struct Product {
    int64_t n = 0, k = 0;
    Int4Weights weights{};  // once they have been seen

    static Status tensor(void* context, size_t index, const void** data, Shape* shape) {
        const void* value = nullptr;
        *data = nullptr;
        if (Status status = call<kKernelContextGetInput>(context, index, &value)) return status;
        if (!value) return nullptr;  // an optional input that is not given
        if (Status status = shape->read(value)) return status;
        return call<kGetTensorMutableData>(value, data);
    }

    // The weights are initialisers: they stay where they are for as long as the session lives.
    Status find_weights(void* context) {
        const void* data[kInputs] = {};
        Shape shapes[kInputs];
        size_t n_inputs = 0;
        if (Status status = call<kKernelContextGetInputCount>(context, &n_inputs)) return status;
        for (size_t i = kCodes; i < n_inputs; ++i) {
            if (Status status = tensor(context, i, &data[i], &shapes[i])) return status;
        }
        if (data[kGroupIndex]) return failure("MatMulNBits: edgekv's kernels take no g_idx");
        const int64_t blocks = dense_blocks(static_cast<int>(k));
        if (shapes[kCodes].elements() != n * blocks * 16 || shapes[kScales].elements() != n * blocks ||
            (data[kZeros] && shapes[kZeros].elements() != n * ((blocks + 1) / 2)) ||
            (data[kBias] && shapes[kBias].elements() != n)) {
            return failure("MatMulNBits: the weights do not have the size that N, K and blocks of 32 ask for");
        }
        weights = {static_cast<const uint8_t*>(data[kCodes]),
                   data[kScales],
                   static_cast<const uint8_t*>(data[kZeros]),
                   static_cast<int>(n),
                   static_cast<int>(k),
                   ScaleType::kFloat,
                   static_cast<const float*>(data[kBias])};
        return nullptr;
    }

    Status compute(void* context) {
        if (!weights.codes) {
            if (Status status = find_weights(context)) return status;
        }
        Shape shape;
        const void* rows = nullptr;
        if (Status status = tensor(context, kRows, &rows, &shape)) return status;
        if (shape.rank == 0 || shape.dims[shape.rank - 1] != k) return failure("MatMulNBits: rows are not K wide");
        const int64_t n_rows = shape.elements() / k;
        shape.dims[shape.rank - 1] = n;
        void *value = nullptr, *out = nullptr;
        if (Status status = call<kKernelContextGetOutput>(context, size_t{0}, static_cast<const int64_t*>(shape.dims),
                                                          shape.rank, &value)) {
            return status;
        }
        if (Status status = call<kGetTensorMutableData>(value, &out)) return status;
        if (n_rows == 0) return nullptr;
        // Not on the session's own threads: ours are awake when the next product comes.
        dense(weights, static_cast<const float*>(rows), static_cast<int>(n_rows), static_cast<float*>(out),
              operator_fork);
        return nullptr;
    }
};

Status attribute(const void* info, const char* name, int64_t* value) {
    return call<kKernelInfoGetAttributeInt64>(info, name, value);
}

struct ProductOp : CustomOp {
    ProductOp() {
        name = [](const CustomOp*) { return "MatMulNBits"; };
        input_count = [](const CustomOp*) { return size_t{kInputs}; };
        input_type = [](const CustomOp*, size_t i) {
            return int{i == kCodes || i == kZeros ? kUint8 : i == kGroupIndex ? kInt32 : kFloat};
        };
        input_kind = [](const CustomOp*, size_t i) { return i >= kZeros ? 1 : 0; };
        create = [](const CustomOp*, Table, const void* info, void** kernel) -> Status {
            auto made = std::make_unique<Product>();
            int64_t bits = 0, block = 0, accuracy = 0;
            if (Status status = attribute(info, "N", &made->n)) return status;
            if (Status status = attribute(info, "K", &made->k)) return status;
            if (Status status = attribute(info, "block_size", &block)) return status;
            ok(attribute(info, "bits", &bits));
            ok(attribute(info, "accuracy_level", &accuracy));
            // Level 4 allows what these kernels do: rows as 8-bit numbers.
            if (bits != 4 || block != kDenseBlock || accuracy != 4) {
                return failure("MatMulNBits: edgekv's kernels take 4 bits, blocks of 32 and accuracy level 4");
            }
            *kernel = made.release();
            return nullptr;
        };
        compute = [](void* kernel, void* context) { return static_cast<Product*>(kernel)->compute(context); };
        destroy = [](void* kernel) { delete static_cast<Product*>(kernel); };
    }
};

}  // namespace
}  // namespace edgekv

// What SessionOptions.register_custom_ops_library calls.
extern "C" EDGEKV_EXPORT void* RegisterCustomOps(void* options, const void* base) {
    using namespace edgekv;
    api = static_cast<const ApiBase*>(base)->get_api(kApiVersion);
    if (!api || !*dense_names()) return nullptr;
    static const ProductOp op;
    void* domain = nullptr;
    if (Status status = call<kCreateCustomOpDomain>("com.microsoft", &domain)) return status;
    if (Status status = call<kCustomOpDomainAdd>(domain, static_cast<const CustomOp*>(&op))) return status;
    return call<kAddCustomOpDomain>(options, domain);
}
