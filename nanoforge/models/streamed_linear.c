/* y = x W^T for rows of x: every weight is read from memory once, as fast as the memory gives it.

   W: (rows, cols) float32 or bfloat16; x: (batch, cols), y: (batch, rows), both float32 or both bfloat16. Sums are
   float32. Built by streamed_linear.py; threads are those of the OpenMP library that PyTorch has loaded.

   linear_* is for a few rows of x, for which memory takes the time, tiled_* for more, for which arithmetic does. */

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

/* Of many rows of x: 6 rows of W and 16 of x have their 96 sums in 12 registers, for BLOCK columns at a time. */
enum { ROWS = 6, WIDTH = 16, BLOCK = 256, LINE = 16 /* floats that memory gives at once */ };

typedef float vec __attribute__((vector_size(32), aligned(4)));

#if defined(__x86_64__)
#define KEEP_IN_REGISTER(V) __asm__("" : "+x"(V)) /* or each product would read it again */
#else
#define KEEP_IN_REGISTER(V)
#endif

/* sums (ROWS, WIDTH) += w (ROWS, n), whose rows are `stride` apart, times x (n, WIDTH). The next rows are fetched. */
static inline __attribute__((always_inline)) void add_tile(float *sums, const float *w, int64_t stride, const float *x,
                                                           int64_t n)
{
    vec s[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int half = 0; half < 2; half++)
            s[r][half] = *(const vec *)(sums + r * WIDTH + half * 8);
    for (int64_t i = 0; i < n; i++) {
        vec low = *(const vec *)(x + i * WIDTH), high = *(const vec *)(x + i * WIDTH + 8);
        KEEP_IN_REGISTER(low);
        KEEP_IN_REGISTER(high);
        if (i % LINE == 0)
            for (int r = 0; r < ROWS; r++)
                __builtin_prefetch(w + (ROWS + r) * stride + i);
        for (int r = 0; r < ROWS; r++) {
            s[r][0] += w[r * stride + i] * low;
            s[r][1] += w[r * stride + i] * high;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int half = 0; half < 2; half++)
            *(vec *)(sums + r * WIDTH + half * 8) = s[r][half];
}

/* tiles: room for x in float32, (ceil(batch / WIDTH), cols, WIDTH). Rows of W that are not float32, and the last ones,
   become float32 a block at a time. */
#define TILED(W, X)                                                                                                    \
    void tiled_##W##_##X(const W *w, const X *x, X *y, int64_t rows, int64_t cols, int64_t batch, float *tiles)        \
    {                                                                                                                  \
        int64_t n_tiles = (batch + WIDTH - 1) / WIDTH;                                                                 \
        _Pragma("omp parallel")                                                                                        \
        {                                                                                                              \
            _Pragma("omp for schedule(static)")                                                                        \
            for (int64_t at = 0; at < n_tiles * cols; at++)                                                            \
                for (int64_t b = 0, row = at / cols * WIDTH; b < WIDTH; b++, row++)                                    \
                    tiles[at * WIDTH + b] = row < batch ? read_##X(x[row * cols + at % cols]) : 0;                     \
            _Pragma("omp for schedule(static) nowait")                                                                 \
            for (int64_t row = 0; row < rows; row += ROWS) {                                                           \
                int64_t n_rows = rows - row < ROWS ? rows - row : ROWS;                                                \
                for (int64_t tile = 0; tile < n_tiles; tile++) {                                                       \
                    float sums[ROWS * WIDTH] = {0};                                                                    \
                    for (int64_t start = 0; start < cols; start += BLOCK) {                                            \
                        int64_t n = cols - start < BLOCK ? cols - start : BLOCK;                                       \
                        const float *in = tiles + (tile * cols + start) * WIDTH;                                       \
                        const W *from = w + row * cols + start;                                                        \
                        if (sizeof(W) == sizeof(float) && n_rows == ROWS) {                                            \
                            add_tile(sums, (const float *)from, cols, in, n);                                          \
                            continue;                                                                                  \
                        }                                                                                              \
                        float block[ROWS * BLOCK];                                                                     \
                        for (int64_t r = 0; r < ROWS; r++) {                                                           \
                            const W *from_row = from + (r < n_rows ? r : 0) * cols;                                    \
                            for (int64_t i = 0; i < n; i += 2 * LINE)                                                  \
                                __builtin_prefetch(from_row + ROWS * cols + i);                                        \
                            for (int64_t i = 0; i < n; i++)                                                            \
                                block[r * BLOCK + i] = read_##W(from_row[i]);                                          \
                        }                                                                                              \
                        add_tile(sums, block, BLOCK, in, n);                                                           \
                    }                                                                                                  \
                    for (int64_t b = tile * WIDTH; b < batch && b < (tile + 1) * WIDTH; b++)                           \
                        for (int64_t r = 0; r < n_rows; r++)                                                           \
                            y[b * rows + row + r] = write_##X(sums[r * WIDTH + b % WIDTH]);                            \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

TILED(float32, float32)
TILED(float32, bfloat16)
TILED(bfloat16, float32)
TILED(bfloat16, bfloat16)
