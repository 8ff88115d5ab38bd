/* LIF neurons with constant currents, a linear layer, and LIF neurons of which only the number of spikes matters.
 *
 * The neuron is the paper's: h = v + (x - v) / 2, a spike where h >= 1, then v = 0, else v = h. The surrogate derivative
 * of a spike is 1 / (1 + (pi (h - 1))^2). No gradient flows through the reset.
 *
 * The first layer's current is constant over time, and a reset is to exactly 0. So a neuron fires with a period: first
 * at step k, then at 2k, 3k, ... (the same arithmetic, step by step, finds k). The next layer's input at step t is then
 * the sum of the weights from all neurons whose k divides t: each neuron's weights are added once, not at each spike.
 *
 * The layers reset by v = (1 - spike) h: where h is infinite, v becomes NaN and the neuron never spikes again. The
 * kernels do the same: h - h is 0, or NaN.
 */

#include "common.h"

#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512") /* gcc prefers 256 bits */
#endif

#define BLOCK 64  /* neurons at a time: their state stays in the first-level cache */
#ifdef __AVX512F__
#define WIDE 32 /* neurons whose gradients are made at a time, so that one waits less for its last step */
#define SUMMED 32 /* of these, as many have the gradients of their spikes of STEPS steps in registers */
#define STEPS 8 /* time steps at a time */
#else
#define WIDE 16
#define SUMMED 16
#define STEPS 4
#endif
#define SAMPLES 4 /* at a time: their additions need not wait for each other */
#define SHORT 30  /* up to so many steps, the sums by period of so many samples fit the cache */
#define LONG 254  /* and those of one */

static int all_finite(const float *x, size_t n) {
    int others = 0;
    _Pragma("omp simd reduction(+ : others)")
    for (size_t i = 0; i < n; i++) others += !(fabsf(x[i]) <= FLT_MAX);
    return !others;
}

/* w [O][H] to wt [H][P], padded with 0 */
static void transpose(const float *w, float *wt, int H, int O, int P) {
    THREADED
    for (int h = 0; h < H; h++)
        for (int o = 0; o < P; o++) wt[(size_t)h * P + o] = o < O ? w[(size_t)o * H + h] : 0.0f;
}

/* Periods of n neurons, at most BLOCK, with constant currents: the step of the first spike; T + 1 where there is none;
 * 0 where the current is infinite, for a spike at step 1 alone. With constant n all of it stays in registers. */
static INLINE void find_some_periods(const float *x, uint16_t *period, int n, int T) {
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
    for (int i = 0; i < n; i++) period[i] = x[i] > FLT_MAX ? 0 : (uint16_t)k[i];
}

static void find_periods(const float *current, uint16_t *period, size_t H, int T) {
    size_t start = 0;
    for (; start + BLOCK <= H; start += BLOCK) find_some_periods(current + start, period + start, BLOCK, T);
    if (start < H) find_some_periods(current + start, period + start, (int)(H - start), T);
}

/* Sums by period: sums [samples][T + 2][LANES] of the weights wt [H][LANES] from the neurons with each period, of some
 * samples whose neurons have the periods k [samples][H]. Row T + 1, for neurons that do not spike, is left out. */
static INLINE void sum_by_period(const uint16_t *k, const float *wt, float *sums, int samples, int H, int T) {
    float lanes[samples][4][T + 2][LANES];
    memset(lanes, 0, sizeof(lanes));
    for (int h = 0; h < H; h++) {
        const float *from = wt + (size_t)h * LANES;
        for (int i = 0; i < samples; i++) {
            float *to = lanes[i][h & 3][k[(size_t)i * H + h]];
            SIMD
            for (int o = 0; o < LANES; o++) to[o] += from[o];
        }
    }
    for (int i = 0; i < samples; i++)
        for (int j = 0; j <= T; j++)
            for (int o = 0; o < LANES; o++)
                sums[((size_t)i * (T + 2) + j) * LANES + o] =
                    (lanes[i][0][j][o] + lanes[i][1][j][o]) + (lanes[i][2][j][o] + lanes[i][3][j][o]);
}

