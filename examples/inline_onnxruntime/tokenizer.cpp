#include "tokenizer.h"

#include <algorithm>
#include <stdexcept>

#include "json.h"
#include "unicode.h"

namespace {

enum class Class { kSpace, kLetter, kNumber, kOther };

template <size_t N>
bool holds(const CodePoints (&ranges)[N], uint32_t point) {
  auto after = std::upper_bound(ranges, ranges + N, point, [](uint32_t p, const CodePoints& range) { return p < range.first; });
  return after != ranges && point <= (after - 1)->last;
}

Class class_of(uint32_t point) {
  if (point < 128) {
    char c = static_cast<char>(point | 32);
    if (c >= 'a' && c <= 'z' && point >= 'A') return Class::kLetter;
    if (point >= '0' && point <= '9') return Class::kNumber;
    return point == ' ' || (point >= 9 && point <= 13) ? Class::kSpace : Class::kOther;
  }
  static constexpr CodePoints kSpaces[] = {{0x85, 0x85},     {0xA0, 0xA0},     {0x1680, 0x1680}, {0x2000, 0x200A},
                                           {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000}};
  return holds(kLetters, point)   ? Class::kLetter
         : holds(kNumbers, point) ? Class::kNumber
         : holds(kSpaces, point)  ? Class::kSpace
                                  : Class::kOther;
}

// Every byte is written as a printable character: most as themselves, the others as those from U+0100 on.
std::vector<uint32_t> byte_characters() {
  std::vector<uint32_t> result(256);
  uint32_t next = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    result[byte] = printable ? byte : next++;
  }
  return result;
}

// The length of the first word of a text, in characters, by the pattern of GPT-2:
// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
size_t word_length(const uint32_t* points, const Class* classes, size_t n) {
  if (points[0] == '\'') {
    auto next = [&](size_t i) { return i < n ? points[i] : 0; };
    uint32_t a = next(1), b = next(2);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
  }
  size_t start = points[0] == ' ' && n > 1 && classes[1] != Class::kSpace ? 1 : 0;
  size_t end = start + 1;
  while (end < n && classes[end] == classes[start]) ++end;
  if (classes[start] != Class::kSpace) return end;
  return end < n && end > 1 ? end - 1 : end;  // the last space belongs to the word behind it
}

[[noreturn]] void unknown(const std::string& what) {
  throw std::runtime_error("tokenizer.json: this program does not know " + what);
}

}  // namespace

uint32_t next_code_point(const std::string& text, size_t& at) {
  auto byte = [&](size_t i) { return i < text.size() ? static_cast<uint8_t>(text[i]) : 0u; };
  uint32_t first = byte(at++);
  if (first < 0x80) return first;
  size_t more = first >= 0xF0 && first < 0xF5 ? 3 : first >= 0xE0 && first < 0xF0 ? 2 : first >= 0xC2 && first < 0xE0 ? 1 : 0;
  uint32_t point = first & (0x3Fu >> more);
  for (size_t i = 0; i < more; ++i) {
    if ((byte(at + i) & 0xC0) != 0x80) return kNoCodePoint;
    point = point << 6 | (byte(at + i) & 0x3F);
  }
  at += more;
  return more == 0 ? kNoCodePoint : point;
}

void append_utf8(uint32_t point, std::string& text) {
  if (point < 0x80) {
    text += static_cast<char>(point);
    return;
  }
  int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
  text += static_cast<char>((0xF00 >> more & 0xF0) | point >> 6 * more);
  for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80 | (point >> 6 * i & 0x3F));
}

