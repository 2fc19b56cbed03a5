/* Clips gradients and updates weights, all of them in one pass. Most rows of an embedding's gradient are zero. */

#include "threads.h"

enum { CHUNK = 512, CHUNKS_PER_THREAD = 64 }; /* numbers; chunks that are worth a thread */

INLINE index_t num_chunks(const Parameter *p) { return (p->size + CHUNK - 1) / CHUNK; }

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
    index_t total = 0;
    for (index_t i = 0; i < args->count; i++) total += num_chunks(&args->parameters[i]);
    parallel_for(update_chunks, args, total, CHUNKS_PER_THREAD, args->num_threads);
    return OK;
}
