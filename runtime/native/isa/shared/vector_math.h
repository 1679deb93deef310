// Softmax and matrix products over the vector type of one instruction set. An isa_*.cpp defines the type and its
// operations in an anonymous namespace and then includes the isa_*.h files, so that every function here exists once
// per instruction set and none is shared: a shared inline function could end up compiled for a processor that is not
// there. For the same reason nothing of the standard library is called.
#pragma once

namespace {

using namespace edgekv;

inline int min_of(int a, int b) { return a < b ? a : b; }

// The bytes that will be needed next. They are asked for a few cache lines at a time, all through the work on the
// present ones: in one burst they would fill the processor's miss buffers and then stall it.
struct Ahead {
    const char* at;
    const char* end;
    void lines(int n) {
        for (; n > 0 && at < end; --n, at += 64) prefetch(at);
    }
};

// exp(x) for x <= 0; exactly 1 at 0 and exactly 0 below about -88.
inline VF vexp(VF x) {
    x = vmax(vmul(x, vset(1.44269504f)), vset(-127.f));
    const VF whole = vround(x);
    const VF f = vsub(x, whole);
    VF p = vset(1.54035304e-4f);  // Taylor series of 2^f, |f| <= 1/2
    p = vfma(p, f, vset(1.33335581e-3f));
    p = vfma(p, f, vset(9.61812911e-3f));
    p = vfma(p, f, vset(5.55041087e-2f));
    p = vfma(p, f, vset(2.40226507e-1f));
    p = vfma(p, f, vset(6.93147181e-1f));
    p = vfma(p, f, vset(1.f));
    return vmul(p, vpow2(whole));
}

inline float exp_of(float x) {
    alignas(64) float lanes[W];
    vstore(lanes, vexp(vset(x)));
    return lanes[0];
}

// limit * tanh(x / limit)
inline VF vsoftcap(VF x, float limit) {
    const VF y = vmul(x, vset(1.f / limit));
    const VF e = vexp(vmul(vabs(y), vset(-2.f)));
    const VF t = vdiv(vsub(vset(1.f), e), vadd(vset(1.f), e));
    const VF signed_t = vselect(vless(y, vset(0.f)), vsub(vset(0.f), t), t);
    return vmul(signed_t, vset(limit));
}

// Turns a row of scores into exp(score - peak), zero where masked, and updates the row's peak and total; returns what
// the row's earlier sums are to be multiplied by. The row is n_parts parts of `columns` scores, one per page; mass, if
// any, is the row's kMassStride floats and slots[i] the place of part i in it.
inline float softmax_row(float* s, const Mask128* masks, int n_parts, int columns, float softcap, float& peak,
                         float& total, float* mass, const int* slots) {
    VF high = vset(kMasked);
    for (int part = 0; part < n_parts; ++part) {
        for (int c = 0; c < columns; c += W) {
            float* at = s + part * columns + c;
            VF x = vload(at);
            if (softcap > 0) x = vsoftcap(x, softcap);
            x = vmax(vmin(x, vset(kScoreLimit)), vset(-kScoreLimit));
            x = vselect(vmask(masks[part].bits(c, W)), x, vset(kMasked));
            vstore(at, x);
            high = vmax(high, x);
        }
    }
    const float row_high = vpeak(high);
    const float old_peak = peak;
    if (row_high > peak) peak = row_high;
    const float factor = peak > old_peak ? exp_of(old_peak - peak) : 1.f;
    if (mass && factor != 1.f) {
        for (int i = 0; i < kRunPages; ++i) mass[i] *= factor;
    }
    total *= factor;
    const VF base = vset(peak);
    for (int part = 0; part < n_parts; ++part) {
        VF sum = vset(0.f);
        for (int c = 0; c < columns; c += W) {
            float* at = s + part * columns + c;
            const VF e = vexp(vsub(vload(at), base));
            vstore(at, e);
            sum = vadd(sum, e);
        }
        const float part_sum = vsum(sum);
        total += part_sum;
        if (mass) mass[slots[part]] = part_sum;
    }
    return factor;
}

template <int M, int N>
inline void product_block(const float* a, size_t lda, const float* b, size_t ldb, int depth, float* c, size_t ldc,
                          const float* beta) {
    VF sum[M][N];
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) sum[i][j] = beta ? vmul(vload(c + i * ldc + j * W), vset(beta[i])) : vset(0.f);
    }
    for (int k = 0; k < depth; ++k) {
        VF right[N];
        for (int j = 0; j < N; ++j) right[j] = vload(b + k * ldb + j * W);
        for (int i = 0; i < M; ++i) {
            const VF left = vset(a[i * lda + k]);
            for (int j = 0; j < N; ++j) sum[i][j] = vfma(left, right[j], sum[i][j]);
        }
    }
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) vstore(c + i * ldc + j * W, sum[i][j]);
    }
}

