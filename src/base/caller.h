/* The thread that called the core, as the core sees it: how long it will wait, how to let its
 * runtime go on meanwhile, and how to ask whether the user wants it back.
 *
 * For Python `detach` drops the GIL and `attach` takes it again. The core calls them only while it
 * holds no lock. A call enters attached and is attached again when it returns.
 */
#ifndef KV_BASE_CALLER_H
#define KV_BASE_CALLER_H

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

/* Work that moves at least so many bytes is done detached. */
enum { KV_DETACH_BYTES = 64 * 1024 };

/* A wait looks for signals and cycles at least so often. */
#define KV_POLL_NS (100 * INT64_C(1000000))

typedef struct kv_caller kv_caller_t;
struct kv_caller {
    void (*detach)(kv_caller_t *caller);
    void (*attach)(kv_caller_t *caller);
    /* Called detached, about every 0.1 s of a wait; KV_INTERRUPTED or KV_CALLBACK end the wait. */
    kv_status_t (*poll)(kv_caller_t *caller);
    int64_t timeout_ns;  /* of all waits of the call together */
    int64_t deadline_ns; /* on kv_clock_ns; 0 until the first wait: a call that never waits does not
                            read the clock */
    bool detached;
};

/* The end of this call's waits; starts the clock at the first use. */
int64_t kv_caller_deadline(kv_caller_t *caller);

/* Both do nothing when the caller is there already. */
static inline void kv_caller_detach(kv_caller_t *caller)
{
    if (!caller->detached) {
        caller->detached = true;
        caller->detach(caller);
    }
}

static inline void kv_caller_attach(kv_caller_t *caller)
{
    if (caller->detached) {
        caller->attach(caller);
        caller->detached = false;
    }
}

#endif
