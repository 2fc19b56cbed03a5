/* What a recurrent language model spends its time on, on a processor: the recurrence, all steps of a
   window in one call, forward and backward; the products around it; the loss of the output layer.

   A product takes its left factor as rows of 32-bit units, a float or a pair of bf16, and its right
   factor packed: panels of PANEL columns, in which the units of a row of PANEL lie side by side. Both
   precisions then share all code but one instruction. A lane's sums are taken in one order whatever
   lanes stand beside it, so its bits depend on it alone.

   Sizes: T steps, B lanes, H hidden units (a multiple of 32: the caller pads), G gates (1, 3 or 4).
   Weights, inputs and carries are float; hidden states and saved gates are float, or bf16 where `low`. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined __AVX512F__
enum { WIDTH = 16, ROWS = 8 };
#elif defined __AVX__
enum { WIDTH = 8, ROWS = 4 };
#else
enum { WIDTH = 4, ROWS = 4 };
#endif
enum { PANEL = 2 * WIDTH, DEPTH = 128, LANES = 64, MOST_THREADS = 64 };
enum cell { RNN, GRU, LSTM };

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef long size;

/* --- numbers --- */

INLINE vec all(float x) { return x - (vec){}; }

#ifdef __AVX512BF16__
INLINE ints widened(const void *p) { return (ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)); }
INLINE __m256i narrowed(vec x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
INLINE ints rounded(vec x) { return (ints)_mm512_cvtepu16_epi32(narrowed(x)); }
#endif

/* WIDTH numbers at place `at` of an array of floats, or of bf16. */
INLINE vec load(int low, const void *array, size at) {
#ifdef __AVX512BF16__
    if (low) return (vec)(widened((const uint16_t *)array + at) << 16);
#endif
    return *(const vec *)((const float *)array + at);
}

INLINE void store(int low, void *array, size at, vec x) {
#ifdef __AVX512BF16__
    if (low) {
        _mm256_storeu_si256((void *)((uint16_t *)array + at), narrowed(x));
        return;
    }
#endif
    *(vec *)((float *)array + at) = x;
}

INLINE const void *moved(int low, const void *array, size by) { return (const char *)array + by * (low ? 2 : 4); }

/* The product of units, added to a sum. */
INLINE vec multiplied(int low, uint32_t a, vec b, vec sum) {
#ifdef __AVX512BF16__
    if (low) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
    float x;
    memcpy(&x, &a, 4);
    return sum + x * b;
}

/* exp(x) - 1 as a power p of two and exp(r) - 1 of the rest, good to 1e-7: exp(x) - 1 = p (exp(r) - 1) + p - 1. */
INLINE vec expm1_parts(vec x, vec *power) {
    vec n = x * 1.44269504f + 12582912.0f; /* the nearest integer stands in the last bits */
    *power = (vec)(((ints)n + 127) << 23);
    n -= 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = (all(1.9841270e-4f) * r + 1.3888889e-3f) * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    return p * r * r + r;
}

/* The larger of two; where one is no number, the second. */
INLINE vec larger(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    ints more = a > b;
    return (vec)((more & (ints)a) | (~more & (ints)b));
#endif
}

INLINE float largest_of(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float found = x[0];
    for (int v = 1; v < WIDTH; v++) found = x[v] > found ? x[v] : found;
    return found;
#endif
}

INLINE float sum_of(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float found = 0;
    for (int v = 0; v < WIDTH; v++) found += x[v];
    return found;
#endif
}

/* a / b; the processor's estimate is good to 1e-4; mended once, to 1e-7, it takes half a division's time. */
INLINE vec divided(int low, vec a, vec b) {
#ifdef __AVX512F__
    vec guess = (vec)_mm512_rcp14_ps((__m512)b), found = a * guess;
    return low ? found : found + guess * (a - found * b);
#else
    return a / b;
#endif
}

/* Good to 1e-7 of the value; where `low` to 1.2e-4, a sixteenth of a bf16's last bit, by a quotient of polynomials. */
INLINE vec vtanh(int low, vec x) {
    if (low) {
        x = -larger(all(-4.97f), -larger(all(-4.97f), x));
        vec y = x * x, above = (y * 6.7345327e-4f + 1.02510300e-1f) * y + 0.99994979f;
        return divided(1, x * above, (y * 1.28483914e-2f + 4.35534239e-1f) * y + 1);
    }
    ints sign = (ints)x & INT32_MIN; /* (1 - exp(-2|x|)) / (1 + exp(-2|x|)), with the sign of x */
    vec power, rest = expm1_parts(larger(all(-40), -2 * (vec)((ints)x ^ sign)), &power), e = power * rest + (power - 1);
    return (vec)((ints)divided(0, -e, e + 2) | sign);
}

/* As good as vtanh. */
INLINE vec sigmoid(int low, vec x) {
#ifdef __AVX512BF16__
    if (low) {
        vec t = x * -1.44269504f, r = (vec)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        vec p = ((all(7.80235e-2f) * r + 2.26067824e-1f) * r + 6.95833713e-1f) * r + 0.99992515f;
        return divided(1, all(1), (vec)_mm512_scalef_ps((__m512)p, (__m512)t) + 1);
    }
#endif
    vec power, rest = expm1_parts(-larger(all(-80), -larger(all(-80), -x)), &power);
    return divided(0, all(1), power * rest + power + 1);
}

/* --- packing --- */

/* One row of units of the right factor: rows 2k and 2k + 1 interleaved, or row k; missing ones are zero. */
INLINE void pack_row(int low, int source_low, uint32_t *to, const void *rows, size stride, size count, size columns,
                     size depth) {
    for (size j = 0; j < columns; j += WIDTH) {
        ints *place = (ints *)(to + (j / PANEL * depth) * PANEL + j % PANEL);
#ifdef __AVX512BF16__
        if (low) {
            ints even = {}, odd = {};
            if (count > 0) even = source_low ? widened((const uint16_t *)rows + j) : rounded(load(0, rows, j));
            if (count > 1)
                odd = source_low ? widened((const uint16_t *)rows + stride + j) : rounded(load(0, rows, stride + j));
            *place = even | odd << 16;
            continue;
        }
#endif
        *place = count > 0 ? *(const ints *)((const float *)rows + j) : (ints){};
    }
}

/* A matrix (rows, columns), `depth` units deep, as panels for products that sum over its rows. */
INLINE void pack_rows(int low, int source_low, uint32_t *to, const void *matrix, size stride, size rows, size columns,
                      size depth) {
    size step = low ? 2 : 1;
    for (size k = 0; k < depth; k++)
        pack_row(low, source_low, to + k * PANEL, moved(source_low, matrix, k * step * stride), stride,
                 rows - k * step, columns, depth);
}

/* A matrix (columns, inner) of floats as panels for products that sum over `inner`; the last is filled with zeros. */
INLINE void pack_columns(int low, uint32_t *to, const float *matrix, size columns, size inner, uint32_t *scratch) {
    size depth = low ? inner / 2 : inner;
    for (size panel = 0; panel < columns; panel += PANEL, to += depth * PANEL) {
        const uint32_t *units = (const uint32_t *)(matrix + panel * inner);
        size here = columns - panel < PANEL ? columns - panel : PANEL;
        if (low) {
            for (size i = 0; i < here * inner; i += WIDTH) store(1, scratch, i, load(0, matrix, panel * inner + i));
            units = scratch;
        }
        for (size k = 0; k < depth; k++)
            for (size j = 0; j < PANEL; j++) to[k * PANEL + j] = j < here ? units[j * depth + k] : 0;
    }
}

/* --- products --- */

/* sums (rows, PANEL) [+]= a (rows, depth units) times a panel. */
INLINE void tile(int low, const int rows, const uint32_t *a, size row_stride, size unit_stride, const uint32_t *panel,
                 size depth, float *sums, size stride, int add) {
    vec sum[ROWS][2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2; j++) sum[i][j] = add ? *(vec *)(sums + i * stride + j * WIDTH) : (vec){};
    for (size k = 0; k < depth; k++, panel += PANEL) {
        vec left = *(const vec *)panel, right = *(const vec *)(panel + WIDTH);
        for (int i = 0; i < rows; i++) {
            uint32_t unit = a[i * row_stride + k * unit_stride];
            sum[i][0] = multiplied(low, unit, left, sum[i][0]);
            sum[i][1] = multiplied(low, unit, right, sum[i][1]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2; j++) *(vec *)(sums + i * stride + j * WIDTH) = sum[i][j];
}

/* sums (rows, PANEL) = a (rows, depth units) times a panel, a stretch of it at a time that the first cache holds. */
INLINE void product(int low, size rows, const void *a, size row_stride, size unit_stride, const uint32_t *panel,
                    size depth, float *sums, size stride, int add) {
    for (size k = 0; k < depth; k += DEPTH, add = 1) {
        size deep = depth - k < DEPTH ? depth - k : DEPTH, i = 0;
        const uint32_t *from = (const uint32_t *)a + k * unit_stride, *part = panel + k * PANEL;
        for (; i + ROWS <= rows; i += ROWS)
            tile(low, ROWS, from + i * row_stride, row_stride, unit_stride, part, deep, sums + i * stride, stride, add);
        for (; ROWS > 4 && i + 4 <= rows; i += 4)
            tile(low, 4, from + i * row_stride, row_stride, unit_stride, part, deep, sums + i * stride, stride, add);
        for (; i + 2 <= rows; i += 2)
            tile(low, 2, from + i * row_stride, row_stride, unit_stride, part, deep, sums + i * stride, stride, add);
        for (; i < rows; i++)
            tile(low, 1, from + i * row_stride, row_stride, unit_stride, part, deep, sums + i * stride, stride, add);
    }
}

/* --- cells: one vector of a lane's units at one step --- */

typedef struct {
    size steps, lanes, units, threads, rows;
    const float *inputs;     /* (T, B, G H), or a table (V, G H) of `rows` rows */
    const int64_t *tokens;   /* (T, B): which row each lane reads; NULL: its own */
    const float *weight;     /* (G H, H) */
    const float *bias;       /* (H), of a GRU's new state */
    void *hidden;            /* (T + 1, B, H), the first given */
    float *carry;            /* (T + 1, B, H), the first given: a GRU's hidden state, an LSTM's cell */
    void *gates;             /* (T, B, 1, 4 or 4 times H): what backward needs; NULL: nothing is kept */
    const void *dhidden;     /* (T, B, H) */
    const float *dcarry_end; /* (B, H), or NULL */
    void *dgates;            /* (T, B, 1, 4 or 4 times H), may be `gates`; of a GRU: reset, update, new as the hidden
                                state and as the input sees it */
    float *dh0, *dcarry;     /* (B, H) */
    uint32_t *packed;
} window;

INLINE size gates_of(enum cell cell) { return cell == RNN ? 1 : cell == GRU ? 3 : 4; }
INLINE size kept_of(enum cell cell) { return cell == RNN ? 1 : 4; }

/* `sums` are the gates' recurrent parts, `far` apart; `row` is the lane's at the step, (T, B) flattened. */
INLINE void cell_forward(enum cell cell, int low, const window *w, size row, size j, const float *sums, size far) {
    size H = w->units, next = (row + w->lanes) * H + j;
    const float *x = w->inputs + (w->tokens ? w->tokens[row] : row) * gates_of(cell) * H + j;
    size kept = row * 4 * H + j;
    if (cell == RNN) {
        store(low, w->hidden, next, vtanh(low, load(0, x, 0) + load(0, sums, 0)));
    } else if (cell == GRU) {
        vec r = sigmoid(low, load(0, x, 0) + load(0, sums, 0)), z = sigmoid(low, load(0, x, H) + load(0, sums, far));
        vec q = load(0, sums, 2 * far) + load(0, w->bias, j), n = vtanh(low, load(0, x, 2 * H) + r * q);
        vec h = n + z * (load(0, w->carry, row * H + j) - n);
        store(0, w->carry, next, h);
        store(low, w->hidden, next, h);
        if (!w->gates) return;
        store(low, w->gates, kept, r);
        store(low, w->gates, kept + H, z);
        store(low, w->gates, kept + 2 * H, n);
        store(low, w->gates, kept + 3 * H, q);
    } else {
        vec i = sigmoid(low, load(0, x, 0) + load(0, sums, 0)), f = sigmoid(low, load(0, x, H) + load(0, sums, far));
        vec g = vtanh(low, load(0, x, 2 * H) + load(0, sums, 2 * far));
        vec o = sigmoid(low, load(0, x, 3 * H) + load(0, sums, 3 * far));
        vec c = f * load(0, w->carry, row * H + j) + i * g;
        store(0, w->carry, next, c);
        store(low, w->hidden, next, o * vtanh(low, c));
        if (!w->gates) return;
        store(low, w->gates, kept, i);
        store(low, w->gates, kept + H, f);
        store(low, w->gates, kept + 2 * H, g);
        store(low, w->gates, kept + 3 * H, o);
    }
}

/* `later` is what comes to the hidden state through the next step's gates. */
INLINE void cell_backward(enum cell cell, int low, const window *w, size row, size lane, size j, vec later) {
    size H = w->units, kept = row * 4 * H + j, next = (row + w->lanes) * H + j;
    vec dh = load(low, w->dhidden, row * H + j) + later;
    if (cell == RNN) {
        vec h = load(low, w->hidden, next);
        store(low, w->dgates, row * H + j, dh * (1 - h * h));
    } else if (cell == GRU) {
        vec r = load(low, w->gates, kept), z = load(low, w->gates, kept + H);
        vec n = load(low, w->gates, kept + 2 * H), q = load(low, w->gates, kept + 3 * H);
        dh += load(0, w->dcarry, lane * H + j);
        vec dn = dh * (1 - z) * (1 - n * n);
        store(0, w->dcarry, lane * H + j, dh * z);
        store(low, w->dgates, kept, dn * q * r * (1 - r));
        store(low, w->dgates, kept + H, dh * (load(0, w->carry, row * H + j) - n) * z * (1 - z));
        store(low, w->dgates, kept + 2 * H, dn * r);
        store(low, w->dgates, kept + 3 * H, dn);
    } else {
        vec i = load(low, w->gates, kept), f = load(low, w->gates, kept + H);
        vec g = load(low, w->gates, kept + 2 * H), o = load(low, w->gates, kept + 3 * H);
        vec c = vtanh(low, load(0, w->carry, next));
        vec dc = load(0, w->dcarry, lane * H + j) + dh * o * (1 - c * c);
        store(0, w->dcarry, lane * H + j, dc * f);
        store(low, w->dgates, kept, dc * g * i * (1 - i));
        store(low, w->dgates, kept + H, dc * load(0, w->carry, row * H + j) * f * (1 - f));
        store(low, w->dgates, kept + 2 * H, dc * i * (1 - g * g));
        store(low, w->dgates, kept + 3 * H, dh * c * o * (1 - o));
    }
}

/* --- windows: some lanes, all steps --- */

INLINE void run_forward(enum cell cell, int low, const window *given, size first, size count) {
    const window own = *given, *w = &own; /* which no store can change */
    float sums[4][LANES * PANEL] __attribute__((aligned(64)));
    size H = w->units, depth = low ? H / 2 : H;
    for (size t = 0; t < w->steps; t++)
        for (size j = 0; j < H; j += PANEL) {
            size row = t * w->lanes + first;
            const void *previous = moved(low, w->hidden, row * H);
            for (size gate = 0; gate < gates_of(cell); gate++)
                product(low, count, previous, depth, 1, w->packed + (gate * H + j) * depth, depth, sums[gate], PANEL, 0);
            for (size lane = 0; lane < count; lane++)
                for (size v = 0; v < PANEL; v += WIDTH)
                    cell_forward(cell, low, w, row + lane, j + v, sums[0] + lane * PANEL + v, LANES * PANEL);
        }
}

/* Asks for the slopes and gates that cell_backward will read, which lie too far apart for the processor to foresee. */
INLINE void foresee(enum cell cell, int low, const window *w, size row, size count, size j) {
    size H = w->units, line = low ? PANEL : WIDTH;
    for (size lane = row; lane < row + count; lane++)
        for (size v = j; v < j + PANEL; v += line) {
            __builtin_prefetch(moved(low, w->dhidden, lane * H + v));
            if (cell == RNN) __builtin_prefetch(moved(low, w->hidden, (lane + w->lanes) * H + v));
            for (size gate = 0; cell != RNN && gate < 4; gate++)
                __builtin_prefetch(moved(low, w->gates, (lane * 4 + gate) * H + v));
        }
}

INLINE void run_backward(enum cell cell, int low, const window *given, size first, size count) {
    const window own = *given, *w = &own;
    float sums[LANES * PANEL] __attribute__((aligned(64)));
    size H = w->units, kept = kept_of(cell) * H, stride = low ? kept / 2 : kept;
    size depth = gates_of(cell) * (low ? H / 2 : H);
    for (size t = w->steps - 1; t >= (w->dh0 ? -1 : 0); t--)
        for (size j = 0; j < H; j += PANEL) {
            size row = t * w->lanes + first;
            const void *later = moved(low, w->dgates, (row + w->lanes) * kept);
            if (t >= 0) foresee(cell, low, w, row, count, j);
            if (t < w->steps - 1)
                product(low, count, later, stride, 1, w->packed + j * depth, depth, sums, PANEL, 0);
            else
                memset(sums, 0, count * PANEL * sizeof *sums);
            for (size lane = 0; lane < count; lane++)
                for (size v = 0; v < PANEL; v += WIDTH) {
                    vec sum = load(0, sums, lane * PANEL + v);
                    size place = (first + lane) * H + j + v;
                    if (t >= 0)
                        cell_backward(cell, low, w, row + lane, first + lane, j + v, sum);
                    else
                        store(0, w->dh0, place, cell == GRU ? sum + load(0, w->dcarry, place) : sum);
                }
        }
}

/* --- threads: each takes some lanes, or some columns --- */

typedef struct {
    void (*work)(const void *task, size first, size count);
    const void *task;
    size first, count;
} share;

static void *run_share(void *given) {
    share *s = given;
    s->work(s->task, s->first, s->count);
    return NULL;
}

static void shared_out(void (*work)(const void *, size, size), const void *task, size total, size grain, size threads) {
    share shares[MOST_THREADS];
    pthread_t running[MOST_THREADS];
    size pieces = (total + grain - 1) / grain, done = 0, started = 0;
    threads = threads > MOST_THREADS ? MOST_THREADS : threads;
    threads = threads > pieces ? pieces : threads;
    for (size i = 0; i < threads; i++) {
        size end = (i + 1) * pieces / threads * grain;
        end = end > total ? total : end;
        shares[i] = (share){work, task, done, end - done};
        done = end;
    }
    for (; started + 1 < threads; started++)
        if (pthread_create(&running[started], NULL, run_share, &shares[started])) break;
    for (size i = started; i < threads; i++) run_share(&shares[i]);
    for (size i = 0; i < started; i++) pthread_join(running[i], NULL);
}

#define PER_CELL_AND_TYPE(name)                                                                      \
    static void name##_lanes(enum cell cell, int low, const window *w, size first, size count) {     \
        if (cell == RNN && low) run_##name(RNN, 1, w, first, count);                                 \
        if (cell == RNN && !low) run_##name(RNN, 0, w, first, count);                                \
        if (cell == GRU && low) run_##name(GRU, 1, w, first, count);                                 \
        if (cell == GRU && !low) run_##name(GRU, 0, w, first, count);                                \
        if (cell == LSTM && low) run_##name(LSTM, 1, w, first, count);                               \
        if (cell == LSTM && !low) run_##name(LSTM, 0, w, first, count);                              \
    }
PER_CELL_AND_TYPE(forward)
PER_CELL_AND_TYPE(backward)

typedef struct {
    enum cell cell;
    int low, backward;
    const window *window;
} lanes_task;

static void work_on_lanes(const void *given, size first, size count) {
    const lanes_task *task = given;
    for (; count > 0; first += LANES, count -= LANES)
        (task->backward ? backward_lanes : forward_lanes)(task->cell, task->low, task->window, first,
                                                          count < LANES ? count : LANES);
}

static uint32_t *room(size units) { return aligned_alloc(64, (units * 4 + 63) / 64 * 64); }

/* --- what Python calls; each gives 0, 1 where memory is short, 2 for a token that is no row --- */

int forward(size cell, size low, window *w) {
    size H = w->units, columns = gates_of(cell) * H;
    for (size i = 0; w->tokens && i < w->steps * w->lanes; i++)
        if (w->tokens[i] < 0 || w->tokens[i] >= w->rows) return 2;
    uint32_t *scratch = room(H * PANEL);
    w->packed = room(columns * H);
    int failed = !w->packed || !scratch;
    if (!failed) {
        if (low)
            pack_columns(1, w->packed, w->weight, columns, H, scratch);
        else
            pack_columns(0, w->packed, w->weight, columns, H, scratch);
        lanes_task task = {(enum cell)cell, (int)low, 0, w};
        shared_out(work_on_lanes, &task, w->lanes, ROWS, w->threads);
    }
    free(w->packed);
    free(scratch);
    return failed;
}

int backward(size cell, size low, window *w) {
    size H = w->units, rows = gates_of(cell) * H;
    w->packed = room(rows * H);
    if (!w->packed) return 1;
    if (low)
        pack_rows(1, 0, w->packed, w->weight, H, rows, H, rows / 2);
    else
        pack_rows(0, 0, w->packed, w->weight, H, rows, H, rows);
    lanes_task task = {(enum cell)cell, (int)low, 1, w};
    shared_out(work_on_lanes, &task, w->lanes, ROWS, w->threads);
    free(w->packed);
    return 0;
}

typedef struct {
    int low;
    size rows, columns, left_columns, stride, left_stride;
    const void *left, *right;
    float scale, *to;
    int failed;
} gradient_task;

/* to (left_columns, columns) = scale times left (rows, left_columns), transposed, times right (rows, columns). */
INLINE void gradient_columns(int low, const gradient_task *task, size first, size count) {
    size step = low ? 2 : 1, N = task->columns;
    uint32_t *a = room(count * DEPTH), *b = room(N * DEPTH);
    if (a && b)
        for (size r = 0; r < task->rows; r += DEPTH * step) {
            size rows = task->rows - r < DEPTH * step ? task->rows - r : DEPTH * step, depth = (rows + step - 1) / step;
            pack_rows(low, low, a, moved(low, task->left, r * task->left_stride + first), task->left_stride, rows, count,
                      depth);
            pack_rows(low, low, b, moved(low, task->right, r * task->stride), task->stride, rows, N, depth);
            for (size n = 0; n < N; n += PANEL)
                for (size m = 0; m < count; m += PANEL)
                    product(low, PANEL, a + m * depth, 1, PANEL, b + n * depth, depth,
                            task->to + (first + m) * N + n, N, r > 0);
        }
    else
        ((gradient_task *)task)->failed = 1;
    for (size i = first * N; task->scale != 1 && i < (first + count) * N; i += WIDTH)
        store(0, task->to, i, task->scale * load(0, task->to, i));
    free(a);
    free(b);
}

static void work_on_columns(const void *given, size first, size count) {
    const gradient_task *task = given;
    if (task->low)
        gradient_columns(1, task, first, count);
    else
        gradient_columns(0, task, first, count);
}

int weight_gradient(size low, size rows, size left_columns, size left_stride, const void *left, size columns,
                    const void *right, float scale, float *to, size threads) {
    gradient_task task = {(int)low, rows, columns, left_columns, columns, left_stride, left, right, scale, to, 0};
    shared_out(work_on_columns, &task, left_columns, PANEL, threads);
    return task.failed;
}

/* to (V, columns) = scale times the sums of the rows of `from`, each in its token's place, or all in one where there
   are no tokens. A row is `stride` long; from `skip_from` on, `skip` of its columns are passed over. */
int sums(size low, size rows, size columns, size stride, size skip_from, size skip, const void *from,
         const int64_t *tokens, size places, float scale, float *to) {
    memset(to, 0, places * columns * sizeof *to);
    for (size r = 0; r < rows; r++)
        for (size j = 0; j < columns; j += WIDTH) {
            size at = r * stride + j + (j >= skip_from ? skip : 0), place = (tokens ? tokens[r] * columns : 0) + j;
            store(0, to, place, load(0, to, place) + (low ? load(1, from, at) : load(0, from, at)));
        }
    for (size i = 0; scale != 1 && i < places * columns; i += WIDTH) store(0, to, i, scale * load(0, to, i));
    return 0;
}

/* --- products and the loss --- */

typedef struct {
    int low, to_low;
    size rows, depth, columns; /* of the left factor: rows and units; of the right one: columns, a multiple of PANEL */
    const void *left;
    const uint32_t *packed;
    const float *bias; /* or NULL */
    float scale;
    void *to;               /* (rows, columns) */
    const int64_t *targets; /* (rows): the loss is wanted, and `to`, or NULL, takes the logits' gradient */
    float *nats;            /* (rows) */
    size tokens;            /* columns that are not padding */
    int failed;
} rows_task;

INLINE void rows_of_product(int low, int to_low, const rows_task *task, size first, size count, void *to) {
    float sums[LANES * PANEL] __attribute__((aligned(64))), scale = task->scale;
    size N = task->columns, depth = task->depth;
    for (size n = 0; n < N; n += PANEL) {
        product(low, count, (const uint32_t *)task->left + first * depth, depth, 1, task->packed + n * depth, depth,
                sums, PANEL, 0);
        vec left = {}, right = {}; /* of the bias */
        if (task->bias) left = load(0, task->bias, n), right = load(0, task->bias, n + WIDTH);
        for (size i = 0; i < count; i++) {
            store(to_low, to, i * N + n, scale * load(0, sums, i * PANEL) + left);
            store(to_low, to, i * N + n + WIDTH, scale * load(0, sums, i * PANEL + WIDTH) + right);
        }
    }
}

/* A row's loss; its logits, with padding up to `padded`, become their exponentials less the largest one's. */
INLINE float row_of_loss(float *logits, size count, size padded, int64_t target, float *sum) {
    for (size j = count; j < padded; j++) logits[j] = -INFINITY;
    vec most = load(0, logits, 0), total = {};
    for (size j = WIDTH; j < padded; j += WIDTH) most = larger(most, load(0, logits, j));
    most = all(largest_of(most));
    float right = logits[target] - most[0];
    for (size j = 0; j < padded; j += WIDTH) {
        vec power, rest = expm1_parts(larger(all(-87), load(0, logits, j) - most), &power), e = power * rest + power;
        store(0, logits, j, e);
        total += e;
    }
    *sum = sum_of(total);
    return logf(*sum) - right;
}

INLINE void rows_of_loss(int low, const rows_task *task, size first, size count, float *logits) {
    size N = task->columns;
    void *to = task->to;
    int32_t places[WIDTH];
    for (int v = 0; v < WIDTH; v++) places[v] = v;
    rows_of_product(low, 0, task, first, count, logits);
    for (size i = 0; i < count; i++) {
        float sum, *row = logits + i * N;
        int64_t target = task->targets[first + i];
        task->nats[first + i] = row_of_loss(row, task->tokens, N, target, &sum);
        vec share = all(1 / sum);
        for (size j = 0; to && j < N; j += WIDTH) {
            ints right = *(ints *)places + (int32_t)j == (int32_t)target;
            store(low, to, (first + i) * N + j, share * load(0, row, j) - (vec)(right & (ints)all(1)));
        }
    }
}

INLINE void work_on_typed_rows(int low, const rows_task *task, size first, size count) {
    float *logits = task->targets ? (float *)room(LANES * task->columns) : NULL;
    if (task->targets && !logits) ((rows_task *)task)->failed = 1;
    for (; count > 0 && !task->failed; first += LANES, count -= LANES) {
        size some = count < LANES ? count : LANES;
        if (task->targets)
            rows_of_loss(low, task, first, some, logits);
        else if (task->to_low)
            rows_of_product(low, 1, task, first, some, (uint16_t *)task->to + first * task->columns);
        else
            rows_of_product(low, 0, task, first, some, (float *)task->to + first * task->columns);
    }
    free(logits);
}

static void work_on_rows(const void *given, size first, size count) {
    const rows_task *task = given;
    if (task->low)
        work_on_typed_rows(1, task, first, count);
    else
        work_on_typed_rows(0, task, first, count);
}

/* to (rows, columns) = scale left (rows, inner) weight + bias; the weight is (columns, inner) where `transposed`,
   else (inner, columns). It has `given` rows of its first axis; more are zero. A bias, of as many numbers, only goes with a
   transposed weight. Or the loss: see rows_task. */
int linear(size low, size to_low, size transposed, size rows, size inner, size columns, size given, const void *left,
           const float *weight, const float *bias, float scale, void *to, const int64_t *targets, float *nats,
           size threads) {
    size depth = low ? inner / 2 : inner;
    for (size i = 0; targets && i < rows; i++)
        if (targets[i] < 0 || targets[i] >= given) return 2;
    uint32_t *packed = room(depth * columns), *scratch = room(inner * PANEL);
    float *wide = bias ? (float *)room(columns) : NULL;
    rows_task task = {(int)low, (int)to_low, rows, depth, columns, left, packed, wide, scale, to, targets, nats, given, 0};
    task.failed = !packed || !scratch || (bias && !wide);
    if (!task.failed) {
        for (size j = 0; bias && j < columns; j++) wide[j] = j < given ? bias[j] : 0;
        if (transposed && low)
            pack_columns(1, packed, weight, given, inner, scratch);
        else if (transposed)
            pack_columns(0, packed, weight, given, inner, scratch);
        else if (low)
            pack_rows(1, 0, packed, weight, columns, given, columns, depth);
        else
            pack_rows(0, 0, packed, weight, columns, given, columns, depth);
        shared_out(work_on_rows, &task, rows, ROWS, threads);
    }
    free(packed);
    free(scratch);
    free(wide);
    return task.failed;
}

/* --- speech --- */

typedef struct {
    window recurrence;   /* of one step; an upper layer's inputs are made here, (B, G H) */
    const float *weight; /* (G H, H): what an upper layer makes of the one below, with `bias` (G H) */
    const float *bias;
    uint32_t *packed;
} storey;

static uint32_t *packed_columns(const float *matrix, size columns, size inner) {
    uint32_t *packed = room((columns + PANEL - 1) / PANEL * PANEL * inner);
    if (packed) pack_columns(0, packed, matrix, columns, inner, NULL);
    return packed;
}

static void step_of_storey(enum cell cell, storey *s, const window *below) {
    window *w = &s->recurrence;
    size state = w->lanes * w->units;
    if (below) {
        rows_task task = {.rows = w->lanes, .depth = w->units, .columns = gates_of(cell) * w->units, .scale = 1,
                          .left = (float *)below->hidden + state, .packed = s->packed, .bias = s->bias,
                          .to = (float *)w->inputs};
        work_on_rows(&task, 0, w->lanes);
    }
    lanes_task task = {cell, 0, 0, w};
    work_on_lanes(&task, 0, w->lanes);
    memcpy(w->hidden, (float *)w->hidden + state, state * sizeof(float));
    if (w->carry && w->carry != w->hidden) memcpy(w->carry, w->carry + state, state * sizeof(float));
}

/* Greedily: spoken (length + 1, B), of which the first tokens are given; the storeys' hidden and carry, (2, B, H),
   begin with the state. The output layer has a weight (V, H) and a bias (V, to a multiple of PANEL). */
int speak(size cell, size count, storey *storeys, const float *weight, const float *bias, size tokens, size length,
          int64_t *spoken) {
    window *last = &storeys[count - 1].recurrence;
    size H = last->units, B = last->lanes, columns = (tokens + PANEL - 1) / PANEL * PANEL, G = gates_of(cell) * H;
    uint32_t *packed = packed_columns(weight, tokens, H);
    float *logits = (float *)room(B * columns);
    int failed = !packed || !logits;
    for (size i = 0; i < count; i++) {
        failed |= !(storeys[i].recurrence.packed = packed_columns(storeys[i].recurrence.weight, G, H));
        failed |= i && !(storeys[i].packed = packed_columns(storeys[i].weight, G, H));
    }
    rows_task task = {.rows = B, .depth = H, .columns = columns, .left = (float *)last->hidden + B * H,
                      .packed = packed, .bias = bias, .scale = 1, .to = logits};
    for (size t = 0; t < length && !failed; t++) {
        storeys[0].recurrence.tokens = spoken + t * B;
        for (size i = 0; i < count; i++)
            step_of_storey((enum cell)cell, storeys + i, i ? &storeys[i - 1].recurrence : NULL);
        work_on_rows(&task, 0, B);
        for (size lane = 0; lane < B; lane++) {
            const float *row = logits + lane * columns;
            size best = 0;
            for (size j = 1; j < tokens; j++)
                if (row[j] > row[best]) best = j;
            spoken[(t + 1) * B + lane] = best;
        }
    }
    for (size i = 0; i < count; i++) {
        free(storeys[i].recurrence.packed);
        if (i) free(storeys[i].packed);
    }
    free(logits);
    free(packed);
    return failed;
}

/* Whether this processor multiplies bf16 here. */
int multiplies_bf16(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
