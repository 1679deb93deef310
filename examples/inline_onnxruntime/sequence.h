// A sequence: its tokens, its cache, and the steps in which the graph computes it.
#pragma once
#include <cstdint>
#include <vector>

#include "engine.h"
#include "model.h"
#include "pages.h"

class Sequence {
 public:
  Sequence(const Model& model, Engine& engine) : model_(model), engine_(engine), cache(model.shape) {}

  // Brings the cache to hold `wanted` and returns the logits after its last token. What the tokens and `wanted` begin with
  // alike is computed again only as far as it has no keys and values.
  const float* prefill(const std::vector<int64_t>& wanted);
  // Computes new tokens in one step; returns the logits after the last of them.
  const float* step(const std::vector<int64_t>& new_tokens);

 private:
  const float* call(const std::vector<int64_t>& new_tokens);

  const Model& model_;
  Engine& engine_;

 public:
  Cache cache;
  std::vector<int64_t> tokens;  // those beyond the cache's size have no keys and values yet
  std::vector<int64_t> steps;   // how many tokens were computed together, from position 0 on; may reach beyond the cache
  int64_t reused = 0;           // tokens whose keys and values were there before the prompt
};
