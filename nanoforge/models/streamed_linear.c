/* y = x W^T for a few rows of x: every weight is read from memory once, as fast as the memory gives it.

   W: (rows, cols) float32 or bfloat16; x: (batch, cols), y: (batch, rows), both float32 or both bfloat16. Sums are
   float32. Built by streamed_linear.py; threads are those of the OpenMP library that PyTorch has loaded. */

#include <stdint.h>
#include <string.h>

typedef float float32;
typedef uint16_t bfloat16; /* the upper half of a float32 */

static inline float read_float32(float32 value) { return value; }
static inline float32 write_float32(float value) { return value; }

static inline float read_bfloat16(bfloat16 value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline bfloat16 write_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* rounded to the nearest, ties to even */
}

/* Four rows of W at a time share a value of x, and their sums don't wait for each other. */
#define LINEAR(W, X)                                                                                                   \
    void linear_##W##_##X(const W *w, const X *x, X *y, int64_t rows, int64_t cols, int64_t batch)                     \
    {                                                                                                                  \
        _Pragma("omp parallel")                                                                                        \
        {                                                                                                              \
            float values[batch * cols];                                                                                \
            for (int64_t i = 0; i < batch * cols; i++)                                                                 \
                values[i] = read_##X(x[i]);                                                                            \
            _Pragma("omp for schedule(static) nowait")                                                                 \
            for (int64_t row = 0; row < rows; row += 4) {                                                              \
                int64_t last = rows - 1 - row;                                                                         \
                const W *w0 = w + row * cols;                                                                          \
                const W *w1 = w0 + (last < 1 ? 0 : cols);                                                              \
                const W *w2 = w0 + (last < 2 ? 0 : 2 * cols);                                                          \
                const W *w3 = w0 + (last < 3 ? 0 : 3 * cols);                                                          \
                for (int64_t b = 0; b < batch; b++) {                                                                  \
                    const float *v = values + b * cols;                                                                \
                    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                              \
                    _Pragma("omp simd reduction(+ : s0, s1, s2, s3)")                                                  \
                    for (int64_t i = 0; i < cols; i++) {                                                               \
                        s0 += v[i] * read_##W(w0[i]);                                                                  \
                        s1 += v[i] * read_##W(w1[i]);                                                                  \
                        s2 += v[i] * read_##W(w2[i]);                                                                  \
                        s3 += v[i] * read_##W(w3[i]);                                                                  \
                    }                                                                                                  \
                    float sums[4] = {s0, s1, s2, s3};                                                                  \
                    for (int64_t i = 0; i < 4 && i <= last; i++)                                                       \
                        y[b * rows + row + i] = write_##X(sums[i]);                                                    \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

LINEAR(float32, float32)
LINEAR(float32, bfloat16)
LINEAR(bfloat16, float32)
LINEAR(bfloat16, bfloat16)
