// What runs the graph. Each engine is an engine.cpp: ONNX Runtime's lies beside this file, ExecuTorch's in ../inline_executorch.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

enum class Type { kInt8, kInt64, kFloat16 };

// An input: memory of the caller, which stays as it is until the run is over.
struct Tensor {
  std::string name;
  Type type;
  std::vector<int64_t> shape;
  const void* data;
};

class Engine {
 public:
  static const char* const kName;  // in manifests

  Engine(const std::string& graph, int threads);
  ~Engine();

  // Runs the graph with all of its inputs and returns its outputs, all float32; valid until the next run. Both are named, and
  // in the order of the contract's table: an engine goes by the one or by the other.
  std::vector<const float*> run(const std::vector<Tensor>& inputs, const std::vector<std::string>& outputs);
  int64_t most_tokens() const;  // new ones of a run
  std::string description() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};
