/* Memory and threads: each thread works on a slice of the lanes, rows or columns. */

#ifndef THREADS_H
#define THREADS_H

#include <pthread.h>
#include <stdlib.h>

#include "vector.h"

enum { MAX_THREADS = 64 };

typedef void (*work_function)(const void *task, index_t first, index_t count);

typedef struct {
    work_function work;
    const void *task;
    index_t first, count;
} work_slice;

/* Memory for `count` floats or words, aligned to a cache line; NULL if there is not enough. */
static void *alloc_floats(index_t count) { return aligned_alloc(64, (count * 4 + 63) / 64 * 64); }

static void *run_slice(void *argument) {
    const work_slice *slice = argument;
    slice->work(slice->task, slice->first, slice->count);
    return NULL;
}

/* Calls work(task, first, count) for slices of 0 … total - 1 that start at multiples of `chunk`. */
static void parallel_for(work_function work, const void *task, index_t total, index_t chunk, index_t num_threads) {
    work_slice slices[MAX_THREADS];
    pthread_t threads[MAX_THREADS];
    index_t num_chunks = (total + chunk - 1) / chunk, first = 0, started = 0;
    num_threads = num_threads > MAX_THREADS ? MAX_THREADS : num_threads;
    num_threads = num_threads > num_chunks ? num_chunks : num_threads;
    for (index_t i = 0; i < num_threads; i++) {
        index_t end = (i + 1) * num_chunks / num_threads * chunk;
        end = end > total ? total : end;
        slices[i] = (work_slice){work, task, first, end - first};
        first = end;
    }
    for (; started + 1 < num_threads; started++)
        if (pthread_create(&threads[started], NULL, run_slice, &slices[started])) break;
    for (index_t i = started; i < num_threads; i++) run_slice(&slices[i]);
    for (index_t i = 0; i < started; i++) pthread_join(threads[i], NULL);
}

#endif
