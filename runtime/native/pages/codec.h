// What is done to single pages outside of attention.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace edgekv {

// Writes n tokens, k and v [n, n_kv_heads, dim], at slots slot.. of a HOT page. Returns whether all of them are in
// fp16's range: what lies beyond it saturates.
bool write_hot(const Kernels&, const Geometry&, uint8_t* page, int slot, const float* k, const float* v, int n);

// Per head and channel the smallest and largest decoded key of the live slots as fp16, rounded outwards; zeros where
// no slot is live.
void page_bounds(const Geometry&, const PageRef&, uint16_t* low, uint16_t* high);

}  // namespace edgekv
