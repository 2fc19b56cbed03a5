/* The cross-entropy of an output layer, and its gradients in the same pass.

   Logits exist for PANEL columns of PRODUCT_ROWS rows of each thread at a time. Their exponentials are stored before the
   sums that divide them are known, and the products with them are divided instead. The gradient of the target's logit is
   left out of these products; what it adds is added in float32. Exponentials exist for the rows of a block, whose
   gradients are added before the next block begins.
   Sources: Hsu et al., "Liger Kernel: efficient Triton kernels for LLM training", 2024; Milakov and Gimelshein, "Online
   normalizer calculation for softmax", 2018. */

#include <math.h>
#include <stdatomic.h>

#include "linear.h"
#include "threads.h"

#ifndef MAX_LOGITS
#define MAX_LOGITS (1 << 22) /* whose exponentials are stored at a time, unless those of MIN_ROWS rows are more */
#endif
enum {
    MIN_ROWS = 2 * BLOCK_ROWS,
    BIAS_COLUMNS = 1 << 11,  /* for fewer a thread does not start */
    TARGET_COLUMNS = 1 << 6, /* likewise */
    MAX_EXPONENT = 60        /* a row whose exponentials add up to exp(60) needs another reference */
};

typedef struct {
    const LossArgs *args;
    packed_product logits;  /* the left factor is all hidden states */
    packed_product dhidden; /* the left factor is `exponentials` */
    /* Of the rows from `first_row` on; NULL if there is no gradient: */
    void *exponentials; /* (rows, V padded), zero for the target */
    float *inverse;     /* (rows): the scale / their sum, with the target's */
    float *dtarget;     /* (rows): the gradient of the target's logit */
    void *scaled;       /* (rows, H padded): hidden states times `inverse` */
    index_t first_row;
    atomic_int *failed; /* set if a thread has no memory */
} loss_task;

/* Of some rows: the sums of exp(logit - reference). */
typedef struct {
    float reference[PRODUCT_ROWS], target_logit[PRODUCT_ROWS];
    vec sum[PRODUCT_ROWS];
} row_sums;

/* logits (count, PANEL), of the columns from `n` on. */
INLINE void logits_panel(int is_bf16, const loss_task *task, index_t first, index_t count, index_t n, float *logits) {
    const packed_product *p = &task->logits;
    gemm_panel(is_bf16, count, PANEL, (const uint32_t *)p->left + first * p->left_stride, p->left_stride, 1,
               p->packed + n * p->depth, p->depth, logits, PANEL, 0, p->bias + n);
}

/* Sets the reference of each row whose sum is too large to the maximum of its first `columns` logits. */
INLINE void set_references(int is_bf16, const loss_task *task, index_t first, index_t count, index_t columns,
                           row_sums *rows) {
    float logits[PRODUCT_ROWS * PANEL] __attribute__((aligned(64)));
    vec max[PRODUCT_ROWS];
    for (index_t i = 0; i < count; i++) max[i] = broadcast(-INFINITY);
    for (index_t n = 0; n < columns; n += PANEL) {
        logits_panel(is_bf16, task, first, count, n, logits);
        for (index_t i = 0; i < count; i++)
            max[i] = vmax(vmax(max[i], load(0, logits, i * PANEL)), load(0, logits, i * PANEL + WIDTH));
    }
    for (index_t i = 0; i < count; i++)
        if (reduce_add(rows->sum[i]) >= expf(MAX_EXPONENT)) rows->reference[i] = reduce_max(max[i]);
}

/* exp(x) for x of -87 … MAX_EXPONENT + 1; the value of -87 below, and above that of the other bound or a larger one. For
   bf16 the relative error is 2e-7 + 6e-8 |x|. */
INLINE vec bounded_exp(int is_bf16, vec x) {
#ifdef __AVX512BF16__
    if (is_bf16) { /* 2^n 2^r, where 2^r is a polynomial of the least relative error */
        vec t = vmax(broadcast(-125.5f), x * 1.44269504f);
        vec r = (vec)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        vec p = ((broadcast(1.32764717e-3f) * r + 9.67554154e-3f) * r + 5.55071328e-2f) * r + 2.40221197e-1f;
        return (vec)_mm512_scalef_ps((__m512)((p * r + 6.93146967e-1f) * r + 1), (__m512)(t - r));
    }
#endif
    vec power, rest = expm1_parts(-vmax(broadcast(-MAX_EXPONENT - 1), -vmax(broadcast(-87), x)), &power);
    return power * rest + power;
}

