// JSON, read. Numbers keep their digits, so that 64-bit checksums lose no bit.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

class Json {
 public:
  enum class Kind { kNull, kBool, kNumber, kString, kList, kTable };

  static Json parse(const std::string& text);
  static Json read(const std::string& path);

  Kind kind = Kind::kNull;
  bool truth = false;
  std::string text;  // of a string; the digits of a number
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  bool is_null() const { return kind == Kind::kNull; }
  // The member of that name; `at` fails without one, `get` then returns null.
  const Json& at(const std::string& name) const;
  const Json& get(const std::string& name) const;
  int64_t integer() const;
  uint64_t natural() const;
  double number() const;
  const std::string& string() const;
  std::vector<int64_t> integers() const;
};

// The text in quotes; bytes that are not UTF-8 become U+FFFD.
std::string quoted(const std::string& text);
std::string read_file(const std::string& path);
