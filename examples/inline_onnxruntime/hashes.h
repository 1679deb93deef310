// The hashes of sessions and their key.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

uint64_t xxh3_64(const void* data, size_t size);        // XXH3, 64 bits, seed 0
std::string blake2b_128(const std::string& bytes);      // 16 bytes
std::string sha256(const std::string& bytes);           // 32 bytes
std::string hexadecimal(const std::string& bytes);      // lower case