/* The sums of the exponentials of some rows, which are stored if there is a gradient. Returns whether one is too large. */
INLINE int add_exponentials(int is_bf16, const loss_task *task, index_t first, index_t count, row_sums *rows) {
    float logits[PRODUCT_ROWS * PANEL] __attribute__((aligned(64)));
    index_t N = task->logits.columns;
    int is_too_large = 0;
    for (index_t i = 0; i < count; i++) rows->sum[i] = (vec){};
    for (index_t n = 0; n < N; n += PANEL) {
        logits_panel(is_bf16, task, first, count, n, logits);
        for (index_t i = 0; i < count; i++) {
            index_t column = task->args->targets[first + i] - n;
            if (column >= 0 && column < PANEL) rows->target_logit[i] = logits[i * PANEL + column];
            vec reference = broadcast(rows->reference[i]);
            vec left = bounded_exp(is_bf16, load(0, logits, i * PANEL) - reference);
            vec right = bounded_exp(is_bf16, load(0, logits, i * PANEL + WIDTH) - reference);
            rows->sum[i] += left + right;
            if (!task->exponentials) continue;
            index_t index = (first - task->first_row + i) * N + n;
            store(is_bf16, task->exponentials, index, left);
            store(is_bf16, task->exponentials, index + WIDTH, right);
        }
    }
    for (index_t i = 0; i < count; i++) is_too_large |= reduce_add(rows->sum[i]) >= expf(MAX_EXPONENT);
    return is_too_large;
}

/* The losses of some rows, and what their gradients need. */
INLINE void loss_block(int is_bf16, const loss_task *task, index_t first, index_t count) {
    const LossArgs *args = task->args;
    row_sums rows;
    for (index_t i = 0; i < count; i++) rows.sum[i] = broadcast(INFINITY);
    for (index_t columns = PANEL, N = task->logits.columns;; columns = N) {
        set_references(is_bf16, task, first, count, columns, &rows);
        if (!add_exponentials(is_bf16, task, first, count, &rows) || columns == N) break;
    }
    for (index_t i = 0; i < count; i++) {
        index_t row = first - task->first_row + i, padded = args->padded_units;
        float sum = reduce_add(rows.sum[i]), logit = rows.target_logit[i] - rows.reference[i];
        args->nats[first + i] = logf(sum) - logit;
        if (!task->exponentials) continue;
        index_t target = row * task->logits.columns + args->targets[first + i];
        memset((void *)offset_ptr(is_bf16, task->exponentials, target), 0, is_bf16 ? 2 : 4);
        task->dtarget[row] = (bounded_exp(is_bf16, broadcast(logit))[0] / sum - 1) * args->scale;
        vec inverse = broadcast(task->inverse[row] = args->scale / sum);
        for (index_t j = 0; j < padded; j += WIDTH)
            store(is_bf16, task->scaled, row * padded + j,
                  inverse * load(is_bf16, args->hidden, (first + i) * padded + j));
    }
}

/* The gradients of the hidden states of the same rows. */
INLINE void hidden_gradient(int is_bf16, const loss_task *task, index_t first, index_t count) {
    const packed_product *p = &task->dhidden;
    index_t row = first - task->first_row, H = task->args->units;
    const uint32_t *exponentials = (const uint32_t *)p->left + row * p->left_stride;
    float *out = task->args->dhidden + first * p->columns;
    for (index_t k = 0; k < p->depth; k += BLOCK_DEPTH)
        for (index_t n = 0; n < H; n += PANEL)
            gemm_panel(is_bf16, count, H - n, exponentials + k, p->left_stride, 1, p->packed + n * p->depth + k * PANEL,
                       p->depth - k < BLOCK_DEPTH ? p->depth - k : BLOCK_DEPTH, out + n, p->columns, k > 0, NULL);
    for (index_t i = 0; i < count; i++, out += p->columns) {
        const float *weight = task->args->weight + task->args->targets[first + i] * H;
        for (index_t n = 0; n < H; n += WIDTH)
            store(0, out, n,
                  load(0, out, n) * task->inverse[row + i] + load_some(weight, n, H - n) * task->dtarget[row + i]);
    }
}

static void loss_rows(const void *argument, index_t first, index_t count) {
    const loss_task *task = argument;
    int is_bf16 = (int)task->args->is_bf16;
    first += task->first_row;
    for (; count > 0; first += PRODUCT_ROWS, count -= PRODUCT_ROWS) {
        index_t rows = count < PRODUCT_ROWS ? count : PRODUCT_ROWS;
        if (is_bf16)
            loss_block(1, task, first, rows);
        else
            loss_block(0, task, first, rows);
        if (!task->exponentials) continue;
        if (is_bf16)
            hidden_gradient(1, task, first, rows);
        else
            hidden_gradient(0, task, first, rows);
    }
}

