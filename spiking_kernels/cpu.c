/* Fused CPU kernels; build.py compiles them, __init__.py calls them.
 *
 * All arrays are contiguous float32 unless said otherwise. The neuron is the paper's: h = v + (x - v) / 2,
 * a spike where h >= 1, then v = 0, else v = h; the surrogate derivative of a spike is 1 / (1 + (pi (h - 1))^2),
 * and no gradient flows through the reset.
 *
 * What makes them fast is that the first layer's current is constant over time. A reset is to exactly 0, so a
 * neuron fires with a period: first at step k, then at 2k, 3k, ... (k is found by the same arithmetic, step by
 * step). The next layer's input at step t is then the sum over the k that divide t of the weights from the
 * neurons of period k: each neuron's weights are added once, not at each of its spikes.
 *
 * The reset of the layers that they replace is v = (1 - spike) h: where h is infinite, v is NaN and the neuron spikes
 * no more. So it is here: h - h is 0, or NaN.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 64 /* neurons at a time: their state stays in the first-level cache */
#define LANES 16 /* outputs are padded to a multiple of it */
#define STEPS 8  /* time steps at a time */
#define SHORT 254 /* up to so many steps, sums by period fit the stack, and the cache */
#define THREADED _Pragma("omp parallel for schedule(static)")
#define SIMD _Pragma("omp simd")

static inline int smaller(int a, int b) { return a < b ? a : b; }

/* w [O][H] to wt [H][P], padded with 0 */
static void transpose(const float *w, float *wt, int H, int O, int P) {
    THREADED
    for (int h = 0; h < H; h++)
        for (int o = 0; o < P; o++) wt[(size_t)h * P + o] = o < O ? w[(size_t)o * H + h] : 0.0f;
}

/* Periods of H neurons with constant currents: the step of the first spike; T + 1 where there is none; 0 where the
 * current is infinite, for a spike at step 1 alone. */
static void find_periods(const float *current, uint16_t *period, int H, int T) {
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
        for (int i = 0; i < n; i++) period[start + i] = x[i] > FLT_MAX ? 0 : (uint16_t)k[i];
    }
}

/* Spikes of N x H neurons with constant currents, through weights [O][H], for T steps (at most 65534).
 * wt [H][P] and sums [N][T + 2][P] are scratch; period [N][H] (uint16) is kept for the backward pass;
 * out [T][N][O]; spikes [H] (int64), unless null, is increased by each neuron's spikes. */
void constant_lif_linear_forward(const float *current, const float *w, float *wt, float *sums, uint16_t *period,
                                 float *out, int64_t *spikes, int N, int H, int O, int P, int T) {
    transpose(w, wt, H, O, P);
    THREADED
    for (int n = 0; n < N; n++) {
        uint16_t *k = period + (size_t)n * H;
        float *sum = sums + (size_t)n * (T + 2) * P;
        find_periods(current + (size_t)n * H, k, H, T);
        memset(sum, 0, sizeof(float) * (T + 2) * P);
        if (P == LANES && T <= SHORT) {
            float lanes[4][T + 2][LANES]; /* so that additions need not wait for each other */
            memset(lanes, 0, sizeof(lanes));
            for (int h = 0; h < H; h++) {
                float *to = lanes[h & 3][k[h]];
                const float *from = wt + (size_t)h * LANES;
                SIMD
                for (int o = 0; o < LANES; o++) to[o] += from[o];
            }
            for (int j = 0; j <= T; j++)
                for (int o = 0; o < LANES; o++)
                    sum[j * LANES + o] = (lanes[0][j][o] + lanes[1][j][o]) + (lanes[2][j][o] + lanes[3][j][o]);
        } else {
            for (int h = 0; h < H; h++) {
                float *to = sum + (size_t)k[h] * P;
                SIMD
                for (int o = 0; o < P; o++) to[o] += wt[(size_t)h * P + o];
            }
        }
        memcpy(out + (size_t)n * O, sum, sizeof(float) * O); /* period 0 */
        for (int t = 2; t <= T; t++) memset(out + ((size_t)(t - 1) * N + n) * O, 0, sizeof(float) * O);
        for (int j = 1; j <= T; j++)
            for (int t = j; t <= T; t += j) {
                float *to = out + ((size_t)(t - 1) * N + n) * O;
                for (int o = 0; o < O; o++) to[o] += sum[(size_t)j * P + o];
            }
    }
    if (spikes) {
        THREADED
        for (int h = 0; h < H; h++) {
            int64_t count = 0;
            for (int n = 0; n < N; n++) {
                int k = period[(size_t)n * H + h];
                count += k ? T / k : 1;
            }
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
            v[i] = h >= 1.0f ? 0.0f : h; /* an infinite h is seen to below */
            trace[i] = h >= 1.0f ? 0.0f : slope;
        }
    }
}

