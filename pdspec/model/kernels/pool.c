/* A pool of threads that spin briefly between tasks (layers follow one another within microseconds) and
 * sleep on a futex when the engine is idle, so that an idle worker costs nothing. */
#define _GNU_SOURCE
#include "pdk.h"
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

struct Pool {
    int threads;
    _Atomic uint32_t generation; /* bumped for each task */
    _Atomic int pending;         /* workers that have not finished the task */
    _Atomic int sleepers;
    _Atomic int stop;
    task_fn fn;
    void *arg;
    pthread_t *ids;
};

typedef struct { Pool *pool; int index; } Seat;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("" ::: "memory");
#endif
}

static void wait_for_task(Pool *p, uint32_t seen) {
    for (int i = 0; i < 4000; i++) {
        if (atomic_load_explicit(&p->generation, memory_order_acquire) != seen) return;
        relax();
    }
    atomic_fetch_add(&p->sleepers, 1);
    while (atomic_load(&p->generation) == seen)
        syscall(SYS_futex, &p->generation, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&p->sleepers, 1);
}

static void *work(void *arg) {
    Seat seat = *(Seat *)arg;
    free(arg);
    Pool *p = seat.pool;
    uint32_t seen = 0;
    for (;;) {
        wait_for_task(p, seen);
        seen = atomic_load_explicit(&p->generation, memory_order_acquire);
        if (atomic_load(&p->stop)) return NULL;
        p->fn(p->arg, seat.index, p->threads);
        atomic_fetch_sub_explicit(&p->pending, 1, memory_order_release);
    }
}

Pool *pd_pool_create(int threads) {
    Pool *p = calloc(1, sizeof *p);
    p->threads = threads < 1 ? 1 : threads;
    p->ids = calloc((size_t)p->threads, sizeof *p->ids);
    for (int i = 1; i < p->threads; i++) {
        Seat *seat = malloc(sizeof *seat);
        *seat = (Seat){p, i};
        if (pthread_create(&p->ids[i], NULL, work, seat)) { free(seat); p->threads = i; break; }
    }
    return p;
}

int pd_threads(const Pool *p) { return p->threads; }

static void publish(Pool *p) {
    atomic_fetch_add(&p->generation, 1);
    if (atomic_load(&p->sleepers) > 0)
        syscall(SYS_futex, &p->generation, FUTEX_WAKE_PRIVATE, p->threads, NULL, NULL, 0);
}

void pd_parallel(Pool *p, task_fn fn, void *arg) {
    if (p->threads == 1) { fn(arg, 0, 1); return; }
    p->fn = fn;
    p->arg = arg;
    atomic_store(&p->pending, p->threads - 1);
    publish(p);
    fn(arg, 0, p->threads);
    for (int i = 0; atomic_load_explicit(&p->pending, memory_order_acquire) > 0; i++) {
        if (i < 20000) relax(); else sched_yield();
    }
}

void pd_pool_destroy(Pool *p) {
    atomic_store(&p->stop, 1);
    publish(p);
    for (int i = 1; i < p->threads; i++) pthread_join(p->ids[i], NULL);
    free(p->ids);
    free(p);
}