/* Periods k [samples][H] of some samples, at most SAMPLES, with constant currents, and their sums [samples][T + 2][P]
 * of the weights wt [H][P] from the neurons with each period. */
static void sum_weights(const float *current, const float *wt, uint16_t *k, float *sums, int samples, int H, int P,
                        int T) {
    find_periods(current, k, (size_t)samples * H, T);
    if (P == LANES && T <= SHORT && samples == SAMPLES) {
        sum_by_period(k, wt, sums, SAMPLES, H, T);
    } else if (P == LANES && T <= LONG) {
        for (int i = 0; i < samples; i++)
            sum_by_period(k + (size_t)i * H, wt, sums + (size_t)i * (T + 2) * P, 1, H, T);
    } else {
        memset(sums, 0, sizeof(float) * samples * (T + 2) * P);
        for (int i = 0; i < samples; i++)
            for (int h = 0; h < H; h++) {
                float *to = sums + ((size_t)i * (T + 2) + k[(size_t)i * H + h]) * P;
                SIMD
                for (int o = 0; o < P; o++) to[o] += wt[(size_t)h * P + o];
            }
    }
}

/* The next layer's inputs x, T rows of O, from a sample's sums [T + 2][P]; a row begins every `row` numbers. */
static void inputs_from_sums(const float *sum, float *x, size_t row, int O, int P, int T) {
    memcpy(x, sum, sizeof(float) * O); /* period 0 */
    for (int t = 2; t <= T; t++) memset(x + (size_t)(t - 1) * row, 0, sizeof(float) * O);
    for (int j = 1; j <= T; j++)
        for (int t = j; t <= T; t += j) {
            float *to = x + (size_t)(t - 1) * row;
            for (int o = 0; o < O; o++) to[o] += sum[(size_t)j * P + o];
        }
}

/* Spikes of N x H neurons with constant currents, through weights [O][H], for T steps (at most 65534).
 * wt [H][P] and sums [N][T + 2][P] are scratch; period [N][H] (uint16) is kept for the backward pass;
 * out [T][N][O]; spikes [H] (int64), unless null, is increased by each neuron's spikes.
 * Returns 1, having written nothing, if a weight is not finite: the layers multiply it by every 0, too. Else 0. */
int constant_lif_linear_forward(const float *current, const float *w, float *wt, float *sums, uint16_t *period,
                                 float *out, int64_t *spikes, int N, int H, int O, int P, int T) {
    if (!all_finite(w, (size_t)O * H)) return 1;
    transpose(w, wt, H, O, P);
    THREADED
    for (int first = 0; first < N; first += SAMPLES)
        sum_weights(current + (size_t)first * H, wt, period + (size_t)first * H, sums + (size_t)first * (T + 2) * P,
                    smaller(SAMPLES, N - first), H, P, T);
    THREADED
    for (int n = 0; n < N; n++)
        inputs_from_sums(sums + (size_t)n * (T + 2) * P, out + (size_t)n * O, (size_t)N * O, O, P, T);
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
    return 0;
}

/* Adds to total what some steps contribute to the gradients of m currents x; v and trace, dh/dx, go on with the
 * steps. grad has the outputs' gradients, a row per step. With constant m and steps all of it stays in registers. */
