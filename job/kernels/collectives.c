/* Collectives between the processes of one machine, in memory that they share.

   In each round a rank writes its data into its own slot and publishes it. When all have published, it reads
   what it needs of all slots: the data itself, or its part of their sum, which is added in the order of the
   ranks and of which all ranks then copy the whole. All get the same bits. The flags hold the number of the
   last round that a rank has published and released.

   Safety. A slot is rewritten only after every rank has released the previous round. The sums are rewritten
   only after every rank has published its next input, which it does after it has copied the previous sums. */

#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#include "api.h"

enum { CACHE_LINE = 64, NUM_SPINS = 2000 };
static const double YIELD_S = 1e-3, SLEEP_S = 5e-5; /* first yield, then sleep: waking up is slow */

typedef struct {
    _Atomic index_t published, released;
    char padding[CACHE_LINE - 16]; /* against false sharing */
} slot_flags;

static slot_flags *flags_of(const ShmGroup *g, index_t rank) { return (slot_flags *)(g->memory + CACHE_LINE) + rank; }
static char *slot(const ShmGroup *g, index_t rank) { return (char *)flags_of(g, g->workers) + rank * g->slot_bytes; }

static double monotonic_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

static void cpu_relax(void) {
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

/* Waits until a flag of all ranks has reached this round; returns 1 after a timeout. */
static int wait_for_all(ShmGroup *g, index_t flag_offset) {
    double start = 0;
    for (index_t rank = 0; rank < g->workers; rank++) {
        _Atomic index_t *flag = (_Atomic index_t *)((char *)flags_of(g, rank) + flag_offset);
        for (index_t spins = 0; atomic_load_explicit(flag, memory_order_acquire) < g->sequence; spins++) {
            if (spins < NUM_SPINS) {
                cpu_relax();
                continue;
            }
            double now = monotonic_s();
            start = start ? start : now;
            g->stalled_rank = rank;
            if (now - start > g->timeout_s) return 1;
            if (now - start < YIELD_S)
                sched_yield();
            else
                nanosleep(&(struct timespec){0, (long)(SLEEP_S * 1e9)}, NULL);
        }
    }
    return 0;
}

/* Starts a round: writes this rank's slot and waits until all slots are written. */
static int publish(ShmGroup *g, const void *data, index_t bytes) {
    g->sequence++;
    memcpy(slot(g, g->rank), data, bytes);
    atomic_store_explicit(&flags_of(g, g->rank)->published, g->sequence, memory_order_release);
    return wait_for_all(g, offsetof(slot_flags, published));
}

/* Ends a round: waits until no rank reads a slot any more. */
static int release(ShmGroup *g) {
    atomic_store_explicit(&flags_of(g, g->rank)->released, g->sequence, memory_order_release);
    return wait_for_all(g, offsetof(slot_flags, released));
}

#define SUM_SLOTS(type)                                                                  \
    static void sum_slots_##type(const ShmGroup *g, index_t first, index_t last) {       \
        type *sums = (type *)slot(g, g->workers);                                        \
        memcpy(sums + first, (type *)slot(g, 0) + first, (last - first) * sizeof *sums); \
        for (index_t rank = 1; rank < g->workers; rank++) {                              \
            const type *data = (const type *)slot(g, rank);                              \
            for (index_t i = first; i < last; i++) sums[i] += data[i];                   \
        }                                                                                \
    }
SUM_SLOTS(float)
SUM_SLOTS(double)

int all_reduce(ShmGroup *g, index_t item_size, index_t count, void *data) {
    index_t slot_items = g->slot_bytes / item_size;
    for (index_t done = 0; done < count;) {
        index_t n = slot_items < count - done ? slot_items : count - done;
        char *block = (char *)data + done * item_size;
        if (publish(g, block, n * item_size)) return 1;
        index_t first = n * g->rank / g->workers, last = n * (g->rank + 1) / g->workers;
        if (item_size == sizeof(double))
            sum_slots_double(g, first, last);
        else
            sum_slots_float(g, first, last);
        if (release(g)) return 1;
        memcpy(block, slot(g, g->workers), n * item_size);
        done += n;
    }
    return 0;
}

int all_gather(ShmGroup *g, index_t bytes, const void *data, void *const *outputs) {
    for (index_t done = 0; done < bytes;) {
        index_t n = g->slot_bytes < bytes - done ? g->slot_bytes : bytes - done;
        if (publish(g, (const char *)data + done, n)) return 1;
        for (index_t rank = 0; rank < g->workers; rank++) memcpy((char *)outputs[rank] + done, slot(g, rank), n);
        if (release(g)) return 1;
        done += n;
    }
    return 0;
}
