/* Fused CPU kernels; __init__.py compiles and calls them.
 *
 * All arrays are contiguous float32 unless said otherwise. The neuron is the paper's: h = v + (x - v) / 2,
 * a spike where h >= 1, then v = 0, else v = h; the surrogate derivative of a spike is 1 / (1 + (pi (h - 1))^2),
 * and no gradient flows through the reset.
 *
 * What makes them fast is that the first layer's current is constant over time. A reset is to exactly 0, so a
 * neuron fires with a period: first at step k, then at 2k, 3k, ... (k is found by the same arithmetic, step by
 * step). The next layer's input at step t is then the sum over the k that divide t of the weights from the
 * neurons of period k: each neuron's weights are added once, not at each of its spikes.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 64 /* neurons at a time: their state stays in the first-level cache */
#define LANES 16 /* outputs are padded to a multiple of it */
#define STEPS 8  /* time steps at a time */
#define THREADED _Pragma("omp parallel for schedule(static)")
#define SIMD _Pragma("omp simd")

static inline int smaller(int a, int b) { return a < b ? a : b; }

/* w [O][H] to wt [H][P], padded with 0 */
static void transpose(const float *w, float *wt, int H, int O, int P) {
    THREADED
    for (int h = 0; h < H; h++)
        for (int o = 0; o < P; o++) wt[(size_t)h * P + o] = o < O ? w[(size_t)o * H + h] : 0.0f;
}

/* Periods of H neurons with constant currents: the step of the first spike, T + 1 where there is none. */
static void find_periods(const float *current, uint8_t *period, int H, int T) {
    for (int start = 0; start < H; start += BLOCK) {
        int n = smaller(BLOCK, H - start);
        const float *x = current + start;
        float v[BLOCK];
        int32_t k[BLOCK];
        for (int i = 0; i < n; i++) v[i] = 0.0f, k[i] = T + 1;
        for (int t = 1; t <= T; t++) {
            SIMD
            for (int i = 0; i < n; i++) {
                float h = v[i] + (x[i] - v[i]) * 0.5f;
                k[i] = h >= 1.0f && k[i] > t ? t : k[i];
                v[i] = h; /* what follows the first spike does not matter */
            }
        }
        for (int i = 0; i < n; i++) period[start + i] = (uint8_t)k[i];
    }
}

/* Spikes of N x H neurons with constant currents, through weights [O][H], for T steps (at most 254).
 * wt [H][P] and sums [N][T + 2][P] are scratch; period [N][H] (uint8) is kept for the backward pass;
 * out [T][N][O]; spikes [H] (int64), unless null, is increased by each neuron's spikes. */
void constant_lif_linear_forward(const float *current, const float *w, float *wt, float *sums, uint8_t *period,
                                 float *out, int64_t *spikes, int N, int H, int O, int P, int T) {
    transpose(w, wt, H, O, P);
    THREADED
    for (int n = 0; n < N; n++) {
        uint8_t *k = period + (size_t)n * H;
        float *sum = sums + (size_t)n * (T + 2) * P;
        float partial[4][P]; /* of neurons with the same k, so that additions need not wait for each other */
        find_periods(current + (size_t)n * H, k, H, T);
        memset(sum, 0, sizeof(float) * (T + 2) * P);
        if (P == LANES) {
            float lanes[4][T + 2][LANES];
            memset(lanes, 0, sizeof(lanes));
            for (int h = 0; h < H; h++) {
                float *to = lanes[h & 3][k[h]];
                const float *from = wt + (size_t)h * LANES;
                SIMD
                for (int o = 0; o < LANES; o++) to[o] += from[o];
            }
            for (int j = 1; j <= T; j++)
                for (int o = 0; o < LANES; o++)
                    sum[j * P + o] = (lanes[0][j][o] + lanes[1][j][o]) + (lanes[2][j][o] + lanes[3][j][o]);
        } else {
            for (int h = 0; h < H; h++) {
                SIMD
                for (int o = 0; o < P; o++) sum[k[h] * P + o] += wt[(size_t)h * P + o];
            }
        }
        for (int t = 1; t <= T; t++) {
            memset(partial, 0, sizeof(float) * P);
            for (int j = 1; j <= t; j++)
                if (t % j == 0)
                    for (int o = 0; o < O; o++) partial[0][o] += sum[j * P + o];
            memcpy(out + ((size_t)(t - 1) * N + n) * O, partial[0], sizeof(float) * O);
        }
    }
    if (spikes) {
        THREADED
        for (int h = 0; h < H; h++) {
            int64_t count = 0;
            for (int n = 0; n < N; n++) count += T / period[(size_t)n * H + h];
            spikes[h] += count;
        }
    }
}