static INLINE void constant_lif_gradient(const float *grad, const float *w, const float *x, float *v, float *trace,
                                         float *total, int m, int steps, size_t row, int H, int O) {
    const float pi = 3.14159265358979f;
    float g[STEPS][WIDE]; /* the gradients of the spikes */
    _Pragma("GCC unroll 4")
    for (int part = 0; part < m; part += SUMMED) {
        const int some = smaller(SUMMED, m - part);
        float sum[STEPS][SUMMED] = {{0}};
        for (int o = 0; o < O; o++) {
            const float *weights = w + (size_t)o * H + part;
            _Pragma("GCC unroll 8")
            for (int t = 0; t < steps; t++) {
                float factor = grad[t * row + o];
                SIMD
                for (int i = 0; i < some; i++) sum[t][i] += factor * weights[i];
            }
        }
        _Pragma("GCC unroll 8")
        for (int t = 0; t < steps; t++)
            for (int i = 0; i < some; i++) g[t][part + i] = sum[t][i];
    }
    _Pragma("GCC unroll 8")
    for (int t = 0; t < steps; t++) {
        SIMD
        for (int i = 0; i < m; i++) {
            float h = v[i] + (x[i] - v[i]) * 0.5f;
            float slope = 0.5f + 0.5f * trace[i];
            float u = pi * (h - 1.0f);
            total[i] += g[t][i] * slope / (1.0f + u * u);
            v[i] = h >= 1.0f ? 0.0f : h; /* for an infinite h see after_infinity */
            trace[i] = h >= 1.0f ? 0.0f : slope;
        }
    }
}

/* Adds to the gradients gwt [m][P] of m neurons' weights what each sample's sums have for the neurons' periods. */
static INLINE void add_sums(float *gwt, const float *sums, const uint16_t *k, int samples, int m, int H, int P, int T) {
    for (int i = 0; i < m; i++) {
        SIMD
        for (int o = 0; o < P; o++) {
            float total = gwt[(size_t)i * P + o];
            for (int n = 0; n < samples; n++)
                total += sums[((size_t)n * (T + 2) + k[(size_t)n * H + i]) * P + o];
            gwt[(size_t)i * P + o] = total;
        }
    }
}

/* After the spike of an infinite current x, v is NaN, and so is all that depends on it: the gradients of m currents. */
static INLINE void after_infinity(const float *x, float *grad, int m) {
    int found = 0;
    for (int i = 0; i < m; i++) found |= x[i] > FLT_MAX;
    for (int i = 0; found && i < m; i++)
        if (x[i] > FLT_MAX) grad[i] = NAN;
}

/* The gradients of m currents from those of the next layer's inputs, which may take the currents' place. */
static INLINE void some_gradients(const float *grad, const float *current, const float *w, float *grad_current, int m,
                                  size_t row, int H, int O, int T) {
    float x[WIDE], v[WIDE], trace[WIDE], total[WIDE];
    for (int i = 0; i < m; i++) x[i] = current[i], v[i] = trace[i] = total[i] = 0.0f;
    int first = 0;
    for (; first + STEPS <= T; first += STEPS)
        constant_lif_gradient(grad + (size_t)first * row, w, x, v, trace, total, m, STEPS, row, H, O);
    if (first < T) constant_lif_gradient(grad + (size_t)first * row, w, x, v, trace, total, m, T - first, row, H, O);
    if (T > 1) after_infinity(x, total, m);
    for (int i = 0; i < m; i++) grad_current[i] = total[i];
}

/* A sample's sums [T + 2][P] of what each neuron of period j passes to its weights, the gradients grad of the next
 * layer's inputs at its spikes' steps; and the gradients of its currents [H], which may take the currents' place. */
static void sample_gradients(const float *grad, const float *current, const float *w, float *sum, float *grad_current,
                             size_t row, int H, int O, int P, int T) {
    memset(sum, 0, sizeof(float) * (T + 2) * P);
    memcpy(sum, grad, sizeof(float) * O); /* period 0 */
    for (int j = 1; j <= T; j++)
        for (int t = j; t <= T; t += j)
            for (int o = 0; o < O; o++) sum[(size_t)j * P + o] += grad[(size_t)(t - 1) * row + o];
    int start = 0;
    for (; start + WIDE <= H; start += WIDE)
        some_gradients(grad, current + start, w + start, grad_current + start, WIDE, row, H, O, T);
    if (start < H) some_gradients(grad, current + start, w + start, grad_current + start, H - start, row, H, O, T);
}

