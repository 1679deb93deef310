#include "engine.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace {

constexpr uint32_t kApiVersion = 18;  // the first that knows opset 21; every later library gives it, too

size_t bytes_of(const Tensor& tensor) {
  size_t count = tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64     ? 8
                 : tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2
                                                                        : 1;
  for (int64_t size : tensor.shape) count *= static_cast<size_t>(size);
  return count;
}

}  // namespace

Engine::Engine(const std::string& library, const std::string& graph, int threads) {
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // read once, as the library loads
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error("ONNX Runtime cannot be loaded: " + std::string(dlerror()));
  auto get_base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
  if (get_base == nullptr) throw std::runtime_error(library + " is not ONNX Runtime");
  version_ = get_base()->GetVersionString();
  api_ = get_base()->GetApi(kApiVersion);
  if (api_ == nullptr) throw std::runtime_error("ONNX Runtime " + version_ + " is too old");
  check(api_->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "driver", &env_));
  check(api_->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory_));
  OrtSessionOptions* options = nullptr;
  check(api_->CreateSessionOptions(&options));
  check(api_->SetIntraOpNumThreads(options, threads));
  OrtStatus* status = api_->CreateSession(env_, graph.c_str(), options, &session_);
  api_->ReleaseSessionOptions(options);
  check(status);
}

Engine::~Engine() {
  release_outputs();
  if (session_ != nullptr) api_->ReleaseSession(session_);
  if (memory_ != nullptr) api_->ReleaseMemoryInfo(memory_);
  if (env_ != nullptr) api_->ReleaseEnv(env_);
}

std::vector<const float*> Engine::run(const std::vector<Tensor>& inputs, const std::vector<std::string>& outputs) {
  static char nothing = 0;  // a tensor without elements has an address nevertheless
  release_outputs();
  std::vector<OrtValue*> values;
  std::vector<const char*> input_names, output_names;
  OrtStatus* status = nullptr;
  for (const Tensor& tensor : inputs) {
    size_t n_bytes = bytes_of(tensor);
    void* data = n_bytes == 0 ? &nothing : const_cast<void*>(tensor.data);
    OrtValue* value = nullptr;
    status = api_->CreateTensorWithDataAsOrtValue(memory_, data, n_bytes, tensor.shape.data(), tensor.shape.size(),
                                                  tensor.type, &value);
    if (status != nullptr) break;
    values.push_back(value);
    input_names.push_back(tensor.name.c_str());
  }
  for (const std::string& name : outputs) output_names.push_back(name.c_str());
  outputs_.assign(outputs.size(), nullptr);
  if (status == nullptr)
    status = api_->Run(session_, nullptr, input_names.data(), values.data(), values.size(), output_names.data(),
                       output_names.size(), outputs_.data());
  for (OrtValue* value : values) api_->ReleaseValue(value);
  check(status);
  std::vector<const float*> result;
  for (OrtValue* value : outputs_) {
    void* data = nullptr;
    check(api_->GetTensorMutableData(value, &data));
    result.push_back(static_cast<const float*>(data));
  }
  return result;
}

void Engine::check(OrtStatus* status) const {
  if (status == nullptr) return;
  std::string message = api_->GetErrorMessage(status);
  api_->ReleaseStatus(status);
  throw std::runtime_error("ONNX Runtime: " + message);
}

void Engine::release_outputs() {
  for (OrtValue* value : outputs_)
    if (value != nullptr) api_->ReleaseValue(value);
  outputs_.clear();
}
