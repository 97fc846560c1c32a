/* Layers for decoding on a CPU: linear layers, RMSNorm, attention. Built by cpu_kernels.py; threads are those of the
   OpenMP library that PyTorch has loaded.

   Products y = x W^T read every weight from memory once. W: (rows, cols) float32 or bfloat16; x: (batch, cols),
   y: (batch, rows), both float32 or both bfloat16. Sums are float32. linear_* is for a few rows of x, for which memory
   takes the time, tiled_* for more, for which arithmetic does, and paired_* for processors that multiply bfloat16. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
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

/* Of many rows of x, 16 at a time: their sums with ROWS rows of W, of every STEPS-th column, stay in registers. More
   rows would be more places of memory that are read at once, fewer registers of sums would wait for each other. */
#if defined(__AVX512F__)
enum { VALUES = 16 /* of a register */, ROWS = 4, STEPS = 4 };
#else
enum { VALUES = 8, ROWS = 6, STEPS = 1 };
#endif
enum { WIDTH = 16, PARTS = WIDTH / VALUES, BLOCK = 256 };
enum { LINE = 64 }; /* bytes that memory gives at once */

typedef float vec __attribute__((vector_size(VALUES * sizeof(float)), aligned(4)));

#if defined(__AVX__)
#define KEEP_IN_REGISTER(V) __asm__("" : "+v"(V)) /* or each product would read it again */
#else
#define KEEP_IN_REGISTER(V)
#endif

/* Ask memory for `bytes` that follow each other. */
static inline void fetch(const void *from, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += LINE)
        __builtin_prefetch((const char *)from + i, 0, 2);
}

/* sums (ROWS, WIDTH) += w (ROWS, n), whose rows are `stride` apart, times x (n, WIDTH). Meanwhile the next weights are
   fetched, ROWS of `size` bytes for each column. */
static inline __attribute__((always_inline)) void add_tile(float *sums, const float *w, int64_t stride, const float *x,
                                                           int64_t n, const void *next, int64_t size)
{
    vec s[STEPS][ROWS][PARTS] = {0};
    int64_t i = 0;
    for (; i + STEPS <= n; i += STEPS) {
        if (i % 4 == 0)
            fetch((const char *)next + i * ROWS * size, 4 * ROWS * size);
        for (int step = 0; step < STEPS; step++)
            for (int part = 0; part < PARTS; part++) {
                vec v = *(const vec *)(x + (i + step) * WIDTH + part * VALUES);
                KEEP_IN_REGISTER(v);
                for (int r = 0; r < ROWS; r++)
                    s[step][r][part] += w[r * stride + i + step] * v;
            }
    }
    for (; i < n; i++)
        for (int r = 0; r < ROWS; r++)
            for (int part = 0; part < PARTS; part++)
                s[0][r][part] += w[r * stride + i] * *(const vec *)(x + i * WIDTH + part * VALUES);
    for (int r = 0; r < ROWS; r++)
        for (int part = 0; part < PARTS; part++)
            for (int step = 0; step < STEPS; step++)
                *(vec *)(sums + r * WIDTH + part * VALUES) += s[step][r][part];
}

/* tiles: room for x in float32, (ceil(batch / WIDTH), cols, WIDTH). Rows of W that are not float32, and the last ones,
   become float32 a block at a time. */
