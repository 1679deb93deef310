#include "sequence.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace {

constexpr int64_t kPromptStep = 256;  // a prompt is cut at the multiples of so many tokens of the sequence

std::string of_layer(const char* name, size_t l) { return std::string(name) + "." + std::to_string(l); }

}  // namespace

const float* Sequence::prefill(const std::vector<int64_t>& wanted) {
  const int64_t count = static_cast<int64_t>(wanted.size());
  const int64_t common = std::mismatch(tokens.begin(), tokens.end(), wanted.begin(), wanted.end()).first - tokens.begin();
  // There are no logits in a cache: the last token is always computed. So go back to where a step began that can be cut at,
  // and from there on repeat the steps as they were.
  const int64_t most = std::min({common, cache.size(), count - 1});
  const int64_t page_size = static_cast<int64_t>(model_.shape.page_size), opened = cache.sealed_pages() * page_size;
  int64_t start = 0, place = 0;
  size_t kept = 0;
  for (size_t i = 0; i <= steps.size() && place <= most; ++i) {
    if (place % page_size == 0 || place >= opened) start = place, kept = i;
    if (i < steps.size()) place += steps[i];
  }
  const std::vector<bool> pruned(cache.pruned().begin(), cache.pruned().begin() + std::min(common, cache.size()));
  std::vector<int64_t> again(steps.begin() + static_cast<std::ptrdiff_t>(kept), steps.end());
  steps.resize(kept);
  cache.cut(start);
  reused = start;
  const size_t tokens_before = tokens.size();
  tokens.assign(wanted.begin(), wanted.begin() + start);
  const float* logits = nullptr;
  bool repeating = common == static_cast<int64_t>(tokens_before);
  for (size_t i = 0; start < count;) {
    repeating = repeating && i < again.size() && start + again[i] <= common;
    int64_t stop = repeating ? start + again[i++] : std::min(count, (start / kPromptStep + 1) * kPromptStep);
    logits = step({wanted.begin() + start, wanted.begin() + stop});
    for (; start < stop; ++start)  // a token that is computed again stays pruned
      if (start < static_cast<int64_t>(pruned.size()) && pruned[static_cast<size_t>(start)]) cache.prune(start, start + 1);
  }
  return logits;
}

const float* Sequence::step(const std::vector<int64_t>& new_tokens) {
  const int64_t count = static_cast<int64_t>(new_tokens.size()), part = std::min(count, engine_.most_tokens());
  const float* logits = nullptr;
  for (int64_t start = 0; start < count; start += part)
    logits = call({new_tokens.begin() + start, new_tokens.begin() + std::min(count, start + part)});
  steps.push_back(count);
  return logits;
}

const float* Sequence::call(const std::vector<int64_t>& new_tokens) {
  const Shape& shape = model_.shape;
  const auto heads = static_cast<int64_t>(shape.heads), dim = static_cast<int64_t>(shape.dim),
             page_size = static_cast<int64_t>(shape.page_size), n_new = static_cast<int64_t>(new_tokens.size()),
             first = cache.size();
  if (first + n_new > model_.max_context) throw std::runtime_error("the context is full");
  std::vector<int64_t> positions(new_tokens.size());
  for (int64_t t = 0; t < n_new; ++t) positions[static_cast<size_t>(t)] = first + t;
  const int64_t last_row = n_new - 1;
  const std::vector<int64_t> open_positions = cache.open_positions();
  const int64_t n_recent = cache.open_has_live_tokens() ? page_size : 0;

  std::vector<Tensor> inputs = {{"input_ids", Type::kInt64, {n_new}, new_tokens.data()},
                                {"position_ids", Type::kInt64, {n_new}, positions.data()},
                                {"logits_rows", Type::kInt64, {1}, &last_row}};
  std::vector<std::string> outputs = {"logits"};
  for (size_t l = 0; l < shape.layers; ++l) {
    // Pages are in the order of their positions: those that nobody sees any more are the first.
    const LayerPages& layer = cache.layer(l);
    const std::vector<int64_t>& pages = cache.pages();
    size_t hidden = 0;
    if (const int64_t window = model_.windows[l]; window > 0)
      while (hidden < pages.size() && (pages[hidden] + 1) * page_size - 1 <= first - window) ++hidden;
    const int64_t n = static_cast<int64_t>(pages.size() - hidden);
    const size_t row = shape.heads * shape.dim;
    auto add = [&](const char* name, Type type, std::vector<int64_t> sizes, const void* data) {
      inputs.push_back({of_layer(name, l), type, std::move(sizes), data});
    };
    add("key_pages", Type::kInt8, {n, heads, dim, page_size}, layer.key_codes.data() + hidden * shape.elements());
    add("key_scales", Type::kFloat16, {n, heads, dim}, layer.key_scales.data() + hidden * row);
    add("value_pages", Type::kInt8, {n, heads, page_size, dim}, layer.value_codes.data() + hidden * shape.elements());
    add("value_scales", Type::kFloat16, {n, heads, page_size},
        layer.value_scales.data() + hidden * shape.heads * shape.page_size);
    add("page_positions", Type::kInt64, {n, page_size}, cache.positions().data() + hidden * shape.page_size);
    add("recent_keys", Type::kFloat16, {n_recent, heads, dim}, layer.open_keys.data());
    add("recent_values", Type::kFloat16, {n_recent, heads, dim}, layer.open_values.data());
    add("recent_positions", Type::kInt64, {n_recent}, open_positions.data());
    for (const char* name : {"new_keys", "new_values", "page_mass"}) outputs.push_back(of_layer(name, l));
  }

  const std::vector<const float*> results = engine_.run(inputs, outputs);
  std::vector<const float*> keys, values;
  for (size_t l = 0; l < shape.layers; ++l) {
    keys.push_back(results[1 + 3 * l]);
    values.push_back(results[2 + 3 * l]);
  }
  cache.append(new_tokens.size(), keys, values);
  tokens.insert(tokens.end(), new_tokens.begin(), new_tokens.end());
  return results[0];
}
