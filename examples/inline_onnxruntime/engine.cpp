// ONNX Runtime, opened by path: $ONNXRUNTIME_LIBRARY.
#include "engine.h"

#include <dlfcn.h>

#include <cstdlib>
#include <limits>
#include <stdexcept>

#include "onnxruntime_c.h"

namespace {

constexpr uint32_t kApiVersion = 18;  // the first that knows opset 21; every later library gives it, too

struct Element {
  ONNXTensorElementDataType type;
  size_t n_bytes;
};

Element element_of(Type type) {
  switch (type) {
    case Type::kInt8: return {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1};
    case Type::kInt64: return {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8};
    case Type::kFloat16: return {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2};
  }
  throw std::logic_error("a type that no input has");
}

const OrtApiBase* open_library() {
  const char* path = std::getenv("ONNXRUNTIME_LIBRARY");
  if (path == nullptr) throw std::runtime_error("set ONNXRUNTIME_LIBRARY to the path of libonnxruntime");
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // read once, as the library loads
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error("ONNX Runtime cannot be loaded: " + std::string(dlerror()));
  auto get_base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
  if (get_base == nullptr) throw std::runtime_error(std::string(path) + " is not ONNX Runtime");
  return get_base();
}

}  // namespace

struct Engine::State {
  State() : base(open_library()), api(base->GetApi(kApiVersion)) {
    if (api == nullptr) throw std::runtime_error("ONNX Runtime " + std::string(base->GetVersionString()) + " is too old");
  }
  ~State() {
    release_outputs();
    if (session != nullptr) api->ReleaseSession(session);
    if (memory != nullptr) api->ReleaseMemoryInfo(memory);
    if (env != nullptr) api->ReleaseEnv(env);
  }

  void check(OrtStatus* status) const {
    if (status == nullptr) return;
    std::string message = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    throw std::runtime_error("ONNX Runtime: " + message);
  }

  void release_outputs() {
    for (OrtValue* value : outputs)
      if (value != nullptr) api->ReleaseValue(value);
    outputs.clear();
  }

  const OrtApiBase* base;
  const OrtApi* api;
  OrtEnv* env = nullptr;
  OrtSession* session = nullptr;
  OrtMemoryInfo* memory = nullptr;
  std::vector<OrtValue*> outputs;
};

const char* const Engine::kName = "onnx";

Engine::Engine(const std::string& graph, int threads) : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.check(state.api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "driver", &state.env));
  state.check(state.api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &state.memory));
  OrtSessionOptions* options = nullptr;
  state.check(state.api->CreateSessionOptions(&options));
  OrtStatus* status = state.api->SetIntraOpNumThreads(options, threads);
  if (status == nullptr) status = state.api->CreateSession(state.env, graph.c_str(), options, &state.session);
  state.api->ReleaseSessionOptions(options);
  state.check(status);
}

Engine::~Engine() = default;

int64_t Engine::most_tokens() const { return std::numeric_limits<int64_t>::max(); }

std::string Engine::description() const { return "onnxruntime " + std::string(state_->base->GetVersionString()); }

std::vector<const float*> Engine::run(const std::vector<Tensor>& inputs, const std::vector<std::string>& outputs) {
  static char nothing = 0;  // a tensor without elements has an address nevertheless
  State& state = *state_;
  const OrtApi& api = *state.api;
  state.release_outputs();
  std::vector<OrtValue*> values;
  std::vector<const char*> input_names, output_names;
  OrtStatus* status = nullptr;
  for (const Tensor& tensor : inputs) {
    auto [type, n_bytes] = element_of(tensor.type);
    for (int64_t size : tensor.shape) n_bytes *= static_cast<size_t>(size);
    void* data = n_bytes == 0 ? &nothing : const_cast<void*>(tensor.data);
    OrtValue* value = nullptr;
    status = api.CreateTensorWithDataAsOrtValue(state.memory, data, n_bytes, tensor.shape.data(), tensor.shape.size(), type,
                                                &value);
    if (status != nullptr) break;
    values.push_back(value);
    input_names.push_back(tensor.name.c_str());
  }
  for (const std::string& name : outputs) output_names.push_back(name.c_str());
  state.outputs.assign(outputs.size(), nullptr);
  if (status == nullptr)
    status = api.Run(state.session, nullptr, input_names.data(), values.data(), values.size(), output_names.data(),
                     output_names.size(), state.outputs.data());
  for (OrtValue* value : values) api.ReleaseValue(value);
  state.check(status);
  std::vector<const float*> result;
  for (OrtValue* value : state.outputs) {
    void* data = nullptr;
    state.check(api.GetTensorMutableData(value, &data));
    result.push_back(static_cast<const float*>(data));
  }
  return result;
}
