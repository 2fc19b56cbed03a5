/* Linear layers and the gradients of their weights. */

#include "linear.h"

#include <stdatomic.h>

#include "threads.h"

enum { LEFT_COLUMNS = 4 * PANEL }; /* of a weight gradient, packed at a time */

typedef struct {
    packed_product product;
    int is_bf16, out_is_bf16;
    void *out;
} linear_task;

static void linear_rows(const void *argument, index_t first, index_t count) {
    const linear_task *task = argument;
    for (; count > 0; first += PRODUCT_ROWS, count -= PRODUCT_ROWS) {
        index_t rows = count < PRODUCT_ROWS ? count : PRODUCT_ROWS;
        void *out = (void *)offset_ptr(task->out_is_bf16, task->out, first * task->product.columns);
        if (task->is_bf16 && task->out_is_bf16)
            product_rows(1, 1, &task->product, first, rows, out);
        else if (task->is_bf16)
            product_rows(1, 0, &task->product, first, rows, out);
        else if (task->out_is_bf16)
            product_rows(0, 1, &task->product, first, rows, out);
        else
            product_rows(0, 0, &task->product, first, rows, out);
    }
}

static void pack_slice(const void *argument, index_t first, index_t count) {
    packing p = *(const packing *)argument;
    if (p.transposed) {
        p.packed += first * p.depth, p.weight += first * p.stride;
        if (p.is_bf16)
            pack_columns(1, p.packed, p.weight, p.rows - first, p.stride, p.depth, count);
        else
            pack_columns(0, p.packed, p.weight, p.rows - first, p.stride, p.depth, count);
    } else if (p.is_bf16)
        pack_rows(1, 0, p.packed, p.weight, p.stride, p.rows, p.columns, p.depth, first, count);
    else
        pack_rows(0, 0, p.packed, p.weight, p.stride, p.rows, p.columns, p.depth, first, count);
}

void pack_weight(const packing *weight, index_t num_threads) {
    enum { MIN_WORDS = 1 << 16 }; /* in less time than they take, a thread does not start */
    packing part = *weight;
    index_t total = part.transposed ? part.columns : part.depth, words = part.transposed ? part.depth : part.columns;
    index_t chunk = MIN_WORDS / words / PANEL * PANEL;
    if (part.rows == (part.transposed || !part.is_bf16 ? total : 2 * total)) part.gates = 1; /* nothing to pad */
    part.rows /= part.gates, total /= part.gates;
    for (index_t gate = 0; gate < part.gates; gate++) {
        parallel_for(pack_slice, &part, total, chunk > PANEL ? chunk : PANEL, num_threads);
        part.weight += part.rows * part.stride, part.packed += total * (part.transposed ? part.depth : PANEL);
    }
}

int linear(const LinearArgs *args) {
    index_t inner = args->inner, columns = args->columns, depth = args->is_bf16 ? inner / 2 : inner;
    packing packing = {(int)args->is_bf16, (int)args->transposed, args->gates, args->weight,
                       args->weight_rows,  args->weight_columns,  depth,       columns,
                       args->packed};
    pack_weight(&packing, args->num_threads);
    packed_product product = {args->left, args->packed, args->bias, depth, depth, columns};
    linear_task task = {product, (int)args->is_bf16, (int)args->out_is_bf16, args->out};
    parallel_for(linear_rows, &task, args->rows, TILE_ROWS, args->num_threads);
    return OK;
}

/* Multiplies a panel of each factor; writes the rows and columns that `out` has, `stride` apart. */
INLINE void gradient_panel(int is_bf16, const uint32_t *a, const uint32_t *b, index_t depth, float *out, index_t rows,
                           index_t columns, index_t stride, int accumulate) {
    float sums[PANEL * PANEL] __attribute__((aligned(64)));
    const float *next = columns > PANEL ? out + PANEL : out + PANEL * stride + columns - stride;
    rows = rows < PANEL ? rows : PANEL;
    for (index_t i = 0; i < rows; i++)
        for (index_t j = 0; j < PANEL; j += WIDTH) __builtin_prefetch(next + i * stride + j, 1);
    if (columns >= PANEL) {
        gemm_panel(is_bf16, rows, PANEL, a, 1, PANEL, b, depth, out, stride, accumulate, NULL);
        return;
    }
    for (index_t i = 0; i < rows * PANEL && accumulate; i += WIDTH)
        store(0, sums, i, load_some(out + i / PANEL * stride, i % PANEL, columns - i % PANEL));
    gemm_panel(is_bf16, rows, columns, a, 1, PANEL, b, depth, sums, PANEL, accumulate, NULL);
    for (index_t i = 0; i < rows * PANEL; i += WIDTH)
        store_some(out + i / PANEL * stride, i % PANEL, load(0, sums, i), columns - i % PANEL);
}

