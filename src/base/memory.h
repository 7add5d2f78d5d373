/* Allocation, live-object counters and fault points.
 *
 * Every allocation of the core goes through here, so that a test can let the n-th one fail, and
 * every object kind has a counter, so that a test can demand zero at its end.
 */
#ifndef KV_BASE_MEMORY_H
#define KV_BASE_MEMORY_H

#include "base/status.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Objects that live and die with the user's work; threads and engines are not counted. */
#define KV_COUNTER_LIST(X)                                                                         \
    X(STORES, "stores")                                                                            \
    X(KEYS, "keys")                                                                                \
    X(ARRAYS, "arrays")                                                                            \
    X(BUFFERS, "buffers")                                                                          \
    X(VALUE_BYTES, "value_bytes")                                                                  \
    X(TASKS, "tasks")                                                                              \
    X(HANDLES, "handles")                                                                          \
    X(ERRORS, "errors")                                                                            \
    X(HOLDS, "holds")                                                                              \
    X(CACHES, "caches")                                                                            \
    X(NET_MESSAGES, "net_messages")                                                                \
    X(NET_ARRIVALS, "net_arrivals")                                                                \
    X(SLICES, "slices")                                                                            \
    X(REQUESTS, "requests")                                                                        \
    X(NCCL_GROUPS, "nccl_groups")

typedef enum kv_counter {
#define KV_COUNTER_ENUM(id, name) KV_COUNT_##id,
    KV_COUNTER_LIST(KV_COUNTER_ENUM)
#undef KV_COUNTER_ENUM
        KV_COUNTER_COUNT
} kv_counter_t;

void kv_count(kv_counter_t counter, int64_t difference);
int64_t kv_counter_value(kv_counter_t counter);
const char *kv_counter_name(kv_counter_t counter);

/* NULL when there is no memory (no sentence is stored: callers use KV_TRY_ALLOC or their own). A
 * size of 0 gives a valid pointer. */
void *kv_alloc(size_t bytes);
void *kv_calloc(size_t count, size_t bytes);
void kv_free(void *pointer);

/* Memory for elements: aligned to 64 bytes, large blocks to 2 MiB and marked for huge pages,
 * contents unspecified. Freed with kv_free. */
void *kv_alloc_elements(size_t bytes);

#define KV_TRY_ALLOC(pointer, what)                                                                \
    do {                                                                                           \
        if (KV_UNLIKELY((pointer) == NULL))                                                        \
            return kv_fail(KV_NO_MEMORY, "no memory for %s", what);                                \
    } while (0)

/* Fault points. `kv_fault_set("alloc", n)` lets the n-th allocation from now on fail, once; the
 * other points are named where they stand (KV_FAULT("engine.run")). n = 0 takes the fault back.
 * Returns how often the point was passed since the last call with its name; -1 for an unknown
 * point. For tests; costs one load when nothing is set. */
#define KV_FAULT_LIST(X)                                                                           \
    X(ALLOC, "alloc")                                                                              \
    X(ENGINE_RUN, "engine.run")                                                                    \
    X(THREAD_START, "thread.start")

typedef enum kv_fault_point {
#define KV_FAULT_ENUM(id, name) KV_FAULT_##id,
    KV_FAULT_LIST(KV_FAULT_ENUM)
#undef KV_FAULT_ENUM
        KV_FAULT_COUNT
} kv_fault_point_t;

int64_t kv_fault_set(const char *name, int64_t nth);
bool kv_fault_hit(kv_fault_point_t point);

#endif
