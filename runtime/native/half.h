// fp16 in portable integer arithmetic, exact and round-half-even.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

[[maybe_unused]] inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t rest = h & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) {  // zero or subnormal: rest * 2^-24
        const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
        return bits_to_float(sign | float_to_bits(magnitude));
    }
    return bits_to_float(sign | ((rest << 13) + 0x38000000));
}

[[maybe_unused]] inline uint16_t float_to_half(float x) {
    const uint32_t bits = float_to_bits(x);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
    if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves a multiple of 2^-24 in the low bits
        const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f);
        return sign | static_cast<uint16_t>(rounded - 0x3f000000);
    }
    const uint32_t odd = magnitude >> 13 & 1;
    return sign | static_cast<uint16_t>((magnitude + 0xfff + odd - 0x38000000) >> 13);
}

// The smallest fp16 not below x (finite, not negative).
[[maybe_unused]] inline uint16_t float_to_half_up(float x) {
    const uint16_t nearest = float_to_half(x);
    return half_to_float(nearest) < x ? static_cast<uint16_t>(nearest + 1) : nearest;
}

}  // namespace
