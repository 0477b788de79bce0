/* A whole decoder layer of Llama's kind in one call, made of the parts in native.c, which stands before
 * this in one source. Every part rounds where its module rounds: the bits are those of the modules.
 *
 * The structures are those of fabric/engine/layers.py and touches.py. Shapes: N tokens of the step, E hidden size,
 * I inner size of the MLP, H query heads, K key-value heads, D head size. */

typedef struct {
    const void *packed;
    const float *scales; /* of weights of 8 bits, or none */
    const void *bias;    /* or none */
    long inputs, outputs;
} Linear;

typedef struct {
    const void *weight;
    float eps;
} Norm;

typedef struct {
    Linear qkv, out, gate_up, down;
    Norm before, between;
    void *keys, *values; /* the layer's pools */
    long heads, kv_heads, head_size, window;
    float scale, gate_a, gate_b;
    long linears[7]; /* which of the model's q, k, v, o, gate, up and down are, or -1 */
} Layer;

typedef struct { /* a chunk that is attended as a whole */
    long begin, num, start;
    const int64_t *table;
} Span;

typedef struct { /* low-rank changes of tokens: what add_lowrank takes, for all linear layers */
    long num;
    const int64_t *tokens, *factors, *ranks; /* [num], [linears, num, 3], the greatest of each */
} Change;

typedef struct {
    long num, num_singles, table_width, num_spans, num_changes;
    const int64_t *slots, *tables, *lengths;
    const Span *spans;
    const Change *changes;
    void *room; /* for N (2 E + (2 H + 2 K) D + H D + 3 I) numbers */
} Step;

/* Points of a layer as it comes by them: TOUCHED in touches.py. */
enum {
    IN, ATTN_IN, ATTN_Q, ATTN_K, ATTN_V, ATTN_OUT, MID, MLP_IN, MLP_GATE, MLP_UP, MLP_ACT, MLP_OUT,
    OUT, END
};

typedef struct { /* at a point a vector is added to one token, or its numbers are kept */
    long point, row;
    const void *vector; /* or none: kept */
    char **room;        /* where, after so many bytes */
    long offset;
} Touch;

static const Touch untouched = {.point = END};

