/* A convolution of spikes: 3 x 3, stride 1, padded by 1 with zeros, without bias. And its gradients.
 *
 * Images are channels-last, the spikes [M][H][W][C], the output [M][H][W][O]; all is float32. A spike is 1, and most
 * neurons are silent. So the kernels list the spikes, and for each one add what it meets: its weights to the output, or
 * the output's gradients to those of its weights. There, nothing is multiplied. The gradient of the spikes is made from
 * the weights that are left, if most are pruned: each multiplies the gradients that it meets. The order of the sums does
 * not depend on the number of threads.
 */

#include "vectors.h"

#ifdef WIDTH
#define FAST 1
#else /* one number at a time */
#define FAST 0
#define WIDTH 1
typedef float Vector;
static INLINE Vector v_all(float x) { return x; }
static INLINE Vector v_load(const float *x) { return *x; }
static INLINE void v_store(float *x, Vector a) { *x = a; }
static INLINE Vector v_add(Vector a, Vector b) { return a + b; }
static INLINE Vector v_fma(Vector a, Vector b, Vector c) { return a * b + c; }
static INLINE unsigned v_bits(int a) { return (unsigned)a; }
static INLINE int v_both(int a, int b) { return a && b; }
static INLINE int v_differ(Vector a, Vector b) { return a != b; }
#endif

#define GROUP 32              /* channels at a time: C and O are multiples of it */
#define PER (GROUP / WIDTH)   /* vectors */
#define ROWS 8                /* of an image at a time, for the gradient of the weights */
#define STRIP 4               /* rows of an image at a time, for that of the spikes */
#define RUN (8 * WIDTH)       /* of its pixels, one row behind the other, at a time */
#define UNROLLED _Pragma("GCC unroll 32")

/* Bit i is set where x[i] is not 0, of GROUP numbers. *foreign is other than 0 if one is neither 0 nor 1. */
static INLINE uint32_t spikes_of(const float *x, uint32_t *foreign) {
    uint32_t found = 0;
    UNROLLED
    for (int i = 0; i < PER; i++) {
        const Vector some = v_load(x + i * WIDTH);
        found |= (uint32_t)v_bits(v_differ(some, v_all(0.0f))) << (i * WIDTH);
        *foreign |= v_bits(v_both(v_differ(some, v_all(0.0f)), v_differ(some, v_all(1.0f))));
    }
    return found;
}

/* x += a, of GROUP numbers */
static INLINE void add_group(float *x, const Vector *a) {
    UNROLLED
    for (int i = 0; i < PER; i++) v_store(x + i * WIDTH, v_add(v_load(x + i * WIDTH), a[i]));
}

/* The first of the images of a part. */
static inline int first_image(int M, int parts, int part) { return (int)((int64_t)M * part / parts); }

/* Whether the processor has vectors for which these kernels are made. */
int convolution_fast(void) { return FAST; }

/* -- forward ------------------------------------------------------------------------------------- */

/* Adds to a row of the output, [W][O] from some group of channels on, what the spikes of a row meet in one row of the
 * filters: weights [C][3][GROUP], those of the output to the right of a spike first.
 *
 * The spikes are listed by pixel: those of pixel x, `many[x]`, from channels[x * C] on. Each output has its last spikes
 * from the pixel to its right: so three sums are on their way at a time. */
static void add_row(const uint16_t *channels, const int *many, const float *weights, float *y, int W, int C, int O) {
    Vector left[PER], here[PER], right[PER]; /* the sums of outputs x - 1, x, x + 1 */
    UNROLLED
    for (int i = 0; i < PER; i++) left[i] = here[i] = v_all(0.0f);
    for (int x = 0; x < W; x++) {
        UNROLLED
        for (int i = 0; i < PER; i++) right[i] = v_all(0.0f);
        for (int k = 0; k < many[x]; k++) {
            const float *from = weights + (size_t)channels[(size_t)x * C + k] * 3 * GROUP;
            UNROLLED
            for (int i = 0; i < PER; i++) {
                right[i] = v_add(right[i], v_load(from + i * WIDTH));
                here[i] = v_add(here[i], v_load(from + GROUP + i * WIDTH));
                left[i] = v_add(left[i], v_load(from + 2 * GROUP + i * WIDTH));
            }
        }
        if (x) add_group(y + (size_t)(x - 1) * O, left);
        UNROLLED
        for (int i = 0; i < PER; i++) left[i] = here[i], here[i] = right[i];
    }
    add_group(y + (size_t)(W - 1) * O, left);
}

