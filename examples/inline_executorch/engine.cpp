// ExecuTorch's C++ runtime: two methods of one program, which take and give tensors by position.
#include "engine.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <map>
#include <stdexcept>

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::Result;
using executorch::runtime::Span;

// The package has this library, not its header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t n_threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

constexpr const char* kDecode = "decode";    // one token and its logits
constexpr const char* kPrefill = "prefill";  // up to 64

void check(Error error, const std::string& what) {
  if (error == Error::Ok) return;
  char code[16];
  std::snprintf(code, sizeof code, "0x%x", static_cast<unsigned>(error));
  throw std::runtime_error("ExecuTorch: " + what + ": error " + code);  // the runtime has said more on stderr
}

template <typename T>
T value_of(Result<T> result, const std::string& what) {
  check(result.error(), what);
  return std::move(*result);
}

// Addresses that become memory where they are touched: what is planned for the longest context costs what a step uses.
class Room {
 public:
  explicit Room(size_t size) : size_(std::max<size_t>(size, 1)) {
    void* start = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) throw std::runtime_error("no addresses for " + std::to_string(size) + " bytes");
    start_ = static_cast<uint8_t*>(start);
  }
  ~Room() { munmap(start_, size_); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;

  uint8_t* start() const { return start_; }

 private:
  size_t size_;
  uint8_t* start_;
};

ScalarType scalar_of(Type type) {
  switch (type) {
    case Type::kInt8: return ScalarType::Char;
    case Type::kInt64: return ScalarType::Long;
    case Type::kFloat16: return ScalarType::Half;
  }
  throw std::logic_error("a type that no input has");
}

}  // namespace

struct Engine::State {
  explicit State(const std::string& graph) : module(graph, Module::LoadMode::Mmap) {}

  std::deque<Room> rooms;
  std::vector<Span<uint8_t>> spans;  // of what the methods compute on the way: one runs at a time, so they share it
  std::unique_ptr<HierarchicalAllocator> memory;
  std::map<std::string, std::vector<const float*>> outputs;  // of each method
  int64_t most_tokens = 0;
  Module module;  // last: its methods use the memory
};

const char* const Engine::kName = "executorch";

Engine::Engine(const std::string& graph, int threads) : state_(std::make_unique<State>(graph)) {
  State& state = *state_;
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (pool == nullptr || !pool->_unsafe_reset_threadpool(static_cast<uint32_t>(threads)))
    throw std::runtime_error("ExecuTorch has no threads");
  std::vector<size_t> sizes;
  for (const char* name : {kDecode, kPrefill}) {
    const auto meta = value_of(state.module.method_meta(name), graph + " has no method " + name);
    sizes.resize(std::max(sizes.size(), meta.num_memory_planned_buffers()));
    for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i)
      sizes[i] = std::max(sizes[i], static_cast<size_t>(value_of(meta.memory_planned_buffer_size(i), graph)));
    state.most_tokens = value_of(meta.input_tensor_meta(0), graph).sizes()[0];
  }
  for (size_t size : sizes) state.spans.emplace_back(state.rooms.emplace_back(size).start(), size);
  state.memory = std::make_unique<HierarchicalAllocator>(Span<Span<uint8_t>>(state.spans.data(), state.spans.size()));
  for (const char* name : {kDecode, kPrefill}) {
    check(state.module.load_method(name, state.memory.get()), graph);
    const auto meta = value_of(state.module.method_meta(name), graph);
    for (size_t i = 0; i < meta.num_outputs(); ++i) {  // which are not planned: they are as large as the method says
      const auto output = value_of(meta.output_tensor_meta(i), graph);
      void* data = state.rooms.emplace_back(output.nbytes()).start();
      const TensorPtr tensor = from_blob(data, {output.sizes().begin(), output.sizes().end()});
      check(state.module.set_output(name, *tensor, i), graph);
      state.outputs[name].push_back(static_cast<const float*>(data));
    }
  }
}

Engine::~Engine() = default;

int64_t Engine::most_tokens() const { return state_->most_tokens; }

std::string Engine::description() const { return "executorch"; }

std::vector<const float*> Engine::run(const std::vector<Tensor>& inputs, const std::vector<std::string>& outputs) {
  static char nothing = 0;  // a tensor without elements has an address nevertheless
  std::vector<TensorPtr> alive;
  std::vector<EValue> values;
  for (const Tensor& tensor : inputs) {
    void* data = tensor.data == nullptr ? &nothing : const_cast<void*>(tensor.data);
    alive.push_back(from_blob(data, std::vector<SizesType>(tensor.shape.begin(), tensor.shape.end()), scalar_of(tensor.type)));
    values.emplace_back(*alive.back());
  }
  const char* name = inputs.at(0).shape[0] == 1 ? kDecode : kPrefill;
  value_of(state_->module.execute(name, values), name);
  const std::vector<const float*>& results = state_->outputs[name];
  if (results.size() != outputs.size()) throw std::runtime_error("the program is of another contract");
  return results;
}