/* The gradients of current [N][H] and w [O][H] from that of out, grad [T][N][O].
 * sums [N][T + 2][P] and gwt [H][P] are scratch. */
void constant_lif_linear_backward(const float *grad, const float *current, const uint16_t *period, const float *w,
                                  float *sums, float *gwt, float *grad_current, float *grad_w, int N, int H, int O,
                                  int P, int T) {
    THREADED
    for (int n = 0; n < N; n++) {
        /* what each neuron of period j passes to its weights: the gradients at its spikes' steps */
        float *sum = sums + (size_t)n * (T + 2) * P;
        memset(sum, 0, sizeof(float) * (T + 2) * P);
        memcpy(sum, grad + (size_t)n * O, sizeof(float) * O); /* period 0 */
        for (int j = 1; j <= T; j++)
            for (int t = j; t <= T; t += j)
                for (int o = 0; o < O; o++) sum[(size_t)j * P + o] += grad[((size_t)(t - 1) * N + n) * O + o];
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
            for (int i = 0; i < m; i++) /* after the spike of an infinite h, v is NaN, and so is what depends on it */
                if (x[i] > FLT_MAX && T > 1) total[i] = NAN;
            memcpy(grad_current + (size_t)n * H + start, total, sizeof(float) * m);
        }
    }
    THREADED
    for (int start = 0; start < H; start += BLOCK) {
        int m = smaller(BLOCK, H - start);
        memset(gwt + (size_t)start * P, 0, sizeof(float) * m * P);
        for (int n = 0; n < N; n++) {
            const float *sum = sums + (size_t)n * (T + 2) * P;
            const uint16_t *k = period + (size_t)n * H + start;
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
                    for (int o = 0; o < P; o++) gwt[(size_t)(start + i) * P + o] += sum[(size_t)k[i] * P + o];
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
                v[i] = h >= 1.0f ? h - h : h;
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
        float v[BLOCK], g[BLOCK];
        for (int i = 0; i < BLOCK; i++) v[i] = g[i] = 0.0f;
        for (int t = 0; t < T; t++) {
            const float *row = x + t * M + start;
            float *h = grad_x + t * M + start; /* kept where the gradient comes to stand */
            SIMD
            for (int i = 0; i < m; i++) {
                h[i] = v[i] + (row[i] - v[i]) * 0.5f;
                v[i] = h[i] >= 1.0f ? h[i] - h[i] : h[i];
            }
        }
        for (int t = T - 1; t >= 0; t--) {
            float *row = grad_x + t * M + start;
            SIMD
            for (int i = 0; i < m; i++) {
                float h = row[i], u = pi * (h - 1.0f);
                float gh = grad[start + i] / (1.0f + u * u) + (h >= 1.0f ? 0.0f : g[i]);
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
    if (height == 0 || width == 0) return 0; /* images and out are null */
    THREADED
    for (int n = 0; n < N; n++) {
        const uint8_t *image = images + index[n] * height * width;
        const int32_t *m = matrices + (size_t)n * 6;
        float *to = out + (size_t)n * height * width;
        for (int y = 0; y < height; y++) {
            SIMD
            for (int x = 0; x < width; x++) {
                /* unsigned, as what does not fit wraps round in the plain path, too */
                int32_t column = (int32_t)(m[0] * (uint32_t)x + m[1] * (uint32_t)y + m[2]) >> 16;
                int32_t row = (int32_t)(m[3] * (uint32_t)x + m[4] * (uint32_t)y + m[5]) >> 16;
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

/* Random numbers for Deep R, from a counter-based generator: each is a function of the step's seed and of its place,
 * whatever the number of threads. Weights are taken in groups; each has a sequence of as many normal numbers, made BATCH
 * at a time, of which hard Deep R, where only active connections feel noise, makes no more than it needs. */
#define GROUP 512
#define CHUNK 4096 /* weights from which a sequence of uniform numbers chooses */
#define BATCH (4 * LANES)
enum { NORMAL, UNIFORM };

/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) of LANES
 * consecutive counters in one of the seed's streams. */
#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u
#define PHILOX_W1 0xBB67AE85u
#ifdef __AVX512F__
/* One round for eight counters, each word in the lower half of 64 bits; the upper halves hold what nobody reads. */
static inline __attribute__((always_inline)) void philox_round(__m512i c[4], __m512i k0, __m512i k1) {
    const __m512i a = _mm512_mul_epu32(c[0], _mm512_set1_epi64(PHILOX_M0));
    const __m512i b = _mm512_mul_epu32(c[2], _mm512_set1_epi64(PHILOX_M1));
    c[0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c[1], k0, 0x96); /* exclusive or of the three */
    c[2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c[3], k1, 0x96);
    c[1] = b;
    c[3] = a;
}

static inline __attribute__((always_inline)) void philox(uint64_t seed, int64_t first, uint32_t stream,
                                                         uint32_t x[4][LANES]) {
    __m512i even[4], odd[4];
    even[0] = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14));
    odd[0] = _mm512_add_epi64(even[0], _mm512_set1_epi64(1));
    even[1] = _mm512_srli_epi64(even[0], 32);
    odd[1] = _mm512_srli_epi64(odd[0], 32);
    even[2] = odd[2] = _mm512_set1_epi64(stream);
    even[3] = odd[3] = _mm512_setzero_si512();
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    _Pragma("GCC unroll 10")
    for (int round = 0; round < 10; round++) {
        philox_round(even, _mm512_set1_epi64(k0), _mm512_set1_epi64(k1));
        philox_round(odd, _mm512_set1_epi64(k0), _mm512_set1_epi64(k1));
        k0 += PHILOX_W0, k1 += PHILOX_W1;
    }
    for (int word = 0; word < 4; word++)
        _mm512_storeu_si512(x[word], _mm512_mask_blend_epi32(0xAAAA, even[word], _mm512_slli_epi64(odd[word], 32)));
}
#else
static inline __attribute__((always_inline)) void philox(uint64_t seed, int64_t first, uint32_t stream,
                                                         uint32_t x[4][LANES]) {
    SIMD
    for (int i = 0; i < LANES; i++) {
        const uint64_t counter = (uint64_t)first + (uint64_t)i;
        uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = stream, c3 = 0;
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        _Pragma("GCC unroll 10")
        for (int round = 0; round < 10; round++) {
            const uint64_t a = (uint64_t)PHILOX_M0 * c0, b = (uint64_t)PHILOX_M1 * c2;
            c0 = (uint32_t)(b >> 32) ^ c1 ^ k0, c1 = (uint32_t)b;
            c2 = (uint32_t)(a >> 32) ^ c3 ^ k1, c3 = (uint32_t)a;
            k0 += PHILOX_W0, k1 += PHILOX_W1;
        }
        x[0][i] = c0, x[1][i] = c1, x[2][i] = c2, x[3][i] = c3;
    }
}
#endif

static inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

/* Two independent normal numbers, times scale, from two random words (Box and Muller 1958): in float32, up to 6.66
 * standard deviations. The polynomials are minimax fits, with errors below half a unit in the last place of float32. */
static inline __attribute__((always_inline)) void box_muller(uint32_t x, uint32_t y, float scale, float *first,
                                                             float *second) {
    /* ln u of u in (0, 1]: u = 2^e (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1) */
    const float u = fmaf((float)(int32_t)(x >> 1), 0x1p-31f, 0x1p-32f);
    const uint32_t shifted = as_bits(u) + (0x3F800000u - 0x3F3504F3u);
    const float e = (float)((int32_t)(shifted >> 23) - 127);
    const float f = as_float((shifted & 0x7FFFFFu) + 0x3F3504F3u) - 1.0f;
    float p = fmaf(0.0897953063f, f, -0.1442688555f);
    p = fmaf(p, f, 0.1488368511f);
    p = fmaf(p, f, -0.1655178666f);
    p = fmaf(p, f, 0.1996347755f);
    p = fmaf(p, f, -0.2500258386f);
    p = fmaf(p, f, 0.3333393335f);
    p = fmaf(p, f, -0.4999998212f);
    const float radius = sqrtf(-2.0f * fmaf(e, 0.6931471806f, fmaf(f * f, p, f)));
    /* the angle, of which y is the fraction of a turn: its nearest multiple of pi / 2, and t in [-1, 1] times pi / 4 */
    const uint32_t quarter = (y + 0x20000000u) >> 30;
    const float t = (float)(int32_t)(y - (quarter << 30)) * 0x1p-29f, t2 = t * t;
    float s = fmaf(-3.595450834e-5f, t2, 2.490007086e-3f);
    s = t * fmaf(fmaf(s, t2, -0.08074543625f), t2, 0.7853981853f);
    float c = fmaf(-3.188805130e-4f, t2, 0.01584991440f);
    c = fmaf(fmaf(c, t2, -0.3084242642f), t2, 1.0f);
    const uint32_t cosine = as_bits(quarter & 1 ? s : c) ^ (((quarter + 1) & 2) << 30);
    const uint32_t sine = as_bits(quarter & 1 ? c : s) ^ ((quarter & 2) << 30);
    *first = radius * as_float(cosine) * scale;
    *second = radius * as_float(sine) * scale;
}

/* The first normal numbers of a group, at least as many as asked for, times scale. Never inlined: the product with
 * scale is rounded by itself, as torch does. */
static __attribute__((noinline)) void normals(uint64_t seed, int64_t group, int count, float scale, float *out) {
    uint32_t x[GROUP / BATCH][4][LANES];
    const int batches = (count + BATCH - 1) / BATCH;
    for (int i = 0; i < batches; i++) philox(seed, (group * GROUP + i * BATCH) / 4, NORMAL, x[i]);
    for (int pair = 0; pair < 2 * batches; pair++) {
        const uint32_t *a = x[pair / 2][pair % 2 * 2], *b = x[pair / 2][pair % 2 * 2 + 1];
        float *to = out + pair * 2 * LANES;
        SIMD
        for (int i = 0; i < LANES; i++) box_muller(a[i], b[i], scale, to + i, to + LANES + i);
    }
}

/* Chooses each of n weights, at most CHUNK, with a probability, independently: what lies between two chosen ones has a
 * geometric distribution (by inversion: Devroye, "Non-Uniform Random Variate Generation", 1986), so that only the chosen
 * ones cost a random number. Returns how many there are, and their places. */
static int choose(uint64_t seed, int64_t chunk, int n, double probability, uint16_t places[CHUNK]) {
    uint32_t x[4][LANES];
    const double scale = 1.0 / log1p(-probability); /* -0 where the probability is 1: no gaps */
    double place = -1.0;
    for (int count = 0;; count++) {
        if (count % BATCH == 0) philox(seed, chunk * CHUNK + count, UNIFORM, x);
        const double u = ((double)x[count % BATCH / LANES][count % LANES] + 0.5) * 0x1p-32;
        place += 1.0 + floor(log(u) * scale);
        if (!(place < n)) return count;
        places[count] = (uint16_t)place;
    }
}

/* What the steps of Deep R below draw for n weights: the normal numbers of each group, in sequence, and which weights
 * are chosen with a probability. */
void deep_rewiring_draws(float *normal, uint8_t *chosen, int64_t n, uint64_t seed, double probability) {
    for (int64_t start = 0; start < n; start += GROUP) {
        float z[GROUP];
        normals(seed, start / GROUP, GROUP, 1.0f, z);
        memcpy(normal + start, z, sizeof(float) * (n - start < GROUP ? n - start : GROUP));
    }
    for (int64_t start = 0; start < n; start += CHUNK) {
        uint16_t places[CHUNK];
        const int size = (int)(n - start < CHUNK ? n - start : CHUNK);
        const int count = choose(seed, start / CHUNK, size, probability, places);
        memset(chosen + start, 0, size);
        for (int i = 0; i < count; i++) chosen[start + places[i]] = 1;
    }
}

/* What one step of Deep R needs beside its tensors: penalty is l1 * eta, temperature T * sqrt(eta) or 0, bound the least
 * theta. */
typedef struct {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, correction, eps, eta, weight_decay, direction, penalty,
        temperature, bound;
} DeepStep;

#ifdef __AVX512F__
/* Sixteen weights of Deep R, without weight decay and running maximum; for the rest see deep_rewiring_group. */
static inline __attribute__((always_inline)) void deep_rewiring_sixteen(float *w, const float *g, float *m, float *v,
                                                                        const int8_t *sign, float *theta,
                                                                        const float *noise, DeepStep p,
                                                                        int32_t counts[2]) {
    const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
    const __m512 S = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)sign)));
    const __m512 W = _mm512_loadu_ps(w), G = _mm512_mul_ps(_mm512_loadu_ps(g), _mm512_set1_ps(p.direction));
    __m512 M = _mm512_mul_ps(_mm512_loadu_ps(m), _mm512_set1_ps(p.beta1));
    __m512 V = _mm512_mul_ps(_mm512_loadu_ps(v), _mm512_set1_ps(p.beta2));
    M = _mm512_fmadd_ps(G, _mm512_set1_ps(p.one_minus_beta1), M);
    V = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(p.one_minus_beta2), G), G, V);
    _mm512_storeu_ps(m, M);
    _mm512_storeu_ps(v, V);
    __m512 change = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(V), _mm512_set1_ps(p.correction)), _mm512_set1_ps(p.eps));
    change = _mm512_div_ps(_mm512_mul_ps(M, _mm512_set1_ps(p.eta)), change);
    const __mmask16 active = _mm512_cmp_ps_mask(W, zero, _CMP_NEQ_UQ);
    const __m512 ones = _mm512_maskz_mov_ps(active, one); /* products with it are exact, and hide no NaN */
    __m512 h = theta ? _mm512_mul_ps(_mm512_loadu_ps(theta), S) : W;
    h = _mm512_sub_ps(h, _mm512_mul_ps(change, ones));
    h = _mm512_sub_ps(h, _mm512_mul_ps(_mm512_mul_ps(S, _mm512_set1_ps(p.penalty)), ones));
    h = _mm512_add_ps(h, _mm512_loadu_ps(noise));
    const __m512 T = _mm512_mul_ps(h, S);
    if (theta) {
        const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(p.bound), T); /* the second operand if one is NaN */
        _mm512_storeu_ps(theta, bounded);
        _mm512_storeu_ps(w, _mm512_mul_ps(_mm512_max_ps(zero, bounded), S));
        return;
    }
    const __mmask16 kept = _mm512_mask_cmp_ps_mask(active, T, zero, _CMP_GT_OQ);
    h = _mm512_mul_ps(h, _mm512_maskz_mov_ps(kept, one));
    _mm512_storeu_ps(w, h);
    const __mmask16 dormant = _mm512_cmp_ps_mask(h, zero, _CMP_EQ_OQ);
    counts[0] += __builtin_popcount(dormant);
    counts[1] += __builtin_popcount(_mm512_mask_cmp_ps_mask(dormant, S, zero, _CMP_NEQ_OQ));
}
#endif

