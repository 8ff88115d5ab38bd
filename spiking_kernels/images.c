/* Training images: picked, moved and normalised in one pass. */

#include "common.h"

#define COLUMNS 32 /* of a row, at a time: their places are computed as vectors */

/* Picks from images [D][height][width] (uint8) those of index [N] (int64), moves each by its matrix [N][6] (int32, 16.16
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
        for (int y = 0; y < height; y++, to += width)
            for (int first = 0; first < width; first += COLUMNS) {
                int32_t from[COLUMNS]; /* places in the image, and -1 outside of it */
                SIMD
                for (int i = 0; i < COLUMNS; i++) {
                    const int x = first + i;
                    /* unsigned, as what does not fit wraps round in the plain path, too */
                    int32_t column = (int32_t)(m[0] * (uint32_t)x + m[1] * (uint32_t)y + m[2]) >> 16;
                    int32_t row = (int32_t)(m[3] * (uint32_t)x + m[4] * (uint32_t)y + m[5]) >> 16;
                    int inside = (column >= 0) & (column < width) & (row >= 0) & (row < height);
                    from[i] = inside ? row * width + column : -1;
                }
                const int columns = smaller(COLUMNS, width - first);
                for (int i = 0; i < columns; i++) {
                    const uint8_t pixel = image[from[i] < 0 ? 0 : from[i]];
                    to[first + i] = table[from[i] < 0 ? 0 : pixel];
                }
            }
    }
    return 0;
}
