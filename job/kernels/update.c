/* The norm of gradients, and their clipping and the update of weights in one pass. Most rows of an embedding's gradient are
   zero. */

#include "threads.h"

enum { CHUNK = 512, CHUNKS_PER_THREAD = 64 }; /* numbers; chunks that are worth a thread */

INLINE index_t num_chunks(const Parameter *p) { return (p->size + CHUNK - 1) / CHUNK; }

static index_t total_chunks(const Parameter *parameters, index_t count) {
    index_t total = 0;
    for (index_t i = 0; i < count; i++) total += num_chunks(&parameters[i]);
    return total;
}

/* Whether all bits are zero. */
static int is_zero(const float *numbers, index_t count) {
    const int32_t *words = (const int32_t *)numbers;
    int32_t bits = 0;
    for (index_t i = 0; i < count; i++) bits |= words[i];
    return !bits;
}

static void update_chunk(const UpdateArgs *args, const Parameter *p, index_t first) {
    index_t count = p->size - first < CHUNK ? p->size - first : CHUNK;
    float *restrict gradient = p->gradient + first, *restrict weight = p->weight ? p->weight + first : NULL;
    float scale = args->scale, learning_rate = args->learning_rate;
    if (scale - scale == 0 && is_zero(gradient, count)) return; /* nothing would change */
    for (index_t i = 0; i < count; i++) {
        gradient[i] *= scale;
        if (weight) weight[i] -= learning_rate * gradient[i];
    }
}

/* Updates `count` of the chunks of all parameters, from number `first` on. */
static void update_chunks(const void *task, index_t first, index_t count) {
    const UpdateArgs *args = task;
    for (const Parameter *p = args->parameters; count > 0; first -= num_chunks(p++))
        for (; first < num_chunks(p) && count > 0; first++, count--) update_chunk(args, p, first * CHUNK);
}

int update(const UpdateArgs *args) {
    index_t total = total_chunks(args->parameters, args->count);
    parallel_for(update_chunks, args, total, CHUNKS_PER_THREAD, args->num_threads);
    return OK;
}

typedef struct {
    const SquaresArgs *args;
    double *sums; /* of the chunks of all parameters */
} squares_task;

static float chunk_squares(const Parameter *p, index_t first) {
    index_t count = p->size - first < CHUNK ? p->size - first : CHUNK;
    vec sums[4] = {};
    for (index_t i = 0; i < count; i += 4 * WIDTH)
        for (index_t j = 0; j < 4; j++) {
            vec x = load_some(p->gradient + first, i + j * WIDTH, count - i - j * WIDTH);
            sums[j] += x * x;
        }
    return reduce_add(sums[0] + sums[1] + (sums[2] + sums[3]));
}

static void squares_of_chunks(const void *argument, index_t first, index_t count) {
    const squares_task *task = argument;
    double *sums = task->sums + first;
    for (const Parameter *p = task->args->parameters; count > 0; first -= num_chunks(p++))
        for (; first < num_chunks(p) && count > 0; first++, count--) *sums++ = chunk_squares(p, first * CHUNK);
}

int sum_squares(const SquaresArgs *args) {
    index_t total = total_chunks(args->parameters, args->count);
    double sum = 0, *sums = alloc_floats(2 * total);
    if (!sums) return OUT_OF_MEMORY;
    squares_task task = {args, sums};
    parallel_for(squares_of_chunks, &task, total, CHUNKS_PER_THREAD, args->num_threads);
    for (index_t i = 0; i < total; i++) sum += sums[i]; /* in one order on any number of threads */
    *args->sum = sum;
    free(sums);
    return OK;
}
