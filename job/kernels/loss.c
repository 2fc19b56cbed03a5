/* The cross-entropy of an output layer. Logits exist for BLOCK_ROWS rows of each thread at a time only. */

#include <math.h>
#include <stdatomic.h>

#include "linear.h"
#include "threads.h"

typedef struct {
    packed_product logits;
    const LossArgs *args;
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

INLINE void loss_block(int is_bf16, const loss_task *task, index_t first, index_t count, float *logits) {
    const LossArgs *args = task->args;
    index_t N = task->logits.columns;
    int32_t columns[WIDTH];
    for (int v = 0; v < WIDTH; v++) columns[v] = v;
    product_rows(is_bf16, 0, &task->logits, first, count, logits);
    for (index_t i = 0; i < count; i++) {
        float sum, *row = logits + i * N;
        int64_t target = args->targets[first + i];
        args->nats[first + i] = softmax_loss(row, args->vocabulary_size, N, target, &sum);
        vec inverse = broadcast(1 / sum);
        for (index_t j = 0; args->dlogits && j < N; j += WIDTH) {
            ivec is_target = *(ivec *)columns + (int32_t)j == (int32_t)target;
            vec one_hot = (vec)(is_target & (ivec)broadcast(1));
            store(is_bf16, args->dlogits, (first + i) * N + j, inverse * load(0, row, j) - one_hot);
        }
    }
}

static void loss_rows(const void *argument, index_t first, index_t count) {
    const loss_task *task = argument;
    float *logits = alloc_floats(BLOCK_ROWS * task->logits.columns);
    if (!logits) *task->failed = 1;
    for (; logits && count > 0; first += BLOCK_ROWS, count -= BLOCK_ROWS) {
        index_t rows = count < BLOCK_ROWS ? count : BLOCK_ROWS;
        if (task->args->is_bf16)
            loss_block(1, task, first, rows, logits);
        else
            loss_block(0, task, first, rows, logits);
    }
    free(logits);
}

int linear_cross_entropy(const LossArgs *args) {
    index_t V = args->vocabulary_size, columns = args->columns, H = args->units;
    index_t depth = args->is_bf16 ? args->padded_units / 2 : args->padded_units;
    for (index_t i = 0; i < args->rows; i++)
        if (args->targets[i] < 0 || args->targets[i] >= V) return INVALID_TOKEN;
    uint32_t *packed = alloc_floats(depth * columns), *scratch = alloc_floats(depth * PANEL);
    float *bias = alloc_floats(columns);
    atomic_int failed = !packed || !scratch || !bias;
    if (!failed) {
        for (index_t j = 0; j < columns; j++) bias[j] = j < V ? args->bias[j] : 0;
        if (args->is_bf16)
            pack_columns(1, packed, args->weight, V, H, depth, scratch);
        else
            pack_columns(0, packed, args->weight, V, H, depth, scratch);
        loss_task task = {{args->hidden, packed, bias, depth, columns, 1}, args, &failed};
        parallel_for(loss_rows, &task, args->rows, TILE_ROWS, args->num_threads);
    }
    free(packed);
    free(scratch);
    free(bias);
    return failed ? OUT_OF_MEMORY : OK;
}