/* dbias += the sums of the columns of the logits' gradients but those of targets, some rows at a time. */
INLINE void bias_gradient(int is_bf16, const loss_task *task, index_t rows, index_t first, index_t count) {
    float *dbias = task->args->dbias;
    index_t N = task->logits.columns;
    for (index_t row = 0; row < rows; row += TILE_ROWS)
        for (index_t j = first; j < first + count; j += WIDTH) {
            vec sum = load(0, dbias, j);
            for (index_t i = row; i < row + TILE_ROWS && i < rows; i++)
                sum += task->inverse[i] * load(is_bf16, task->exponentials, i * N + j);
            store(0, dbias, j, sum);
        }
}

typedef struct {
    const loss_task *loss;
    index_t rows;
} gradients_task;

static void bias_columns(const void *argument, index_t first, index_t count) {
    const gradients_task *task = argument;
    if (task->loss->args->is_bf16)
        bias_gradient(1, task->loss, task->rows, first, count);
    else
        bias_gradient(0, task->loss, task->rows, first, count);
}

/* What the targets of a block's rows add to some columns of the weight's gradient. */
INLINE void target_gradient(int is_bf16, const gradients_task *task, index_t first, index_t count) {
    const loss_task *loss = task->loss;
    const LossArgs *args = loss->args;
    index_t end = first + count < args->units ? first + count : args->units;
    for (index_t i = 0; i < task->rows; i++) {
        index_t row = loss->first_row + i;
        float *dweight = args->dweight + args->targets[row] * args->units;
        for (index_t j = first; j < end; j += WIDTH) {
            vec product = load(is_bf16, args->hidden, row * args->padded_units + j) * loss->dtarget[i];
            store_some(dweight, j, load_some(dweight, j, end - j) + product, end - j);
        }
    }
}

static void target_columns(const void *argument, index_t first, index_t count) {
    const gradients_task *task = argument;
    if (task->loss->args->is_bf16)
        target_gradient(1, task, first, count);
    else
        target_gradient(0, task, first, count);
}

/* Adds the products of a block's gradients to those of the weight and the bias. */
static void add_gradients(const loss_task *task, index_t rows) {
    const LossArgs *args = task->args;
    index_t columns = task->logits.columns;
    gradients_task block = {task, rows};
    parallel_for(bias_columns, &block, columns, BIAS_COLUMNS, args->num_threads);
    for (index_t i = 0; i < rows; i++) args->dbias[args->targets[task->first_row + i]] += task->dtarget[i];
    WeightGradientArgs gradient = {
        args->is_bf16, task->first_row > 0, 1, rows, columns, columns, args->padded_units, args->vocabulary_size,
        args->units,   args->num_threads};
    gradient.left = task->exponentials, gradient.right = task->scaled, gradient.out = args->dweight;
    if (weight_gradient(&gradient)) *task->failed = 1;
    parallel_for(target_columns, &block, args->units, TARGET_COLUMNS, args->num_threads);
}

static void loss_blocks(loss_task *task, index_t block) {
    const LossArgs *args = task->args;
    for (; task->first_row < args->rows && !*task->failed; task->first_row += block) {
        index_t rows = args->rows - task->first_row < block ? args->rows - task->first_row : block;
        parallel_for(loss_rows, task, rows, TILE_ROWS, args->num_threads);
        if (task->exponentials && !*task->failed) add_gradients(task, rows);
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
    float *bias = alloc_floats(columns), *inverse = has_gradient ? alloc_floats(2 * rows) : NULL;
    uint32_t *exponentials = has_gradient ? alloc_floats(rows * columns / step) : NULL;
    uint32_t *scaled = has_gradient ? alloc_floats(rows * padded / step) : NULL;
    atomic_int failed = !bias || (has_gradient && !(exponentials && inverse && scaled));
    if (!failed) {
        for (index_t j = 0; j < columns; j++) bias[j] = j < V ? args->bias[j] : -INFINITY;
        pack_weight(&(packing){is_bf16, 1, 1, args->weight, V, H, depth, columns, args->packed}, args->num_threads);
        loss_task task = {args, {args->hidden, args->packed, bias, padded / step, depth, columns}};
        task.dhidden = (packed_product){exponentials, args->token_packed, NULL, columns / step, token_depth, padded};
        task.exponentials = exponentials, task.inverse = inverse, task.dtarget = inverse + rows, task.scaled = scaled,
        task.failed = &failed;
        if (has_gradient) {
            pack_weight(&(packing){is_bf16, 0, 1, args->weight, V, H, token_depth, padded, args->token_packed},
                        args->num_threads);
            memset(args->dbias, 0, columns * sizeof *args->dbias);
        }
        loss_blocks(&task, rows);
    }
    free(bias);
    free(exponentials);
    free(scaled);
    free(inverse);
    return failed ? OUT_OF_MEMORY : OK;
}
