// The namespace edgekv_device of ExecuTorch operators: a decoder's dense part on the native kernels. A program that has
// them was exported with --operators edgekv. The kernels come as a table of functions (runtime/native/engines/operators.h), from a
// library that has them for every processor; here is what turns ExecuTorch's values into their arguments.
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include <cstdint>

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

constexpr int64_t kVersion = 2;

struct Operators {
    int64_t version;
    void (*linear_int4)(const float*, const uint8_t*, const void*, const float*, int, int, int, float*);
    void (*rms_norm)(const float*, const float*, const float*, float, int, int, float*, float*);
    void (*swiglu)(const float*, const float*, int64_t, float*);
    void (*geglu)(const float*, const float*, int64_t, float*);
    void (*rotary)(const float*, const float*, const float*, int, int, int, int, float*);
};

const Operators* operators = nullptr;

const float* floats(const EValue* value) { return value->toTensor().const_data_ptr<float>(); }
float* output(EValue* value) { return value->toTensor().mutable_data_ptr<float>(); }
int size(const Tensor& tensor, int dim) { return static_cast<int>(tensor.size(dim)); }
int last(const Tensor& tensor) { return size(tensor, static_cast<int>(tensor.dim()) - 1); }

// Whether the tensors are what they are said to be; a program made by the exporter always is.
bool require(KernelRuntimeContext& context, bool as_said) {
    if (!as_said || operators == nullptr) context.fail(Error::InvalidArgument);
    return as_said && operators != nullptr;
}

bool is_float(const EValue* value) { return value->toTensor().scalar_type() == ScalarType::Float; }

void linear_int4(KernelRuntimeContext& context, Span<EValue*> v) {
    const Tensor &x = v[0]->toTensor(), &codes = v[1]->toTensor(), &scales = v[2]->toTensor(), &y = v[4]->toTensor();
    const int n = size(codes, 0), k = last(x), rows = static_cast<int>(x.numel() / k);
    const bool as_said = is_float(v[0]) && is_float(v[4]) && codes.scalar_type() == ScalarType::Byte &&
                         scales.scalar_type() == ScalarType::BFloat16 && k % 32 == 0 &&
                         codes.numel() == int64_t{n} * k / 2 && scales.numel() == int64_t{n} * k / 32 &&
                         y.numel() == int64_t{rows} * n;
    if (!require(context, as_said)) return;
    operators->linear_int4(floats(v[0]), codes.const_data_ptr<uint8_t>(), scales.const_data_ptr(),
                           v[3]->isNone() ? nullptr : floats(v[3]), rows, n, k, output(v[4]));
}

void norm(KernelRuntimeContext& context, const EValue* x, const EValue* residual, const EValue* weight, double eps,
          EValue* y, EValue* total) {
    const int k = last(x->toTensor()), rows = static_cast<int>(x->toTensor().numel() / k);
    const bool as_said = is_float(x) && is_float(y) && is_float(weight) && weight->toTensor().numel() == k &&
                         y->toTensor().numel() == x->toTensor().numel();
    if (!require(context, as_said)) return;
    operators->rms_norm(floats(x), residual ? floats(residual) : nullptr, floats(weight), static_cast<float>(eps), rows,
                        k, output(y), total ? output(total) : nullptr);
}

void rms_norm(KernelRuntimeContext& context, Span<EValue*> v) {
    norm(context, v[0], nullptr, v[1], v[2]->toDouble(), v[3], nullptr);
}

void add_rms_norm(KernelRuntimeContext& context, Span<EValue*> v) {
    norm(context, v[0], v[1], v[2], v[3]->toDouble(), v[4], v[5]);
}

void gated(KernelRuntimeContext& context, Span<EValue*> v,
           void (*Operators::*kernel)(const float*, const float*, int64_t, float*)) {
    const int64_t n = v[0]->toTensor().numel();
    const bool as_said = is_float(v[0]) && is_float(v[1]) && is_float(v[2]) && v[1]->toTensor().numel() == n &&
                         v[2]->toTensor().numel() == n;
    if (!require(context, as_said)) return;
    (operators->*kernel)(floats(v[0]), floats(v[1]), n, output(v[2]));
}

void swiglu(KernelRuntimeContext& context, Span<EValue*> v) { gated(context, v, &Operators::swiglu); }
void geglu(KernelRuntimeContext& context, Span<EValue*> v) { gated(context, v, &Operators::geglu); }

void rotary(KernelRuntimeContext& context, Span<EValue*> v) {
    const Tensor &x = v[0]->toTensor(), &cos = v[1]->toTensor();
    const int tokens = size(x, 0), half = last(cos);
    const bool as_said = x.dim() == 3 && is_float(v[0]) && is_float(v[1]) && is_float(v[2]) && is_float(v[3]) &&
                         cos.numel() == int64_t{tokens} * half && v[3]->toTensor().numel() == x.numel();
    if (!require(context, as_said)) return;
    operators->rotary(floats(v[0]), floats(v[1]), floats(v[2]), tokens, size(x, 1), size(x, 2), half, output(v[3]));
}

const Kernel kernels[] = {
    Kernel("edgekv_device::linear_int4.out", linear_int4), Kernel("edgekv_device::rms_norm.out", rms_norm),
    Kernel("edgekv_device::add_rms_norm.out", add_rms_norm), Kernel("edgekv_device::swiglu.out", swiglu),
    Kernel("edgekv_device::geglu.out", geglu),       Kernel("edgekv_device::rotary.out", rotary),
};

const Error registered =
    executorch::runtime::register_kernels(Span<const Kernel>(kernels, sizeof kernels / sizeof *kernels));

}  // namespace

// Takes the table of functions; returns 0 if it is one of this version.
extern "C" int edgekv_et_set_operators(const void* table) {
    const auto* given = static_cast<const Operators*>(table);
    if (given == nullptr || given->version != kVersion || registered != Error::Ok) return -1;
    operators = given;
    return 0;
}
