// ONNX Runtime, opened by path: one graph, run with named tensors.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "onnxruntime_c.h"

// An input: memory of the caller, which stays as it is until the run is over.
struct Tensor {
  std::string name;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
  const void* data;
};

class Engine {
 public:
  Engine(const std::string& library, const std::string& graph, int threads);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Runs the graph and returns its outputs of these names, all float32; valid until the next run.
  std::vector<const float*> run(const std::vector<Tensor>& inputs, const std::vector<std::string>& outputs);
  const std::string& version() const { return version_; }

 private:
  void check(OrtStatus* status) const;
  void release_outputs();

  const OrtApi* api_ = nullptr;
  OrtEnv* env_ = nullptr;
  OrtSession* session_ = nullptr;
  OrtMemoryInfo* memory_ = nullptr;
  std::vector<OrtValue*> outputs_;
  std::string version_;
};