/* The gradients of w [O][H] from the samples' sums [N][T + 2][P] and periods [N][H]; gwt [H][P] is scratch. */
static void weight_gradients(const float *sums, const uint16_t *period, float *gwt, float *grad_w, int N, int H, int O,
                             int P, int T) {
    THREADED
    for (int start = 0; start < H; start += BLOCK) {
        int m = smaller(BLOCK, H - start);
        memset(gwt + (size_t)start * P, 0, sizeof(float) * m * P);
        for (int n = 0; n < N; n += SAMPLES) {
            const float *sum = sums + (size_t)n * (T + 2) * P;
            const uint16_t *k = period + (size_t)n * H + start;
            if (P == LANES && N - n >= SAMPLES)
                add_sums(gwt + (size_t)start * P, sum, k, SAMPLES, m, H, LANES, T);
            else
                add_sums(gwt + (size_t)start * P, sum, k, smaller(SAMPLES, N - n), m, H, P, T);
        }
        for (int o = 0; o < O; o++)
            for (int i = 0; i < m; i++) grad_w[(size_t)o * H + start + i] = gwt[(size_t)(start + i) * P + o];
    }
}

/* The gradients of current [N][H] and w [O][H] from that of out, grad [T][N][O].
 * sums [N][T + 2][P] and gwt [H][P] are scratch. */
void constant_lif_linear_backward(const float *grad, const float *current, const uint16_t *period, const float *w,
                                  float *sums, float *gwt, float *grad_current, float *grad_w, int N, int H, int O,
                                  int P, int T) {
    THREADED
    for (int n = 0; n < N; n++)
        sample_gradients(grad + (size_t)n * O, current + (size_t)n * H, w, sums + (size_t)n * (T + 2) * P,
                         grad_current + (size_t)n * H, (size_t)N * O, H, O, P, T);
    weight_gradients(sums, period, gwt, grad_w, N, H, O, P, T);
}

/* Spike counts of m neurons, at most BLOCK, with inputs x: T rows, one every `row` numbers. */
static INLINE void count_spikes(const float *x, float *counts, int m, size_t row, int T) {
    float v[BLOCK], count[BLOCK];
    for (int i = 0; i < BLOCK; i++) v[i] = count[i] = 0.0f;
    for (int t = 0; t < T; t++, x += row) {
        SIMD
        for (int i = 0; i < m; i++) {
            float h = v[i] + (x[i] - v[i]) * 0.5f;
            count[i] += h >= 1.0f ? 1.0f : 0.0f;
            v[i] = h >= 1.0f ? h - h : h;
        }
    }
    memcpy(counts, count, sizeof(float) * m);
}

/* The gradients of these inputs from those of the counts, grad [m]. They may take the inputs' place. */
static INLINE void count_gradients(const float *grad, const float *x, float *grad_x, int m, size_t row, int T) {
    const float pi = 3.14159265358979f;
    float v[BLOCK], g[BLOCK];
    for (int i = 0; i < BLOCK; i++) v[i] = g[i] = 0.0f;
    for (int t = 0; t < T; t++) {
        const float *from = x + (size_t)t * row;
        float *h = grad_x + (size_t)t * row; /* kept where the gradient comes to stand */
        SIMD
        for (int i = 0; i < m; i++) {
            h[i] = v[i] + (from[i] - v[i]) * 0.5f;
            v[i] = h[i] >= 1.0f ? h[i] - h[i] : h[i];
        }
    }
    for (int t = T - 1; t >= 0; t--) {
        float *to = grad_x + (size_t)t * row;
        SIMD
        for (int i = 0; i < m; i++) {
            float h = to[i], u = pi * (h - 1.0f);
            float gh = grad[i] / (1.0f + u * u) + (h >= 1.0f ? 0.0f : g[i]);
            to[i] = g[i] = 0.5f * gh; /* half to the input, half to the potential before */
        }
    }
}

/* Spike counts [M] of M neurons with input x [T][M]. */
void lif_count_forward(const float *x, float *counts, int64_t M, int T) {
    THREADED
    for (int64_t start = 0; start < M; start += BLOCK)
        count_spikes(x + start, counts + start, (int)(M - start < BLOCK ? M - start : BLOCK), M, T);
}