/* Up to GROUP weights of Deep R, soft where theta is not null; each operation rounds as that of
 * deeprewire.DeepRewiring does, whose symbols these are, so that the weights are bitwise the same. max_v is null without
 * amsgrad. Adds to counts the dormant connections and those of them that have a sign. */
static inline __attribute__((always_inline)) void deep_rewiring_group(float *w, const float *grad, float *m, float *v,
                                                                      float *max_v, const int8_t *sign, float *theta,
                                                                      const float *noise, int n, DeepStep p,
                                                                      int32_t counts[2]) {
    int done = 0;
#ifdef __AVX512F__
    if (!max_v && p.weight_decay == 0.0f)
        for (; done + 16 <= n; done += 16)
            deep_rewiring_sixteen(w + done, grad + done, m + done, v + done, sign + done, theta ? theta + done : 0,
                                  noise + done, p, counts);
#endif
    float signs[GROUP]; /* apart, so that the loops below take as many weights at a time as fit a vector of floats */
    SIMD
    for (int i = done; i < n; i++) signs[i] = (float)sign[i];
    SIMD
    for (int i = done; i < n; i++) {
        const float s = signs[i], active = w[i] != 0.0f ? 1.0f : 0.0f;
        float g = p.direction * grad[i];
        g = p.weight_decay != 0.0f ? fmaf(w[i], p.weight_decay, g) : g;
        m[i] = fmaf(g, p.one_minus_beta1, m[i] * p.beta1);
        v[i] = fmaf(p.one_minus_beta2 * g, g, v[i] * p.beta2);
        float x = v[i];
        if (max_v) max_v[i] = x = max_v[i] > x ? max_v[i] : x;
        const float change = active * (m[i] * p.eta / (sqrtf(x) / p.correction + p.eps));
        if (theta) {
            const float h = theta[i] * s - change - active * (s * p.penalty) + noise[i];
            const float t = h * s < p.bound ? p.bound : h * s;
            theta[i] = t;
            w[i] = (t < 0.0f ? 0.0f : t) * s; /* NaN stays NaN, as in torch */
        } else {
            float h = w[i] - change - active * (s * p.penalty) + noise[i];
            h *= (active != 0.0f && h * s > 0.0f) ? 1.0f : 0.0f; /* and here */
            w[i] = h;
        }
    }
    if (theta) return;
    int32_t dormant = 0, candidates = 0;
    _Pragma("omp simd reduction(+ : dormant, candidates)")
    for (int i = done; i < n; i++) {
        dormant += w[i] == 0.0f;
        candidates += (w[i] == 0.0f) & (signs[i] != 0.0f);
    }
    counts[0] += dormant;
    counts[1] += candidates;
}

