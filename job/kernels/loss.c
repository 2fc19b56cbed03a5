/* The cross-entropy of an output layer, and its gradients in the same pass. Logits exist for BLOCK_ROWS rows of each thread
   at a time, their gradients for the rows of a block, whose products are added before the next block begins.
   Source: Hsu et al., "Liger Kernel: efficient Triton kernels for LLM training", 2024. */

#include <math.h>
#include <stdatomic.h>

#include "linear.h"
#include "threads.h"

#ifndef MAX_LOGITS
#define MAX_LOGITS (1 << 22) /* whose gradients exist at a time, unless those of MIN_ROWS rows are more */
#endif
enum {
    MIN_ROWS = 2 * BLOCK_ROWS,
    BIAS_COLUMNS = 1 << 11 /* for fewer a thread does not start */
};

typedef struct {
    const LossArgs *args;
    packed_product logits;  /* the left factor is all hidden states */
    packed_product dhidden; /* the left factor is `dlogits` */
    void *dlogits;          /* of the rows from `first_row` on (rows, V padded); NULL if not needed */
    index_t first_row;
    atomic_int *failed; /* set if a thread has no memory */
} loss_task;

/* Returns a row's loss. Replaces its logits, with the padding up to `padded`, by exp(logit - max); `sum` is their sum. */
INLINE float softmax_loss(float *logits, index_t count, index_t padded, int64_t target, float *sum) {
    for (index_t j = count; j < padded; j++) logits[j] = -INFINITY;
    vec max = load(0, logits, 0), total = {};
    for (index_t j = WIDTH; j < padded; j += WIDTH) max = vmax(max, load(0, logits, j));
    max = broadcast(reduce_max(max));
    float target_logit = logits[target] - max[0];
    for (index_t j = 0; j < padded; j += WIDTH) {
        vec power, rest = expm1_parts(vmax(broadcast(-87), load(0, logits, j) - max), &power), e = power * rest + power;
        store(0, logits, j, e);
        total += e;
    }
    *sum = reduce_add(total);
    return logf(*sum) - target_logit;
}

/* The losses of some rows, and the gradients of their logits. */
INLINE void loss_block(int is_bf16, const loss_task *task, index_t first, index_t count, float *logits) {
    const LossArgs *args = task->args;
    index_t N = task->logits.columns;
    int32_t columns[WIDTH];
    for (int v = 0; v < WIDTH; v++) columns[v] = v;
    const packed_product *p = &task->logits;
    for (index_t n = 0; n < N; n += PANEL)
        gemm_panel(is_bf16, count, PANEL, (const uint32_t *)p->left + first * p->left_stride, p->left_stride, 1,
                   p->packed + n * p->depth, p->depth, logits + n, N, 0, p->bias + n);
    for (index_t i = 0; i < count; i++) {
        float sum, *row = logits + i * N;
        int64_t target = args->targets[first + i];
        args->nats[first + i] = softmax_loss(row, args->vocabulary_size, N, target, &sum);
        vec inverse = broadcast(1 / sum);
        for (index_t j = 0; task->dlogits && j < N; j += WIDTH) {
            ivec is_target = *(ivec *)columns + (int32_t)j == (int32_t)target;
            vec one_hot = (vec)(is_target & (ivec)broadcast(1));
            store(is_bf16, task->dlogits, (first - task->first_row + i) * N + j, inverse * load(0, row, j) - one_hot);
        }
    }
}

/* The gradients of the hidden states of the same rows. */
INLINE void hidden_gradient(int is_bf16, const loss_task *task, index_t first, index_t count) {
    const packed_product *p = &task->dhidden;
    const uint32_t *dlogits = (const uint32_t *)p->left + (first - task->first_row) * p->left_stride;
    float *out = task->args->dhidden + first * p->columns;
    for (index_t k = 0; k < p->depth; k += BLOCK_DEPTH)
        for (index_t n = 0; n < task->args->units; n += PANEL)
            gemm_panel(is_bf16, count, task->args->units - n, dlogits + k, p->left_stride, 1,
                       p->packed + n * p->depth + k * PANEL, p->depth - k < BLOCK_DEPTH ? p->depth - k : BLOCK_DEPTH,
                       out + n, p->columns, k > 0, NULL);
}

/* Both, of at most PRODUCT_ROWS rows. */
INLINE void loss_product_rows(int is_bf16, const loss_task *task, index_t first, index_t count, float *logits) {
    for (index_t i = 0; i < count; i += BLOCK_ROWS)
        loss_block(is_bf16, task, first + i, count - i < BLOCK_ROWS ? count - i : BLOCK_ROWS, logits);
    if (task->dlogits) hidden_gradient(is_bf16, task, first, count);
}

