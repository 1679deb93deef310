// What a decoder computes between its products, for one token; numbers past the last whole vector one by one.
#pragma once

#include <cmath>

namespace {

// y = x * weight / sqrt(mean(x * x) + eps), of n numbers. With a residual, x is x + residual, which total gets.
void rms_norm(const float* x, const float* residual, const float* weight, float eps, int n, float* y, float* total) {
    const int whole = n - n % W;
    VF squares = vset(0.f);
    float sum = 0.f;
    for (int i = 0; i < whole; i += W) {
        VF v = vload(x + i);
        if (residual) {
            v = vadd(v, vload(residual + i));
            vstore(total + i, v);
        }
        squares = vfma(v, v, squares);
    }
    for (int i = whole; i < n; ++i) {
        float v = x[i];
        if (residual) total[i] = v += residual[i];
        sum += v * v;
    }
    sum += vsum(squares);
    const float scale = 1.f / std::sqrt(sum / static_cast<float>(n) + eps);
    const float* const from = residual ? total : x;
    for (int i = 0; i < whole; i += W) vstore(y + i, vmul(vmul(vload(from + i), vset(scale)), vload(weight + i)));
    for (int i = whole; i < n; ++i) y[i] = from[i] * scale * weight[i];
}

// 1 / (1 + exp(-x)).
inline VF sigmoid(VF x) {
    // vexp() is for numbers up to 0, so e is exp(-|x|), and the result is 1 or e over 1 + e.
    const VF one = vset(1.f), e = vexp(vsub(vset(0.f), vabs(x)));
    return vdiv(vselect(vless(x, vset(0.f)), e, one), vadd(one, e));
}

// y = gate / (1 + exp(-gate)) * up.
void swiglu(const float* gate, const float* up, float* y, size_t n) {
    const size_t whole = n - n % W;
    for (size_t i = 0; i < whole; i += W) {
        const VF g = vload(gate + i);
        vstore(y + i, vmul(vmul(g, sigmoid(g)), vload(up + i)));
    }
    for (size_t i = whole; i < n; ++i) y[i] = gate[i] / (1.f + std::exp(-gate[i])) * up[i];
}

// y = gelu(gate) * up, with gelu(x) = x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
void geglu(const float* gate, const float* up, float* y, size_t n) {
    const float linear = 1.5957691216057308f, cubic = 0.044715f * linear;  // twice sqrt(2 / pi)
    const size_t whole = n - n % W;
    for (size_t i = 0; i < whole; i += W) {
        const VF g = vload(gate + i);
        const VF twice_u = vmul(g, vfma(vmul(g, g), vset(cubic), vset(linear)));
        vstore(y + i, vmul(vmul(g, sigmoid(twice_u)), vload(up + i)));
    }
    for (size_t i = whole; i < n; ++i) {
        const float g = gate[i];
        y[i] = g / (1.f + std::exp(-g * (g * g * cubic + linear))) * up[i];
    }
}

// Rotates channel i with channel i + half, of each head; cos and sin [half]. Channels from 2 * half on stay.
void rotary(const float* x, const float* cos, const float* sin, int heads, int dim, int half, float* y) {
    for (int head = 0; head < heads; ++head, x += dim, y += dim) {
        for (int i = 0; i < half; ++i) {
            const float first = x[i], second = x[half + i];
            y[i] = first * cos[i] - second * sin[i];
            y[half + i] = second * cos[i] + first * sin[i];
        }
        for (int i = 2 * half; i < dim; ++i) y[i] = x[i];
    }
}

}  // namespace
