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

/* A task is cut into chunks that whoever is awake claims; nobody waits for a thread that the system has not
 * scheduled. A ticket holds the task's generation (high half) and the next unclaimed chunk (low half); a claim that
 * succeeds proves that the task is still open, so that its description may be read. */
struct Pool {
    int threads;
    _Atomic uint64_t ticket;
    _Atomic uint32_t wake; /* futex word: bumped with each task */
    _Atomic uint32_t done; /* chunks finished */
    _Atomic int sleepers;
    _Atomic int stop;
    _Atomic uint32_t chunks;
    task_fn fn;
    void *arg;
    pthread_t *ids;
    char *scratch;
    size_t scratch_bytes;
};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("" ::: "memory");
#endif
}

#define CLOSED 0xffffffffu

/* Claim and run chunks of the open task until there are none. */
static void drain(Pool *p) {
    uint64_t ticket = atomic_load_explicit(&p->ticket, memory_order_acquire);
    for (;;) {
        uint32_t next = (uint32_t)ticket, chunks = atomic_load_explicit(&p->chunks, memory_order_relaxed);
        task_fn fn = p->fn;
        void *arg = p->arg;
        if (next >= chunks) return;
        if (!atomic_compare_exchange_weak(&p->ticket, &ticket, ticket + 1)) continue;
        fn(arg, (int)next, (int)chunks);
        atomic_fetch_add_explicit(&p->done, 1, memory_order_release);
        ticket = atomic_load_explicit(&p->ticket, memory_order_acquire);
    }
}

static void wait_for_task(Pool *p, uint32_t seen) {
    for (int i = 0; i < 4000; i++) {
        if (atomic_load_explicit(&p->wake, memory_order_acquire) != seen) return;
        relax();
    }
    atomic_fetch_add(&p->sleepers, 1);
    while (atomic_load(&p->wake) == seen)
        syscall(SYS_futex, &p->wake, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&p->sleepers, 1);
}

static void *work(void *arg) {
    Pool *p = arg;
    uint32_t seen = 0;
    for (;;) {
        wait_for_task(p, seen);
        seen = atomic_load_explicit(&p->wake, memory_order_acquire);
        if (atomic_load(&p->stop)) return NULL;
        drain(p);
    }
}

Pool *pd_pool_create(int threads) {
    Pool *p = calloc(1, sizeof *p);
    p->threads = threads < 1 ? 1 : threads;
    atomic_store(&p->ticket, CLOSED);
    p->ids = calloc((size_t)p->threads, sizeof *p->ids);
    for (int i = 1; i < p->threads; i++) {
        if (pthread_create(&p->ids[i], NULL, work, p)) { p->threads = i; break; }
    }
    return p;
}

int pd_threads(const Pool *p) { return p->threads; }

char *pd_scratch(Pool *p, size_t bytes) {
    if (bytes > p->scratch_bytes) {
        free(p->scratch);
        p->scratch_bytes = bytes + bytes / 2;
        p->scratch = aligned_alloc(64, (p->scratch_bytes + 63) / 64 * 64);
        if (!p->scratch) p->scratch_bytes = 0;
    }
    return p->scratch;
}

static void wake(Pool *p) {
    atomic_fetch_add(&p->wake, 1);
    if (atomic_load(&p->sleepers) > 0)
        syscall(SYS_futex, &p->wake, FUTEX_WAKE_PRIVATE, p->threads, NULL, NULL, 0);
}

void pd_parallel(Pool *p, task_fn fn, void *arg, int chunks) {
    if (p->threads == 1 || chunks == 1) {
        for (int i = 0; i < chunks; i++) fn(arg, i, chunks);
        return;
    }
    uint64_t generation = (atomic_load(&p->ticket) >> 32) + 1;
    atomic_store(&p->ticket, generation << 32 | CLOSED);
    p->fn = fn;
    p->arg = arg;
    atomic_store(&p->done, 0);
    atomic_store(&p->chunks, (uint32_t)chunks);
    atomic_store(&p->ticket, generation << 32);
    wake(p);
    drain(p);
    for (int i = 0; atomic_load_explicit(&p->done, memory_order_acquire) < (uint32_t)chunks; i++) {
        if (i < 4000) relax(); else sched_yield();
    }
}

void pd_pool_destroy(Pool *p) {
    atomic_store(&p->stop, 1);
    wake(p);
    for (int i = 1; i < p->threads; i++) pthread_join(p->ids[i], NULL);
    free(p->ids);
    free(p->scratch);
    free(p);
}