/* The convolution y of spikes. weights [O / GROUP][3][C][3][GROUP]: groups of outputs, rows of the filters, inputs,
 * columns of the filters, outputs.
 *
 * Returns 1 if a number is no spike, neither 0 nor 1; then y is not complete. */
int convolution_forward(const float *spikes, const float *weights, float *y, int M, int H, int W, int C, int O) {
    int refused = 0;
    _Pragma("omp parallel for schedule(static) reduction(| : refused)")
    for (int m = 0; m < M; m++) {
        uint16_t channels[(size_t)W * C];
        int many[W];
        uint32_t foreign = 0;
        float *image = y + (size_t)m * H * W * O;
        memset(image, 0, sizeof(float) * H * W * O);
        for (int row = 0; row < H; row++) {
            const float *from = spikes + ((size_t)m * H + row) * W * C;
            for (int x = 0; x < W; x++) {
                uint16_t *to = channels + (size_t)x * C;
                for (int c = 0; c < C; c += GROUP)
                    for (uint32_t left = spikes_of(from + (size_t)x * C + c, &foreign); left; left &= left - 1)
                        *to++ = (uint16_t)(c + __builtin_ctz(left));
                many[x] = (int)(to - (channels + (size_t)x * C));
            }
            for (int o = 0; o < O; o += GROUP)
                for (int kh = 0; kh < 3; kh++) {
                    const int to = row + 1 - kh;
                    if (to >= 0 && to < H)
                        add_row(channels, many, weights + ((size_t)o / GROUP * 3 + kh) * C * 3 * GROUP,
                                image + (size_t)to * W * O + o, W, C, O);
                }
        }
        refused |= foreign != 0;
    }
    return refused;
}

/* -- the gradient of the weights ------------------------------------------------------------------ */

/* Lists the spikes of some rows by channel: those of channel c, `many[c]`, from places[c * most] on. A place is that of
 * a pixel in rows of W + 2. *foreign is as in spikes_of. */
static void list_spikes(const float *spikes, uint16_t *places, int *many, uint32_t *foreign, int rows, int W, int C,
                        int most) {
    memset(many, 0, sizeof(int) * C);
    for (int row = 0; row < rows; row++)
        for (int x = 0; x < W; x++, spikes += C)
            for (int c = 0; c < C; c += GROUP)
                for (uint32_t left = spikes_of(spikes + c, foreign); left; left &= left - 1) {
                    const int channel = c + __builtin_ctz(left);
                    places[(size_t)channel * most + many[channel]++] = (uint16_t)(row * (W + 2) + x);
                }
}

/* Copies rows first - 1 to first + rows of a group of an image's gradients, [H][W][O] from that group on, to
 * [rows + 2][W + 2][GROUP], with zeros around the image. The columns at both ends are zeros already. */
static void copy_padded(const float *grad, float *to, int first, int rows, int H, int W, int O) {
    for (int row = first - 1; row <= first + rows; row++, to += (size_t)(W + 2) * GROUP) {
        if (row < 0 || row >= H) {
            memset(to + GROUP, 0, sizeof(float) * W * GROUP);
            continue;
        }
        for (int x = 0; x < W; x++)
            memcpy(to + (size_t)(x + 1) * GROUP, grad + ((size_t)row * W + x) * O, sizeof(float) * GROUP);
    }
}

/* Adds to the gradients of one row of the filters, of one input and a group of outputs, those that its spikes meet.
 * `grad` is padded; sums has 3 rows of GROUP numbers, `apart` from each other, that of the outputs to the right of a spike
 * first. */
