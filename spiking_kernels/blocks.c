/* A block of a spiking convolutional network behind its convolution: BatchNorm per time step, LIF neurons, and the
 * maximum of 2 x 2 spikes if there is one.
 *
 * All images are channels-last: y [T][N][H][W][C], float32 or bfloat16 as the flag says; the arithmetic is in float32,
 * sums over images in double. The neuron and its surrogate derivative are those of neurons.c.
 *
 * Nothing but y, the spikes, gradients and sums per time step and channel is read from or written to memory: the
 * potentials of a tile, some pixels of one image in some channels, stay in the cache through all time steps, and the
 * backward passes compute them anew. The results do not depend on the number of threads.
 */

#include "common.h"

#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512") /* gcc prefers 256 bits */
#endif

#define TILE 1024          /* neurons at a time, at most; their potentials at all time steps are on the stack */
#define CHANNELS 256       /* at most, of these neurons */
#define LINE 64            /* bytes of a line of the cache */
#define AHEAD 4096         /* bytes from what is read to what is asked for meanwhile */
#ifndef STREAMED
#define STREAMED (1 << 26) /* bytes from which on an output is written past the cache */
#endif

typedef struct {
    int T, N, H, W, C;
    int pool;     /* the output is the maximum of 2 x 2 spikes */
    int constant; /* y has one time step, which is the input of all; then it is not normalised */
    int half;     /* y, spikes and gradients are bfloat16 */
    int stream;   /* the output is written past the cache */
} Shape;

/* Some neurons of image n: rows x pixels x channels, from row, pixel and channel on. */
typedef struct {
    int n, row, rows, pixel, pixels, channel, channels;
} Tile;

/* The numbers of a pixel as they come to stand in memory. */
typedef union {
    float full[CHANNELS];
    uint16_t half[CHANNELS];
} Pixel;

/* -- float32 and bfloat16 in memory -------------------------------------------------------------- */

static inline float widened(uint16_t x) { return as_float((uint32_t)x << 16); }

