/* Threads, mutexes with ranks, condition variables, the monotonic clock, fork generations, and the
 * deadline of a call. */
#include "base/thread.h"
#include "base/caller.h"
#include "base/memory.h"
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif

#define NS_PER_S (1000 * INT64_C(1000000))

/* ---------------------------------------------------------------------------- lock order */

static _Atomic int64_t violations;

int64_t kv_lock_violations(void)
{
    return atomic_load(&violations);
}

#ifdef KV_DEBUG

static _Thread_local int held[KV_RANK_LEAF + 1]; /* mutexes of this thread, by rank */

static void note_lock(const kv_mutex_t *mutex)
{
    for (int rank = (int)mutex->rank; rank <= KV_RANK_LEAF; rank++) {
        if (held[rank] > 0) {
            atomic_fetch_add(&violations, 1);
            fprintf(stderr, "kvstore: lock order: rank %d taken under rank %d\n", (int)mutex->rank,
                    rank);
        }
    }
    held[mutex->rank]++;
}

static void note_unlock(const kv_mutex_t *mutex)
{
    held[mutex->rank]--;
}

#else

static inline void note_lock(const kv_mutex_t *mutex)
{
    (void)mutex;
}

static inline void note_unlock(const kv_mutex_t *mutex)
{
    (void)mutex;
}

#endif

/* -------------------------------------------------------------------------------- mutexes */

void kv_mutex_init(kv_mutex_t *mutex, kv_lock_rank_t rank)
{
    pthread_mutex_init(&mutex->raw, NULL);
    mutex->rank = rank;
}

void kv_mutex_fini(kv_mutex_t *mutex)
{
    pthread_mutex_destroy(&mutex->raw);
}

/* Before the lock is taken, so that a violation that deadlocks is still reported. */
void kv_mutex_lock(kv_mutex_t *mutex) KV_NO_ANALYSIS
{
    note_lock(mutex);
    pthread_mutex_lock(&mutex->raw);
}

void kv_mutex_unlock(kv_mutex_t *mutex) KV_NO_ANALYSIS
{
    note_unlock(mutex);
    pthread_mutex_unlock(&mutex->raw);
}

/* ------------------------------------------------------------------- condition variables */

void kv_cond_init(kv_cond_t *cond)
{
#ifdef __APPLE__
    pthread_cond_init(&cond->raw, NULL);
#else
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&cond->raw, &attributes);
    pthread_condattr_destroy(&attributes);
#endif
}

void kv_cond_fini(kv_cond_t *cond)
{
    pthread_cond_destroy(&cond->raw);
}

void kv_cond_wait(kv_cond_t *cond, kv_mutex_t *mutex)
{
    pthread_cond_wait(&cond->raw, &mutex->raw);
}

void kv_cond_wait_until(kv_cond_t *cond, kv_mutex_t *mutex, int64_t until_ns)
{
#ifdef __APPLE__
    until_ns -= kv_clock_ns();
#endif
    if (until_ns < 0)
        until_ns = 0;
    struct timespec time = {.tv_sec = until_ns / NS_PER_S, .tv_nsec = until_ns % NS_PER_S};
#ifdef __APPLE__
    pthread_cond_timedwait_relative_np(&cond->raw, &mutex->raw, &time);
#else
    pthread_cond_timedwait(&cond->raw, &mutex->raw, &time);
#endif
}

void kv_cond_signal(kv_cond_t *cond)
{
    pthread_cond_signal(&cond->raw);
}

void kv_cond_broadcast(kv_cond_t *cond)
{
    pthread_cond_broadcast(&cond->raw);
}

/* ------------------------------------------------------------------------ clock, deadline */

int64_t kv_clock_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * NS_PER_S + time.tv_nsec;
}

int64_t kv_caller_deadline(kv_caller_t *caller)
{
    if (caller->deadline_ns == 0) {
        int64_t now = kv_clock_ns();
        caller->deadline_ns =
            caller->timeout_ns > INT64_MAX - now ? INT64_MAX : now + caller->timeout_ns;
    }
    return caller->deadline_ns;
}

/* -------------------------------------------------------------------------------- threads */

kv_status_t kv_thread_start(kv_thread_t *thread, const char *name, void *(*body)(void *),
                            void *context)
{
    if (kv_fault_hit(KV_FAULT_THREAD_START))
        return kv_fail(KV_NO_MEMORY, "cannot start the thread %s: a fault was set", name);

    /* A fault of the thread's own code must reach the handler that reports it: blocked, such a
     * signal kills the process without a word. */
    sigset_t blocked, before;
    sigfillset(&blocked);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGFPE);
    sigdelset(&blocked, SIGILL);
    kv_thread_t started;
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int error = pthread_create(&started, NULL, body, context);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0)
        return kv_fail(KV_NO_MEMORY, "cannot start the thread %s (error %d)", name, error);

#ifdef __linux__
    char short_name[16];
    snprintf(short_name, sizeof short_name, "%s", name);
    pthread_setname_np(started, short_name);
#endif
    *thread = started;
    return KV_OK;
}

void kv_thread_join(kv_thread_t thread)
{
    pthread_join(thread, NULL);
}

int kv_processor_count(void)
{
#ifdef __linux__
    cpu_set_t sets[16]; /* one holds 1024 processors, and the call fails when they do not fit */
    if (sched_getaffinity(0, sizeof sets, sets) == 0) {
        int count = CPU_COUNT_S(sizeof sets, sets);
        return count > 0 ? count : 1;
    }
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 && online < INT32_MAX ? (int)online : 1;
}

/* ----------------------------------------------------------------------------------- fork */

/* One more than the number of forks; 0 before the handler stands. */
static _Atomic uint64_t forks;
static pthread_once_t forks_once = PTHREAD_ONCE_INIT;

static void count_fork(void)
{
    atomic_fetch_add(&forks, 1);
}

static void install_fork_handler(void)
{
    pthread_atfork(NULL, NULL, count_fork);
    atomic_store(&forks, 1);
}

uint64_t kv_fork_generation(void)
{
    uint64_t now = atomic_load_explicit(&forks, memory_order_relaxed);
    if (KV_UNLIKELY(now == 0)) {
        pthread_once(&forks_once, install_fork_handler);
        now = atomic_load(&forks);
    }
    return now - 1;
}
