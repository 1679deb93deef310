// What manifest.json of a bundle says.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "json.h"
#include "pages.h"

struct Model {
  explicit Model(const std::string& bundle);

  // What keys and values depend on, as JSON: the key of a session.
  std::string compatibility_key() const;

  Json manifest;
  std::string graph;  // path
  Json tokenizer;
  Shape shape;
  std::vector<int64_t> windows;  // of each layer; 0: it sees all tokens
  int64_t vocab_size, max_context;
  std::vector<int64_t> eos, prompt_begin, prompt_end;
};