static void loss_rows(const void *argument, index_t first, index_t count) {
    const loss_task *task = argument;
    float *logits = alloc_floats(BLOCK_ROWS * task->logits.columns);
    if (!logits) *task->failed = 1;
    first += task->first_row;
    for (; logits && count > 0; first += PRODUCT_ROWS, count -= PRODUCT_ROWS) {
        index_t rows = count < PRODUCT_ROWS ? count : PRODUCT_ROWS;
        if (task->args->is_bf16)
            loss_product_rows(1, task, first, rows, logits);
        else
            loss_product_rows(0, task, first, rows, logits);
    }
    free(logits);
}

/* dbias += the sums of the columns of `dlogits`, some rows at a time. */
INLINE void bias_gradient(int is_bf16, const loss_task *task, index_t rows, index_t first, index_t count) {
    float *dbias = task->args->dbias;
    index_t N = task->logits.columns;
    for (index_t row = 0; row < rows; row += TILE_ROWS)
        for (index_t j = first; j < first + count; j += WIDTH) {
            vec sum = load(0, dbias, j);
            for (index_t i = row; i < row + TILE_ROWS && i < rows; i++) sum += load(is_bf16, task->dlogits, i * N + j);
            store(0, dbias, j, sum);
        }
}

typedef struct {
    const loss_task *loss;
    index_t rows;
} bias_task;

static void bias_columns(const void *argument, index_t first, index_t count) {
    const bias_task *task = argument;
    if (task->loss->args->is_bf16)
        bias_gradient(1, task->loss, task->rows, first, count);
    else
        bias_gradient(0, task->loss, task->rows, first, count);
}

/* Adds the products of a block's gradients to those of the weight and the bias. */
static void add_gradients(const loss_task *task, index_t rows) {
    const LossArgs *args = task->args;
    index_t columns = task->logits.columns;
    bias_task bias = {task, rows};
    parallel_for(bias_columns, &bias, columns, BIAS_COLUMNS, args->num_threads);
    WeightGradientArgs gradient = {
        args->is_bf16, task->first_row > 0, 1, rows, columns, columns, args->padded_units, args->vocabulary_size,
        args->units,   args->num_threads};
    gradient.left = task->dlogits, gradient.out = args->dweight;
    gradient.right = offset_ptr((int)args->is_bf16, args->hidden, task->first_row * args->padded_units);
    if (weight_gradient(&gradient)) *task->failed = 1;
}

static void loss_blocks(loss_task *task, index_t block) {
    const LossArgs *args = task->args;
    for (; task->first_row < args->rows && !*task->failed; task->first_row += block) {
        index_t rows = args->rows - task->first_row < block ? args->rows - task->first_row : block;
        parallel_for(loss_rows, task, rows, TILE_ROWS, args->num_threads);
        if (task->dlogits && !*task->failed) add_gradients(task, rows);
    }
}

/* The number of rows of a block: similar for all, a multiple of BLOCK_ROWS, and independent of the number of threads. */
static index_t block_rows(const LossArgs *args) {
    index_t rows = MAX_LOGITS / args->columns / BLOCK_ROWS * BLOCK_ROWS, largest = rows > MIN_ROWS ? rows : MIN_ROWS;
    index_t blocks = (args->rows - 1) / largest + 1;
    return ((args->rows - 1) / blocks / BLOCK_ROWS + 1) * BLOCK_ROWS;
}

int linear_cross_entropy(const LossArgs *args) {
    int is_bf16 = (int)args->is_bf16, has_gradient = args->dweight != NULL;
    index_t V = args->vocabulary_size, columns = args->columns, H = args->units, padded = args->padded_units;
    index_t step = is_bf16 ? 2 : 1, depth = pad_depth(is_bf16, (H + step - 1) / step);
    index_t token_depth = pad_depth(is_bf16, (V + step - 1) / step);
    index_t rows = has_gradient ? block_rows(args) : args->rows;
    for (index_t i = 0; i < args->rows; i++)
        if (args->targets[i] < 0 || args->targets[i] >= V) return INVALID_TOKEN;
    float *bias = alloc_floats(columns);
    uint32_t *dlogits = has_gradient ? alloc_floats(rows * columns / step) : NULL;
    atomic_int failed = !bias || (has_gradient && !dlogits);
    if (!failed) {
        for (index_t j = 0; j < columns; j++) bias[j] = j < V ? args->bias[j] : 0;
        pack_weight(&(packing){is_bf16, 1, 1, args->weight, V, H, depth, columns, args->packed}, args->num_threads);
        loss_task task = {args, {args->hidden, args->packed, bias, padded / step, depth, columns}};
        task.dhidden = (packed_product){dlogits, args->token_packed, NULL, columns / step, token_depth, padded};
        task.dlogits = dlogits, task.failed = &failed;
        if (has_gradient) {
            pack_weight(&(packing){is_bf16, 0, 1, args->weight, V, H, token_depth, padded, args->token_packed},
                        args->num_threads);
            memset(args->dbias, 0, columns * sizeof *args->dbias);
        }
        loss_blocks(&task, rows);
    }
    free(bias);
    free(dlogits);
    return failed ? OUT_OF_MEMORY : OK;
}
