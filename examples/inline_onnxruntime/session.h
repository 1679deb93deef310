// A session of edgekv on flash: docs/flash_format.md, format 2, not encrypted.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "model.h"
#include "sequence.h"

class Database;

class Session {
 public:
  // Opens a session, or makes the folder of a new one; holds its lock from then on.
  Session(const std::string& folder, const Model& model);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Whether something was saved here before.
  bool holds_something() const { return held_; }
  // Reads it; what is damaged is an error.
  void load(Sequence& sequence);
  // Writes the pages that are new into a new segment, then refers to them in one commit.
  void save(const Sequence& sequence);

 private:
  struct Placed {
    int64_t number;
    uint64_t check;
  };

  std::string segment_path(int64_t segment) const;
  std::string read_record(Placed placed, int64_t page, size_t layer, int kind, size_t n_bytes) const;
  Placed write_record(int file, int64_t number, int64_t page, size_t layer, int kind, const std::string& payload) const;

  std::string folder_;
  const Model& model_;
  bool held_;
  int lock_;
  std::map<int64_t, std::string> rows_;  // of the pages that were read or saved: `page N` from its tokens to its chain
};