/* Adds to total what some steps contribute to the gradients of m currents x; v and trace, dh/dx, go on with the
 * steps. grad has the outputs' gradients, a row per step. With constant m and steps all of it stays in registers. */
static inline __attribute__((always_inline)) void constant_lif_gradient(const float *grad, const float *w,
                                                                        const float *x, float *v, float *trace,
                                                                        float *total, int m, int steps, size_t row,
                                                                        int H, int O) {
    const float pi = 3.14159265358979f;
    float g[STEPS][LANES] = {{0}}; /* the gradients of the spikes */
    for (int o = 0; o < O; o++) {
        const float *weights = w + (size_t)o * H;
        _Pragma("GCC unroll 8")
        for (int t = 0; t < steps; t++) {
            float factor = grad[t * row + o];
            SIMD
            for (int i = 0; i < m; i++) g[t][i] += factor * weights[i];
        }
    }
    _Pragma("GCC unroll 8")
    for (int t = 0; t < steps; t++) {
        SIMD
        for (int i = 0; i < m; i++) {
            float h = v[i] + (x[i] - v[i]) * 0.5f;
            float slope = 0.5f + 0.5f * trace[i];
            float u = pi * (h - 1.0f);
            total[i] += g[t][i] * slope / (1.0f + u * u);
            v[i] = h >= 1.0f ? 0.0f : h;
            trace[i] = h >= 1.0f ? 0.0f : slope;
        }
    }
}

/* The gradients of current [N][H] and w [O][H] from that of out, grad [T][N][O].
 * sums [N][T + 2][P] and gwt [H][P] are scratch. */
void constant_lif_linear_backward(const float *grad, const float *current, const uint8_t *period, const float *w,
                                  float *sums, float *gwt, float *grad_current, float *grad_w, int N, int H, int O,
                                  int P, int T) {
    THREADED
    for (int n = 0; n < N; n++) {
        /* what each neuron of period j passes to its weights: the gradients at its spikes' steps */
        float *sum = sums + (size_t)n * (T + 2) * P;
        memset(sum, 0, sizeof(float) * (T + 2) * P);
        for (int j = 1; j <= T; j++)
            for (int t = j; t <= T; t += j)
                for (int o = 0; o < O; o++) sum[j * P + o] += grad[((size_t)(t - 1) * N + n) * O + o];
        for (int start = 0; start < H; start += LANES) {
            int m = smaller(LANES, H - start);
            float x[LANES] = {0}, v[LANES] = {0}, trace[LANES] = {0}, total[LANES] = {0};
            memcpy(x, current + (size_t)n * H + start, sizeof(float) * m);
            for (int first = 0; first < T; first += STEPS) {
                const float *rows = grad + ((size_t)first * N + n) * O;
                if (m == LANES && T - first >= STEPS)
                    constant_lif_gradient(rows, w + start, x, v, trace, total, LANES, STEPS, (size_t)N * O, H, O);
                else
                    constant_lif_gradient(rows, w + start, x, v, trace, total, m, smaller(STEPS, T - first),
                                          (size_t)N * O, H, O);
            }
            memcpy(grad_current + (size_t)n * H + start, total, sizeof(float) * m);
        }
    }
    THREADED
    for (int start = 0; start < H; start += BLOCK) {
        int m = smaller(BLOCK, H - start);
        memset(gwt + (size_t)start * P, 0, sizeof(float) * m * P);
        for (int n = 0; n < N; n++) {
            const float *sum = sums + (size_t)n * (T + 2) * P;
            const uint8_t *k = period + (size_t)n * H + start;
            if (P == LANES) {
                for (int i = 0; i < m; i++) {
                    float *to = gwt + (size_t)(start + i) * LANES;
                    const float *from = sum + k[i] * LANES;
                    SIMD
                    for (int o = 0; o < LANES; o++) to[o] += from[o];
                }
            } else {
                for (int i = 0; i < m; i++) {
                    SIMD
                    for (int o = 0; o < P; o++) gwt[(size_t)(start + i) * P + o] += sum[k[i] * P + o];
                }
            }
        }
        for (int o = 0; o < O; o++)
            for (int i = 0; i < m; i++) grad_w[(size_t)o * H + start + i] = gwt[(size_t)(start + i) * P + o];
    }
}

