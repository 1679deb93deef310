// XXH3-64 of a block of more than 240 bytes, as the xxHash library computes it with seed 0 and its default secret
// (xxHash specification 0.2.0, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md). The eight lanes are one
// vector of the compiler's, which each instruction set's flags turn into as many registers as it takes.
#pragma once

namespace {

constexpr int kLanes = 8, kStripe = 64, kStripesPerBlock = 16;
constexpr uint64_t kPrime32[3] = {0x9E3779B1u, 0x85EBCA77u, 0xC2B2AE3Du};
constexpr uint64_t kPrime64[5] = {0x9E3779B185EBCA87u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u, 0x85EBCA77C2B2AE63u,
                                  0x27D4EB2F165667C5u};
alignas(64) constexpr uint8_t kSecret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

typedef uint64_t StripeSums __attribute__((vector_size(kStripe), aligned(kStripe)));

inline StripeSums neighbours(const StripeSums& x) {
#ifdef __clang__
    return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    return __builtin_shuffle(x, StripeSums{1, 0, 3, 2, 5, 4, 7, 6});
#endif
}

inline uint64_t word64(const uint8_t* at) {
    uint64_t word;
    __builtin_memcpy(&word, at, 8);
    return word;
}

inline void accumulate(StripeSums& sums, const uint8_t* data, const uint8_t* secret) {
    StripeSums words, keys;
    __builtin_memcpy(&words, data, kStripe);
    __builtin_memcpy(&keys, secret, kStripe);
    keys ^= words;
    sums += (keys & 0xFFFFFFFFu) * (keys >> 32) + neighbours(words);
}

inline void scramble(StripeSums& sums) {
    StripeSums keys;
    __builtin_memcpy(&keys, kSecret + sizeof kSecret - kStripe, kStripe);
    sums = (sums ^ sums >> 47 ^ keys) * kPrime32[0];
}

uint64_t checksum(const uint8_t* data, size_t n) {
    StripeSums sums = {kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2], kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]};
    const size_t block = kStripe * kStripesPerBlock, blocks = (n - 1) / block;
    for (size_t b = 0; b < blocks; ++b) {
        for (int s = 0; s < kStripesPerBlock; ++s) accumulate(sums, data + b * block + s * kStripe, kSecret + 8 * s);
        scramble(sums);
    }
    const size_t stripes = (n - 1 - blocks * block) / kStripe;
    for (size_t s = 0; s < stripes; ++s) accumulate(sums, data + blocks * block + s * kStripe, kSecret + 8 * s);
    accumulate(sums, data + n - kStripe, kSecret + sizeof kSecret - kStripe - 7);
    uint64_t result = static_cast<uint64_t>(n) * kPrime64[0];
    for (int i = 0; i < kLanes; i += 2) {
        const unsigned __int128 product = static_cast<unsigned __int128>(sums[i] ^ word64(kSecret + 11 + 8 * i)) *
                                          (sums[i + 1] ^ word64(kSecret + 19 + 8 * i));
        result += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }
    result = (result ^ result >> 37) * 0x165667919E3779F9u;
    return result ^ result >> 32;
}

}  // namespace