#define TILED(W, X)                                                                                                    \
    void tiled_##W##_##X(const W *w, const X *x, X *y, int64_t rows, int64_t cols, int64_t batch, float *tiles)        \
    {                                                                                                                  \
        int64_t n_tiles = (batch + WIDTH - 1) / WIDTH;                                                                 \
        _Pragma("omp parallel")                                                                                        \
        {                                                                                                              \
            for (int64_t tile = 0; tile < n_tiles; tile++) {                                                           \
                _Pragma("omp for schedule(static)")                                                                    \
                for (int64_t i = 0; i < cols; i++)                                                                     \
                    for (int64_t b = 0, row = tile * WIDTH; b < WIDTH; b++, row++)                                     \
                        tiles[(tile * cols + i) * WIDTH + b] = row < batch ? read_##X(x[row * cols + i]) : 0;          \
            }                                                                                                          \
            _Pragma("omp for schedule(static) nowait")                                                                 \
            for (int64_t row = 0; row < rows; row += ROWS) {                                                           \
                int64_t n_rows = rows - row < ROWS ? rows - row : ROWS;                                                \
                for (int64_t tile = 0; tile < n_tiles; tile++) {                                                       \
                    float sums[ROWS * WIDTH] = {0};                                                                    \
                    const float *in = tiles + tile * cols * WIDTH;                                                     \
                    const W *from = w + row * cols, *next = from + ROWS * cols;                                        \
                    if (sizeof(W) == sizeof(float) && n_rows == ROWS)                                                  \
                        add_tile(sums, (const float *)from, cols, in, cols, next, sizeof(W));                          \
                    else                                                                                               \
                        for (int64_t start = 0; start < cols; start += BLOCK) {                                        \
                            int64_t n = cols - start < BLOCK ? cols - start : BLOCK;                                   \
                            float block[ROWS * BLOCK];                                                                 \
                            for (int64_t r = 0; r < ROWS; r++)                                                         \
                                for (int64_t i = 0; i < n; i++)                                                        \
                                    block[r * BLOCK + i] = read_##W(from[(r < n_rows ? r : 0) * cols + start + i]);    \
                            add_tile(sums, block, BLOCK, in + start * WIDTH, n, next + start * ROWS, sizeof(W));       \
                        }                                                                                              \
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

/* With AMX: a processor's own products of bfloat16, 16 rows of W and 16 of x at a time. */
#if defined(__AMX_BF16__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* Linux: Documentation/arch/x86/xstate.rst */
enum { HEIGHT = 16, STEP = 32 }; /* rows of W, and columns, of a tile */

int prepare_amx(void) { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

/* Tile 0 has the sums, 1 and 2 have STEP columns of W and of x, 3 and 4 the columns that are left. */
static void configure_tiles(int64_t cols)
{
    int64_t left = cols % STEP;
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1, .row_bytes = {LINE, LINE, LINE}, .rows = {HEIGHT, HEIGHT, STEP / 2}};
    if (left) {
        config.row_bytes[3] = left * sizeof(bfloat16), config.rows[3] = HEIGHT;
        config.row_bytes[4] = LINE, config.rows[4] = left / 2;
    }
    _tile_loadconfig(&config);
}

/* sums (HEIGHT, WIDTH) = w (HEIGHT, cols) times x, (cols / 2, WIDTH) pairs. The next rows of W are fetched. */
static inline void multiply_tile(float *sums, const bfloat16 *w, int64_t cols, const uint32_t *x)
{
    int64_t i = 0, stride = cols * sizeof(*w);
    _tile_zero(0);
    for (; i + STEP <= cols; i += STEP) {
        fetch(w + HEIGHT * (cols + i), HEIGHT * STEP * sizeof(*w));
        _tile_loadd(1, w + i, stride);
        _tile_loadd(2, x + i / 2 * WIDTH, LINE);
        _tile_dpbf16ps(0, 1, 2);
    }
    if (i < cols) {
        _tile_loadd(3, w + i, stride);
        _tile_loadd(4, x + i / 2 * WIDTH, LINE);
        _tile_dpbf16ps(0, 3, 4);
    }
    _tile_stored(0, sums, LINE);
}

/* cols is even, rows at least HEIGHT. tiles: room for x, (ceil(batch / WIDTH), cols / 2, WIDTH) pairs of columns. */
void paired_bfloat16_bfloat16(const bfloat16 *w, const bfloat16 *x, bfloat16 *y, int64_t rows, int64_t cols,
                              int64_t batch, uint32_t *tiles)
{
    int64_t n_tiles = (batch + WIDTH - 1) / WIDTH, n_pairs = cols / 2;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n_tiles * n_pairs; i++)
            for (int64_t b = 0, row = i / n_pairs * WIDTH; b < WIDTH; b++, row++) {
                uint32_t pair = 0;
                if (row < batch)
                    memcpy(&pair, x + row * cols + i % n_pairs * 2, sizeof pair);
                tiles[i * WIDTH + b] = pair;
            }
        configure_tiles(cols);
#pragma omp for schedule(static) nowait
        for (int64_t at = 0; at < rows; at += HEIGHT) {
            int64_t row = at < rows - HEIGHT ? at : rows - HEIGHT; /* the last ones may be computed twice */
            for (int64_t tile = 0; tile < n_tiles; tile++) {
                float sums[HEIGHT * WIDTH];
                multiply_tile(sums, w + row * cols, cols, tiles + tile * n_pairs * WIDTH);
                for (int64_t b = tile * WIDTH; b < batch && b < (tile + 1) * WIDTH; b++)
                    for (int64_t r = 0; r < HEIGHT; r++)
                        y[b * rows + row + r] = write_bfloat16(sums[r * WIDTH + b % WIDTH]);
            }
        }
        _tile_release();
    }
}
#else
int prepare_amx(void) { return 0; }
#endif

/* y = x / sqrt(mean(x^2) + eps) of each row, times a gain if there is one. Both products are rounded, as PyTorch's. */
#define RMS_NORM(X)                                                                                                    \
    void rms_norm_##X(const X *x, const X *gain, X *y, int64_t batch, int64_t cols, float eps)                         \
    {                                                                                                                  \
        _Pragma("omp parallel for schedule(static) if (batch * cols > FEW_NUMBERS)")                                   \
        for (int64_t b = 0; b < batch; b++) {                                                                          \
            const X *row = x + b * cols;                                                                               \
            float squares = 0;                                                                                         \
            _Pragma("omp simd reduction(+ : squares)")                                                                 \
            for (int64_t i = 0; i < cols; i++)                                                                         \
                squares += read_##X(row[i]) * read_##X(row[i]);                                                        \
            float scale = 1 / sqrtf(squares / cols + eps);                                                             \
            for (int64_t i = 0; i < cols; i++) {                                                                       \
                X normalized = write_##X(read_##X(row[i]) * scale);                                                    \
                y[b * cols + i] = gain ? write_##X(read_##X(normalized) * read_##X(gain[i])) : normalized;             \
            }                                                                                                          \
        }                                                                                                              \
    }

enum { FEW_NUMBERS = 1 << 15 }; /* one thread is faster */

RMS_NORM(float32)
RMS_NORM(bfloat16)

/* e^x for x <= 0, to the last bits of a float32: a power of 2, times a polynomial of what is left. */
static inline float exponential(float x)
{
    x = x < -87 ? -87 : x; /* so that the power is not denormal */
    int32_t power = (int32_t)(x * 1.44269504f - 0.5f);
    float rest = (x - power * 0.693359375f) + power * 2.12194440e-4f; /* ln 2 in two parts */
    float series = 1.0f / 5040;
    series = series * rest + 1.0f / 720;
    series = series * rest + 1.0f / 120;
    series = series * rest + 1.0f / 24;
    series = series * rest + 1.0f / 6;
    series = series * rest + 0.5f;
    series = series * rest + 1;
    series = series * rest + 1;
    uint32_t bits = (uint32_t)(power + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return series * scale;
}

/* scores (n,), the largest of which is given, become probabilities. */
static inline void softmax(float *scores, int64_t n, float largest)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        scores[i] = exponential(scores[i] - largest);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += scores[i];
    for (int64_t i = 0; i < n; i++)
        scores[i] /= sum;
}

/* A query or a key, (size,), turned as model.py's RotaryPosition does; without angles it stays as it is. */
#define ROTATE(X)                                                                                                      \
    static inline void rotate_##X(const X *from, const X *cos, const X *sin, X *to, int64_t size)                      \
    {                                                                                                                  \
        if (!cos) {                                                                                                    \
            memcpy(to, from, size * sizeof(X));                                                                        \
            return;                                                                                                    \
        }                                                                                                              \
        for (int64_t i = 0, half = size / 2; i < size; i++) {                                                          \
            X turned = write_##X(read_##X(from[i]) * read_##X(cos[i]));                                                \
            X other = from[i < half ? i + half : i - half];                                                            \
            to[i] = write_##X(read_##X(turned) + read_##X(other) * read_##X(sin[i]));                                  \
        }                                                                                                              \
    }

ROTATE(float32)
ROTATE(bfloat16)

/* y (group, size): queries that share a head of n keys and values, (n, size). */
#define ATTEND_HEAD(X)                                                                                                 \
    static inline __attribute__((always_inline)) void attend_head_##X(                                                 \
        const float *queries, const X *keys, const X *values, X *y, int64_t group, int64_t n, int64_t size)            \
    {                                                                                                                  \
        float(*scores)[n] = malloc(group * sizeof(*scores)), largest[group];                                           \
        for (int64_t r = 0; r < group; r++)                                                                            \
            largest[r] = -INFINITY;                                                                                    \
        for (int64_t j = 0; j < n; j++) {                                                                              \
            fetch(values + j * size, size * sizeof(X));                                                                \
            float key[size];                                                                                           \
            for (int64_t i = 0; i < size; i++)                                                                         \
                key[i] = read_##X(keys[j * size + i]);                                                                 \
            for (int64_t r = 0; r < group; r++) {                                                                      \
                float score = 0;                                                                                       \
                _Pragma("omp simd reduction(+ : score)")                                                               \
                for (int64_t i = 0; i < size; i++)                                                                     \
                    score += queries[r * size + i] * key[i];                                                           \
                scores[r][j] = score;                                                                                  \
                largest[r] = score > largest[r] ? score : largest[r];                                                  \
            }                                                                                                          \
        }                                                                                                              \
        for (int64_t r = 0; r < group; r++) {                                                                          \
            softmax(scores[r], n, largest[r]);                                                                         \
            float sums[size];                                                                                          \
            for (int64_t i = 0; i < size; i++)                                                                         \
                sums[i] = 0;                                                                                           \
            for (int64_t j = 0; j < n; j++)                                                                            \
                for (int64_t i = 0; i < size; i++)                                                                     \
                    sums[i] += scores[r][j] * read_##X(values[j * size + i]);                                          \
            for (int64_t i = 0; i < size; i++)                                                                         \
                y[r * size + i] = write_##X(sums[i]);                                                                  \
        }                                                                                                              \
        free(scores);                                                                                                  \
    }

ATTEND_HEAD(float32)
ATTEND_HEAD(bfloat16)

/* Attention of one token of each sequence to the last `span` keys up to its own.

   q: (batch, n_head, size); k, v: (batch, n_kv_head, size); cos, sin: (batch, size), or none. Sequences are a stride
   apart. The token's key and value are written into the cache, (batch, keys and values, n_kv_head, n_keys, size), at
   its position. y: (batch, n_head, size). */
#define ATTEND(X)                                                                                                      \
    void attend_##X(const X *q, const X *k, const X *v, const X *cos, const X *sin, const int64_t *positions,          \
                    X *cache, X *y, int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t angle_stride,        \
                    int64_t batch, int64_t n_head, int64_t n_kv_head, int64_t n_keys, int64_t size, int64_t span,      \
                    float scale)                                                                                       \
    {                                                                                                                  \
        int64_t group = n_head / n_kv_head;                                                                            \
        _Pragma("omp parallel for collapse(2) schedule(static)")                                                       \
        for (int64_t b = 0; b < batch; b++)                                                                            \
            for (int64_t head = 0; head < n_kv_head; head++) {                                                         \
                /* 1. Write the key and the value. */                                                                  \
                const X *row_cos = cos ? cos + b * angle_stride : 0, *row_sin = cos ? sin + b * angle_stride : 0;      \
                X *keys = cache + (b * 2 * n_kv_head + head) * n_keys * size;                                          \
                X *values = keys + n_kv_head * n_keys * size;                                                          \
                int64_t position = positions[b];                                                                       \
                rotate_##X(k + b * k_stride + head * size, row_cos, row_sin, keys + position * size, size);            \
                memcpy(values + position * size, v + b * v_stride + head * size, size * sizeof(X));                    \
                                                                                                                       \
                /* 2. Rotate the queries that share them. */                                                           \
                float queries[group][size];                                                                            \
                for (int64_t r = 0; r < group; r++) {                                                                  \
                    X query[size];                                                                                     \
                    rotate_##X(q + b * q_stride + (head * group + r) * size, row_cos, row_sin, query, size);           \
                    for (int64_t i = 0; i < size; i++)                                                                 \
                        queries[r][i] = read_##X(query[i]) * scale;                                                    \
                }                                                                                                      \
                                                                                                                       \
                /* 3. Attend to the keys that they see. A size that the compiler knows is faster. */                   \
                int64_t first = position < span ? 0 : position - span + 1, n = position + 1 - first;                   \
                X *results = y + (b * n_head + head * group) * size;                                                   \
                keys += first * size;                                                                                  \
                values += first * size;                                                                                \
                if (size == 64)                                                                                        \
                    attend_head_##X(queries[0], keys, values, results, group, n, 64);                                  \
                else if (size == 128)                                                                                  \
                    attend_head_##X(queries[0], keys, values, results, group, n, 128);                                 \
                else                                                                                                   \
                    attend_head_##X(queries[0], keys, values, results, group, n, size);                                \
            }                                                                                                          \
    }

ATTEND(float32)
ATTEND(bfloat16)
