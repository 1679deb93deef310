// The configuration of AMX tiles. The instructions are written as assembly because the compiler's own say nothing of the
// memory that they touch: GCC 12 removes stores that only ldtilecfg reads.
#pragma once

#include <cstdint>

namespace edgekv {

// What ldtilecfg reads.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    void set(int tile, int n_rows, int bytes) {
        rows[tile] = static_cast<uint8_t>(n_rows);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
    void configure() const { asm volatile("ldtilecfg %0" : : "m"(*this)); }
    static void release() { asm volatile("tilerelease"); }
};
static_assert(sizeof(TileShapes) == 64, "ldtilecfg reads 64 bytes");

}  // namespace edgekv
