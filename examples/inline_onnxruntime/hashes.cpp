#include "hashes.h"

#include <algorithm>
#include <cstring>

namespace {

// All of these hashes, as the formats, are little endian, and so is every machine that this program was written for.
template <typename T>
T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

uint64_t load64(const uint8_t* from) { return load<uint64_t>(from); }
uint64_t load32(const uint8_t* from) { return load<uint32_t>(from); }
uint64_t rotate_left(uint64_t x, int n) { return x << n | x >> (64 - n); }
uint64_t rotate_right(uint64_t x, int n) { return x >> n | x << (64 - n); }
uint32_t rotate_right(uint32_t x, int n) { return x >> n | x << (32 - n); }

// -- XXH3: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md

constexpr uint64_t kPrime32[] = {0, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D};
constexpr uint64_t kPrime64[] = {0, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63,
                                 0x27D4EB2F165667C5};
constexpr uint8_t kSecret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

uint64_t multiply_fold(uint64_t a, uint64_t b) {
  unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t avalanche(uint64_t x) {
  x = (x ^ x >> 37) * 0x165667919E3779F9;
  return x ^ x >> 32;
}

uint64_t avalanche_64(uint64_t x) {
  x = (x ^ x >> 33) * kPrime64[2];
  x = (x ^ x >> 29) * kPrime64[3];
  return x ^ x >> 32;
}

uint64_t mix_16(const uint8_t* data, const uint8_t* secret) {
  return multiply_fold(load64(data) ^ load64(secret), load64(data + 8) ^ load64(secret + 8));
}

uint64_t xxh3_up_to_16(const uint8_t* data, size_t size) {
  if (size > 8) {
    uint64_t low = load64(data) ^ load64(kSecret + 24) ^ load64(kSecret + 32);
    uint64_t high = load64(data + size - 8) ^ load64(kSecret + 40) ^ load64(kSecret + 48);
    return avalanche(size + __builtin_bswap64(low) + high + multiply_fold(low, high));
  }
  if (size >= 4) {
    uint64_t x = load32(data + size - 4) + (load32(data) << 32);
    x ^= load64(kSecret + 8) ^ load64(kSecret + 16);
    x ^= rotate_left(x, 49) ^ rotate_left(x, 24);
    x *= 0x9FB21C651E98DF25;
    x ^= (x >> 35) + size;
    x *= 0x9FB21C651E98DF25;
    return x ^ x >> 28;
  }
  if (size > 0) {
    uint64_t x = static_cast<uint64_t>(data[0]) << 16 | static_cast<uint64_t>(data[size >> 1]) << 24 | data[size - 1] |
                 static_cast<uint64_t>(size) << 8;
    return avalanche_64(x ^ load32(kSecret) ^ load32(kSecret + 4));
  }
  return avalanche_64(load64(kSecret + 56) ^ load64(kSecret + 64));
}

uint64_t xxh3_up_to_240(const uint8_t* data, size_t size) {
  uint64_t sum = size * kPrime64[1];
  if (size <= 128) {
    for (size_t i = 0; i < (size - 1) / 32 + 1; ++i)
      sum += mix_16(data + 16 * i, kSecret + 32 * i) + mix_16(data + size - 16 * (i + 1), kSecret + 32 * i + 16);
    return avalanche(sum);
  }
  for (size_t i = 0; i < 8; ++i) sum += mix_16(data + 16 * i, kSecret + 16 * i);
  sum = avalanche(sum);
  for (size_t i = 8; i < size / 16; ++i) sum += mix_16(data + 16 * i, kSecret + 16 * (i - 8) + 3);
  return avalanche(sum + mix_16(data + size - 16, kSecret + 136 - 17));
}

void accumulate(uint64_t* sums, const uint8_t* data, const uint8_t* secret) {
  for (size_t i = 0; i < 8; ++i) {
    uint64_t value = load64(data + 8 * i), keyed = value ^ load64(secret + 8 * i);
    sums[i ^ 1] += value;
    sums[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
  }
}

uint64_t xxh3_long(const uint8_t* data, size_t size) {
  constexpr size_t kStripe = 64, kStripes = (sizeof kSecret - kStripe) / 8, kBlock = kStripe * kStripes;
  uint64_t sums[8] = {kPrime32[3], kPrime64[1], kPrime64[2], kPrime64[3], kPrime64[4], kPrime32[2], kPrime64[5], kPrime32[1]};
  const uint8_t* last_secret = kSecret + sizeof kSecret - kStripe;
  size_t n_blocks = (size - 1) / kBlock;
  for (size_t block = 0; block < n_blocks; ++block) {
    for (size_t i = 0; i < kStripes; ++i) accumulate(sums, data + block * kBlock + i * kStripe, kSecret + 8 * i);
    for (size_t i = 0; i < 8; ++i) sums[i] = (sums[i] ^ sums[i] >> 47 ^ load64(last_secret + 8 * i)) * kPrime32[1];
  }
  size_t n_left = (size - 1 - n_blocks * kBlock) / kStripe;
  for (size_t i = 0; i < n_left; ++i) accumulate(sums, data + n_blocks * kBlock + i * kStripe, kSecret + 8 * i);
  accumulate(sums, data + size - kStripe, last_secret - 7);
  uint64_t result = size * kPrime64[1];
  for (size_t i = 0; i < 8; i += 2)
    result += multiply_fold(sums[i] ^ load64(kSecret + 11 + 8 * i), sums[i + 1] ^ load64(kSecret + 19 + 8 * i));
  return avalanche(result);
}

// -- BLAKE2b: RFC 7693

constexpr uint64_t kBlakeStart[8] = {0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
                                     0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179};
constexpr uint8_t kSigma[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

void blake_block(uint64_t* state, const uint8_t* block, uint64_t n_bytes, bool last) {
  uint64_t v[16];
  for (int i = 0; i < 8; ++i) v[i] = state[i], v[i + 8] = kBlakeStart[i];
  v[12] ^= n_bytes;
  if (last) v[14] = ~v[14];
  auto mix = [&](int a, int b, int c, int d, uint64_t x, uint64_t y) {
    v[a] += v[b] + x;
    v[d] = rotate_right(v[d] ^ v[a], 32);
    v[c] += v[d];
    v[b] = rotate_right(v[b] ^ v[c], 24);
    v[a] += v[b] + y;
    v[d] = rotate_right(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = rotate_right(v[b] ^ v[c], 63);
  };
  for (int round = 0; round < 12; ++round) {
    const uint8_t* s = kSigma[round % 10];
    auto word = [&](int i) { return load64(block + 8 * s[i]); };
    for (int i = 0; i < 4; ++i) mix(i, i + 4, i + 8, i + 12, word(2 * i), word(2 * i + 1));
    for (int i = 0; i < 4; ++i)
      mix(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12, word(2 * i + 8), word(2 * i + 9));
  }
  for (int i = 0; i < 8; ++i) state[i] ^= v[i] ^ v[i + 8];
}

// -- SHA-256: FIPS 180-4

constexpr uint32_t kShaConstants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

void sha_block(uint32_t* state, const uint8_t* block) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) w[i] = __builtin_bswap32(load<uint32_t>(block + 4 * i));
  for (int i = 16; i < 64; ++i) {
    uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (rotate_right(a, 7) ^ rotate_right(a, 18) ^ a >> 3) + w[i - 7] +
           (rotate_right(b, 17) ^ rotate_right(b, 19) ^ b >> 10);
  }
  uint32_t v[8];
  std::copy(state, state + 8, v);
  for (int i = 0; i < 64; ++i) {
    uint32_t a = v[0], e = v[4];
    uint32_t first = v[7] + (rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25)) + ((e & v[5]) ^ (~e & v[6])) +
                     kShaConstants[i] + w[i];
    uint32_t second = (rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22)) +
                      ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
    std::copy_backward(v, v + 7, v + 8);
    v[4] += first;
    v[0] = first + second;
  }
  for (int i = 0; i < 8; ++i) state[i] += v[i];
}

}  // namespace