/* Spike counts [M] of M neurons with input x [T][M]. */
void lif_count_forward(const float *x, float *counts, int64_t M, int T) {
    THREADED
    for (int64_t start = 0; start < M; start += BLOCK) {
        int m = (int)(M - start < BLOCK ? M - start : BLOCK);
        float v[BLOCK], count[BLOCK];
        for (int i = 0; i < BLOCK; i++) v[i] = count[i] = 0.0f;
        for (int t = 0; t < T; t++) {
            const float *row = x + t * M + start;
            SIMD
            for (int i = 0; i < m; i++) {
                float h = v[i] + (row[i] - v[i]) * 0.5f;
                count[i] += h >= 1.0f ? 1.0f : 0.0f;
                v[i] = h >= 1.0f ? 0.0f : h;
            }
        }
        memcpy(counts + start, count, sizeof(float) * m);
    }
}

/* The gradient of x [T][M] from that of the counts, grad [M]. */
void lif_count_backward(const float *grad, const float *x, float *grad_x, int64_t M, int T) {
    const float pi = 3.14159265358979f;
    THREADED
    for (int64_t start = 0; start < M; start += BLOCK) {
        int m = (int)(M - start < BLOCK ? M - start : BLOCK);
        float v[BLOCK], g[BLOCK], h[T][BLOCK];
        for (int i = 0; i < BLOCK; i++) v[i] = g[i] = 0.0f;
        for (int t = 0; t < T; t++) {
            const float *row = x + t * M + start;
            SIMD
            for (int i = 0; i < m; i++) {
                h[t][i] = v[i] + (row[i] - v[i]) * 0.5f;
                v[i] = h[t][i] >= 1.0f ? 0.0f : h[t][i];
            }
        }
        for (int t = T - 1; t >= 0; t--) {
            float *row = grad_x + t * M + start;
            SIMD
            for (int i = 0; i < m; i++) {
                float u = pi * (h[t][i] - 1.0f);
                float gh = grad[start + i] / (1.0f + u * u) + (h[t][i] >= 1.0f ? 0.0f : g[i]);
                row[i] = g[i] = 0.5f * gh; /* half to the input, half to the potential before */
            }
        }
    }
}

/* Picks of images [D][height][width] (uint8) those of index [N] (int64), moves each by its matrix [N][6] (int32, 16.16
 * fixed-point inverse map, as training.data.RandomAffine.inverse gives it; fill 0), and looks its pixels up in
 * table [256]; out [N][height][width]. Returns 1, having done nothing, if an index is not one of an image, else 0. */
int affine_lookup(const uint8_t *images, const int64_t *index, const int32_t *matrices, const float *table, float *out,
                  int64_t D, int N, int height, int width) {
    for (int n = 0; n < N; n++)
        if (index[n] < 0 || index[n] >= D) return 1;
    THREADED
    for (int n = 0; n < N; n++) {
        const uint8_t *image = images + index[n] * height * width;
        const int32_t *m = matrices + n * 6;
        float *to = out + (size_t)n * height * width;
        for (int y = 0; y < height; y++) {
            SIMD
            for (int x = 0; x < width; x++) {
                int32_t column = (m[0] * x + m[1] * y + m[2]) >> 16;
                int32_t row = (m[3] * x + m[4] * y + m[5]) >> 16;
                int inside = (column >= 0) & (column < width) & (row >= 0) & (row < height);
                int32_t at = inside ? row * width + column : 0;
                to[y * width + x] = table[inside ? image[at] : 0];
            }
        }
    }
    return 0;
}

/* What one step of Grad Rewiring needs beside its tensors; scale is 1 / sqrt(1 - beta2^t), prior is alpha * eta or 0. */
typedef struct {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, scale, eps, eta, weight_decay, direction, prior, mu;
} Step;

