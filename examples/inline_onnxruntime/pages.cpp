#include "pages.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr float kLargestHalf = 65504.0f;

// Codes and scale of `n` numbers that lie `stride` apart.
uint16_t quantise(const uint16_t* from, size_t n, size_t stride, int8_t* to, size_t to_stride) {
  float peak = 0;
  for (size_t i = 0; i < n; ++i) peak = std::max(peak, std::fabs(float_of(from[i * stride])));
  float exact = peak / 127.0f;
  uint16_t scale = half_of(exact);
  if (float_of(scale) < exact) ++scale;  // the next float16
  if (scale == 0) scale = 1;             // 2^-24
  float divisor = float_of(scale);
  for (size_t i = 0; i < n; ++i) to[i * to_stride] = static_cast<int8_t>(std::nearbyint(float_of(from[i * stride]) / divisor));
  return scale;
}

template <typename T>
T* grow(std::vector<T>& buffer, size_t n) {
  buffer.resize(buffer.size() + n);
  return buffer.data() + buffer.size() - n;
}

template <typename T>
void drop(std::vector<T>& buffer, size_t place, size_t n) {
  auto start = buffer.begin() + static_cast<std::ptrdiff_t>(place * n);
  buffer.erase(start, start + static_cast<std::ptrdiff_t>(n));
}

}  // namespace

uint16_t half_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  float size = std::fabs(x);
  if (!(size < kLargestHalf)) return static_cast<uint16_t>(sign | 0x7BFF);
  if (size < 6.103515625e-05f)  // subnormal: a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 16777216.0f)));
  bits = (bits & 0x7FFFFFFF) - (112u << 23);  // the exponent's bias is 15, not 127
  bits += 0xFFF + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | std::min(bits >> 13, 0x7BFFu));
}

float float_of(uint16_t half) {
  uint32_t exponent = half >> 10 & 31, fraction = half & 0x3FF;
  float size = exponent == 0 ? static_cast<float>(fraction) / 16777216.0f
                             : std::ldexp(static_cast<float>(1024 + fraction), static_cast<int>(exponent) - 25);
  return (half & 0x8000) != 0 ? -size : size;
}

Cache::Cache(const Shape& shape) : shape_(shape), layers_(shape.layers) {
  for (LayerPages& layer : layers_) {
    layer.open_keys.resize(shape.elements());
    layer.open_values.resize(shape.elements());
  }
}

std::vector<int64_t> Cache::open_positions() const {
  std::vector<int64_t> result(shape_.page_size, -1);
  for (int64_t p = sealed_pages() * page_size(); p < size(); ++p)
    if (!pruned_[static_cast<size_t>(p)]) result[static_cast<size_t>(p % page_size())] = p;
  return result;
}

bool Cache::open_has_live_tokens() const {
  return std::find(pruned_.begin() + sealed_pages() * page_size(), pruned_.end(), false) != pruned_.end();
}

void Cache::append(size_t n, const std::vector<const float*>& keys, const std::vector<const float*>& values) {
  const size_t row = shape_.heads * shape_.dim;
  for (size_t t = 0; t < n; ++t) {
    size_t slot = pruned_.size() % shape_.page_size;
    pruned_.push_back(false);
    for (size_t l = 0; l < shape_.layers; ++l) {
      for (size_t i = 0; i < row; ++i) {
        layers_[l].open_keys[slot * row + i] = half_of(keys[l][t * row + i]);
        layers_[l].open_values[slot * row + i] = half_of(values[l][t * row + i]);
      }
      if (slot + 1 == shape_.page_size) seal(layers_[l]);
    }
    if (slot + 1 == shape_.page_size) list_page(sealed_pages() - 1);
  }
}

void Cache::seal(LayerPages& layer) const {
  const size_t heads = shape_.heads, dim = shape_.dim, size = shape_.page_size, row = heads * dim;
  int8_t* key_codes = grow(layer.key_codes, shape_.elements());
  int8_t* value_codes = grow(layer.value_codes, shape_.elements());
  uint16_t* key_scales = grow(layer.key_scales, row);
  uint16_t* value_scales = grow(layer.value_scales, heads * size);
  for (size_t h = 0; h < heads; ++h) {
    for (size_t c = 0; c < dim; ++c)
      key_scales[h * dim + c] = quantise(&layer.open_keys[h * dim + c], size, row, key_codes + (h * dim + c) * size, 1);
    for (size_t p = 0; p < size; ++p)
      value_scales[h * size + p] =
          quantise(&layer.open_values[p * row + h * dim], dim, 1, value_codes + (h * size + p) * dim, 1);
  }
  std::fill(layer.open_keys.begin(), layer.open_keys.end(), uint16_t{0});
  std::fill(layer.open_values.begin(), layer.open_values.end(), uint16_t{0});
}

void Cache::list_page(int64_t page) {
  pages_.push_back(page);
  for (int64_t p = page * page_size(); p < (page + 1) * page_size(); ++p)
    positions_.push_back(pruned_[static_cast<size_t>(p)] ? -1 : p);
}

void Cache::prune(int64_t start, int64_t stop) {
  for (int64_t p = start; p < stop; ++p) pruned_[static_cast<size_t>(p)] = true;
  for (int64_t& position : positions_)
    if (position >= start && position < stop) position = -1;
  if (!open_has_live_tokens())  // what nobody will read is forgotten, and does not count for scales
    for (LayerPages& layer : layers_) {
      std::fill(layer.open_keys.begin(), layer.open_keys.end(), uint16_t{0});
      std::fill(layer.open_values.begin(), layer.open_values.end(), uint16_t{0});
    }
  drop_dead_pages();
}