/* The gradient of x [T][M] from that of the counts, grad [M]. */
void lif_count_backward(const float *grad, const float *x, float *grad_x, int64_t M, int T) {
    THREADED
    for (int64_t start = 0; start < M; start += BLOCK)
        count_gradients(grad + start, x + start, grad_x + start, (int)(M - start < BLOCK ? M - start : BLOCK), M, T);
}

/* All but the products of a training step: the neurons of constant_lif_linear_forward, LIF neurons behind them, the mean
 * squared error between their firing rates and the one-hot labels [N], and its gradients. Each group of samples goes
 * through all of this while it is in the cache.
 *
 * current [N][H], or [H][N] if it is turned. grad_current [N][H], grad_w [O][H]; loss and right, the number of correct
 * predictions, are one number each. wt [H][P], sums [N][T + 2][P], inputs [N][T][O], counts [N][O], period [N][H] are
 * scratch. Returns 1, having written nothing, if a weight is not finite or a label is not from 0 to O - 1. Else 0. */
int constant_lif_linear_learn(const float *current, const float *w, const int64_t *labels, float *wt, float *sums,
                              float *inputs, float *counts, uint16_t *period, float *grad_current, float *grad_w,
                              float *loss, int64_t *right, int N, int H, int O, int P, int T, int turned) {
    if (!all_finite(w, (size_t)O * H)) return 1;
    for (int n = 0; n < N; n++)
        if (labels[n] < 0 || labels[n] >= O) return 1;
    const float slope = (float)(2.0 / ((double)N * O));
    transpose(w, wt, H, O, P);
    THREADED
    for (int first = 0; first < N; first += SAMPLES) {
        const int samples = smaller(SAMPLES, N - first);
        float *own = grad_current + (size_t)first * H; /* their currents, until these make room for the gradients */
        if (!turned)
            memcpy(own, current + (size_t)first * H, sizeof(float) * samples * H);
        else if (samples == SAMPLES)
            for (int h = 0; h < H; h++)
                for (int i = 0; i < SAMPLES; i++) own[(size_t)i * H + h] = current[(size_t)h * N + first + i];
        else
            for (int h = 0; h < H; h++)
                for (int i = 0; i < samples; i++) own[(size_t)i * H + h] = current[(size_t)h * N + first + i];
        sum_weights(own, wt, period + (size_t)first * H, sums + (size_t)first * (T + 2) * P, samples, H, P, T);
        for (int n = first; n < first + samples; n++) {
            float *sum = sums + (size_t)n * (T + 2) * P, *x = inputs + (size_t)n * T * O;
            inputs_from_sums(sum, x, O, O, P, T);
            for (int start = 0; start < O; start += BLOCK) {
                const int m = smaller(BLOCK, O - start);
                float *count = counts + (size_t)n * O + start, grad[BLOCK];
                count_spikes(x + start, count, m, O, T);
                for (int i = 0; i < m; i++)
                    grad[i] = slope * (count[i] / T - (start + i == labels[n] ? 1.0f : 0.0f)) / T;
                count_gradients(grad, x + start, x + start, m, O, T);
            }
            own = grad_current + (size_t)n * H;
            sample_gradients(x, own, w, sum, own, O, H, O, P, T);
        }
    }
    weight_gradients(sums, period, wt, grad_w, N, H, O, P, T);
    double squares = 0.0;
    *right = 0;
    for (int n = 0; n < N; n++) {
        const float *count = counts + (size_t)n * O;
        int most = 0;
        for (int o = 0; o < O; o++) {
            const double error = count[o] / T - (o == labels[n] ? 1.0f : 0.0f);
            squares += error * error;
            if (count[o] > count[most]) most = o; /* the first one of several */
        }
        *right += most == labels[n];
    }
    *loss = (float)(squares / ((double)N * O));
    return 0;
}