static INLINE void add_met(const uint16_t *places, int many, const float *grad, float *sums, size_t apart) {
    Vector sum[3][PER];
    UNROLLED
    for (int kw = 0; kw < 3; kw++) {
        UNROLLED
        for (int i = 0; i < PER; i++) sum[kw][i] = v_load(sums + kw * apart + i * WIDTH);
    }
    for (int k = 0; k < many; k++) {
        const float *from = grad + (size_t)places[k] * GROUP;
        UNROLLED
        for (int kw = 0; kw < 3; kw++) {
            UNROLLED
            for (int i = 0; i < PER; i++)
                sum[kw][i] = v_add(sum[kw][i], v_load(from + (2 - kw) * GROUP + i * WIDTH));
        }
    }
    UNROLLED
    for (int kw = 0; kw < 3; kw++) {
        UNROLLED
        for (int i = 0; i < PER; i++) v_store(sums + kw * apart + i * WIDTH, sum[kw][i]);
    }
}

/* The gradient total [3][3][C][O] of the weights: rows and columns of the filters, inputs, outputs. partial
 * [parts][3][3][C][O] is scratch, for the sums over the images of each part.
 *
 * Returns 1 if a number is no spike; then the gradient is not complete. */
int convolution_weights_gradient(const float *spikes, const float *grad, float *partial, float *total, int parts,
                                 int M, int H, int W, int C, int O) {
    const size_t apart = (size_t)C * O, size = 9 * apart;
    const int most = ROWS * W;
    int refused = 0;
    _Pragma("omp parallel for schedule(static) reduction(| : refused)")
    for (int part = 0; part < parts; part++) {
        uint16_t places[(size_t)C * most];
        float padded[(size_t)(ROWS + 2) * (W + 2) * GROUP];
        int many[C];
        uint32_t foreign = 0;
        float *sums = partial + part * size;
        memset(sums, 0, sizeof(float) * size);
        memset(padded, 0, sizeof(padded));
        for (int m = first_image(M, parts, part); m < first_image(M, parts, part + 1); m++)
            for (int first = 0; first < H; first += ROWS) {
                const int rows = smaller(ROWS, H - first);
                list_spikes(spikes + ((size_t)m * H + first) * W * C, places, many, &foreign, rows, W, C,
                            most);
                for (int o = 0; o < O; o += GROUP) {
                    copy_padded(grad + (size_t)m * H * W * O + o, padded, first, rows, H, W, O);
                    for (int c = 0; c < C; c++)
                        for (int kh = 0; kh < 3 && many[c]; kh++)
                            add_met(places + (size_t)c * most, many[c], padded + (size_t)(2 - kh) * (W + 2) * GROUP,
                                    sums + 3 * kh * apart + (size_t)c * O + o, apart);
                }
            }
        refused |= foreign != 0;
    }
    if (refused) return 1;
    THREADED
    for (int i = 0; i < 9 * C; i++) {
        float *to = total + (size_t)i * O;
        memcpy(to, partial + (size_t)i * O, sizeof(float) * O);
        for (int part = 1; part < parts; part++) {
            const float *from = partial + part * size + (size_t)i * O;
            for (int o = 0; o < O; o++) to[o] += from[o];
        }
    }
    return 0;
}

/* -- the gradient of the spikes ------------------------------------------------------------------- */

#ifdef __AVX2__
static INLINE void transpose_8(const float *from, size_t from_step, float *to, size_t to_step) {
    __m256 a[8], b[8];
    UNROLLED
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(from + i * from_step);
    UNROLLED
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLLED
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
    }
    UNROLLED
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_step, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_step, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}
#endif

/* to [columns][rows] is the transposed matrix from [rows][columns]; the steps are from one row to the next. */
static void transpose(const float *from, size_t from_step, float *to, size_t to_step, int rows, int columns) {
    int tiled_rows = 0, tiled_columns = 0;
#ifdef __AVX2__
    tiled_rows = rows & ~7, tiled_columns = columns & ~7;
    for (int r = 0; r < tiled_rows; r += 8)
        for (int c = 0; c < tiled_columns; c += 8)
            transpose_8(from + r * from_step + c, from_step, to + c * to_step + r, to_step);
#endif
    for (int r = 0; r < rows; r++)
        for (int c = r < tiled_rows ? tiled_columns : 0; c < columns; c++) to[c * to_step + r] = from[r * from_step + c];
}

