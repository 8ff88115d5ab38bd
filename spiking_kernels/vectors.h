/* Vectors of WIDTH numbers in AVX-512 or in AVX2, whichever the processor has. Without both, WIDTH is not defined, and the
 * loops in plain C do everything. */

#include "common.h"

#if defined(__AVX512F__)
#define WIDTH 16
typedef __m512 Vector;
typedef __m512i Words; /* WIDTH words of 32 bits, or half as many of 64 */
typedef __mmask16 Mask;
#define OPERATION(name) _mm512_##name
#define OF_WORDS(name) _mm512_##name##_si512
#elif defined(__AVX2__) && defined(__FMA__)
#define WIDTH 8
typedef __m256 Vector;
typedef __m256i Words;
typedef __m256 Mask;
#define OPERATION(name) _mm256_##name
#define OF_WORDS(name) _mm256_##name##_si256
#endif

#ifdef WIDTH
static INLINE Vector v_all(float x) { return OPERATION(set1_ps)(x); }
static INLINE Vector v_load(const float *x) { return OPERATION(loadu_ps)(x); }
static INLINE void v_store(float *x, Vector a) { OPERATION(storeu_ps)(x, a); }
static INLINE void v_stream(float *x, Vector a) { OPERATION(stream_ps)(x, a); } /* past the cache; x is aligned */
static INLINE Vector v_add(Vector a, Vector b) { return OPERATION(add_ps)(a, b); }
static INLINE Vector v_sub(Vector a, Vector b) { return OPERATION(sub_ps)(a, b); }
static INLINE Vector v_mul(Vector a, Vector b) { return OPERATION(mul_ps)(a, b); }
static INLINE Vector v_div(Vector a, Vector b) { return OPERATION(div_ps)(a, b); }
static INLINE Vector v_fma(Vector a, Vector b, Vector c) { return OPERATION(fmadd_ps)(a, b, c); }
static INLINE Vector v_sqrt(Vector a) { return OPERATION(sqrt_ps)(a); }
static INLINE Vector v_max(Vector a, Vector b) { return OPERATION(max_ps)(a, b); } /* b if one is NaN */

#if WIDTH == 16
static INLINE Vector v_signs(const int8_t *x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)x)));
}
static INLINE Mask v_greater(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static INLINE Mask v_equal(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static INLINE Mask v_differ(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); } /* also if NaN */
/* where |a| is larger than b, or NaN */
static INLINE Mask v_beyond(Vector a, Vector b) { return _mm512_cmp_ps_mask(_mm512_abs_ps(a), b, _CMP_NLE_UQ); }
static INLINE Mask v_both(Mask a, Mask b) { return a & b; }
static INLINE unsigned v_bits(Mask a) { return a; }
static INLINE Vector v_where(Mask a, Vector x) { return _mm512_maskz_mov_ps(a, x); } /* 0 elsewhere */
/* The first numbers of x in turn where the mask is, 0 elsewhere; may read WIDTH of them. */
static INLINE Vector v_spread(Mask a, const float *x) { return _mm512_maskz_expandloadu_ps(a, x); }

static INLINE Words v_all64(uint64_t x) { return _mm512_set1_epi64((long long)x); }
static INLINE Words v_even64(void) { return _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14); }
static INLINE Words v_xor3(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
static INLINE Words v_alternate(Words a, Words b) { return _mm512_mask_blend_epi32(0xAAAA, a, b); }
#else
static INLINE Vector v_signs(const int8_t *x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
}
static INLINE Mask v_greater(Vector a, Vector b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
static INLINE Mask v_equal(Vector a, Vector b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static INLINE Mask v_differ(Vector a, Vector b) { return _mm256_cmp_ps(a, b, _CMP_NEQ_UQ); }
static INLINE Mask v_beyond(Vector a, Vector b) {
    return _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a), b, _CMP_NLE_UQ);
}
static INLINE Mask v_both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
static INLINE unsigned v_bits(Mask a) { return (unsigned)_mm256_movemask_ps(a); }
static INLINE Vector v_where(Mask a, Vector x) { return _mm256_and_ps(a, x); }
static INLINE Vector v_spread(Mask a, const float *x) {
    const uint64_t ones = 0x0101010101010101u; /* of each byte */
    const uint64_t found = ((v_bits(a) * ones & 0x8040201008040201u) + 0x7F * ones) >> 7 & ones; /* 0 or 1 */
    const uint64_t before = found * ones << 8; /* how many there are before each */
    const Words places = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)before));
    return v_where(a, _mm256_permutevar8x32_ps(v_load(x), places));
}

static INLINE Words v_all64(uint64_t x) { return _mm256_set1_epi64x((long long)x); }
static INLINE Words v_even64(void) { return _mm256_setr_epi64x(0, 2, 4, 6); }
static INLINE Words v_xor3(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
static INLINE Words v_alternate(Words a, Words b) { return _mm256_blend_epi32(a, b, 0xAA); } /* b's in odd places */
#endif
#endif
