/* The exchange between workers of one machine, in memory that they share.

   In each turn a worker writes its numbers into its own slot, and when all have, takes what it needs of all
   slots: the numbers themselves, or its part of their sum, which is added in the order of the workers' ranks
   and of which all then read the whole. All get the same bits. How far a worker is it tells by the turn's
   number in its mark. Nothing is overwritten that is still read: who writes in the next turn has seen that
   all have taken, so that no slot is read any more; who adds in it has seen that all have written, so that
   all have read the sums before. */

#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

typedef long size;

enum { LINE = 64, SPINS = 2000 };
static const double YIELDING = 1e-3, NAP = 5e-5; /* seconds: a machine that sleeps is slow to wake */

typedef struct {
    _Atomic uint64_t written, taken;
    char rest[LINE - 16]; /* a line of the cache to each */
} mark;

typedef struct {
    char *memory; /* a line that says whose it is; a mark for each worker; a slot for each; the sums */
    size rank, workers, room; /* of a slot, in bytes */
    double patience;          /* seconds */
    uint64_t turn;
    size missing; /* the worker for whom patience was lost */
} neighbours;

static mark *mark_of(const neighbours *n, size rank) { return (mark *)(n->memory + LINE) + rank; }
static char *slot(const neighbours *n, size rank) { return (char *)mark_of(n, n->workers) + rank * n->room; }

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

static void breathe(void) {
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

/* Until all have come to this turn; 0 then, or 1 where one has not in time. */
static int wait_for(neighbours *n, size offset) {
    double begun = 0;
    for (size rank = 0; rank < n->workers; rank++) {
        _Atomic uint64_t *told = (_Atomic uint64_t *)((char *)mark_of(n, rank) + offset);
        for (size spins = 0; atomic_load_explicit(told, memory_order_acquire) < n->turn; spins++) {
            if (spins < SPINS) {
                breathe();
                continue;
            }
            double now = seconds();
            begun = begun ? begun : now;
            n->missing = rank;
            if (now - begun > n->patience) return 1;
            if (now - begun < YIELDING)
                sched_yield();
            else
                nanosleep(&(struct timespec){0, (long)(NAP * 1e9)}, NULL);
        }
    }
    return 0;
}

/* A turn begins: this worker's numbers are in its slot, and all have written theirs. */
static int shown(neighbours *n, const void *numbers, size bytes) {
    n->turn++;
    memcpy(slot(n, n->rank), numbers, bytes);
    atomic_store_explicit(&mark_of(n, n->rank)->written, n->turn, memory_order_release);
    return wait_for(n, offsetof(mark, written));
}

/* It ends: no slot is read any more. */
static int taken(neighbours *n) {
    atomic_store_explicit(&mark_of(n, n->rank)->taken, n->turn, memory_order_release);
    return wait_for(n, offsetof(mark, taken));
}

#define SUM_OF(type)                                                                     \
    static void sum_of_##type(const neighbours *n, size first, size last) {              \
        type *to = (type *)slot(n, n->workers);                                          \
        memcpy(to + first, (type *)slot(n, 0) + first, (last - first) * sizeof *to);     \
        for (size rank = 1; rank < n->workers; rank++) {                                 \
            const type *from = (const type *)slot(n, rank);                              \
            for (size i = first; i < last; i++) to[i] += from[i];                        \
        }                                                                                \
    }
SUM_OF(float)
SUM_OF(double)

/* Makes `count` numbers of `width` bytes the sums of all workers' numbers; 1 where a worker was missing. */
int add_up(neighbours *n, size width, size count, void *numbers) {
    for (size done = 0; done < count;) {
        size some = n->room / width < count - done ? n->room / width : count - done;
        char *own = (char *)numbers + done * width;
        if (shown(n, own, some * width)) return 1;
        size first = some * n->rank / n->workers, last = some * (n->rank + 1) / n->workers;
        if (width == sizeof(double))
            sum_of_double(n, first, last);
        else
            sum_of_float(n, first, last);
        if (taken(n)) return 1;
        memcpy(own, slot(n, n->workers), some * width);
        done += some;
    }
    return 0;
}

/* Gives `to` the `bytes` of each worker's numbers; 1 where a worker was missing. */
int gather(neighbours *n, size bytes, const void *numbers, void *const *to) {
    for (size done = 0; done < bytes;) {
        size some = n->room < bytes - done ? n->room : bytes - done;
        if (shown(n, (const char *)numbers + done, some)) return 1;
        for (size rank = 0; rank < n->workers; rank++) memcpy((char *)to[rank] + done, slot(n, rank), some);
        if (taken(n)) return 1;
        done += some;
    }
    return 0;
}
