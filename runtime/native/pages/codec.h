// What is done to single pages outside of attention.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace edgekv {

// Writes n tokens, k and v [n, n_kv_heads, dim], at slots slot.. of a HOT page.
void write_hot(const Kernels&, const Geometry&, uint8_t* page, int slot, const float* k, const float* v, int n);

// INT8 copies in plain order: codes [n_kv_heads, page, dim], key scales [n_kv_heads, dim], value scales
// [n_kv_heads, page]. A HOT page is quantised first, into `packed` (warm_bytes). Dead slots become zeros.
void gather_int8(const Kernels&, const Geometry&, const PageRef&, int8_t* keys, uint16_t* key_scales, int8_t* values,
                 uint16_t* value_scales, uint8_t* packed);

// Per head and channel the smallest and largest decoded key of the live slots as fp16, rounded outwards; zeros where
// no slot is live.
void page_bounds(const Geometry&, const PageRef&, uint16_t* low, uint16_t* high);

}  // namespace edgekv
