/* What the tests of the cluster's client share: calls that count their ends, and waiting for them
 * without a clock. */
#ifndef KV_TESTS_C_PS_CALLS_H
#define KV_TESTS_C_PS_CALLS_H

#include "ps/client.h"
#include "test.h"
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

#define SECOND_NS (1000 * INT64_C(1000000))

enum { MAX_PARTS = 16 };

static inline bool has_time_left(int64_t start)
{
    sched_yield();
    return CHECK(kv_clock_ns() - start < 60 * SECOND_NS);
}

/* Lets the other threads go on until the expression holds. */
#define WAIT_UNTIL(expression)                                                                     \
    for (int64_t wait_start = kv_clock_ns(); !(expression) && has_time_left(wait_start);)

/* A value of one key: what is pushed, what comes back, what was declared. */
typedef struct test_call {
    kv_client_call_t base; /* first */
    kv_client_part_t parts[MAX_PARTS];
    kv_declared_t keys[MAX_PARTS];
    int64_t shapes[MAX_PARTS];
    _Atomic int num_sent, num_done;
    kv_status_t status;
    char message[KV_MESSAGE_BYTES];
} test_call_t;

/* Signalled at the end of any call. */
static pthread_mutex_t ends_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ends = PTHREAD_COND_INITIALIZER;

static inline void call_sent(kv_client_call_t *base)
{
    test_call_t *call = (test_call_t *)base;
    CHECK_EQ(atomic_load(&call->num_done), 0);
    atomic_fetch_add(&call->num_sent, 1);
}

static inline void call_done(kv_client_call_t *base, kv_status_t status)
{
    test_call_t *call = (test_call_t *)base;
    CHECK_EQ(atomic_load(&call->num_sent), 1);
    call->status = status;
    snprintf(call->message, sizeof call->message, "%s",
             status == KV_OK ? "" : kv_status_message(status));
    pthread_mutex_lock(&ends_lock); /* the call may be gone once the count is seen */
    atomic_fetch_add(&call->num_done, 1);
    pthread_cond_broadcast(&ends);
    pthread_mutex_unlock(&ends_lock);
}

static inline void call_init(test_call_t *call, kv_client_verb_t verb)
{
    memset(call, 0, sizeof *call);
    call->base = (kv_client_call_t){.verb = verb,
                                    .parts = call->parts,
                                    .keys = call->keys,
                                    .sent = call_sent,
                                    .done = call_done};
}

static inline void call_add(test_call_t *call, kv_remote_t *remote, const void *value, void *out)
{
    if (CHECK(call->base.num_parts < MAX_PARTS))
        call->parts[call->base.num_parts++] = (kv_client_part_t){.remote = remote, .value = value, .out = out};
}

/* A vector of floats under a number. */
static inline void call_add_key(test_call_t *call, int64_t name, int64_t count, const void *value)
{
    int64_t i = call->base.num_keys++;
    call->shapes[i] = count;
    call->keys[i] = (kv_declared_t){.name = {.number = name},
                                    .dtype = KV_FLOAT32,
                                    .ndim = 1,
                                    .shape = &call->shapes[i],
                                    .bytes = (size_t)count * 4,
                                    .row_bytes = 4,
                                    .value = value};
}

static inline bool call_start(kv_client_t *client, test_call_t *call)
{
    return CHECK_STATUS(kv_client_start(client, &call->base), KV_OK);
}

/* Waits for the end of a call that has begun; for ever if there is none. */
static inline kv_status_t call_wait(test_call_t *call)
{
    pthread_mutex_lock(&ends_lock);
    while (atomic_load(&call->num_done) == 0)
        pthread_cond_wait(&ends, &ends_lock);
    pthread_mutex_unlock(&ends_lock);
    CHECK_EQ(atomic_load(&call->num_done), 1);
    return call->status;
}

/* The same where it may not have begun: its error then. */
static inline kv_status_t call_run(kv_client_t *client, test_call_t *call)
{
    kv_status_t status = kv_client_start(client, &call->base);
    if (status == KV_OK)
        return call_wait(call);
    snprintf(call->message, sizeof call->message, "%s", kv_status_message(status));
    return status;
}

static inline void nothing(kv_caller_t *caller)
{
    (void)caller;
}

static inline kv_status_t no_poll(kv_caller_t *caller)
{
    (void)caller;
    return KV_OK;
}

static inline kv_caller_t patient(void)
{
    return (kv_caller_t){nothing, nothing, no_poll, .timeout_ns = 30 * SECOND_NS};
}

#endif