void Cache::drop_dead_pages() {
  const size_t size = shape_.page_size, row = shape_.heads * shape_.dim;
  for (size_t place = pages_.size(); place-- > 0;) {
    auto slots = positions_.begin() + static_cast<std::ptrdiff_t>(place * size);
    if (std::any_of(slots, slots + page_size(), [](int64_t p) { return p >= 0; })) continue;
    for (LayerPages& layer : layers_) {
      drop(layer.key_codes, place, shape_.elements());
      drop(layer.key_scales, place, row);
      drop(layer.value_codes, place, shape_.elements());
      drop(layer.value_scales, place, shape_.heads * size);
    }
    drop(positions_, place, size);
    drop(pages_, place, 1);
  }
}

void Cache::cut(int64_t size) {
  const bool opened = size >= sealed_pages() * page_size();
  const size_t kept = opened ? static_cast<size_t>(size % page_size()) * shape_.heads * shape_.dim : 0;
  pruned_.resize(static_cast<size_t>(size));
  for (LayerPages& layer : layers_) {
    std::fill(layer.open_keys.begin() + static_cast<std::ptrdiff_t>(kept), layer.open_keys.end(), uint16_t{0});
    std::fill(layer.open_values.begin() + static_cast<std::ptrdiff_t>(kept), layer.open_values.end(), uint16_t{0});
  }
  for (int64_t& position : positions_)
    if (position >= size) position = -1;
  drop_dead_pages();
}

// -- records

std::string Cache::pack(size_t place, size_t l) const {
  const LayerPages& layer = layers_[l];
  const size_t heads = shape_.heads, dim = shape_.dim, size = shape_.page_size, n = shape_.elements();
  const int8_t* keys = &layer.key_codes[place * n];
  const int8_t* values = &layer.value_codes[place * n];
  std::string result(2 * n, '\0');
  for (size_t h = 0; h < heads; ++h)
    for (size_t c = 0; c < dim; ++c)
      for (size_t p = 0; p < size; ++p) {
        result[h * dim * size + c / 4 * 4 * size + 4 * p + c % 4] = static_cast<char>(keys[(h * dim + c) * size + p]);
        result[n + h * dim * size + p / 4 * 4 * dim + 4 * c + p % 4] = static_cast<char>(values[(h * size + p) * dim + c]);
      }
  result.append(reinterpret_cast<const char*>(&layer.key_scales[place * heads * dim]), 2 * heads * dim);
  result.append(reinterpret_cast<const char*>(&layer.value_scales[place * heads * size]), 2 * heads * size);
  return result;
}

void Cache::restore_page(const std::vector<std::string>& packed, bool live) {
  const size_t heads = shape_.heads, dim = shape_.dim, size = shape_.page_size, n = shape_.elements();
  pruned_.resize(pruned_.size() + size, !live);
  if (!live) return;
  for (size_t l = 0; l < shape_.layers; ++l) {
    const char* from = packed[l].data();
    int8_t* keys = grow(layers_[l].key_codes, n);
    int8_t* values = grow(layers_[l].value_codes, n);
    for (size_t h = 0; h < heads; ++h)
      for (size_t c = 0; c < dim; ++c)
        for (size_t p = 0; p < size; ++p) {
          keys[(h * dim + c) * size + p] = from[h * dim * size + c / 4 * 4 * size + 4 * p + c % 4];
          values[(h * size + p) * dim + c] = from[n + h * dim * size + p / 4 * 4 * dim + 4 * c + p % 4];
        }
    std::memcpy(grow(layers_[l].key_scales, heads * dim), from + 2 * n, 2 * heads * dim);
    std::memcpy(grow(layers_[l].value_scales, heads * size), from + 2 * n + 2 * heads * dim, 2 * heads * size);
  }
  list_page(sealed_pages() - 1);
}

std::string Cache::pack_open(size_t l, bool values) const {
  const std::vector<uint16_t>& from = values ? layers_[l].open_values : layers_[l].open_keys;
  const size_t heads = shape_.heads, dim = shape_.dim, size = shape_.page_size;
  std::vector<uint16_t> to(shape_.elements());
  for (size_t p = 0; p < size; ++p)
    for (size_t h = 0; h < heads; ++h)
      for (size_t c = 0; c < dim; ++c)
        to[values ? (h * size + p) * dim + c : (h * dim + c) * size + p] = from[(p * heads + h) * dim + c];
  return std::string(reinterpret_cast<const char*>(to.data()), 2 * to.size());
}

void Cache::restore_open(size_t tokens, const std::vector<std::string>& keys, const std::vector<std::string>& values) {
  const size_t heads = shape_.heads, dim = shape_.dim, size = shape_.page_size;
  pruned_.resize(pruned_.size() + tokens, false);
  for (size_t l = 0; l < shape_.layers; ++l)
    for (size_t p = 0; p < tokens; ++p)
      for (size_t h = 0; h < heads; ++h)
        for (size_t c = 0; c < dim; ++c) {
          const size_t to = (p * heads + h) * dim + c;
          std::memcpy(&layers_[l].open_keys[to], keys[l].data() + 2 * ((h * dim + c) * size + p), 2);
          std::memcpy(&layers_[l].open_values[to], values[l].data() + 2 * ((h * size + p) * dim + c), 2);
        }
}
