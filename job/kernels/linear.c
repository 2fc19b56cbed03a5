/* Linear layers and the gradients of their weights. */

#include "linear.h"

#include <stdatomic.h>

#include "threads.h"

typedef struct {
    packed_product product;
    int is_bf16, out_is_bf16;
    void *out;
} linear_task;

static void linear_rows(const void *argument, index_t first, index_t count) {
    const linear_task *task = argument;
    for (; count > 0; first += BLOCK_ROWS, count -= BLOCK_ROWS) {
        index_t rows = count < BLOCK_ROWS ? count : BLOCK_ROWS;
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

int linear(const LinearArgs *args) {
    index_t inner = args->inner, columns = args->columns, depth = args->is_bf16 ? inner / 2 : inner;
    uint32_t *packed = alloc_floats(depth * columns), *scratch = alloc_floats(depth * PANEL);
    int failed = !packed || !scratch;
    if (!failed) {
        if (args->transposed && args->is_bf16)
            pack_columns(1, packed, args->weight, columns, args->weight_columns, depth, scratch);
        else if (args->transposed)
            pack_columns(0, packed, args->weight, columns, args->weight_columns, depth, scratch);
        else if (args->is_bf16)
            pack_rows(1, 0, packed, args->weight, args->weight_columns, args->weight_rows, columns, depth);
        else
            pack_rows(0, 0, packed, args->weight, args->weight_columns, args->weight_rows, columns, depth);
        packed_product product = {args->left, packed, args->bias, depth, columns, args->scale};
        linear_task task = {product, (int)args->is_bf16, (int)args->out_is_bf16, args->out};
        parallel_for(linear_rows, &task, args->rows, TILE_ROWS, args->num_threads);
    }
    free(packed);
    free(scratch);
    return failed ? OUT_OF_MEMORY : OK;
}

/* Multiplies a panel of each factor; writes the columns that `out` has, `stride` apart. */
INLINE void gradient_panel(int is_bf16, const uint32_t *a, const uint32_t *b, index_t depth, float *out,
                           index_t columns, index_t stride, int accumulate) {
    float sums[PANEL * PANEL] __attribute__((aligned(64)));
    if (columns >= PANEL) {
        gemm_panel(is_bf16, PANEL, a, 1, PANEL, b, depth, out, stride, accumulate);
        return;
    }
    for (index_t i = 0; i < PANEL && accumulate; i++) memcpy(sums + i * PANEL, out + i * stride, columns * sizeof *out);
    gemm_panel(is_bf16, PANEL, a, 1, PANEL, b, depth, sums, PANEL, accumulate);
    for (index_t i = 0; i < PANEL; i++) memcpy(out + i * stride, sums + i * PANEL, columns * sizeof *out);
}

typedef struct {
    const WeightGradientArgs *args;
    atomic_int *failed; /* set if a thread has no memory */
} gradient_task;

INLINE void gradient_rows(int is_bf16, const WeightGradientArgs *args, atomic_int *failed, index_t first,
                          index_t count) {
    index_t step = is_bf16 ? 2 : 1, N = args->columns, stride = args->out_columns;
    uint32_t *a = alloc_floats(count * BLOCK_DEPTH), *b = alloc_floats(N * BLOCK_DEPTH);
    if (a && b)
        for (index_t r = 0; r < args->rows; r += BLOCK_DEPTH * step) {
            index_t rows = args->rows - r < BLOCK_DEPTH * step ? args->rows - r : BLOCK_DEPTH * step;
            index_t depth = (rows + step - 1) / step;
            pack_rows(is_bf16, is_bf16, a, offset_ptr(is_bf16, args->left, r * args->left_stride + first),
                      args->left_stride, rows, count, depth);
            pack_rows(is_bf16, is_bf16, b, offset_ptr(is_bf16, args->right, r * N), N, rows, N, depth);
            for (index_t n = 0; n < stride; n += PANEL)
                for (index_t m = 0; m < count; m += PANEL)
                    gradient_panel(is_bf16, a + m * depth, b + n * depth, depth, args->out + (first + m) * stride + n,
                                   stride - n, stride, r > 0);
        }
    else
        *failed = 1;
    for (index_t i = first * stride; args->scale != 1 && i < (first + count) * stride; i += WIDTH)
        store(0, args->out, i, args->scale * load(0, args->out, i));
    free(a);
    free(b);
}

static void gradient_work(const void *argument, index_t first, index_t count) {
    const gradient_task *task = argument;
    if (task->args->is_bf16)
        gradient_rows(1, task->args, task->failed, first, count);
    else
        gradient_rows(0, task->args, task->failed, first, count);
}

int weight_gradient(const WeightGradientArgs *args) {
    atomic_int failed = 0;
    gradient_task task = {args, &failed};
    parallel_for(gradient_work, &task, args->left_columns, PANEL, args->num_threads);
    return failed ? OUT_OF_MEMORY : OK;
}

int segment_sum(const SegmentSumArgs *args) {
    index_t columns = args->columns;
    float *out = args->out;
    memset(out, 0, args->num_segments * columns * sizeof *out);
    for (index_t r = 0; r < args->rows; r++)
        for (index_t j = 0; j < columns; j += WIDTH) {
            index_t from = r * args->stride + j + (j >= args->skip_start ? args->skip_count : 0);
            index_t to = (args->segments ? args->segments[r] * columns : 0) + j;
            vec x = args->is_bf16 ? load(1, args->source, from) : load(0, args->source, from);
            store(0, out, to, load(0, out, to) + x);
        }
    for (index_t i = 0; args->scale != 1 && i < args->num_segments * columns; i += WIDTH)
        store(0, out, i, args->scale * load(0, out, i));
    return OK;
}
