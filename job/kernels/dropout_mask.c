/* Dropout: zeroes elements by a hash of their position and their lane's key, and divides the others by the probability
   of being kept. A 32-bit hash decides on two successive elements. */

#include "threads.h"

enum { CHUNK = 128, CHUNKS_PER_THREAD = 128 }; /* elements; chunks that are worth a thread */

/* The hash function "lowbias32" (Chris Wellons, 2018). */
INLINE uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352d;
    x = (x ^ x >> 15) * 0x846ca68b;
    return x ^ x >> 16;
}

INLINE void drop(int is_bf16, const DropoutArgs *a, index_t start, uint32_t counter, uint32_t key, index_t count) {
    uint32_t hashes[CHUNK / 2];
    int16_t draws[CHUNK];
    for (uint32_t i = 0; i < CHUNK / 2; i++) hashes[i] = mix((counter + i) * 0x9e3779b9 ^ key);
    memcpy(draws, hashes, sizeof draws);
    for (index_t i = 0; i < count; i++) {
        uint32_t bits = is_bf16 ? (uint32_t)((const uint16_t *)a->source)[start + i] << 16
                                : ((const uint32_t *)a->source)[start + i];
        float x;
        memcpy(&x, &bits, 4);
        x = draws[i] < a->threshold ? 0 : x / a->keep;
        memcpy(&bits, &x, 4);
        if (is_bf16)
            ((uint16_t *)a->out)[start + i] =
                (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to the nearest, ties to even */
        else
            ((uint32_t *)a->out)[start + i] = bits;
    }
}

static void drop_chunks(const void *task, index_t first, index_t num_chunks) {
    const DropoutArgs local = *(const DropoutArgs *)task, *a = &local;
    index_t per_row = (a->units + CHUNK - 1) / CHUNK, pairs = (a->units + 1) / 2;
    for (index_t chunk = first; chunk < first + num_chunks; chunk++) {
        index_t row = chunk / per_row, offset = chunk % per_row * CHUNK, step = a->is_locked ? 0 : row / a->lanes;
        index_t left = a->units - offset, count = left < CHUNK ? left : CHUNK, start = row * a->units + offset;
        uint32_t counter = (uint32_t)(step * pairs + offset / 2), key = (uint32_t)a->keys[row % a->lanes];
        if (a->is_bf16)
            drop(1, a, start, counter, key, count);
        else
            drop(0, a, start, counter, key, count);
    }
}

int dropout(const DropoutArgs *args) {
    index_t num_chunks = args->steps * args->lanes * ((args->units + CHUNK - 1) / CHUNK);
    parallel_for(drop_chunks, args, num_chunks, CHUNKS_PER_THREAD, args->num_threads);
    return OK;
}