/* to the nearest bfloat16, ties to even */
static inline uint16_t narrowed(float x) {
    const uint32_t bits = as_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static INLINE float number(const void *x, size_t i, int half) {
    return half ? widened(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

static INLINE void put(void *x, size_t i, float value, int half) {
    if (half)
        ((uint16_t *)x)[i] = narrowed(value);
    else
        ((float *)x)[i] = value;
}

static inline void load(float *restrict to, const void *from, size_t at, int n, int half) {
    if (half) {
        const uint16_t *x = (const uint16_t *)from + at;
        SIMD
        for (int i = 0; i < n; i++) to[i] = widened(x[i]);
    } else {
        memcpy(to, (const float *)from + at, sizeof(float) * n);
    }
}

static inline void store(void *to, size_t at, const float *restrict from, int n, int half) {
    if (half) {
        uint16_t *x = (uint16_t *)to + at;
        SIMD
        for (int i = 0; i < n; i++) x[i] = narrowed(from[i]);
    } else {
        memcpy((float *)to + at, from, sizeof(float) * n);
    }
}

/* Where the channels of a tile's pixel stand in images of H x W, at time step t. */
static inline size_t place(const Shape *s, int t, int n, int row, int pixel, int channel, int H, int W) {
    return ((((size_t)t * s->N + n) * H + row) * W + pixel) * s->C + channel;
}

static inline size_t in_y(const Shape *s, const Tile *at, int t, int r, int p) {
    return place(s, t, at->n, at->row + r, at->pixel + p, at->channel, s->H, s->W);
}

static inline size_t in_output(const Shape *s, const Tile *at, int t, int r, int p) {
    return s->pool ? place(s, t, at->n, at->row / 2 + r, at->pixel / 2 + p, at->channel, s->H / 2, s->W / 2)
                   : in_y(s, at, t, r, p);
}

/* For each pixel of a tile, with `from`, where its channels stand in y at time step t. */
#define FOR_PIXELS(s, at, t, from)                                                             \
    for (int row_ = 0; row_ < (at)->rows; row_++)                                              \
        for (size_t from = in_y(s, at, t, row_, 0), end_ = from + (size_t)(at)->pixels * (s)->C; \
             from < end_; from += (s)->C)

/* -- memory -------------------------------------------------------------------------------------- */

/* Asks for n numbers of x that are read soon. */
static INLINE void fetch(const void *x, size_t at, size_t n, int half) {
    const size_t size = half ? 2 : 4;
    const char *from = (const char *)x + at * size;
    for (size_t i = 0; i < n * size; i += LINE) __builtin_prefetch(from + i);
}

/* Whether to write an output past the cache, which spares reading each line before it is written: where the output is
 * large and its pixels are whole lines. */
static int streams(const void *output, size_t elements, int C, int half) {
#ifdef __AVX512F__
    const size_t size = half ? 2 : 4;
    return elements * size >= STREAMED && C * size % LINE == 0 && (uintptr_t)output % LINE == 0;
#else
    (void)output, (void)elements, (void)C, (void)half;
    return 0;
#endif
}

/* Writes n numbers of a pixel. */
static INLINE void write_pixel(const Shape *s, void *to, size_t at, const Pixel *pixel, int n) {
    const size_t size = s->half ? 2 : 4;
    char *place = (char *)to + at * size;
    if (!s->stream) {
        memcpy(place, pixel, n * size);
        return;
    }
#ifdef __AVX512F__
    for (size_t i = 0; i < n * size; i += LINE)
        _mm512_stream_si512((void *)(place + i), _mm512_loadu_si512((const char *)pixel + i));
#endif
}

/* -- statistics ---------------------------------------------------------------------------------- */

/* Adds y [pixels][C] and its squares to sums [2][C]. */
static void add_moments(const void *y, size_t at, double *sums, int pixels, int C, int half) {
    float x[4][CHANNELS];
    for (int first = 0; first < C; first += CHANNELS) {
        int m = smaller(CHANNELS, C - first);
        double *sum = sums + first, *squares = sums + C + first;
        int p = 0;
        for (; p + 4 <= pixels; p += 4) {
            fetch(y, at + (size_t)p * C + first + AHEAD / (half ? 2 : 4), (size_t)4 * C, half);
            for (int i = 0; i < 4; i++) load(x[i], y, at + (size_t)(p + i) * C + first, m, half);
            SIMD
            for (int c = 0; c < m; c++) {
                double a = x[0][c], b = x[1][c], d = x[2][c], e = x[3][c];
                sum[c] += (a + b) + (d + e);
                squares[c] += (a * a + b * b) + (d * d + e * e);
            }
        }
        for (; p < pixels; p++) {
            load(x[0], y, at + (size_t)p * C + first, m, half);
            for (int c = 0; c < m; c++) {
                double a = x[0][c];
                sum[c] += a;
                squares[c] += a * a;
            }
        }
    }
}

/* Mean and biased variance [T][C] of y [T][N][S][C]; sums [T * N][2][C] is scratch. */
void block_statistics(const void *y, double *sums, float *mean, float *variance, int T, int N, int S, int C, int half) {
    THREADED
    for (int i = 0; i < T * N; i++) {
        memset(sums + (size_t)i * 2 * C, 0, sizeof(double) * 2 * C);
        add_moments(y, (size_t)i * S * C, sums + (size_t)i * 2 * C, S, C, half);
    }
    THREADED
    for (int t = 0; t < T; t++) {
        double *total = sums + (size_t)t * N * 2 * C, many = (double)N * S;
        for (int n = 1; n < N; n++)
            for (int c = 0; c < 2 * C; c++) total[c] += total[(size_t)n * 2 * C + c];
        for (int c = 0; c < C; c++) {
            double m = total[c] / many, v = total[C + c] / many - m * m;
            mean[(size_t)t * C + c] = (float)m;
            variance[(size_t)t * C + c] = (float)(v < 0 ? 0 : v);
        }
    }
}

/* -- neurons ------------------------------------------------------------------------------------- */

/* A time step of a tile: from potentials v, [rows][pixels][channels], to the next ones; h are those before the reset.
 * The input is y, normalised as scale * y + shift, both [T][C], with norm. */
static INLINE void advance(const Shape *s, const Tile *at, const void *y, const float *scale, const float *shift, int t,
                           float *restrict v, float *restrict h, int norm, int half) {
    const int m = at->channels;
    const float *a = norm ? scale + (size_t)t * s->C + at->channel : 0;
    const float *b = norm ? shift + (size_t)t * s->C + at->channel : 0;
    FOR_PIXELS(s, at, s->constant ? 0 : t, from) {
        SIMD
        for (int c = 0; c < m; c++) {
            float x = number(y, from + c, half);
            if (norm) x = x * a[c] + b[c];
            float now = v[c] + (x - v[c]) * 0.5f;
            h[c] = now;
            v[c] = now >= 1.0f ? now - now : now; /* 0, or NaN after infinity, as (1 - spike) * h is */
        }
        v += m, h += m;
    }
}

/* The tile behind one, in the same channels; behind the last row of an image, the next image begins.
 *
 * What a tile reads at one time step is far from what it reads at the others: the processor does not foresee it, and
 * would wait. So each tile asks for what the next one reads. */
static INLINE Tile next_tile(const Shape *s, const Tile *at) {
    Tile next = *at;
    next.pixel += at->pixels;
    if (next.pixel >= s->W) next.pixel = 0, next.row += at->rows;
    return next;
}

static void advance_tile(const Shape *s, const Tile *at, const void *y, const float *scale, const float *shift, int t,
                         float *v, float *h) {
    const Tile next = next_tile(s, at);
    for (int r = 0; r < at->rows && !s->constant; r++)
        fetch(y, in_y(s, &next, t, r, 0), (size_t)at->pixels * s->C, s->half);
    if (scale)
        s->half ? advance(s, at, y, scale, shift, t, v, h, 1, 1) : advance(s, at, y, scale, shift, t, v, h, 1, 0);
    else
        s->half ? advance(s, at, y, 0, 0, t, v, h, 0, 1) : advance(s, at, y, 0, 0, t, v, h, 0, 0);
}

/* Spikes of m neurons, or the maxima of theirs and those of the neurons to the right, below, and both. */
static INLINE void make_spikes(const float *h, int right, int below, Pixel *spikes, int m, int half) {
    const uint16_t one = 0x3f80; /* in bfloat16 */
    SIMD
    for (int c = 0; c < m; c++) {
        const int any = (h[c] >= 1.0f) | (h[right + c] >= 1.0f) | (h[below + c] >= 1.0f) | (h[below + right + c] >= 1.0f);
        if (half)
            spikes->half[c] = any ? one : 0;
        else
            spikes->full[c] = any ? 1.0f : 0.0f;
    }
}

static void write_spikes(const Shape *s, const Tile *at, int t, const float *h, void *spikes) {
    const int m = at->channels, below = at->pixels * m;
    Pixel made;
    if (!s->pool) {
        for (int r = 0; r < at->rows; r++)
            for (int p = 0; p < at->pixels; p++, h += m) {
                s->half ? make_spikes(h, 0, 0, &made, m, 1) : make_spikes(h, 0, 0, &made, m, 0);
                write_pixel(s, spikes, in_output(s, at, t, r, p), &made, m);
            }
        return;
    }
    for (int p = 0; at->rows == 2 && p + 2 <= at->pixels; p += 2, h += 2 * m) {
        s->half ? make_spikes(h, m, below, &made, m, 1) : make_spikes(h, m, below, &made, m, 0);
        write_pixel(s, spikes, in_output(s, at, t, 0, p / 2), &made, m);
    }
}

static void count_spikes(const Shape *s, const Tile *at, const float *h, int64_t *counts) {
    for (int r = 0; r < at->rows; r++)
        for (int p = 0; p < at->pixels; p++, h += at->channels) {
            int64_t *to = counts + ((size_t)(at->row + r) * s->W + at->pixel + p) * s->C + at->channel;
            for (int c = 0; c < at->channels; c++) to[c] += h[c] >= 1.0f;
        }
}

/* How many pixels of a row a tile has. */
static inline int tile_pixels(const Shape *s) {
    int pixels = TILE / 2 / smaller(CHANNELS, s->C);
    return smaller(s->pool ? pixels & ~1 : pixels, s->W);
}

#define FOR_TILES(s, image, first)                                                                        \
    for (int channel = 0; channel < (s)->C; channel += CHANNELS)                                          \
        for (int pixel = 0, most = tile_pixels(s); pixel < (s)->W; pixel += most)                         \
            for (Tile at = {image, first, smaller((s)->pool ? 2 : 1, (s)->H - (first)),                   \
                            pixel, smaller(most, (s)->W - pixel), channel, smaller(CHANNELS, (s)->C - channel)}, \
                      *once = &at; once; once = 0)

static void forward_rows(const Shape *s, int n, int row, const void *y, const float *scale, const float *shift,
                         void *spikes, int64_t *counts) {
    float v[TILE], h[TILE];
    FOR_TILES(s, n, row) {
        memset(v, 0, sizeof(float) * at.rows * at.pixels * at.channels);
        for (int t = 0; t < s->T; t++) {
            advance_tile(s, &at, y, scale, shift, t, v, h);
            write_spikes(s, &at, t, h, spikes);
            if (counts) count_spikes(s, &at, h, counts);
        }
    }
    if (s->stream) end_stream();
}

/* Spikes [T][N][H][W][C], with pool [T][N][H / 2][W / 2][C], of neurons whose input is scale * y + shift.
 * counts [H][W][C], unless null, is increased by each neuron's spikes. */
void block_forward(const void *y, const float *scale, const float *shift, void *spikes, int64_t *counts, int T, int N,
                   int H, int W, int C, int pool, int constant, int half) {
    Shape s = {T, N, H, W, C, pool, constant, half, 0};
    const int rows = pool ? 2 : 1, groups = (H + rows - 1) / rows;
    s.stream = streams(spikes, (size_t)T * N * (H / rows) * (W / rows) * C, C, half);
    if (counts) { /* a row's counts belong to one thread */
        THREADED
        for (int group = 0; group < groups; group++)
            for (int n = 0; n < N; n++) forward_rows(&s, n, group * rows, y, scale, shift, spikes, counts);
    } else {
        THREADED
        for (int i = 0; i < N * groups; i++)
            forward_rows(&s, i / groups, i % groups * rows, y, scale, shift, spikes, counts);
    }
}

/* -- gradients ----------------------------------------------------------------------------------- */

/* The gradients of a tile's spikes at time step t, where those of each window go to its first maximum; those of what is
 * in no window stay as they are. */
static void first_maxima(const Shape *s, const Tile *at, int t, const void *grad, const float *h, float *g) {
    const int m = at->channels;
    float from[CHANNELS];
    for (int p = 0; at->rows == 2 && p + 2 <= at->pixels; p += 2) {
        const size_t up = (size_t)p * m, low = up + (size_t)at->pixels * m;
        load(from, grad, in_output(s, at, t, 0, p / 2), m, s->half);
        SIMD
        for (int c = 0; c < m; c++) {
            const float x = from[c], first = h[up + c] >= 1.0f ? 0.0f : x; /* what is left for the others */
            g[up + m + c] = h[up + m + c] >= 1.0f ? first : 0.0f;
            const float second = h[up + m + c] >= 1.0f ? 0.0f : first;
            g[low + c] = h[low + c] >= 1.0f ? second : 0.0f;
            const float third = h[low + c] >= 1.0f ? 0.0f : second;
            g[low + m + c] = h[low + m + c] >= 1.0f ? third : 0.0f;
            g[up + c] = h[up + c] >= 1.0f ? x : h[low + m + c] >= 1.0f ? 0.0f : third; /* without a spike, too */
        }
    }
}

/* What a backward pass makes of the gradients of the inputs, g; TOTAL: their sum over time, for a constant input.
 *
 * Behind a normalisation, dy is made of g and its sums over all images. In float32 SUMS keeps g itself, where dy comes to
 * stand. In bfloat16, which would round it, GRADIENT computes it again. */
enum { SUMS, GRADIENT, PLAIN_GRADIENT, TOTAL };

typedef struct {
    const float *mean;                    /* [T][C], and all that follow */
    const float *factor, *mean_g, *slope; /* GRADIENT: see of_normalised */
    double *sums;                         /* SUMS: increased by g and g * (y - mean), [2][T][C] */
    void *dy;                             /* the gradient of y; g with SUMS, which writes none in bfloat16 */
} Use;

/* The gradient of a value that is x off the mean, from that of the normalised one. */
static INLINE float of_normalised(float g, float x, float factor, float mean_g, float slope) {
    return factor * (g - mean_g - x * slope);
}

/* A time step of a tile backward, from the gradients of its spikes. carried are those of the potentials, g of the
 * inputs; total is increased by g with TOTAL. With pool, the gradients of the spikes are in spread. */
static INLINE void retreat(const Shape *s, const Tile *at, const void *y, const void *grad, int t,
                           const float *restrict h, float *restrict carried, float *restrict total,
                           const float *restrict spread, const Use *use, float *restrict first, float *restrict second,
                           int what, int pool, int half) {
    const float pi = 3.14159265358979f;
    const int m = at->channels;
    const size_t to = (size_t)t * s->C + at->channel;
    const int off = what == SUMS || what == GRADIENT;
    const float *mean = off ? use->mean + to : 0, *factor = what == GRADIENT ? use->factor + to : 0;
    const float *mean_g = what == GRADIENT ? use->mean_g + to : 0, *slope = what == GRADIENT ? use->slope + to : 0;
    const int writes_g = what == PLAIN_GRADIENT || (what == SUMS && !half), writes = writes_g || what == GRADIENT;
    Pixel made;
    FOR_PIXELS(s, at, t, from) {
        void *const dy = s->stream || !writes ? (void *)&made : (char *)use->dy + from * (half ? 2 : 4);
        __asm__ volatile("" ::: "memory"); /* or gcc swaps the loops to add up one channel at a time */
        SIMD
        for (int c = 0; c < m; c++) {
            float now = h[c], u = pi * (now - 1.0f), later = carried[c];
            float of_spike = pool ? spread[c] : number(grad, from + c, half);
            float g = 0.5f * (of_spike / (1.0f + u * u) + (now >= 1.0f ? 0.0f : later));
            carried[c] = g;
            float x = off ? number(y, from + c, half) - mean[c] : 0.0f;
            if (what == SUMS) {
                first[c] += g;
                second[c] += g * x;
            }
            if (what == TOTAL) total[c] += g;
            if (what == GRADIENT) put(dy, c, of_normalised(g, x, factor[c], mean_g[c], slope[c]), half);
            if (writes_g) put(dy, c, g, half);
        }
        if (s->stream && writes) write_pixel(s, use->dy, from, &made, m);
        h += m, carried += m, total += m, spread += m;
    }
}

#define RETREAT_AS(what, pool, half) \
    retreat(s, at, y, grad, t, h, carried, total, spread, use, first, second, what, pool, half)
#define RETREAT(what)                                                           \
    (s->pool ? (s->half ? RETREAT_AS(what, 1, 1) : RETREAT_AS(what, 1, 0))      \
             : (s->half ? RETREAT_AS(what, 0, 1) : RETREAT_AS(what, 0, 0)))

static void retreat_tile(const Shape *s, const Tile *at, const void *y, const void *grad, int t, const float *h,
                         float *carried, float *total, const float *spread, const Use *use, float *first, float *second,
                         int what) {
    switch (what) {
        case SUMS: RETREAT(SUMS); break;
        case GRADIENT: s->pool ? RETREAT_AS(GRADIENT, 1, 1) : RETREAT_AS(GRADIENT, 0, 1); break;
        case PLAIN_GRADIENT: RETREAT(PLAIN_GRADIENT); break;
        default: RETREAT(TOTAL);
    }
}

/* The gradient of an input that is constant over time. */
static void write_total(const Shape *s, const Tile *at, const float *total, void *dy) {
    FOR_PIXELS(s, at, 0, from) {
        store(dy, from, total, at->channels, s->half);
        total += at->channels;
    }
}

/* Adds sums [T][2][CHANNELS] of a tile's channels to those of all, [2][T][C]. */
static void add_sums(const Shape *s, const Tile *at, const float *sums, double *to) {
    for (int i = 0; i < 2; i++)
        for (int t = 0; t < s->T; t++) {
            const float *from = sums + (size_t)(2 * t + i) * CHANNELS;
            double *row = to + ((size_t)i * s->T + t) * s->C + at->channel;
            for (int c = 0; c < at->channels; c++) row[c] += from[c];
        }
}

/* Makes what is asked for of rows of an image. */
static void backward_rows(const Shape *s, int n, int row, const void *y, const float *scale, const float *shift,
                          const void *grad, const Use *use) {
    float h[(size_t)s->T * TILE], v[TILE], spread[TILE], total[TILE];
    float sums[(size_t)2 * s->T * CHANNELS]; /* [T][2][CHANNELS], of the rows' tiles in some channels */
    const int what = s->constant ? TOTAL : use->sums ? SUMS : use->mean ? GRADIENT : PLAIN_GRADIENT;
    FOR_TILES(s, n, row) {
        const size_t bytes = sizeof(float) * at.rows * at.pixels * at.channels;
        for (int i = 0; i < 2 * s->T && at.pixel == 0; i++)
            memset(sums + (size_t)i * CHANNELS, 0, sizeof(float) * at.channels);
        memset(v, 0, bytes);
        for (int t = 0; t < s->T; t++) advance_tile(s, &at, y, scale, shift, t, v, h + (size_t)t * TILE);
        memset(v, 0, bytes);
        if (what == TOTAL) memset(total, 0, bytes);
        if (s->pool) memset(spread, 0, bytes); /* what is in no window has no gradient */
        const Tile next = next_tile(s, &at);
        for (int t = s->T - 1; t >= 0; t--) {
            const float *now = h + (size_t)t * TILE;
            float *first = sums + (size_t)2 * t * CHANNELS;
            fetch(grad, in_output(s, &next, t, 0, 0), (size_t)(s->pool ? at.pixels / 2 : at.pixels) * s->C, s->half);
            if (s->pool) first_maxima(s, &at, t, grad, now, spread);
            retreat_tile(s, &at, y, grad, t, now, v, total, spread, use, first, first + CHANNELS, what);
        }
        if (what == TOTAL) write_total(s, &at, total, use->dy);
        if (what == SUMS && at.pixel + at.pixels == s->W) add_sums(s, &at, sums, use->sums);
    }
    if (s->stream) end_stream();
}

/* The sums of g and of g * (y - mean) for each time step and channel, total [2][T][C], g being the gradients of
 * the inputs; partial [N][2][T][C] is scratch. In float32 dy becomes g, for block_backward; in bfloat16 it stays. */
void block_backward_sums(const void *y, const float *scale, const float *shift, const void *grad, const float *mean,
                         double *partial, double *total, void *dy, int T, int N, int H, int W, int C, int pool,
                         int half) {
    Shape s = {T, N, H, W, C, pool, 0, half, 0};
    s.stream = !half && streams(dy, (size_t)T * N * H * W * C, C, half);
    const size_t size = (size_t)2 * T * C;
    THREADED
    for (int n = 0; n < N; n++) {
        const Use use = {.mean = mean, .sums = partial + n * size, .dy = dy};
        memset(use.sums, 0, sizeof(double) * size);
        for (int row = 0; row < H; row += pool ? 2 : 1) backward_rows(&s, n, row, y, scale, shift, grad, &use);
    }
    memcpy(total, partial, sizeof(double) * size);
    for (int n = 1; n < N; n++)
        for (size_t i = 0; i < size; i++) total[i] += partial[n * size + i];
}

/* Makes dy of g, which it holds. */
static void normalise_gradient(const Shape *s, const float *y, const Use *use) {
    const int rows = s->N * s->H; /* of pixels, at a time step */
    THREADED
    for (int i = 0; i < s->T * rows; i++) {
        const size_t to = (size_t)(i / rows) * s->C, first = (size_t)i * s->W * s->C;
        const float *mean = use->mean + to, *factor = use->factor + to, *mean_g = use->mean_g + to;
        const float *slope = use->slope + to;
        for (int pixel = 0; pixel < s->W; pixel++) {
            const float *x = y + first + (size_t)pixel * s->C;
            float *dy = (float *)use->dy + first + (size_t)pixel * s->C;
            SIMD
            for (int c = 0; c < s->C; c++) dy[c] = of_normalised(dy[c], x[c] - mean[c], factor[c], mean_g[c], slope[c]);
        }
    }
}

/* The gradient dy of y: factor * (g - mean_g - (y - mean) * slope), all [T][C]; g itself where mean is null. In float32
 * with a mean, dy holds g, from block_backward_sums. */
void block_backward(const void *y, const float *scale, const float *shift, const void *grad, const float *mean,
                    const float *factor, const float *mean_g, const float *slope, void *dy, int T, int N, int H, int W,
                    int C, int pool, int constant, int half) {
    Shape s = {T, N, H, W, C, pool, constant, half, 0};
    s.stream = !constant && streams(dy, (size_t)T * N * H * W * C, C, half);
    const Use use = {.mean = mean, .factor = factor, .mean_g = mean_g, .slope = slope, .dy = dy};
    if (mean && !half) {
        normalise_gradient(&s, y, &use);
        return;
    }
    const int rows = pool ? 2 : 1, groups = (H + rows - 1) / rows;
    THREADED
    for (int i = 0; i < N * groups; i++)
        backward_rows(&s, i / groups, i % groups * rows, y, scale, shift, grad, &use);
}
