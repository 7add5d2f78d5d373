/* Threads, mutexes with ranks, condition variables on the monotonic clock, fork generations.
 *
 * In debug builds (KV_DEBUG) a mutex checks that it is taken only by a thread that holds no mutex
 * of the same or a higher rank; ranks follow the lock order below, outermost first.
 */
#ifndef KV_BASE_THREAD_H
#define KV_BASE_THREAD_H

#include "base/status.h"
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#if defined(__clang__)
#define KV_CAPABILITY __attribute__((capability("mutex")))
#define KV_ACQUIRES(...) __attribute__((acquire_capability(__VA_ARGS__)))
#define KV_RELEASES(...) __attribute__((release_capability(__VA_ARGS__)))
#define KV_REQUIRES(...) __attribute__((requires_capability(__VA_ARGS__)))
#define KV_NO_ANALYSIS __attribute__((no_thread_safety_analysis))
#else
#define KV_CAPABILITY
#define KV_ACQUIRES(...)
#define KV_RELEASES(...)
#define KV_REQUIRES(...)
#define KV_NO_ANALYSIS
#endif

typedef enum kv_lock_rank {
    KV_RANK_STORE = 1,  /* key table and settings of one store */
    KV_RANK_PS = 2,     /* a client or a server of the cluster */
    KV_RANK_NET = 3,    /* one endpoint: its queues and peers */
    KV_RANK_ENGINE = 4, /* queues of all variables of one engine */
    KV_RANK_TEAM = 5,   /* the helpers of the kernels */
    KV_RANK_LEAF = 6,   /* counters, log, start of a process-wide object */
} kv_lock_rank_t;

typedef struct KV_CAPABILITY kv_mutex {
    pthread_mutex_t raw;
    kv_lock_rank_t rank;
} kv_mutex_t;

typedef struct kv_cond {
    pthread_cond_t raw;
} kv_cond_t;

void kv_mutex_init(kv_mutex_t *mutex, kv_lock_rank_t rank);
void kv_mutex_fini(kv_mutex_t *mutex);
void kv_mutex_lock(kv_mutex_t *mutex) KV_ACQUIRES(mutex);
void kv_mutex_unlock(kv_mutex_t *mutex) KV_RELEASES(mutex);
/* For an object made statically: KV_MUTEX_INIT(KV_RANK_LEAF). */
#define KV_MUTEX_INIT(rank_)                                                                       \
    {                                                                                              \
        .raw = PTHREAD_MUTEX_INITIALIZER, .rank = (rank_)                                          \
    }

void kv_cond_init(kv_cond_t *cond);
void kv_cond_fini(kv_cond_t *cond);
void kv_cond_wait(kv_cond_t *cond, kv_mutex_t *mutex) KV_REQUIRES(mutex);
/* Returns at `until_ns` (kv_clock_ns) at the latest; may return early. */
void kv_cond_wait_until(kv_cond_t *cond, kv_mutex_t *mutex, int64_t until_ns) KV_REQUIRES(mutex);
void kv_cond_signal(kv_cond_t *cond);
void kv_cond_broadcast(kv_cond_t *cond);

/* How often the order of ranks was broken; stays 0 without KV_DEBUG. For tests. */
int64_t kv_lock_violations(void);

/* Nanoseconds of the monotonic clock. */
int64_t kv_clock_ns(void);

typedef pthread_t kv_thread_t;

/* Starts a thread with every signal blocked but those of its own faults (signals belong to the
 * user's threads). The name shows in debuggers, cut at 15 bytes. */
KV_MUST_CHECK kv_status_t kv_thread_start(kv_thread_t *thread, const char *name,
                                          void *(*body)(void *), void *context);
void kv_thread_join(kv_thread_t thread);

/* Processors that this process may use (its affinity mask), at least 1. */
int kv_processor_count(void);

/* How often this process has forked on its way from the first one: an object remembers the number
 * of its birth, and refuses to work where another one holds. The first call installs the handler.
 */
uint64_t kv_fork_generation(void);

#endif