typedef struct {
    const WeightGradientArgs *args;
    atomic_int *failed; /* set if a thread has no memory */
} gradient_task;

/* Adds the products of a block of rows to `out`, whose rows are completed one after the other. */
INLINE void gradient_block(int is_bf16, const WeightGradientArgs *args, index_t row, index_t first, index_t count,
                           uint32_t *a, uint32_t *b) {
    index_t step = is_bf16 ? 2 : 1, N = args->columns, stride = args->out_columns, left_stride = args->left_stride;
    index_t rows = args->rows - row < BLOCK_DEPTH * step ? args->rows - row : BLOCK_DEPTH * step;
    index_t depth = pad_depth(is_bf16, (rows + step - 1) / step);
    index_t padded = args->left_columns / args->gates, units = args->out_rows / args->gates;
    pack_rows(is_bf16, is_bf16, b, offset_ptr(is_bf16, args->right, row * N), N, rows, N, depth, 0, depth);
    for (index_t group = 0; group < count; group += LEFT_COLUMNS) {
        index_t columns = count - group < LEFT_COLUMNS ? count - group : LEFT_COLUMNS;
        pack_rows(is_bf16, is_bf16, a, offset_ptr(is_bf16, args->left, row * left_stride + first + group), left_stride,
                  rows, columns, depth, 0, depth);
        if (is_bf16) transpose_tiles(a, columns, PANEL, depth);
        for (index_t m = 0; m < columns; m += PANEL) {
            index_t gate = (first + group + m) / padded, unit = (first + group + m) % padded;
            float *out = args->out + (gate * units + unit) * stride;
            for (index_t n = 0; n < stride; n += PANEL)
                gradient_panel(is_bf16, a + m * depth, b + n * depth, depth, out + n, units - unit, stride - n, stride,
                               row > 0 || args->accumulate);
        }
    }
}

INLINE void gradient_rows(int is_bf16, const gradient_task *task, index_t first, index_t count) {
    const WeightGradientArgs *args = task->args;
    uint32_t *a = alloc_floats(LEFT_COLUMNS * BLOCK_DEPTH), *b = alloc_floats(args->columns * BLOCK_DEPTH);
    if (!a || !b) *task->failed = 1;
    for (index_t row = 0; a && b && row < args->rows; row += BLOCK_DEPTH * (is_bf16 ? 2 : 1))
        gradient_block(is_bf16, args, row, first, count, a, b);
    free(a);
    free(b);
}

static void gradient_work(const void *argument, index_t first, index_t count) {
    const gradient_task *task = argument;
    if (task->args->is_bf16)
        gradient_rows(1, task, first, count);
    else
        gradient_rows(0, task, first, count);
}

int weight_gradient(const WeightGradientArgs *args) {
    atomic_int failed = 0;
    gradient_task task = {args, &failed};
    parallel_for(gradient_work, &task, args->left_columns, PANEL, args->num_threads);
    return failed ? OUT_OF_MEMORY : OK;
}

/* The sums of `count` segments from `first` on. */
INLINE void sum_segments(int is_bf16, const SegmentSumArgs *args, index_t first, index_t count) {
    index_t columns = args->columns;
    float *out = args->out;
    memset(out + first * columns, 0, count * columns * sizeof *out);
    for (index_t r = 0; r < args->rows; r++) {
        index_t segment = args->segments ? args->segments[r] : 0;
        if (segment < first || segment >= first + count) continue;
        for (index_t j = 0; j < columns; j += WIDTH) {
            index_t from = r * args->stride + j + (j >= args->skip_start ? args->skip_count : 0);
            index_t to = segment * columns + j;
            vec x = is_bf16 ? load(1, args->source, from) : load_some(args->source, from, columns - j);
            store_some(out, to, load_some(out, to, columns - j) + x, columns - j);
        }
    }
}

static void segment_work(const void *argument, index_t first, index_t count) {
    const SegmentSumArgs *args = argument;
    if (args->is_bf16)
        sum_segments(1, args, first, count);
    else
        sum_segments(0, args, first, count);
}

int segment_sum(const SegmentSumArgs *args) {
    enum { MIN_NUMBERS = 1 << 16 }; /* for fewer sums a thread does not start */
    parallel_for(segment_work, args, args->num_segments, MIN_NUMBERS / args->columns + 1, args->num_threads);
    return OK;
}
