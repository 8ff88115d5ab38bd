/* What the kernels share. All arrays are contiguous float32 unless said otherwise. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16 /* numbers at a time; outputs are padded to a multiple of it */
#define THREADED _Pragma("omp parallel for schedule(static)")
#define SIMD _Pragma("omp simd")
