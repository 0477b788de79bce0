/* The CPU's part of the engine that torch does not do well: small batches.
 *
 * Compiled on first use by fabric/engine/native.py, with this machine's instructions; everything
 * here has a torch equivalent that is used where there is no compiler.
 *
 * Shapes: M rows, N outputs, K inputs of a linear layer; B decoding rows, H query heads,
 * G query heads of one key-value head, D head size. Strides count elements.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef uint16_t bf16;
enum { BLOCK_TOKENS = 16, PANEL = 32, TILE = 12, ROWS = 8 * TILE, AHEAD = 32 };

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline bf16 narrow(float value) { /* to nearest even, NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)(value != value ? 0x7fc0 : rounded);
}

/* exp of what is at most 0, within 2e-7 of it; plain arithmetic, so that compilers vectorise it.
 * Source: Cephes expf, range reduction by ln 2 and its polynomial. */
static inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float whole = rintf(x * 1.44269504f);
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float poly = 1.9875691500e-4f;
    poly = poly * rest + 1.3981999507e-3f;
    poly = poly * rest + 8.3334519073e-3f;
    poly = poly * rest + 4.1665795894e-2f;
    poly = poly * rest + 1.6666665459e-1f;
    poly = poly * rest + 5.0000001201e-1f;
    float value = poly * rest * rest + rest + 1.0f, power;
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    memcpy(&power, &bits, 4);
    return value * power;
}

/* ---- linear layers ---------------------------------------------------------------------------
 *
 * A row's sums run over its inputs in order, whatever rows are multiplied beside it: its result has
 * the same bits in every batch. */

int has_linear_bf16(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

int has_linear_f32(void) { return 1; }

/* Lay a weight [N, K] out in panels of 32 outputs, GROUP inputs side by side:
 * [N / 32, K / GROUP, 32, GROUP]. GROUP divides K; missing outputs are zero. */
#define PACK(T, NAME, GROUP)                                                                       \
    void pack_linear_##NAME(const T *weight, long N, long K, T *packed) {                          \
        _Pragma("omp parallel for") for (long panel = 0; panel < (N + PANEL - 1) / PANEL; panel++) \
            for (long k = 0; k < K; k += GROUP)                                                    \
                for (long n = 0; n < PANEL; n++)                                                   \
                    for (long g = 0; g < GROUP; g++)                                               \
                        packed[(panel * K + k) * PANEL + n * GROUP + g] =                          \
                            panel * PANEL + n < N ? weight[(panel * PANEL + n) * K + k + g] : 0;   \
    }

PACK(bf16, bf16, 2)
PACK(float, f32, 1)
PACK(int8_t, i8, 2)

#ifdef __AVX512BF16__
/* Add x [rows, K] times a panel to what low and high hold of its outputs. */
static inline __attribute__((always_inline)) void add_bf16(
    const int rows, const bf16 *x, long x_stride, const bf16 *panel, long K, __m512 *low,
    __m512 *high) {
    for (long pair = 0; pair < K / 2; pair++) {
        __m512bh w_low = (__m512bh)_mm512_loadu_si512(panel + pair * 2 * PANEL);
        __m512bh w_high = (__m512bh)_mm512_loadu_si512(panel + pair * 2 * PANEL + PANEL);
        /* Weights are read once: the next ones must be on their way while these are used. */
        _mm_prefetch(panel + (pair + AHEAD) * 2 * PANEL, _MM_HINT_T0);
        _mm_prefetch(panel + (pair + AHEAD) * 2 * PANEL + PANEL, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            int32_t two;
            memcpy(&two, x + m * x_stride + 2 * pair, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            low[m] = _mm512_dpbf16_ps(low[m], both, w_low);
            high[m] = _mm512_dpbf16_ps(high[m], both, w_high);
        }
    }
}
#endif

static inline __attribute__((always_inline)) void tile_bf16(
    const int rows, const bf16 *x, long x_stride, const bf16 *panel, long K, const float *scale,
    const float *bias, bf16 *y, long y_stride, long outputs) {
    (void)scale;
#ifdef __AVX512BF16__
    __m512 low[TILE], high[TILE];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        low[m] = _mm512_loadu_ps(bias);
        high[m] = _mm512_loadu_ps(bias + 16);
    }
    add_bf16(rows, x, x_stride, panel, K, low, high);
    uint32_t mask = outputs >= PANEL ? 0xffffffffu : (1u << outputs) - 1;
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
        _mm512_mask_storeu_epi16(
            y + m * y_stride, mask, (__m512i)_mm512_cvtne2ps_pbh(high[m], low[m]));
#endif
}

