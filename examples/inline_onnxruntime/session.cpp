#include "session.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <stdexcept>

#include "hashes.h"

namespace {

constexpr size_t kHeader = 64;
enum Kind { kSealed = 0, kOpenKeys = 1, kOpenValues = 2 };

size_t record_bytes(const Shape& shape) { return (kHeader + shape.payload_bytes() + 4095) / 4096 * 4096; }

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

void sync_folder(const std::string& folder) {
  int file = open(folder.c_str(), O_RDONLY | O_DIRECTORY);
  if (file < 0 || fsync(file) != 0) fail(folder);
  close(file);
}

template <typename T>
void put(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}

template <typename T>
T get(const std::string& bytes, size_t at) {
  T value;
  if (at + sizeof value > bytes.size()) throw std::runtime_error("the session is cut short");
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

template <typename List>
std::string json_list(const List& numbers) {
  std::string result;
  for (auto number : numbers) result += (result.empty() ? "" : ", ") + std::to_string(number);
  return "[" + result + "]";
}

std::string tokens_of(const std::vector<int64_t>& tokens, size_t start, size_t n) {
  std::string result;
  for (size_t i = start; i < start + n; ++i) put(result, static_cast<int32_t>(tokens[i]));
  return result;
}

}  // namespace

// -- SQLite, of which a handful of functions is used: declared here, since devices have the library and seldom its header

struct sqlite3;
struct sqlite3_stmt;

class Database {
 public:
  explicit Database(const std::string& path) {
    const char* chosen = std::getenv("SQLITE3_LIBRARY");
    for (const char* name : {chosen, "libsqlite3.so.0", "libsqlite3.so", "libsqlite3.dylib"})
      if (library_ == nullptr && name != nullptr) library_ = dlopen(name, RTLD_NOW);
    if (library_ == nullptr) throw std::runtime_error("SQLite is not there: set SQLITE3_LIBRARY to the path of libsqlite3");
    constexpr int kReadWrite = 2, kCreate = 4;
    auto open_it = function<int(const char*, sqlite3**, int, const char*)>("sqlite3_open_v2");
    check(open_it(path.c_str(), &handle_, kReadWrite | kCreate, nullptr) == 0);
    run("PRAGMA synchronous=FULL");
  }
  ~Database() { function<int(sqlite3*)>("sqlite3_close")(handle_); }
  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;

  // Runs a statement with these blobs or texts; returns the blobs of its rows.
  std::vector<std::vector<std::string>> run(const char* sql, const std::vector<std::pair<bool, std::string>>& values = {}) {
    constexpr int kRow = 100, kDone = 101;
    sqlite3_stmt* statement = nullptr;
    auto prepare = function<int(sqlite3*, const char*, int, sqlite3_stmt**, const char**)>("sqlite3_prepare_v2");
    check(prepare(handle_, sql, -1, &statement, nullptr) == 0);
    for (size_t i = 0; i < values.size(); ++i) {
      const auto& [is_text, value] = values[i];
      auto bind = function<int(sqlite3_stmt*, int, const void*, int, void*)>(is_text ? "sqlite3_bind_text" : "sqlite3_bind_blob");
      check(bind(statement, static_cast<int>(i) + 1, value.data(), static_cast<int>(value.size()), nullptr) == 0);
    }
    auto step = function<int(sqlite3_stmt*)>("sqlite3_step");
    auto blob = function<const void*(sqlite3_stmt*, int)>("sqlite3_column_blob");
    auto bytes = function<int(sqlite3_stmt*, int)>("sqlite3_column_bytes");
    int columns = function<int(sqlite3_stmt*)>("sqlite3_column_count")(statement);
    std::vector<std::vector<std::string>> rows;
    int code;
    while ((code = step(statement)) == kRow) {
      rows.emplace_back();
      for (int i = 0; i < columns; ++i) {
        auto data = static_cast<const char*>(blob(statement, i));
        rows.back().emplace_back(data == nullptr ? "" : data, static_cast<size_t>(bytes(statement, i)));
      }
    }
    function<int(sqlite3_stmt*)>("sqlite3_finalize")(statement);
    check(code == kDone);
    return rows;
  }

  std::string row(const std::string& name) {
    const std::vector<std::string> found = unchecked_row(name);
    if (found[1] != checksum(name, found[0])) throw std::runtime_error("row " + name + " of the session is damaged");
    return found[0];
  }

