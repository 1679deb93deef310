#include "pages/codec.h"

#include <algorithm>
#include <cstring>

#include "half.h"

namespace edgekv {
namespace {

uint16_t float_to_half_down(float x) {
    const uint16_t nearest = float_to_half(x);
    if (!(half_to_float(nearest) > x)) return nearest;
    if (nearest == 0) return 0x8001;
    return nearest & 0x8000 ? static_cast<uint16_t>(nearest + 1) : static_cast<uint16_t>(nearest - 1);
}

uint16_t negated(uint16_t h) { return h ^ 0x8000; }

// Maps the bits of an fp16 number to an integer of the same order, and back.
int ordered(uint16_t h) { return h & 0x8000 ? -(h & 0x7fff) : h; }
uint16_t from_ordered(int x) { return static_cast<uint16_t>(x < 0 ? 0x8000 | -x : x); }

const uint8_t* bytes_of(const PageRef& ref) {
    return reinterpret_cast<const uint8_t*>(static_cast<uintptr_t>(ref.data));
}

}  // namespace

bool write_hot(const Kernels& kernels, const Geometry& g, uint8_t* page, int slot, const float* k, const float* v,
               int n) {
    uint16_t* keys = reinterpret_cast<uint16_t*>(page);
    uint16_t* values = keys + g.elements();
    uint16_t half[kMaxDim];
    float largest = 0;
    for (int h = 0; h < g.n_kv_heads; ++h) {
        const size_t head = static_cast<size_t>(h) * g.dim * g.page;
        for (int i = 0; i < n; ++i) {
            const size_t from = (static_cast<size_t>(i) * g.n_kv_heads + h) * g.dim;
            largest = std::max(largest, kernels.to_half(k + from, half, g.dim));
            uint16_t* to = keys + head + slot + i;
            for (int c = 0; c < g.dim; ++c) to[static_cast<size_t>(c) * g.page] = half[c];
            uint16_t* row = values + head + static_cast<size_t>(slot + i) * g.dim;
            largest = std::max(largest, kernels.to_half(v + from, row, g.dim));
        }
    }
    return largest < 65520.f;  // from where on a number is rounded to infinity
}

void page_bounds(const Geometry& g, const PageRef& ref, uint16_t* low, uint16_t* high) {
    const Mask128 live = g.live(ref);
    const int n = g.n_kv_heads * g.dim;
    if (!live.any()) {
        std::memset(low, 0, n * 2);
        std::memset(high, 0, n * 2);
        return;
    }
    int slots[kMaxPage], n_live = 0;
    for (int i = 0; i < g.page; ++i) {
        if (live.test(i)) slots[n_live++] = i;
    }
    const uint8_t* page = bytes_of(ref);
    if (ref.kind == kHot) {
        const uint16_t* keys = reinterpret_cast<const uint16_t*>(page);
        for (int channel = 0; channel < n; ++channel) {
            const uint16_t* row = keys + static_cast<size_t>(channel) * g.page;
            int least = ordered(row[slots[0]]), most = least;
            for (int i = 1; i < n_live; ++i) {
                const int x = ordered(row[slots[i]]);
                least = std::min(least, x);
                most = std::max(most, x);
            }
            low[channel] = from_ordered(least);
            high[channel] = from_ordered(most);
        }
        return;
    }
    const int8_t* codes = reinterpret_cast<const int8_t*>(page);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(page + 2 * g.elements());
    for (int channel = 0; channel < n; channel += 4) {
        const int8_t* row = codes + static_cast<size_t>(channel) * g.page;
        int least[4], most[4];
        for (int j = 0; j < 4; ++j) least[j] = most[j] = row[4 * slots[0] + j];
        for (int i = 1; i < n_live; ++i) {
            for (int j = 0; j < 4; ++j) {
                const int x = row[4 * slots[i] + j];
                least[j] = std::min(least[j], x);
                most[j] = std::max(most[j], x);
            }
        }
        for (int j = 0; j < 4; ++j) {
            const float scale = half_to_float(scales[channel + j]);
            low[channel + j] = float_to_half_down(static_cast<float>(least[j]) * scale);
            high[channel + j] = negated(float_to_half_down(static_cast<float>(-most[j]) * scale));
        }
    }
}

}  // namespace edgekv
