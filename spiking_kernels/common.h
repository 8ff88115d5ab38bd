/* What the kernels share. All arrays are contiguous float32 unless said otherwise. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define LANES 16 /* numbers at a time; outputs are padded to a multiple of it */
#define THREADED _Pragma("omp parallel for schedule(static)")
#define SIMD _Pragma("omp simd")
#define INLINE inline __attribute__((always_inline)) /* with constant flags, the branches on them go */

static inline int smaller(int a, int b) { return a < b ? a : b; }

/* Each thread that has written past the cache calls this before others read that: it orders the writes of its own. */
static inline void end_stream(void) {
#ifdef __AVX2__
    _mm_sfence();
#endif
}

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
