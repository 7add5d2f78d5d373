/* One call to the servers that a thread waits for. */
#ifndef KV_STORE_EXCHANGE_H
#define KV_STORE_EXCHANGE_H

#include "ps/client.h"
#include "store/internal.h"

/* The head of what such a call consists of. The call itself goes on when the thread that waits for
 * it gives up, so its parts belong to it. */
typedef struct kv_exchange kv_exchange_t;
typedef enum kv_outcome { KV_OUTCOME_OPEN, KV_OUTCOME_GOOD, KV_OUTCOME_FAILED } kv_outcome_t;
struct kv_exchange {
    kv_client_call_t call;
    kv_op_t op;
    _Atomic int32_t refs;  /* the task, the thread that waits, others who hold it */
    _Atomic bool given_up; /* that thread has been told why it waits no more */
    _Atomic int outcome;   /* kv_outcome_t */
    const char *may_still; /* of a call that is given up: what may happen all the same, or NULL */
    kv_engine_t *engine;
    kv_client_t *client;
    kv_name_t name; /* for the sentence about a deadline: of one of its keys, which is pinned */
    void (*free)(kv_exchange_t *exchange);
};

/* One share; the parts of the call are filled in afterwards. */
void kv_exchange_init(kv_exchange_t *exchange, kv_store_t *store, kv_client_verb_t verb,
                      void (*free)(kv_exchange_t *exchange));
void kv_exchange_rele(kv_exchange_t *exchange);

/* Starts the call and waits for its end, detached. After an error of the wait nothing reads the
 * values of the call or writes its outs any more. */
KV_MUST_CHECK kv_status_t kv_exchange_run(kv_exchange_t *exchange, kv_caller_t *caller);

#endif
