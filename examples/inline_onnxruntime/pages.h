// The cache: sealed INT8 pages and an open one of float16, of all layers.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

uint16_t half_of(float x);  // to the nearest, ties to even; beyond the range to the largest
float float_of(uint16_t half);

struct Shape {
  size_t layers, heads, dim, page_size;

  size_t elements() const { return heads * dim * page_size; }  // keys of a page
  size_t payload_bytes() const { return 2 * elements() + 2 * heads * (dim + page_size); }
};

// Buffers of one layer. Those of pages lie as the graph takes them, the open page token by token.
struct LayerPages {
  std::vector<int8_t> key_codes;       // [pages, heads, dim, page_size]
  std::vector<uint16_t> key_scales;    // [pages, heads, dim]
  std::vector<int8_t> value_codes;     // [pages, heads, page_size, dim]
  std::vector<uint16_t> value_scales;  // [pages, heads, page_size]
  std::vector<uint16_t> open_keys;     // [page_size, heads, dim]
  std::vector<uint16_t> open_values;   // [page_size, heads, dim]
};

// Page k holds the positions k * page_size ... of every layer. Pages without a live token are not kept.
class Cache {
 public:
  explicit Cache(const Shape& shape);

  const Shape& shape() const { return shape_; }
  int64_t size() const { return static_cast<int64_t>(pruned_.size()); }  // tokens, pruned ones too
  int64_t sealed_pages() const { return size() / page_size(); }
  // Of the pages that are kept, in this order in every buffer: their numbers, and the position in every slot or -1.
  const std::vector<int64_t>& pages() const { return pages_; }
  const std::vector<int64_t>& positions() const { return positions_; }
  // Of the open page, -1 in slots without a live token.
  std::vector<int64_t> open_positions() const;
  bool open_has_live_tokens() const;
  const LayerPages& layer(size_t l) const { return layers_[l]; }
  const std::vector<bool>& pruned() const { return pruned_; }

  // Puts the keys and values [n, heads, dim] of a step behind the tokens; one pointer for each layer.
  void append(size_t n, const std::vector<const float*>& keys, const std::vector<const float*>& values);
  void prune(int64_t start, int64_t stop);
  // Forgets the tokens from `size` on: a multiple of the page size, or within the open page.
  void cut(int64_t size);

  // A page as its record holds it, and back: `packed` has one payload for each layer.
  std::string pack(size_t place, size_t layer) const;
  std::string pack_open(size_t layer, bool values) const;
  void restore_page(const std::vector<std::string>& packed, bool live);
  void restore_open(size_t tokens, const std::vector<std::string>& keys, const std::vector<std::string>& values);

 private:
  int64_t page_size() const { return static_cast<int64_t>(shape_.page_size); }
  void seal(LayerPages& layer) const;
  void list_page(int64_t page);
  void drop_dead_pages();

  Shape shape_;
  std::vector<LayerPages> layers_;
  std::vector<int64_t> pages_, positions_;
  std::vector<bool> pruned_;
};
