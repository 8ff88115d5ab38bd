/* Random numbers for Deep R, from a counter-based generator: each is a function of the step's seed and of its place,
 * whatever the number of threads. Weights are taken in groups. Each group has a sequence of as many normal numbers, made
 * BATCH at a time; hard Deep R, where only active connections feel noise, makes no more than it needs. */

#include "vectors.h"

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
#ifdef WIDTH
/* One round for some counters, each word in the lower half of 64 bits; the upper halves hold what nobody reads. */
static INLINE void philox_round(Words c[4], Words k0, Words k1) {
    const Words a = OPERATION(mul_epu32)(c[0], v_all64(PHILOX_M0)), b = OPERATION(mul_epu32)(c[2], v_all64(PHILOX_M1));
    c[0] = v_xor3(OPERATION(srli_epi64)(b, 32), c[1], k0);
    c[2] = v_xor3(OPERATION(srli_epi64)(a, 32), c[3], k1);
    c[1] = b;
    c[3] = a;
}

static INLINE void philox(uint64_t seed, int64_t first, uint32_t stream, uint32_t x[4][LANES]) {
    for (int at = 0; at < LANES; at += WIDTH) {
        Words even[4], odd[4];
        even[0] = OPERATION(add_epi64)(v_all64((uint64_t)first + (uint64_t)at), v_even64());
        odd[0] = OPERATION(add_epi64)(even[0], v_all64(1));
        even[1] = OPERATION(srli_epi64)(even[0], 32);
        odd[1] = OPERATION(srli_epi64)(odd[0], 32);
        even[2] = odd[2] = v_all64(stream);
        even[3] = odd[3] = v_all64(0);
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        _Pragma("GCC unroll 10")
        for (int round = 0; round < 10; round++) {
            philox_round(even, v_all64(k0), v_all64(k1));
            philox_round(odd, v_all64(k0), v_all64(k1));
            k0 += PHILOX_W0, k1 += PHILOX_W1;
        }
        for (int word = 0; word < 4; word++)
            OF_WORDS(storeu)((void *)(x[word] + at), v_alternate(even[word], OPERATION(slli_epi64)(odd[word], 32)));
    }
}
#else
static INLINE void philox(uint64_t seed, int64_t first, uint32_t stream, uint32_t x[4][LANES]) {
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

/* Two independent normal numbers, times scale, from two random words (Box and Muller 1958): in float32, up to 6.66
 * standard deviations. The polynomials are minimax fits, with errors below half a unit in the last place of float32. */
static INLINE void box_muller(uint32_t x, uint32_t y, float scale, float *first, float *second) {
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
