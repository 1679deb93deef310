// Byte-level BPE, as tokenizer.json of the Hugging Face tokenizers library describes it.
//
// What this knows: no normalizer; ByteLevel, alone or behind Digits, as the pre-tokenizer; added tokens that are taken
// literally. Anything else is refused. An app takes the library itself, which has bindings for most languages.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

constexpr uint32_t kNoCodePoint = 0xFFFFFFFF;
// The code point at byte `at`, which moves behind it; kNoCodePoint where the bytes are no UTF-8.
uint32_t next_code_point(const std::string& text, size_t& at);
void append_utf8(uint32_t point, std::string& text);

class Json;

class Tokenizer {
 public:
  explicit Tokenizer(const Json& description);

  // The tokens of a text, without special ones in front or behind.
  std::vector<int64_t> encode(const std::string& text) const;
  // The bytes of a token; none of a special one. A character may be cut between two tokens.
  std::string decode(int64_t token) const;

 private:
  struct Added {
    std::string content;
    int64_t id;
  };

  void encode_stretch(const std::string& text, std::vector<int64_t>& tokens) const;
  void encode_word(const std::string& word, std::vector<int64_t>& tokens) const;

  std::unordered_map<std::string, int64_t> ids_;
  std::unordered_map<int64_t, std::string> texts_;
  std::map<std::pair<std::string, std::string>, size_t> ranks_;
  std::vector<Added> added_;
  bool single_digits_ = false;
  bool whole_words_ = false;  // a word that is a token needs no merges
};