Tokenizer::Tokenizer(const Json& description) {
  if (!description.get("normalizer").is_null()) unknown("its normalizer");
  const Json& before = description.at("pre_tokenizer");
  bool sequence = before.at("type").string() == "Sequence";
  const std::vector<Json> steps = sequence ? before.at("pretokenizers").items : std::vector<Json>{before};
  for (const Json& step : steps) {
    const std::string& type = step.at("type").string();
    bool last = &step == &steps.back();
    if (type == "Digits" && !last) {
      single_digits_ = step.at("individual_digits").truth;
      if (!single_digits_) unknown("digits that stay together");
    } else if (type != "ByteLevel" || !last || step.at("add_prefix_space").truth || !step.at("use_regex").truth) {
      unknown("its pre-tokenizer " + type);
    }
  }
  const Json& model = description.at("model");
  if (model.at("type").string() != "BPE") unknown("the model " + model.at("type").string());
  for (const char* name : {"unk_token", "continuing_subword_prefix", "end_of_word_suffix"})
    if (const Json& value = model.get(name); !value.is_null() && !value.text.empty()) unknown(name);
  if (model.get("byte_fallback").truth) unknown("byte_fallback");
  whole_words_ = model.get("ignore_merges").truth;

  std::unordered_map<uint32_t, char> bytes;
  std::vector<uint32_t> characters = byte_characters();
  for (size_t byte = 0; byte < 256; ++byte) bytes[characters[byte]] = static_cast<char>(byte);
  auto plain = [&](const std::string& written) {  // the bytes that the characters of a token stand for
    std::string result;
    for (size_t at = 0; at < written.size();) {
      auto found = bytes.find(next_code_point(written, at));
      if (found == bytes.end()) return written;  // no byte-level token: an added one
      result += found->second;
    }
    return result;
  };
  for (const auto& [written, id] : model.at("vocab").members) {
    ids_[plain(written)] = id.integer();
    texts_[id.integer()] = plain(written);
  }
  for (const Json& merge : model.at("merges").items) {
    std::string left, right;
    if (merge.kind == Json::Kind::kList) {
      left = merge.items.at(0).string(), right = merge.items.at(1).string();
    } else {
      size_t space = merge.string().find(' ');
      left = merge.text.substr(0, space), right = merge.text.substr(space + 1);
    }
    ranks_.emplace(std::pair(plain(left), plain(right)), ranks_.size());
  }
  for (const Json& token : description.at("added_tokens").items) {
    for (const char* name : {"single_word", "lstrip", "rstrip"})
      if (token.get(name).truth) unknown(std::string("an added token with ") + name);
    int64_t id = token.at("id").integer();
    added_.push_back({token.at("content").string(), id});
    texts_[id] = token.at("special").truth ? "" : added_.back().content;
  }
}

std::vector<int64_t> Tokenizer::encode(const std::string& text) const {
  std::vector<int64_t> tokens;
  size_t start = 0;
  while (start < text.size()) {
    size_t place = text.size();
    const Added* found = nullptr;
    for (const Added& token : added_) {
      size_t at = token.content.empty() ? std::string::npos : text.find(token.content, start);
      bool longer = at == place && found != nullptr && token.content.size() > found->content.size();
      if (at < place || longer) place = at, found = &token;
    }
    encode_stretch(text.substr(start, place - start), tokens);
    if (found == nullptr) break;
    tokens.push_back(found->id);
    start = place + found->content.size();
  }
  return tokens;
}

void Tokenizer::encode_stretch(const std::string& text, std::vector<int64_t>& tokens) const {
  std::vector<uint32_t> points;
  std::vector<Class> classes;
  std::vector<size_t> starts;
  for (size_t at = 0; at < text.size();) {
    starts.push_back(at);
    points.push_back(next_code_point(text, at));
    if (points.back() == kNoCodePoint) throw std::runtime_error("the text is no UTF-8");
    classes.push_back(class_of(points.back()));
  }
  starts.push_back(text.size());
  for (size_t at = 0; at < points.size();) {
    size_t end = points.size();  // of the piece in which a word is looked for
    if (single_digits_) {
      end = at;
      while (end < points.size() && classes[end] != Class::kNumber) ++end;
      if (end == at) ++end;
    }
    while (at < end) {
      size_t n = word_length(&points[at], &classes[at], end - at);
      encode_word(text.substr(starts[at], starts[at + n] - starts[at]), tokens);
      at += n;
    }
  }
}

void Tokenizer::encode_word(const std::string& word, std::vector<int64_t>& tokens) const {
  auto whole = ids_.find(word);
  if (whole_words_ && whole != ids_.end()) {
    tokens.push_back(whole->second);
    return;
  }
  std::vector<std::string> parts;
  for (char byte : word) parts.emplace_back(1, byte);
  while (parts.size() > 1) {
    size_t best = ranks_.size(), place = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      auto rank = ranks_.find({parts[i], parts[i + 1]});
      if (rank != ranks_.end() && rank->second < best) best = rank->second, place = i;
    }
    if (best == ranks_.size()) break;
    parts[place] += parts[place + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(place) + 1);
  }
  for (const std::string& part : parts) {
    auto found = ids_.find(part);
    if (found == ids_.end()) throw std::runtime_error("the tokenizer has no token for a byte of the text");
    tokens.push_back(found->second);
  }
}

std::string Tokenizer::decode(int64_t token) const {
  auto found = texts_.find(token);
  return found == texts_.end() ? "" : found->second;
}
