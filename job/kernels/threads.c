/* Threads that are kept between calls: to start one takes as long as a small kernel. They wait for their next slice
   actively for some microseconds, then they sleep. */

#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>

#include "tiles.h"

enum { MAX_THREADS = 64, SPINS = 2000 /* some 20 to 50 us */ };

typedef struct {
    work_function work;
    const void *task;
    index_t first, count;
} work_slice;

typedef struct {
    work_slice slice;
    atomic_int is_pending; /* whether the thread has yet to complete its slice */
    pthread_mutex_t lock;
    pthread_cond_t changed;
} worker;

static worker workers[MAX_THREADS - 1];
static index_t num_workers; /* that were started */
static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;

static void run_slice(const work_slice *slice) {
    slice->work(slice->task, slice->first, slice->count);
    release_tiles();
}

static void pause_briefly(void) {
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

static void wait_for(worker *w, int is_pending) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&w->is_pending) == is_pending) return;
        pause_briefly();
    }
    pthread_mutex_lock(&w->lock);
    while (atomic_load(&w->is_pending) != is_pending) pthread_cond_wait(&w->changed, &w->lock);
    pthread_mutex_unlock(&w->lock);
}

static void set_pending(worker *w, int is_pending) {
    pthread_mutex_lock(&w->lock);
    atomic_store(&w->is_pending, is_pending);
    pthread_mutex_unlock(&w->lock);
    pthread_cond_signal(&w->changed);
}

static void *run_worker(void *argument) {
    worker *w = argument;
    for (;;) {
        wait_for(w, 1);
        run_slice(&w->slice);
        set_pending(w, 0);
    }
    return NULL;
}

/* In a forked process only the thread that forked exists. */
static void forget_workers(void) {
    num_workers = 0;
    pthread_mutex_init(&in_use, NULL);
}

/* Starts threads until there are `count`, or as many as the system permits. */
static void start_workers(index_t count) {
    static int is_registered;
    if (!is_registered) is_registered = !pthread_atfork(NULL, NULL, forget_workers);
    for (; num_workers < count; num_workers++) {
        worker *w = &workers[num_workers];
        pthread_t thread;
        atomic_store(&w->is_pending, 0);
        pthread_mutex_init(&w->lock, NULL);
        pthread_cond_init(&w->changed, NULL);
        if (pthread_create(&thread, NULL, run_worker, w)) break;
        pthread_detach(thread);
    }
}

void parallel_for(work_function work, const void *task, index_t total, index_t chunk, index_t num_threads) {
    index_t num_chunks = (total + chunk - 1) / chunk, first = 0;
    num_threads = num_threads > MAX_THREADS ? MAX_THREADS : num_threads;
    num_threads = num_threads > num_chunks ? num_chunks : num_threads;
    if (num_threads < 2 || pthread_mutex_trylock(&in_use)) { /* another thread of the program uses them */
        run_slice(&(work_slice){work, task, 0, total});
        return;
    }
    start_workers(num_threads - 1);
    num_threads = num_threads > num_workers + 1 ? num_workers + 1 : num_threads;
    for (index_t i = 1; i <= num_threads; i++) {
        index_t end = i * num_chunks / num_threads * chunk;
        work_slice slice = {work, task, first, (end > total ? total : end) - first};
        first = end;
        if (i == num_threads) {
            run_slice(&slice);
        } else {
            workers[i - 1].slice = slice;
            set_pending(&workers[i - 1], 1);
        }
    }
    for (index_t i = 0; i < num_threads - 1; i++) wait_for(&workers[i], 0);
    pthread_mutex_unlock(&in_use);
}