  // Value and checksum.
  std::vector<std::string> unchecked_row(const std::string& name) {
    auto found = run("SELECT value, xxh3 FROM item WHERE name = ?", {{true, name}});
    if (found.empty()) throw std::runtime_error("the session has no row " + name);
    return found[0];
  }

  void put_row(const std::string& name, const std::string& value) {
    run("INSERT OR REPLACE INTO item VALUES (?, ?, ?)", {{true, name}, {false, value}, {false, checksum(name, value)}});
  }

 private:
  static std::string checksum(const std::string& name, const std::string& value) {
    std::string checked = name + '\0' + value, result;
    put(result, xxh3_64(checked.data(), checked.size()));
    return result;
  }

  template <typename Signature>
  Signature* function(const char* name) {
    return reinterpret_cast<Signature*>(dlsym(library_, name));
  }

  void check(bool fine) {
    if (!fine) throw std::runtime_error(std::string("SQLite: ") + function<const char*(sqlite3*)>("sqlite3_errmsg")(handle_));
  }

  void* library_ = nullptr;
  sqlite3* handle_ = nullptr;
};

Session::Session(const std::string& folder, const Model& model) : folder_(folder), model_(model) {
  if (mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) fail(folder);
  lock_ = open((folder + "/lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (lock_ < 0 || flock(lock_, LOCK_EX | LOCK_NB) != 0) fail(folder + "/lock");
  held_ = access((folder + "/index.sqlite").c_str(), F_OK) == 0;
}

Session::~Session() { close(lock_); }

std::string Session::segment_path(int64_t segment) const {
  char name[32];
  std::snprintf(name, sizeof name, "/pages-%08d.bin", static_cast<int>(segment));
  return folder_ + name;
}

std::string Session::read_record(Placed placed, int64_t page, size_t layer, int kind, size_t n_bytes) const {
  const size_t size = kHeader + model_.shape.payload_bytes();
  const std::string path = segment_path(placed.number >> 32);
  std::string record(size, '\0');
  int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail(path);
  ssize_t n = pread(file, record.data(), size, (placed.number & 0xFFFFFFFF) * static_cast<int64_t>(record_bytes(model_.shape)));
  close(file);
  const uint64_t tag = static_cast<uint64_t>(page) + (static_cast<uint64_t>(layer) << 32) + (static_cast<uint64_t>(kind) << 48);
  const bool right = n == static_cast<ssize_t>(size) && record.compare(0, 8, "EKVPAGE1") == 0 &&
                     get<uint64_t>(record, 8) == placed.check && get<int64_t>(record, 16) == placed.number &&
                     get<uint64_t>(record, 24) == tag && get<uint32_t>(record, 32) == model_.shape.payload_bytes() &&
                     xxh3_64(record.data() + 16, size - 16) == placed.check;
  if (!right) throw std::runtime_error(path + ": the record of page " + std::to_string(page) + " is damaged");
  return record.substr(kHeader, n_bytes);
}

Session::Placed Session::write_record(int file, int64_t number, int64_t page, size_t layer, int kind,
                                      const std::string& payload) const {
  std::string checked;
  put(checked, number);
  put(checked, static_cast<uint32_t>(page));
  put(checked, static_cast<uint16_t>(layer));
  put(checked, static_cast<uint16_t>(kind));
  put(checked, static_cast<uint32_t>(model_.shape.payload_bytes()));
  checked.resize(kHeader - 16);
  checked += payload;
  checked.resize(kHeader - 16 + model_.shape.payload_bytes());
  const uint64_t check = xxh3_64(checked.data(), checked.size());
  std::string record = "EKVPAGE1";
  put(record, check);
  record += checked;
  record.resize(record_bytes(model_.shape));
  if (write(file, record.data(), record.size()) != static_cast<ssize_t>(record.size())) fail(folder_);
  return {number, check};
}

void Session::load(Sequence& sequence) {
  Database index(folder_ + "/index.sqlite");
  const Json meta = Json::parse(index.unchecked_row("meta")[0]);
  if (const int64_t format = meta.at("format").integer(); format != 2)  // whose checksums may be other ones
    throw std::runtime_error(folder_ + " has format " + std::to_string(format) +
                             ", and this program knows 2: edgekv run --continue makes that of an older one");
  index.row("meta");
  if (meta.at("encrypted").truth)
    throw std::runtime_error(folder_ + " is encrypted, which this program cannot read: edgekv run has the key");
  const Json wanted = Json::parse(model_.compatibility_key());
  for (const auto& [name, value] : wanted.members)
    if (meta.at("key").at(name).text != value.text)
      throw std::runtime_error(folder_ + " is of another bundle: " + name + " is " + meta.at("key").at(name).text +
                               ", not " + value.text);

  const Shape& shape = model_.shape;
  const Json tail = Json::parse(index.row("tail"));
  const int64_t n_pages = tail.at("n_pages").integer(), n_kv = tail.at("n_kv").integer();
  const size_t token_bytes = 4 * shape.page_size, layers = shape.layers;
  std::string chain;
  for (int64_t page = 0; page < n_pages; ++page) {
    std::string row = index.row("page " + std::to_string(page));
    chain = blake2b_128(chain + row.substr(0, token_bytes));
    if (row.substr(row.size() - 16) != chain) throw std::runtime_error(folder_ + ": a page is of another history");
    for (size_t i = 0; i < shape.page_size; ++i) sequence.tokens.push_back(get<int32_t>(row, 4 * i));
    std::vector<std::string> payloads;
    const bool live = row.size() > token_bytes + 16;
    for (size_t l = 0; live && l < layers; ++l) {
      Placed placed = {get<int64_t>(row, token_bytes + 8 * l), get<uint64_t>(row, token_bytes + 8 * layers + 8 * l)};
      payloads.push_back(read_record(placed, page, l, kSealed, shape.payload_bytes()));
    }
    sequence.cache.restore_page(payloads, live);
    rows_[page] = std::move(row);
  }
  for (int64_t token : tail.at("tokens").integers()) sequence.tokens.push_back(token);

  const std::vector<int64_t> pruned = tail.get("pruned").integers();
  const int64_t sealed = n_pages * static_cast<int64_t>(shape.page_size);
  bool open_is_dead = false;  // then it needs no records
  for (size_t i = 0; i + 1 < pruned.size(); i += 2) open_is_dead |= pruned[i] <= sealed && pruned[i + 1] >= n_kv;
  const std::vector<Json>& records = tail.get("records").items;
  const std::vector<Json>& checks = tail.get("checks").items;
  const size_t n_open = static_cast<size_t>(n_kv - sealed);
  if (!records.empty() || open_is_dead) {
    std::vector<std::string> halves[2];
    for (size_t i = 0; i < 2 * layers; ++i) {
      const int kind = i % 2 == 0 ? kOpenKeys : kOpenValues;
      const size_t n_bytes = 2 * shape.elements();
      std::string half(n_bytes, '\0');
      if (!records.empty()) half = read_record({records.at(i).integer(), checks.at(i).natural()}, n_pages, i / 2, kind, n_bytes);
      halves[i % 2].push_back(std::move(half));
    }
    sequence.cache.restore_open(n_open, halves[0], halves[1]);
  }
  for (size_t i = 0; i + 1 < pruned.size(); i += 2)
    sequence.cache.prune(pruned[i], std::min(pruned[i + 1], sequence.cache.size()));

  const std::vector<int64_t> runs = tail.get("steps").integers();
  int64_t reached = 0;
  for (size_t i = 0; i + 1 < runs.size(); i += 2)
    for (int64_t n = 0; n < runs[i + 1]; ++n) sequence.steps.push_back(runs[i]), reached += runs[i];
  while (reached < n_kv) {  // not told: a step began with every page
    const int64_t size = static_cast<int64_t>(shape.page_size);
    sequence.steps.push_back(std::min(n_kv, (reached / size + 1) * size) - reached);
    reached += sequence.steps.back();
  }
}

void Session::save(const Sequence& sequence) {
  const Shape& shape = model_.shape;
  const Cache& cache = sequence.cache;
  int64_t segment = 1;
  while (access(segment_path(segment).c_str(), F_OK) == 0) ++segment;
  int file = open(segment_path(segment).c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) fail(segment_path(segment));
  int64_t number = segment << 32;

  std::string chain;
  std::map<int64_t, std::string> rows;
  size_t place = 0;  // of the page in the cache, which keeps those with live tokens
  for (int64_t page = 0; page < cache.sealed_pages(); ++page) {
    const std::string tokens = tokens_of(sequence.tokens, static_cast<size_t>(page) * shape.page_size, shape.page_size);
    chain = blake2b_128(chain + tokens);
    const bool live = place < cache.pages().size() && cache.pages()[place] == page;
    std::string& row = rows[page];
    // A page that was computed again is another one: what was pruned meanwhile took no part in it.
    auto stored = (page + 1) * static_cast<int64_t>(shape.page_size) <= sequence.reused ? rows_.find(page) : rows_.end();
    if (!live) {
      row = tokens + chain;
    } else if (stored != rows_.end()) {
      row = stored->second;
    } else {
      std::string numbers, checks;
      for (size_t l = 0; l < shape.layers; ++l) {
        Placed placed = write_record(file, number++, page, l, kSealed, cache.pack(place, l));
        put(numbers, placed.number);
        put(checks, placed.check);
      }
      row = tokens + numbers + checks + chain;
    }
    if (live) ++place;
  }
  std::vector<int64_t> records;
  std::vector<uint64_t> checks;
  if (cache.open_has_live_tokens())
    for (size_t i = 0; i < 2 * shape.layers; ++i) {
      const bool values = i % 2 == 1;
      const int kind = values ? kOpenValues : kOpenKeys;
      Placed placed = write_record(file, number++, cache.sealed_pages(), i / 2, kind, cache.pack_open(i / 2, values));
      records.push_back(placed.number);
      checks.push_back(placed.check);
    }
  if (fsync(file) != 0) fail(folder_);
  close(file);
  if (number == segment << 32) unlink(segment_path(segment).c_str());
  sync_folder(folder_);

  std::vector<int64_t> pruned, steps;
  for (int64_t p = 0; p < cache.size(); ++p) {
    if (!cache.pruned()[static_cast<size_t>(p)]) continue;
    if (pruned.empty() || pruned.back() != p) pruned.insert(pruned.end(), {p, p});
    pruned.back() = p + 1;
  }
  for (int64_t length : sequence.steps) {
    if (steps.empty() || steps[steps.size() - 2] != length) steps.insert(steps.end(), {length, 0});
    ++steps.back();
  }
  const auto sealed = static_cast<std::ptrdiff_t>(cache.sealed_pages() * static_cast<int64_t>(shape.page_size));
  const std::vector<int64_t> behind(sequence.tokens.begin() + sealed, sequence.tokens.end());
  const std::string tail = "{\"n_pages\": " + std::to_string(cache.sealed_pages()) +
                           ", \"tokens\": " + json_list(behind) +
                           ", \"n_kv\": " + std::to_string(cache.size()) + ", \"records\": " + json_list(records) +
                           ", \"checks\": " + json_list(checks) + ", \"chain\": \"" + hexadecimal(chain) +
                           "\", \"pruned\": " + json_list(pruned) + ", \"steps\": " + json_list(steps) + "}";

  const std::string path = folder_ + "/index.sqlite";
  int made = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);  // so that it is nobody else's to read
  if (made < 0) fail(path);
  close(made);
  Database index(path);
  index.run("CREATE TABLE IF NOT EXISTS item(name TEXT PRIMARY KEY, value BLOB, xxh3 BLOB) WITHOUT ROWID");
  index.run("BEGIN IMMEDIATE");
  if (!held_) {
    const std::string sizes = "{\"n_layers\": " + std::to_string(shape.layers) + ", \"n_kv_heads\": " + std::to_string(shape.heads) +
                              ", \"head_dim\": " + std::to_string(shape.dim) + ", \"page_size\": " +
                              std::to_string(shape.page_size) + "}";
    index.put_row("meta", "{\"format\": 2, \"key\": " + model_.compatibility_key() + ", \"pages\": " + sizes +
                              ", \"created\": " + std::to_string(std::time(nullptr)) +
                              ", \"encrypted\": false, \"salt\": \"\", \"probe\": \"\"}");
    index.put_row("notes", "{}");
  }
  for (const auto& [page, row] : rows) {
    auto stored = rows_.find(page);
    if (stored == rows_.end() || stored->second != row) index.put_row("page " + std::to_string(page), row);
  }
  for (const auto& [page, row] : rows_)
    if (rows.count(page) == 0) index.run("DELETE FROM item WHERE name = ?", {{true, "page " + std::to_string(page)}});
  index.put_row("tail", tail);
  index.run("COMMIT");
  held_ = true;
  rows_ = std::move(rows);
}
