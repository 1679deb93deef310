#include "json.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "tokenizer.h"

namespace {

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Json document() {
    Json value = parse_value();
    skip_space();
    if (at_ != text_.size()) fail();
    return value;
  }

 private:
  [[noreturn]] void fail() const { throw std::runtime_error("no JSON at byte " + std::to_string(at_)); }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void skip_space() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_]) != nullptr) ++at_;
  }
  void expect(char c) {
    if (peek() != c) fail();
    ++at_;
  }
  bool take(const char* word) {
    size_t n = std::strlen(word);
    if (text_.compare(at_, n, word) != 0) return false;
    at_ += n;
    return true;
  }

  Json parse_value() {
    skip_space();
    Json value;
    switch (peek()) {
      case '{':
        value.kind = Json::Kind::kTable;
        sequence('}', [&] {
          skip_space();
          std::string name = parse_string();
          skip_space();
          expect(':');
          value.members.emplace_back(std::move(name), parse_value());
        });
        break;
      case '[':
        value.kind = Json::Kind::kList;
        sequence(']', [&] { value.items.push_back(parse_value()); });
        break;
      case '"':
        value.kind = Json::Kind::kString;
        value.text = parse_string();
        break;
      case 't':
      case 'f':
        value.kind = Json::Kind::kBool;
        value.truth = peek() == 't';
        if (!take(value.truth ? "true" : "false")) fail();
        break;
      case 'n':
        if (!take("null")) fail();
        break;
      default:
        value.kind = Json::Kind::kNumber;
        while (peek() != '\0' && std::strchr("+-.eE0123456789", peek()) != nullptr) value.text += text_[at_++];
        if (value.text.empty()) fail();
    }
    return value;
  }

  template <typename Item>
  void sequence(char end, Item item) {
    ++at_;
    skip_space();
    if (peek() == end) {
      ++at_;
      return;
    }
    while (true) {
      item();
      skip_space();
      if (peek() == end) break;
      expect(',');
    }
    ++at_;
  }

  uint32_t hex4() {
    if (at_ + 4 > text_.size()) fail();
    uint32_t value = static_cast<uint32_t>(std::stoul(text_.substr(at_, 4), nullptr, 16));
    at_ += 4;
    return value;
  }

  std::string parse_string() {
    expect('"');
    std::string result;
    while (peek() != '"') {
      if (at_ >= text_.size()) fail();
      char c = text_[at_++];
      if (c != '\\') {
        result += c;
        continue;
      }
      c = peek();
      ++at_;
      static const char kNames[] = "bfnrt\"\\/", kMeanings[] = "\b\f\n\r\t\"\\/";
      if (c == 'u') {
        uint32_t point = hex4();
        if (point >= 0xD800 && point < 0xDC00 && take("\\u")) point = 0x10000 + ((point - 0xD800) << 10) + (hex4() - 0xDC00);
        append_utf8(point, result);
      } else if (const char* place = std::strchr(kNames, c); place != nullptr && c != '\0') {
        result += kMeanings[place - kNames];
      } else {
        fail();
      }
    }
    ++at_;
    return result;
  }

  const std::string& text_;
  size_t at_ = 0;
};

[[noreturn]] void wrong_kind(const char* wanted) { throw std::runtime_error(std::string("JSON: no ") + wanted); }

}  // namespace

Json Json::parse(const std::string& text) { return Parser(text).document(); }

Json Json::read(const std::string& path) {
  try {
    return parse(read_file(path));
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
}

const Json& Json::get(const std::string& name) const {
  static const Json nothing;
  for (const auto& [key, value] : members)
    if (key == name) return value;
  return nothing;
}

const Json& Json::at(const std::string& name) const {
  for (const auto& [key, value] : members)
    if (key == name) return value;
  throw std::runtime_error("JSON: no field " + name);
}

int64_t Json::integer() const {
  if (kind != Kind::kNumber) wrong_kind("whole number");
  return std::stoll(text);
}

uint64_t Json::natural() const {
  if (kind != Kind::kNumber) wrong_kind("whole number");
  return std::stoull(text);
}

double Json::number() const {
  if (kind != Kind::kNumber) wrong_kind("number");
  return std::strtod(text.c_str(), nullptr);
}

const std::string& Json::string() const {
  if (kind != Kind::kString) wrong_kind("text");
  return text;
}

std::vector<int64_t> Json::integers() const {
  std::vector<int64_t> result;
  for (const Json& item : items) result.push_back(item.integer());
  return result;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (size_t at = 0; at < text.size();) {
    size_t start = at;
    uint32_t point = next_code_point(text, at);
    if (point == '"' || point == '\\') {
      result += '\\';
      result += static_cast<char>(point);
    } else if (point < 0x20) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", point);
      result += code;
    } else if (point == kNoCodePoint) {
      result += "\xEF\xBF\xBD";
    } else {
      result.append(text, start, at - start);
    }
  }
  return result + '"';
}

std::string read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream content;
  content << stream.rdbuf();
  if (!stream || content.fail()) throw std::runtime_error(path + " cannot be read");
  return content.str();
}
