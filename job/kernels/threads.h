/* Memory and threads: each thread works on a slice of the lanes, rows or columns. */

#ifndef THREADS_H
#define THREADS_H

#include <stdlib.h>

#include "vector.h"

typedef void (*work_function)(const void *task, index_t first, index_t count);

/* Memory for `count` floats or words, aligned to a cache line; NULL if there is not enough. */
static inline void *alloc_floats(index_t count) { return aligned_alloc(64, (count * 4 + 63) / 64 * 64); }

/* Calls work(task, first, count) for slices of 0 … total - 1 that start at multiples of `chunk`. */
void parallel_for(work_function work, const void *task, index_t total, index_t chunk, index_t num_threads);

#endif