uint64_t xxh3_64(const void* data, size_t size) {
  auto bytes = static_cast<const uint8_t*>(data);
  return size <= 16 ? xxh3_up_to_16(bytes, size) : size <= 240 ? xxh3_up_to_240(bytes, size) : xxh3_long(bytes, size);
}

std::string blake2b_128(const std::string& bytes) {
  uint64_t state[8];
  std::copy(kBlakeStart, kBlakeStart + 8, state);
  state[0] ^= 0x01010000 ^ 16;  // no key, digest of 16 bytes
  size_t at = 0;
  for (; at + 128 < bytes.size(); at += 128)
    blake_block(state, reinterpret_cast<const uint8_t*>(bytes.data()) + at, at + 128, false);
  uint8_t block[128] = {};
  std::memcpy(block, bytes.data() + at, bytes.size() - at);
  blake_block(state, block, bytes.size(), true);
  return std::string(reinterpret_cast<const char*>(state), 16);
}

std::string sha256(const std::string& bytes) {
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::string padded = bytes + '\x80';
  padded.resize((padded.size() + 8 + 63) / 64 * 64);
  uint64_t bits = __builtin_bswap64(bytes.size() * 8);
  std::memcpy(padded.data() + padded.size() - 8, &bits, 8);
  for (size_t at = 0; at < padded.size(); at += 64) sha_block(state, reinterpret_cast<const uint8_t*>(padded.data()) + at);
  for (uint32_t& word : state) word = __builtin_bswap32(word);
  return std::string(reinterpret_cast<const char*>(state), 32);
}

std::string hexadecimal(const std::string& bytes) {
  static const char kDigits[] = "0123456789abcdef";
  std::string result;
  for (unsigned char byte : bytes) result += {kDigits[byte >> 4], kDigits[byte & 15]};
  return result;
}