/* Numbers of a plane: STRIP + 2 rows of W + 2 pixels of a channel, and what vectors read behind them. */
int convolution_plane(int W) { return ((STRIP + 2) * (W + 2) + 2 + WIDTH + 15) / 16 * 16; }

/* Lists the weights [O][C][3][3] that are not 0: those of input c from starts[c] on, each with the place of the gradient
 * that it brings to pixel 0, in planes of `plane` numbers. */
static void list_weights(const float *weights, int *starts, int *places, float *values, int plane, int W, int C, int O) {
    int k = 0;
    for (int c = 0; c < C; c++) {
        starts[c] = k;
        for (int o = 0; o < O; o++)
            for (int i = 0; i < 9; i++) {
                const float value = weights[((size_t)o * C + c) * 9 + i];
                if (value == 0.0f) continue;
                places[k] = o * plane + (2 - i / 3) * (W + 2) + 2 - i % 3;
                values[k++] = value;
            }
    }
    starts[C] = k;
}

/* The sums of `many` weights times what they meet, for n pixels; to holds a multiple of WIDTH. */
static void add_weighted(const int *places, const float *values, int many, const float *planes, float *to, int n) {
    int at = 0;
    for (; at + RUN <= n; at += RUN) {
        Vector sum[RUN / WIDTH];
        UNROLLED
        for (int i = 0; i < RUN / WIDTH; i++) sum[i] = v_all(0.0f);
        for (int k = 0; k < many; k++) {
            const float *from = planes + places[k] + at;
            const Vector value = v_all(values[k]);
            UNROLLED
            for (int i = 0; i < RUN / WIDTH; i++) sum[i] = v_fma(v_load(from + i * WIDTH), value, sum[i]);
        }
        UNROLLED
        for (int i = 0; i < RUN / WIDTH; i++) v_store(to + at + i * WIDTH, sum[i]);
    }
    for (; at < n; at += WIDTH) {
        Vector sum = v_all(0.0f);
        for (int k = 0; k < many; k++) sum = v_fma(v_load(planes + places[k] + at), v_all(values[k]), sum);
        v_store(to + at, sum);
    }
}

/* The gradient of the spikes, [M][H][W][C], from that of the output. weights [O][C][3][3]. Scratch: starts [C + 1], places
 * and values [9 C O], and for each part of the images planes [parts][O][plane]. */
void convolution_spikes_gradient(const float *weights, const float *grad, float *to, int *starts, int *places,
                                 float *values, float *planes, int parts, int M, int H, int W, int C, int O) {
    const int plane = convolution_plane(W), pitch = W + 2;
    list_weights(weights, starts, places, values, plane, W, C, O);
    THREADED
    for (int part = 0; part < parts; part++) {
        float *const own = planes + (size_t)part * O * plane;
        float sums[8][STRIP * pitch + WIDTH];
        memset(own, 0, sizeof(float) * O * plane); /* the columns at both ends stay zeros */
        for (int m = first_image(M, parts, part); m < first_image(M, parts, part + 1); m++)
            for (int first = 0; first < H; first += STRIP) {
                const int rows = smaller(STRIP, H - first);
                for (int i = 0; i < rows + 2; i++) {
                    const int row = first + i - 1;
                    float *const at = own + (size_t)i * pitch + 1;
                    if (row >= 0 && row < H)
                        transpose(grad + ((size_t)m * H + row) * W * O, O, at, plane, W, O);
                    else
                        for (int o = 0; o < O; o++) memset(at + (size_t)o * plane, 0, sizeof(float) * W);
                }
                for (int c = 0; c < C; c += 8) {
                    for (int i = 0; i < 8; i++) {
                        const int start = starts[c + i], many = starts[c + i + 1] - start;
                        add_weighted(places + start, values + start, many, own, sums[i], rows * pitch);
                    }
                    for (int i = 0; i < rows; i++)
                        transpose(sums[0] + (size_t)i * pitch, STRIP * pitch + WIDTH,
                                  to + ((size_t)m * H + first + i) * W * C + c, C, 8, W);
                }
            }
    }
}