/* One weight: see gradrewire.GradRewiring, whose symbols these are. x is v, or its running maximum. */
static inline void grad_rewiring_one(float *w, float g, float *m, float *v, float *x, float s, float *theta, Step p) {
    g = p.direction * g + (p.weight_decay != 0.0f ? p.weight_decay * *w : 0.0f);
    *m = *m * p.beta1 + g * p.one_minus_beta1;
    *v = *v * p.beta2 + g * g * p.one_minus_beta2;
    *x = *x > *v ? *x : *v;
    float above = *theta - p.mu;
    float push = above > 0.0f ? p.prior : above < 0.0f ? -p.prior : 0.0f;
    float t = (*theta * s - *m * p.eta / (sqrtf(*x) * p.scale + p.eps) - push * s) * s;
    *theta = t;
    *w = (t < 0.0f ? 0.0f : t) * s; /* NaN stays NaN */
}

#ifdef __AVX512F__
/* The same for sixteen weights, without weight decay and running maximum. w is written, not read: past the cache
 * (stream), that costs half the memory traffic. */
static inline void grad_rewiring_sixteen(float *w, const float *g, float *m, float *v, const int8_t *sign, float *theta,
                                         Step p, int stream) {
    const __m512 zero = _mm512_setzero_ps(), prior = _mm512_set1_ps(p.prior);
    __m512 G = _mm512_mul_ps(_mm512_loadu_ps(g), _mm512_set1_ps(p.direction));
    __m512 M = _mm512_mul_ps(G, _mm512_set1_ps(p.one_minus_beta1));
    __m512 V = _mm512_mul_ps(_mm512_mul_ps(G, G), _mm512_set1_ps(p.one_minus_beta2));
    M = _mm512_fmadd_ps(_mm512_loadu_ps(m), _mm512_set1_ps(p.beta1), M);
    V = _mm512_fmadd_ps(_mm512_loadu_ps(v), _mm512_set1_ps(p.beta2), V);
    _mm512_storeu_ps(m, M);
    _mm512_storeu_ps(v, V);
    __m512 denominator = _mm512_fmadd_ps(_mm512_sqrt_ps(V), _mm512_set1_ps(p.scale), _mm512_set1_ps(p.eps));
    __m512 change = _mm512_div_ps(_mm512_mul_ps(M, _mm512_set1_ps(p.eta)), denominator);
    __m512 S = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)sign)));
    __m512 T = _mm512_loadu_ps(theta);
    __m512 above = _mm512_sub_ps(T, _mm512_set1_ps(p.mu));
    __m512 push = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(above, zero, _CMP_GT_OQ), prior);
    push = _mm512_mask_sub_ps(push, _mm512_cmp_ps_mask(above, zero, _CMP_LT_OQ), zero, prior);
    __m512 h = _mm512_sub_ps(_mm512_sub_ps(_mm512_mul_ps(T, S), change), _mm512_mul_ps(push, S));
    T = _mm512_mul_ps(h, S);
    _mm512_storeu_ps(theta, T);
    __m512 W = _mm512_mul_ps(_mm512_max_ps(zero, T), S); /* max returns its second operand if one is NaN */
    if (stream)
        _mm512_stream_ps(w, W);
    else
        _mm512_storeu_ps(w, W);
}
#endif

/* One step of Grad Rewiring on n weights; max_v is null without amsgrad. */
void grad_rewiring_step(float *w, const float *grad, float *m, float *v, float *max_v, const int8_t *sign, float *theta,
                        int64_t n, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2,
                        float correction, float eps, float eta, float weight_decay, float direction, float prior,
                        float mu) {
    const Step p = {beta1, one_minus_beta1, beta2,     one_minus_beta2, 1.0f / correction, eps,
                    eta,   weight_decay,    direction, prior,           mu};
    int64_t done = 0;
#ifdef __AVX512F__
    if (!max_v && weight_decay == 0.0f) {
        const int stream = n >= (1 << 22) && ((uintptr_t)w & 63) == 0;
        done = n / 16 * 16;
        THREADED
        for (int64_t i = 0; i < done; i += 16)
            grad_rewiring_sixteen(w + i, grad + i, m + i, v + i, sign + i, theta + i, p, stream);
        _mm_sfence();
    }
#endif
    float *x = max_v ? max_v : v;
    _Pragma("omp parallel for simd schedule(static)")
    for (int64_t i = done; i < n; i++)
        grad_rewiring_one(w + i, grad[i], m + i, v + i, x + i, (float)sign[i], theta + i, p);
}