#ifdef __AVX512BF16__
/* 32 bytes as bfloat16, which holds them exactly. */
static inline __m512bh widen_bytes(const int8_t *bytes) {
    __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((void *)bytes)));
    __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((void *)(bytes + 16))));
    return _mm512_cvtne2ps_pbh(second, first);
}
#endif

/* Weights of 8 bits and a scale for each output. */
static inline __attribute__((always_inline)) void tile_i8(
    const int rows, const bf16 *x, long x_stride, const int8_t *panel, long K, const float *scale,
    const float *bias, bf16 *y, long y_stride, long outputs) {
#ifdef __AVX512BF16__
    __m512 low[TILE], high[TILE];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) low[m] = high[m] = _mm512_setzero_ps();
    for (long pair = 0; pair < K / 2; pair++) {
        __m512bh w_low = widen_bytes(panel + pair * 2 * PANEL);
        __m512bh w_high = widen_bytes(panel + pair * 2 * PANEL + PANEL);
        _mm_prefetch(panel + (pair + AHEAD) * 2 * PANEL, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            int32_t two;
            memcpy(&two, x + m * x_stride + 2 * pair, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            low[m] = _mm512_dpbf16_ps(low[m], both, w_low);
            high[m] = _mm512_dpbf16_ps(high[m], both, w_high);
        }
    }
    uint32_t mask = outputs >= PANEL ? 0xffffffffu : (1u << outputs) - 1;
    __m512 s_low = _mm512_loadu_ps(scale), s_high = _mm512_loadu_ps(scale + 16);
    __m512 b_low = _mm512_loadu_ps(bias), b_high = _mm512_loadu_ps(bias + 16);
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
        _mm512_mask_storeu_epi16(
            y + m * y_stride, mask,
            (__m512i)_mm512_cvtne2ps_pbh(_mm512_fmadd_ps(high[m], s_high, b_high),
                                         _mm512_fmadd_ps(low[m], s_low, b_low)));
#endif
}

typedef float lanes __attribute__((vector_size(64), aligned(4)));

static inline __attribute__((always_inline)) void tile_f32(
    const int rows, const float *x, long x_stride, const float *panel, long K, const float *scale,
    const float *bias, float *y, long y_stride, long outputs) {
    (void)scale;
    lanes low[TILE], high[TILE];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        low[m] = *(const lanes *)bias;
        high[m] = *(const lanes *)(bias + 16);
    }
    for (long k = 0; k < K; k++) {
        lanes w_low = *(const lanes *)(panel + k * PANEL);
        lanes w_high = *(const lanes *)(panel + k * PANEL + 16);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            low[m] += x[m * x_stride + k] * w_low;
            high[m] += x[m * x_stride + k] * w_high;
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        float row[PANEL];
        memcpy(row, &low[m], 64);
        memcpy(row + 16, &high[m], 64);
        memcpy(y + m * y_stride, row, sizeof(float) * (size_t)(outputs < PANEL ? outputs : PANEL));
    }
}

/* y [M, N] = x [M, K] times a packed weight, plus a bias. Tiles are as even as they come.
 * Scales, of weights of 8 bits, fill whole panels. */