#define FOR_LAYER(T, NAME, WIDEN, NARROW, MULTIPLY, ATTEND_SPAN)                                   \
    static void add_to_##NAME(T *to, const T *x, long num) {                                       \
        _Pragma("omp parallel for simd if (num > 65536)")                                          \
        for (long i = 0; i < num; i++) to[i] = NARROW(WIDEN(to[i]) + WIDEN(x[i]));                 \
    }                                                                                              \
                                                                                                   \
    /* Do to rows of x what is next at a point; return what comes after it. */                     \
    static const Touch *touch_##NAME(const Touch *next, long point, T *x, long stride,             \
                                     long width) {                                                 \
        for (; next->point == point; next++) {                                                     \
            T *at = x + next->row * stride;                                                        \
            if (next->vector)                                                                      \
                add_to_##NAME(at, next->vector, width);                                            \
            else                                                                                   \
                memcpy(*next->room + next->offset, at, sizeof(T) * (size_t)width);                 \
        }                                                                                          \
        return next;                                                                               \
    }                                                                                              \
                                                                                                   \
    /* Add to y, of whose rows the stride is given, what changes add to a linear layer of x. */    \
    static int change_##NAME(const Step *step, long linear, const T *x, long K, T *y, long stride, \
                             long O) {                                                             \
        int failed = 0;                                                                            \
        for (const Change *c = step->changes; c < step->changes + step->num_changes; c++)          \
            if (linear >= 0 && c->ranks[linear])                                                   \
                failed |= add_lowrank_##NAME(x, K, y, stride, K, O, c->tokens,                     \
                                             c->factors + 3 * c->num * linear, c->num);            \
        return failed;                                                                             \
    }                                                                                              \
                                                                                                   \
    /* to [M, K] times x, of whose rows the strides are given. */                                  \
    static void multiply_by_##NAME(T *to, const T *x, long x_stride, long M, long K) {             \
        _Pragma("omp parallel for if (M * K > 65536)") for (long m = 0; m < M; m++)                \
            _Pragma("omp simd") for (long k = 0; k < K; k++)                                       \
                to[m * K + k] = NARROW(WIDEN(to[m * K + k]) * WIDEN(x[m * x_stride + k]));         \
    }                                                                                              \
                                                                                                   \
    /* y [N, E] = the layer's output for x [N, E]; cosine and sine are [N, D]. Touches are in the  \
     * order of points, the last one at END. */                                                    \
    int layer_##NAME(const Layer *layer, const Step *step, const Touch *touches, T *x,             \
                     const T *cosine, const T *sine, T *y) {                                       \
        long N = step->num, E = layer->qkv.inputs, I = layer->down.inputs;                         \
        long H = layer->heads, K = layer->kv_heads, D = layer->head_size;                          \
        long width = (H + 2 * K) * D;                                                              \
        T *normed = step->room, *branch = normed + N * E, *qkv = branch + N * E;                   \
        T *q = qkv + N * width, *k = q + N * H * D, *mixed = k + N * K * D;                        \
        T *gate_up = mixed + N * H * D, *inner = gate_up + 2 * N * I;                              \
        T *keys = layer->keys, *values = layer->values;                                            \
        const long *linears = layer->linears;                                                      \
        int failed = 0;                                                                            \
        const Touch *next = touches ? touches : &untouched;                                        \
                                                                                                   \
        next = touch_##NAME(next, IN, x, E, E);                                                    \
        rms_norm_##NAME(x, E, layer->before.weight, layer->before.eps, N, E, normed);              \
        next = touch_##NAME(next, ATTN_IN, normed, E, E);                                          \
        MULTIPLY(&layer->qkv, normed, N, qkv);                                                     \
        failed |= change_##NAME(step, linears[0], normed, E, qkv, width, H * D);                   \
        failed |= change_##NAME(step, linears[1], normed, E, qkv + H * D, width, K * D);           \
        failed |= change_##NAME(step, linears[2], normed, E, qkv + (H + K) * D, width, K * D);     \
        next = touch_##NAME(next, ATTN_Q, qkv, width, H * D);                                      \
        next = touch_##NAME(next, ATTN_K, qkv + H * D, width, K * D);                              \
        next = touch_##NAME(next, ATTN_V, qkv + (H + K) * D, width, K * D);                        \
        rotate_##NAME(qkv, width, D, cosine, sine, N, H, D, q);                                    \
        rotate_##NAME(qkv + H * D, width, D, cosine, sine, N, K, D, k);                            \
        for (long n = 0; n < N; n++) {                                                             \
            long to = step->slots[n] * K * D;                                                      \
            memcpy(keys + to, k + n * K * D, sizeof(T) * (size_t)(K * D));                         \
            memcpy(values + to, qkv + n * width + (H + K) * D, sizeof(T) * (size_t)(K * D));       \
        }                                                                                          \
        if (step->num_singles &&                                                                   \
            attend_##NAME(q, H * D, D, keys, values, step->tables, step->table_width,              \
                          step->lengths, step->num_singles, H, K, D, D, layer->scale,              \
                          layer->window, 0, mixed))                                                \
            return 1;                                                                              \
        for (const Span *span = step->spans; span < step->spans + step->num_spans; span++)         \
            if (ATTEND_SPAN(q + span->begin * H * D, H * D, D, keys, values, span->table,          \
                            span->start, span->num, H, K, D, D, layer->scale, layer->window, 0,    \
                            mixed + span->begin * H * D))                                          \
                return 1;                                                                          \
        MULTIPLY(&layer->out, mixed, N, y);                                                        \
        failed |= change_##NAME(step, linears[3], mixed, H * D, y, E, E);                          \
        next = touch_##NAME(next, ATTN_OUT, y, E, E);                                              \
        add_to_##NAME(y, x, N * E);                                                                \
        next = touch_##NAME(next, MID, y, E, E);                                                   \
                                                                                                   \
        rms_norm_##NAME(y, E, layer->between.weight, layer->between.eps, N, E, normed);            \
        next = touch_##NAME(next, MLP_IN, normed, E, E);                                           \
        MULTIPLY(&layer->gate_up, normed, N, gate_up);                                             \
        failed |= change_##NAME(step, linears[4], normed, E, gate_up, 2 * I, I);                   \
        failed |= change_##NAME(step, linears[5], normed, E, gate_up + I, 2 * I, I);               \
        next = touch_##NAME(next, MLP_GATE, gate_up, 2 * I, I);                                    \
        next = touch_##NAME(next, MLP_UP, gate_up + I, 2 * I, I);                                  \
        gate_##NAME(gate_up, 2 * I, N, I, layer->gate_a, layer->gate_b, inner);                    \
        multiply_by_##NAME(inner, gate_up + I, 2 * I, N, I);                                       \
        next = touch_##NAME(next, MLP_ACT, inner, I, I);                                           \
        MULTIPLY(&layer->down, inner, N, branch);                                                  \
        failed |= change_##NAME(step, linears[6], inner, I, branch, E, E);                         \
        next = touch_##NAME(next, MLP_OUT, branch, E, E);                                          \
        add_to_##NAME(y, branch, N * E);                                                           \
        next = touch_##NAME(next, OUT, y, E, E);                                                   \
        return failed;                                                                             \
    }

static void multiply_bf16(const Linear *by, const bf16 *x, long M, bf16 *y) {
    if (by->scales)
        linear_i8(x, by->inputs, M, by->inputs, by->packed, by->scales, by->bias, by->outputs, y);
    else
        linear_bf16(x, by->inputs, M, by->inputs, by->packed, 0, by->bias, by->outputs, y);
}

static void multiply_f32(const Linear *by, const float *x, long M, float *y) {
    linear_f32(x, by->inputs, M, by->inputs, by->packed, 0, by->bias, by->outputs, y);
}

#define NO_SPANS(...) 1

FOR_LAYER(bf16, bf16, widen, narrow, multiply_bf16, attend_chunk)
FOR_LAYER(float, f32, same, same, multiply_f32, NO_SPANS)