/* Noise for the active ones of up to GROUP weights, the group's numbers in turn; 0 for the others. */
static void noise_of_the_active(const float *w, int n, uint64_t seed, int64_t group, float scale, float *noise) {
    float z[GROUP];
    int active = 0;
    _Pragma("omp simd reduction(+ : active)")
    for (int i = 0; i < n; i++) active += w[i] != 0.0f;
    normals(seed, group, active, scale, z);
    int taken = 0, i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16) {
        const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_loadu_ps(w + i), _mm512_setzero_ps(), _CMP_NEQ_UQ);
        _mm512_storeu_ps(noise + i, _mm512_maskz_expandloadu_ps(mask, z + taken));
        taken += __builtin_popcount(mask);
    }
#endif
    for (; i < n; i++) {
        noise[i] = w[i] != 0.0f ? z[taken] : 0.0f;
        taken += w[i] != 0.0f;
    }
}

/* Re-activates each dormant connection at s * eps with a probability. */
static void reactivate(float *w, const int8_t *sign, int64_t n, uint64_t seed, double probability, float eps) {
    THREADED
    for (int64_t start = 0; start < n; start += CHUNK) {
        uint16_t places[CHUNK];
        const int size = (int)(n - start < CHUNK ? n - start : CHUNK);
        const int count = choose(seed, start / CHUNK, size, probability, places);
        for (int i = 0; i < count; i++) {
            float *x = w + start + places[i];
            if (*x == 0.0f) *x = (float)sign[start + places[i]] * eps;
        }
    }
}