#define LINEAR(T, W, NAME, WIDEN)                                                                  \
    void linear_##NAME(const T *x, long x_stride, long M, long K, const W *packed,                 \
                       const float *scales, const T *bias, long N, T *y) {                         \
        _Pragma("omp parallel for collapse(2) schedule(dynamic)") for (                            \
            long m_from = 0; m_from < M;                                                           \
            m_from += ROWS) for (long panel = 0; panel < (N + PANEL - 1) / PANEL; panel++) {       \
            long left = M - m_from < ROWS ? M - m_from : ROWS, outputs = N - panel * PANEL;        \
            long num_tiles = (left + TILE - 1) / TILE;                                             \
            float start[PANEL] = {0};                                                              \
            if (bias)                                                                              \
                for (long n = 0; n < PANEL && n < outputs; n++)                                    \
                    start[n] = WIDEN(bias[panel * PANEL + n]);                                     \
            for (long t = 0; t < num_tiles; t++) {                                                 \
                long from = m_from + left * t / num_tiles;                                         \
                long rows = m_from + left * (t + 1) / num_tiles - from;                            \
                const T *x_tile = x + from * x_stride;                                             \
                const W *w = packed + panel * PANEL * K;                                           \
                const float *scale = scales ? scales + panel * PANEL : 0;                                   \
                T *y_tile = y + from * N + panel * PANEL;                                          \
                switch (rows) {                                                                    \
                    CASE(1, NAME) CASE(2, NAME) CASE(3, NAME) CASE(4, NAME)                        \
                    CASE(5, NAME) CASE(6, NAME) CASE(7, NAME) CASE(8, NAME)                        \
                    CASE(9, NAME) CASE(10, NAME) CASE(11, NAME) CASE(12, NAME)                     \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
    }
#define CASE(rows, NAME)                                                                           \
    case rows:                                                                                     \
        tile_##NAME(rows, x_tile, x_stride, w, K, scale, start, y_tile, N, outputs);                      \
        break;

static inline float same(float value) { return value; }

LINEAR(bf16, bf16, bf16, widen)
LINEAR(float, float, f32, same)
LINEAR(bf16, int8_t, i8, widen)

/* ---- attention of a chunk ----------------------------------------------------------------------
 *
 * Both of its products are linear layers' with bfloat16 weights: a head's keys and values are packed
 * like these, once for all the chunk's queries. A query's sums run over its keys in order, whatever
 * queries are computed beside it. */

#ifdef __AVX512BF16__
static inline __attribute__((always_inline)) void wide_tile(
    const int rows, const bf16 *x, long x_stride, const bf16 *panel, long K, float *y,
    long y_stride) {
    __m512 low[TILE], high[TILE];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) low[m] = high[m] = _mm512_setzero_ps();
    add_bf16(rows, x, x_stride, panel, K, low, high);
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        _mm512_storeu_ps(y + m * y_stride, low[m]);
        _mm512_storeu_ps(y + m * y_stride + 16, high[m]);
    }
}

/* y [rows, PANEL] in float32 = x [rows, K] times a panel; at most TILE rows. */
static void multiply_wide(long rows, const bf16 *x, long x_stride, const bf16 *panel, long K,
                          float *y, long y_stride) {
#define WIDE(rows)                                                                                 \
    case rows:                                                                                     \
        wide_tile(rows, x, x_stride, panel, K, y, y_stride);                                       \
        break;
    switch (rows) {
        WIDE(1) WIDE(2) WIDE(3) WIDE(4) WIDE(5) WIDE(6)
        WIDE(7) WIDE(8) WIDE(9) WIDE(10) WIDE(11) WIDE(12)
    }
}

/* Lay 32 tokens of one head out: keys [D / 2, token, 2], values [panel of 32, token / 2, 32, 2].
 * Tokens from `end` on are zero; `num` tokens lie in a panel of values. */
static void pack_tokens(const bf16 *keys, const bf16 *values, long k_stride, long v_stride,
                        const int64_t *table, long from, long end, long num, long D,
                        long value_size, bf16 *to_keys, bf16 *to_values) {
    const bf16 *key[PANEL], *value[PANEL];
    for (long n = 0; n < PANEL; n++) {
        long t = from + n;
        long slot = t < end ? table[t / BLOCK_TOKENS] * BLOCK_TOKENS + t % BLOCK_TOKENS : 0;
        key[n] = t < end ? keys + slot * k_stride : 0;
        value[n] = t < end ? values + slot * v_stride : 0;
    }
    for (long n = 0; n < PANEL; n++)
        for (long d = 0; d < D; d += 2) {
            to_keys[d * PANEL + 2 * n] = key[n] ? key[n][d] : 0;
            to_keys[d * PANEL + 2 * n + 1] = key[n] ? key[n][d + 1] : 0;
        }
    for (long n = 0; n < PANEL; n++)
        for (long panel = 0; panel * PANEL < value_size; panel++) {
            long width = value_size - panel * PANEL < PANEL ? value_size - panel * PANEL : PANEL;
            bf16 *to = to_values + (panel * num + n / 2 * 2) * PANEL + n % 2;
            for (long d = 0; d < PANEL; d++)
                to[2 * d] = value[n] && d < width ? value[n][panel * PANEL + d] : 0;
        }
}

/* Turn a query's scores of `num` keys, of which it sees those of [begin, end), into weights;
 * return their sum. */
static float weigh(float *scores, long begin, long end, long num, float scale, float cap,
                   bf16 *weights) {
    float most = -INFINITY, total = 0;
    if (cap > 0) {
        for (long t = begin; t < end; t++) scores[t] = cap * tanhf(scores[t] * scale / cap);
        scale = 1;
    }
    _Pragma("omp simd reduction(max : most)") for (long t = begin; t < end; t++) most =
        scores[t] * scale > most ? scores[t] * scale : most;
    _Pragma("omp simd reduction(+ : total)") for (long t = begin; t < end; t++) {
        float weight = exp_negative(scores[t] * scale - most);
        weights[t] = narrow(weight);
        total += weight;
    }
    memset(weights, 0, sizeof(bf16) * (size_t)begin);
    memset(weights + end, 0, sizeof(bf16) * (size_t)(num - end));
    return total;
}
#endif

/* The attention of n consecutive tokens of one row to its paged past and to themselves; their keys
 * are already in the pool. q [n, H, D] in any strides, D even; out is [n, H, value_size]. */
int attend_chunk(const bf16 *q, long q_row, long q_head, const bf16 *keys, const bf16 *values,
                 const int64_t *table, long start, long n, long H, long heads, long D,
                 long value_size, float scale, long window, float cap, bf16 *out) {
    int failed = 0;
#ifdef __AVX512BF16__
    long end = start + n, first = window && window <= start ? start + 1 - window : 0;
    first -= first % PANEL;
    long num_panels = (end - first + PANEL - 1) / PANEL, num = num_panels * PANEL;
    long value_panels = (value_size + PANEL - 1) / PANEL;
    long keys_size = num * D, head_size = keys_size + value_panels * PANEL * num;
    bf16 *packed = malloc(sizeof(bf16) * (size_t)(heads * head_size));
    if (!packed) return 1;
    _Pragma("omp parallel") {
        _Pragma("omp for collapse(2)") for (long head = 0; head < heads; head++) for (
            long panel = 0; panel < num_panels; panel++) {
            bf16 *to = packed + head * head_size;
            pack_tokens(keys + head * D, values + head * value_size, heads * D, heads * value_size,
                        table, first + panel * PANEL, end, num, D, value_size,
                        to + panel * PANEL * D, to + keys_size + panel * PANEL * PANEL);
        }
        /* Later queries see more keys: they go first, so that the threads end together. */
        long num_tiles = (n + TILE - 1) / TILE;
        _Pragma("omp for collapse(2) schedule(dynamic)") for (long tile = num_tiles - 1; tile >= 0;
                                                              tile--) for (long h = 0; h < H; h++) {
            long from = n * tile / num_tiles, rows = n * (tile + 1) / num_tiles - from;
            long seen = start + from + 1, begin = window && window < seen ? seen - window : 0;
            long skipped = begin > first ? (begin - first) / PANEL : 0, origin = skipped * PANEL;
            long width = (start + from + rows - first + PANEL - 1) / PANEL * PANEL - origin;
            float *scores = malloc((size_t)rows * ((size_t)width * 6 + PANEL * 4));
            if (!scores) {
                _Pragma("omp atomic write") failed = 1;
                continue;
            }
            float *sums = scores + rows * width, totals[TILE];
            bf16 *weights = (bf16 *)(sums + rows * PANEL);
            const bf16 *of_head = packed + h / (H / heads) * head_size;
            const bf16 *query = q + from * q_row + h * q_head;
            for (long t = 0; t < width; t += PANEL)
                multiply_wide(rows, query, q_row, of_head + (origin + t) * D, D, scores + t, width);
            for (long m = 0; m < rows; m++) {
                long stop = seen + m, sees = window && window < stop ? stop - window : 0;
                totals[m] = weigh(scores + m * width, sees > first + origin ? sees - first - origin : 0,
                                  stop - first - origin, width, scale, cap, weights + m * width);
            }
            for (long panel = 0; panel < value_panels; panel++) {
                multiply_wide(rows, weights, width,
                              of_head + keys_size + (panel * num + origin) * PANEL, width, sums,
                              PANEL);
                for (long m = 0; m < rows; m++) {
                    bf16 *to = out + ((from + m) * H + h) * value_size + panel * PANEL;
                    for (long d = 0; d < PANEL && d < value_size - panel * PANEL; d++)
                        to[d] = narrow(sums[m * PANEL + d] / totals[m]);
                }
            }
            free(scores);
        }
    }
    free(packed);
#endif
    return failed;
}

/* ---- attention of single tokens, in bfloat16 ------------------------------------------------- */

#ifdef __AVX512BF16__
/* The sum of each of 16 vectors' lanes. */
static inline __m512 sums_of_16(const __m512 *v) {
    __m512 pairs[8], fours[4], halves[2];
    for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                                 _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++)
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                                  _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                         _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

/* Weighted sums of 64 numbers of each token's value, for `rows` queries. */
static inline __attribute__((always_inline)) void sum_values(
    const int rows, const bf16 *values, long stride, const int64_t *table, long begin, long end,
    const float *weights, long num, bf16 *out, long out_stride) {
    __m512 sums[4][4];
#pragma GCC unroll 4
    for (int g = 0; g < rows; g++)
        for (int i = 0; i < 4; i++) sums[g][i] = _mm512_setzero_ps();
    for (long t = begin; t < end; t++) {
        long slot = table[t / BLOCK_TOKENS] * BLOCK_TOKENS + t % BLOCK_TOKENS;
        const bf16 *value = values + slot * stride;
        __m512 wide[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            wide[i] = _mm512_castsi512_ps(_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_loadu_si256((void *)(value + 16 * i))), 16));
#pragma GCC unroll 4
        for (int g = 0; g < rows; g++) {
            __m512 weight = _mm512_set1_ps(weights[g * num + t - begin]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sums[g][i] = _mm512_fmadd_ps(weight, wide[i], sums[g][i]);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < rows; g++) {
        _mm512_storeu_si512(out + g * out_stride,
                            (__m512i)_mm512_cvtne2ps_pbh(sums[g][1], sums[g][0]));
        _mm512_storeu_si512(out + g * out_stride + 32,
                            (__m512i)_mm512_cvtne2ps_pbh(sums[g][3], sums[g][2]));
    }
}
#endif

/* One key-value head of one row, 16 keys at once; return 0 where sizes do not fit. `scores` has
 * room for G rows of end - begin numbers and 32 more each. */
static inline int attend_wide_bf16(long D, long value_size, long G, const bf16 *q, long q_head,
                                   const bf16 *keys, const bf16 *values, long heads,
                                   const int64_t *table, long begin, long end, float scale,
                                   float cap, float *scores, bf16 *out) {
#ifdef __AVX512BF16__
    if (D % 32 || D > 256 || value_size % 64) return 0;
    long first = begin / BLOCK_TOKENS * BLOCK_TOKENS;
    long num = (end - first + BLOCK_TOKENS - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
    for (long t = 0; t < num; t += BLOCK_TOKENS) {
        const bf16 *block = keys + table[(first + t) / BLOCK_TOKENS] * BLOCK_TOKENS * heads * D;
        /* What comes next must be on its way: the next block's keys, and this one's values. */
        long at = (first + t) / BLOCK_TOKENS, next = t + BLOCK_TOKENS < num ? table[at + 1] : table[at];
        for (int i = 0; i < BLOCK_TOKENS; i++) {
            for (long d = 0; d < D; d += 32)
                _mm_prefetch(keys + (next * BLOCK_TOKENS + i) * heads * D + d, _MM_HINT_T0);
            for (long d = 0; d < value_size; d += 32)
                _mm_prefetch(values + (table[at] * BLOCK_TOKENS + i) * heads * value_size + d,
                             _MM_HINT_T1);
        }
        for (long g = 0; g < G; g++) {
            __m512 dots[BLOCK_TOKENS];
            for (int i = 0; i < BLOCK_TOKENS; i++) dots[i] = _mm512_setzero_ps();
            for (long d = 0; d < D; d += 32) {
                __m512bh query = (__m512bh)_mm512_loadu_si512(q + g * q_head + d);
#pragma GCC unroll 16
                for (int i = 0; i < BLOCK_TOKENS; i++)
                    dots[i] = _mm512_dpbf16_ps(
                        dots[i], query, (__m512bh)_mm512_loadu_si512(block + i * heads * D + d));
            }
            _mm512_storeu_ps(scores + g * num + t, sums_of_16(dots));
        }
    }
    for (long g = 0; g < G; g++) {
        float *row = scores + g * num, most = -INFINITY, total = 0;
        for (long t = begin - first; t < end - first; t++) row[t] *= scale;
        if (cap > 0)
            for (long t = begin - first; t < end - first; t++) row[t] = cap * tanhf(row[t] / cap);
        _Pragma("omp simd reduction(max : most)") for (long t = begin - first; t < end - first; t++)
            most = row[t] > most ? row[t] : most;
        _Pragma("omp simd reduction(+ : total)") for (long t = begin - first; t < end - first; t++)
            total += row[t] = exp_negative(row[t] - most);
        for (long t = begin - first; t < end - first; t++) row[t] /= total;
    }
    const float *weights = scores + begin - first;
    for (long d = 0; d < value_size; d += 64)
        for (long g = 0; g < G; g += 4) {
#define SUM(rows)                                                                                  \
    case rows:                                                                                     \
        sum_values(rows, values + d, heads *value_size, table, begin, end, weights + g * num, num, \
                   out + g * value_size + d, value_size);                                          \
        break;
            switch (G - g < 4 ? G - g : 4) { SUM(1) SUM(2) SUM(3) SUM(4) }
        }
    return 1;
#else
    return 0;
#endif
}

#define attend_wide_f32(...) 0

/* ---- everything else, for both dtypes -------------------------------------------------------- */

static inline float sigmoid(float x) {
    float e = exp_negative(x < 0 ? x : -x);
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

#define FOR_DTYPE(T, NAME, WIDEN, NARROW)                                                          \
                                                                                                   \
    /* y = weight * round(x / rms(x)), rounded where transformers' modules round. */               \
    void rms_norm_##NAME(const T *x, long x_stride, const T *weight, float eps, long M, long K,    \
                         T *y) {                                                                   \
        _Pragma("omp parallel for if (M * K > 32768)") for (long m = 0; m < M; m++) {              \
            const T *row = x + m * x_stride;                                                       \
            float sum = 0;                                                                         \
            _Pragma("omp simd reduction(+ : sum)") for (long k = 0; k < K; k++) {                  \
                float value = WIDEN(row[k]);                                                       \
                sum += value * value;                                                              \
            }                                                                                      \
            float scale = 1.0f / sqrtf(sum / (float)K + eps);                                      \
            _Pragma("omp simd") for (long k = 0; k < K; k++)                                        \
                y[m * K + k] = NARROW(WIDEN(weight[k]) * WIDEN(NARROW(WIDEN(row[k]) * scale)));    \
        }                                                                                          \
    }                                                                                              \
                                                                                                   \
    /* x times the logistic function of a x + b x^3, rows one by one: SiLU is (1, 0). */            \
    void gate_##NAME(const T *x, long x_stride, long M, long K, float a, float b, T *y) {          \
        _Pragma("omp parallel for if (M * K > 32768)") for (long m = 0; m < M; m++)                \
            _Pragma("omp simd") for (long k = 0; k < K; k++) {                                      \
                float value = WIDEN(x[m * x_stride + k]);                                          \
                y[m * K + k] = NARROW(value * sigmoid(value * (a + b * value * value)));           \
            }                                                                                      \
    }                                                                                              \
                                                                                                   \
    /* Rotary positions over halves: y [M, H, D] from x [M, H, D] in any strides. */               \
    void rotate_##NAME(const T *x, long m_stride, long h_stride, const T *cosine, const T *sine,   \
                       long M, long H, long D, T *y) {                                             \
        long half = D / 2;                                                                         \
        _Pragma("omp parallel for if (M * H * D > 32768)") for (long m = 0; m < M; m++) {          \
            const T *c = cosine + m * D, *s = sine + m * D;                                        \
            for (long h = 0; h < H; h++) {                                                         \
                const T *a = x + m * m_stride + h * h_stride, *b = a + half;                       \
                T *to = y + (m * H + h) * D;                                                       \
                _Pragma("omp simd") for (long d = 0; d < half; d++) {                                \
                    float first = WIDEN(a[d]), second = WIDEN(b[d]);                               \
                    to[d] = NARROW(WIDEN(NARROW(first * WIDEN(c[d]))) -                            \
                                   WIDEN(NARROW(second * WIDEN(s[d]))));                           \
                    to[half + d] = NARROW(WIDEN(NARROW(second * WIDEN(c[half + d]))) +             \
                                          WIDEN(NARROW(first * WIDEN(s[half + d]))));              \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
    }                                                                                              \
                                                                                                   \
    /* One key-value head of one row: scores, softmax, weighted sum. Inlined for common sizes. */  \
    static inline __attribute__((always_inline)) void attend_head_##NAME(                          \
        const long D, const long value_size, long G, const T *q, long q_head, const T *keys,       \
        const T *values, long heads, const int64_t *table, long begin, long end, float scale,      \
        float cap, float *scores, T *out) {                                                        \
        long num = end - begin;                                                                    \
        float *query = scores + G * num, *sums = query + G * D;                                    \
        for (long g = 0; g < G; g++)                                                               \
            for (long d = 0; d < D; d++) query[g * D + d] = WIDEN(q[g * q_head + d]) * scale;      \
        for (long t = begin; t < end; t++) {                                                       \
            long slot = table[t / BLOCK_TOKENS] * BLOCK_TOKENS + t % BLOCK_TOKENS;                 \
            const T *key = keys + slot * heads * D;                                                \
            for (long g = 0; g < G; g++) {                                                         \
                float dot = 0;                                                                     \
                _Pragma("omp simd reduction(+ : dot)") for (long d = 0; d < D; d++) dot +=         \
                    query[g * D + d] * WIDEN(key[d]);                                              \
                scores[g * num + t - begin] = dot;                                                 \
            }                                                                                      \
        }                                                                                          \
        for (long g = 0; g < G; g++) {                                                             \
            float *row = scores + g * num, most = -INFINITY, total = 0;                            \
            if (cap > 0)                                                                           \
                for (long t = 0; t < num; t++) row[t] = cap * tanhf(row[t] / cap);                 \
            _Pragma("omp simd reduction(max : most)") for (long t = 0; t < num; t++) most =        \
                row[t] > most ? row[t] : most;                                                     \
            _Pragma("omp simd reduction(+ : total)") for (long t = 0; t < num; t++) total +=       \
                row[t] = exp_negative(row[t] - most);                                              \
            for (long t = 0; t < num; t++) row[t] /= total;                                        \
        }                                                                                          \
        memset(sums, 0, sizeof(float) * (size_t)(G * value_size));                                 \
        for (long t = begin; t < end; t++) {                                                       \
            long slot = table[t / BLOCK_TOKENS] * BLOCK_TOKENS + t % BLOCK_TOKENS;                 \
            const T *value = values + slot * heads * value_size;                                   \
            for (long g = 0; g < G; g++) {                                                         \
                float weight = scores[g * num + t - begin], *sum = sums + g * value_size;          \
                _Pragma("omp simd") for (long d = 0; d < value_size; d++) sum[d] +=                \
                    weight * WIDEN(value[d]);                                                      \
            }                                                                                      \
        }                                                                                          \
        for (long d = 0; d < G * value_size; d++) out[d] = NARROW(sums[d]);                        \
    }                                                                                              \
                                                                                                   \
    /* One query token a row over its paged past; the row's own key is already in the pool.        \
     * Pools are [tokens, heads, D]; tables [B, width] of blocks; a window of 0 is none, and so    \
     * is a cap of 0. out is [B, H, value_size]. */                                                \
    int attend_##NAME(const T *q, long q_row, long q_head, const T *keys, const T *values,         \
                      const int64_t *tables, long width, const int64_t *lengths, long B, long H,   \
                      long heads, long D, long value_size, float scale, long window, float cap,    \
                      T *out) {                                                                    \
        long G = H / heads;                                                                        \
        int failed = 0;                                                                            \
        _Pragma("omp parallel for collapse(2) schedule(dynamic) reduction(| : failed)") for (      \
            long b = 0; b < B; b++) for (long head = 0; head < heads; head++) {                    \
            long end = lengths[b], begin = window && window < end ? end - window : 0;              \
            float *scores =                                                                        \
                malloc(sizeof(float) * (size_t)(G * (end - begin + 32 + D + value_size)));         \
            if (!scores) {                                                                         \
                failed = 1;                                                                        \
                continue;                                                                          \
            }                                                                                      \
            const T *query = q + b * q_row + head * G * q_head;                                    \
            T *to = out + (b * H + head * G) * value_size;                                         \
            const T *k = keys + head * D, *v = values + head * value_size;                         \
            const int64_t *table = tables + b * width;                                             \
            if (attend_wide_##NAME(D, value_size, G, query, q_head, k, v, heads, table, begin, end,\
                                   scale, cap, scores, to))                                        \
                ;                                                                                  \
            else if (D == 64 && value_size == 64)                                                       \
                attend_head_##NAME(64, 64, G, query, q_head, k, v, heads, table, begin, end, scale,\
                                   cap, scores, to);                                               \
            else if (D == 128 && value_size == 128)                                                \
                attend_head_##NAME(128, 128, G, query, q_head, k, v, heads, table, begin, end,     \
                                   scale, cap, scores, to);                                        \
            else                                                                                   \
                attend_head_##NAME(D, value_size, G, query, q_head, k, v, heads, table, begin, end,\
                                   scale, cap, scores, to);                                        \
            free(scores);                                                                          \
        }                                                                                          \
        return failed;                                                                             \
    }                                                                                              \
                                                                                                   \
    /* One token's low-rank change: y [N] += (x [K] down^T) up, with down [R, K] and up [R, N].    \
     * wide has room for K + N + R numbers. */                                                     \
    static inline void add_lowrank_row_##NAME(const T *x, T *y, const T *down, const T *up, long K,\
                                              long N, long R, float *restrict wide) {              \
        float *restrict sums = wide + K, *restrict inner = sums + N;                               \
        for (long k = 0; k < K; k++) wide[k] = WIDEN(x[k]);                                        \
        for (long n = 0; n < N; n++) sums[n] = WIDEN(y[n]);                                        \
        long r = 0;                                                                                \
        for (; r + 4 <= R; r += 4) { /* four at a time: more sums on their way, fewer reads of x */\
            const T *a = down + r * K, *b = a + K, *c = b + K, *d = c + K;                         \
            float of_a = 0, of_b = 0, of_c = 0, of_d = 0;                                          \
            _Pragma("omp simd reduction(+ : of_a, of_b, of_c, of_d)")                              \
            for (long k = 0; k < K; k++) {                                                         \
                of_a += wide[k] * WIDEN(a[k]);                                                     \
                of_b += wide[k] * WIDEN(b[k]);                                                     \
                of_c += wide[k] * WIDEN(c[k]);                                                     \
                of_d += wide[k] * WIDEN(d[k]);                                                     \
            }                                                                                      \
            inner[r] = of_a, inner[r + 1] = of_b, inner[r + 2] = of_c, inner[r + 3] = of_d;        \
        }                                                                                          \
        for (; r < R; r++) {                                                                       \
            float dot = 0;                                                                         \
            _Pragma("omp simd reduction(+ : dot)") for (long k = 0; k < K; k++)                    \
                dot += wide[k] * WIDEN(down[r * K + k]);                                           \
            inner[r] = dot;                                                                        \
        }                                                                                          \
        for (r = 0; r + 4 <= R; r += 4) {                                                          \
            const T *a = up + r * N, *b = a + N, *c = b + N, *d = c + N;                           \
            float by_a = inner[r], by_b = inner[r + 1], by_c = inner[r + 2], by_d = inner[r + 3];  \
            _Pragma("omp simd") for (long n = 0; n < N; n++)                                       \
                sums[n] += by_a * WIDEN(a[n]) + by_b * WIDEN(b[n]) + by_c * WIDEN(c[n]) +          \
                           by_d * WIDEN(d[n]);                                                     \
        }                                                                                          \
        for (; r < R; r++)                                                                         \
            _Pragma("omp simd") for (long n = 0; n < N; n++)                                       \
                sums[n] += inner[r] * WIDEN(up[r * N + n]);                                        \
        for (long n = 0; n < N; n++) y[n] = NARROW(sums[n]);                                       \
    }                                                                                              \
                                                                                                   \
    /* The same for some tokens, all different: factors [T, 3] has down, up and R of each. */      \
    int add_lowrank_##NAME(const T *x, long x_stride, T *y, long y_stride, long K, long N,         \
                           const int64_t *tokens, const int64_t *factors, long num_tokens) {       \
        int failed = 0;                                                                            \
        _Pragma("omp parallel for schedule(dynamic) reduction(| : failed) if (num_tokens > 1)")    \
        for (long t = 0; t < num_tokens; t++) {                                                    \
            const int64_t *of = factors + 3 * t;                                                   \
            if (!of[2]) continue;                                                                  \
            float *wide = malloc(sizeof(float) * (size_t)(K + N + of[2]));                         \
            if (!wide) {                                                                           \
                failed = 1;                                                                        \
                continue;                                                                          \
            }                                                                                      \
            add_lowrank_row_##NAME(x + tokens[t] * x_stride, y + tokens[t] * y_stride,             \
                                   (const T *)(intptr_t)of[0], (const T *)(intptr_t)of[1], K, N,   \
                                   of[2], wide);                                                   \
            free(wide);                                                                            \
        }                                                                                          \
        return failed;                                                                             \
    }

FOR_DTYPE(bf16, bf16, widen, narrow)
FOR_DTYPE(float, f32, same, same)
