/* A convolution of spikes: 3 x 3, stride 1, padded by 1 with zeros, without bias. And the gradient of its weights.
 *
 * Images are channels-last, the spikes [M][H][W][C], the output [M][H][W][O]; all is float32. A spike is 1, and most
 * neurons are silent. So the kernels list the spikes, and for each one add what it meets: its weights to the output, or
 * the output's gradients to those of its weights. Nothing is multiplied, and the sums' order does not depend on the
 * number of threads.
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
static INLINE unsigned v_bits(int a) { return (unsigned)a; }
static INLINE int v_both(int a, int b) { return a && b; }
static INLINE int v_differ(Vector a, Vector b) { return a != b; }
#endif

#define GROUP 32              /* channels at a time: C and O are multiples of it */
#define PER (GROUP / WIDTH)   /* vectors */
#define ROWS 8                /* of an image at a time, for the gradient of the weights */
#define UNROLLED _Pragma("GCC unroll 32")

/* Bit i is set where x[i] is not 0, of GROUP numbers; *foreign, too, where one is neither 0 nor 1. */
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
 * a pixel in rows of W + 2. */
static void list_spikes(const float *spikes, uint16_t *places, int *many, int rows, int W, int C, int most) {
    uint32_t foreign = 0; /* the forward pass has looked */
    memset(many, 0, sizeof(int) * C);
    for (int row = 0; row < rows; row++)
        for (int x = 0; x < W; x++, spikes += C)
            for (int c = 0; c < C; c += GROUP)
                for (uint32_t left = spikes_of(spikes + c, &foreign); left; left &= left - 1) {
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
 * [parts][3][3][C][O] is scratch, for the sums over the images of each part. */
void convolution_backward(const float *spikes, const float *grad, float *partial, float *total, int parts, int M, int H,
                          int W, int C, int O) {
    const size_t apart = (size_t)C * O, size = 9 * apart;
    const int most = ROWS * W;
    THREADED
    for (int part = 0; part < parts; part++) {
        uint16_t places[(size_t)C * most];
        float padded[(size_t)(ROWS + 2) * (W + 2) * GROUP];
        int many[C];
        float *sums = partial + part * size;
        memset(sums, 0, sizeof(float) * size);
        memset(padded, 0, sizeof(padded));
        for (int m = (int)((int64_t)M * part / parts); m < (int64_t)M * (part + 1) / parts; m++)
            for (int first = 0; first < H; first += ROWS) {
                const int rows = smaller(ROWS, H - first);
                list_spikes(spikes + ((size_t)m * H + first) * W * C, places, many, rows, W, C, most);
                for (int o = 0; o < O; o += GROUP) {
                    copy_padded(grad + (size_t)m * H * W * O + o, padded, first, rows, H, W, O);
                    for (int c = 0; c < C; c++)
                        for (int kh = 0; kh < 3 && many[c]; kh++)
                            add_met(places + (size_t)c * most, many[c], padded + (size_t)(2 - kh) * (W + 2) * GROUP,
                                    sums + 3 * kh * apart + (size_t)c * O + o, apart);
                }
            }
    }
    THREADED
    for (int i = 0; i < 9 * C; i++) {
        float *to = total + (size_t)i * O;
        memcpy(to, partial + (size_t)i * O, sizeof(float) * O);
        for (int part = 1; part < parts; part++) {
            const float *from = partial + part * size + (size_t)i * O;
            for (int o = 0; o < O; o++) to[o] += from[o];
        }
    }
}