/* One step of Deep R on n weights, soft where theta is not null; max_v is null without amsgrad. Afterwards at most max_s
 * of the weights are dormant, in expectation; soft Deep R ignores max_s. */
void deep_rewiring_step(float *w, const float *grad, float *m, float *v, float *max_v, const int8_t *sign, float *theta,
                        int64_t n, uint64_t seed, double max_s, float beta1, float one_minus_beta1, float beta2,
                        float one_minus_beta2, float correction, float eps, float eta, float weight_decay,
                        float direction, float penalty, float temperature, float bound) {
    const DeepStep p = {beta1, one_minus_beta1, beta2,     one_minus_beta2, correction,  eps,
                        eta,   weight_decay,    direction, penalty,         temperature, bound};
    static const float zeros[GROUP];
    int64_t dormant = 0, candidates = 0;
    _Pragma("omp parallel for schedule(static) reduction(+ : dormant, candidates)")
    for (int64_t start = 0; start < n; start += GROUP) {
        const int size = (int)(n - start < GROUP ? n - start : GROUP);
        float drawn[GROUP];
        const float *noise = temperature != 0.0f ? drawn : zeros;
        int32_t counts[2] = {0, 0};
        if (temperature != 0.0f) {
            if (theta)
                normals(seed, start / GROUP, size, temperature, drawn);
            else
                noise_of_the_active(w + start, size, seed, start / GROUP, temperature, drawn);
        }
        /* with theta and max_v known to be null or not: a loop of its own for each case */
        float *W = w + start, *M = m + start, *V = v + start;
        const float *G = grad + start;
        const int8_t *S = sign + start;
        if (theta && max_v)
            deep_rewiring_group(W, G, M, V, max_v + start, S, theta + start, noise, size, p, counts);
        else if (theta)
            deep_rewiring_group(W, G, M, V, 0, S, theta + start, noise, size, p, counts);
        else if (max_v)
            deep_rewiring_group(W, G, M, V, max_v + start, S, 0, noise, size, p, counts);
        else
            deep_rewiring_group(W, G, M, V, 0, S, 0, noise, size, p, counts);
        dormant += counts[0];
        candidates += counts[1];
    }
    if (theta || max_s >= 1.0 || !candidates) return;
    const double probability = ((double)dormant - max_s * (double)n) / (double)candidates;
    if (probability > 0.0) reactivate(w, sign, n, seed, probability < 1.0 ? probability : 1.0, eps);
}
