// Page quantisation, bit-identical to edgekv/codec.py, and what else runs over whole pages.
#pragma once

namespace {

// Quantises an fp16 matrix [rows, columns] with one scale per row into codes [rows/4, columns, 4]. Columns outside
// `live_columns` and rows outside `live_rows` count as zero.
inline void pack_matrix(const uint16_t* m, int rows, int columns, Mask128 live_columns, Mask128 live_rows,
                        bool mask_rows, int8_t* codes, uint16_t* scales) {
    alignas(64) float x[4][kMaxDim];
    alignas(64) int32_t packed[kMaxDim];
    const int padded = pad16(columns);
    for (int r = 0; r < rows; r += 4) {
        VF divisor[4];
        for (int i = 0; i < 4; ++i) {
            VF high = vset(0.f);
            const bool dead = mask_rows && !live_rows.test(r + i);
            if (!dead) load_halves(m + static_cast<size_t>(r + i) * columns, columns, x[i]);
            for (int c = 0; c < padded; c += W) {
                VF v = dead ? vset(0.f) : vload(x[i] + c);
                if (!mask_rows) v = vselect(vmask(live_columns.bits(c, W)), v, vset(0.f));
                vstore(x[i] + c, v);
                high = vmax(high, vabs(v));
            }
            uint16_t scale = float_to_half_up(vpeak(high) / 127.f);
            if (scale == 0) scale = 1;  // 2^-24, the smallest fp16
            scales[r + i] = scale;
            divisor[i] = vset(half_to_float(scale));
        }
        for (int c = 0; c < padded; c += W) {
            VI code[4];
            for (int i = 0; i < 4; ++i) code[i] = vint(vround(vdiv(vload(x[i] + c), divisor[i])));
            vistore(packed + c, vipack(code[0], code[1], code[2], code[3]));
        }
        int8_t* out = codes + static_cast<size_t>(r) * columns;
        const int8_t* from = reinterpret_cast<const int8_t*>(packed);
        __builtin_memcpy(out, from, static_cast<size_t>(columns) * 4);
    }
}

void pack_warm(const Geometry& g, const uint8_t* hot, uint8_t* warm, Mask128 live) {
    const size_t one = static_cast<size_t>(g.dim) * g.page, all = g.elements();
    const uint16_t* keys = reinterpret_cast<const uint16_t*>(hot);
    const uint16_t* values = keys + all;
    int8_t* codes = reinterpret_cast<int8_t*>(warm);
    uint16_t* key_scales = reinterpret_cast<uint16_t*>(warm + 2 * all);
    uint16_t* value_scales = key_scales + static_cast<size_t>(g.n_kv_heads) * g.dim;
    for (int h = 0; h < g.n_kv_heads; ++h) {
        pack_matrix(keys + h * one, g.dim, g.page, live, live, false, codes + h * one, key_scales + h * g.dim);
        pack_matrix(values + h * one, g.page, g.dim, live, live, true, codes + all + h * one,
                    value_scales + h * g.page);
    }
}

float to_half(const float* x, uint16_t* out, size_t n) {
    size_t i = 0;
    VF high = vset(0.f);
    for (; i + W <= n; i += W) {
        const VF v = vload(x + i);
        high = vmax(high, vabs(v));
        vstore_half(out + i, vmax(vmin(v, vset(65504.f)), vset(-65504.f)));
    }
    float largest = vpeak(high);
    for (; i < n; ++i) {
        float v = x[i] < 65504.f ? x[i] : 65504.f;
        v = v > -65504.f ? v : -65504.f;
        const float size = x[i] < 0.f ? -x[i] : x[i];
        if (size > largest) largest = size;
        out[i] = float_to_half(v);
    }
    return largest;
}

}  // namespace