template <int M>
inline void product_rows(const float* a, size_t lda, const float* b, size_t ldb, int columns, int depth, float* c,
                         size_t ldc, const float* beta) {
    int j = 0;
    for (; j + kProductColumns * W <= columns; j += kProductColumns * W) {
        product_block<M, kProductColumns>(a, lda, b + j, ldb, depth, c + j, ldc, beta);
    }
    for (; j < columns; j += W) product_block<M, 1>(a, lda, b + j, ldb, depth, c + j, ldc, beta);
}

// C = A B, or diag(beta) C + A B. A is [rows, depth], B [depth, columns], columns a multiple of 16. Every element is
// one chain of multiply-adds over depth, so the result does not depend on how rows are grouped.
inline void product(const float* a, size_t lda, const float* b, size_t ldb, int rows, int columns, int depth, float* c,
                    size_t ldc, const float* beta) {
    int i = 0;
    for (; i + kProductRows <= rows; i += kProductRows) {
        product_rows<kProductRows>(a + i * lda, lda, b, ldb, columns, depth, c + i * ldc, ldc, beta ? beta + i : beta);
    }
    for (; i + 2 <= rows; i += 2) {
        product_rows<2>(a + i * lda, lda, b, ldb, columns, depth, c + i * ldc, ldc, beta ? beta + i : beta);
    }
    if (i < rows) {
        product_rows<1>(a + i * lda, lda, b, ldb, columns, depth, c + i * ldc, ldc, beta ? beta + i : beta);
    }
}

// fp16 to float, n of them, zeros up to a multiple of 16.
inline void load_halves(const uint16_t* x, int n, float* out) {
    int i = 0;
    for (; i + W <= n; i += W) vstore(out + i, vload_half(x + i));
    for (; i < n; ++i) out[i] = half_to_float(x[i]);
    for (; i & 15; ++i) out[i] = 0.f;
}

// An INT8 matrix [rows/4, columns, 4] times its row scales, as floats [rows, ld].
inline void expand_codes(const int8_t* codes, int rows, int columns, const float* scales, float* out, size_t ld) {
    for (int r = 0; r < rows; r += 4) {
        const int8_t* row = codes + static_cast<size_t>(r) * columns;
        int c = 0;
        for (; c + W <= columns; c += W) {
            const VI x = viload(row + 4 * c);
            float* at = out + r * ld + c;
            vstore(at, vmul(vfloat(vbyte<0>(x)), vset(scales[r])));
            vstore(at + ld, vmul(vfloat(vbyte<1>(x)), vset(scales[r + 1])));
            vstore(at + 2 * ld, vmul(vfloat(vbyte<2>(x)), vset(scales[r + 2])));
            vstore(at + 3 * ld, vmul(vfloat(vbyte<3>(x)), vset(scales[r + 3])));
        }
        for (; c < columns; ++c) {
            for (int i = 0; i < 4; ++i) out[(r + i) * ld + c] = static_cast<float>(row[4 * c + i]) * scales[r + i];
        }
        for (; c & 15; ++c) {
            for (int i = 0; i < 4; ++i) out[(r + i) * ld + c] = 0.f;
        }
    }
}

}  // namespace
