/* One call to the servers that a thread waits for: what concerns keys as a whole, not their values.
 *
 * It is a task without variables while it is on its way, so wait_all and the interpreter's exit
 * know of it; a thread that gives up waiting leaves it behind.
 */
#include "store/exchange.h"
#include "base/memory.h"

enum { NAME_BYTES = 96 };

void kv_exchange_rele(kv_exchange_t *exchange)
{
    if (atomic_fetch_sub(&exchange->refs, 1) == 1)
        exchange->free(exchange);
}

static void finish(kv_op_t *op)
{
    kv_handle_rele(op->handle);
    kv_exchange_rele((kv_exchange_t *)((char *)op - offsetof(kv_exchange_t, op)));
}

static void done(kv_client_call_t *call, kv_status_t status)
{
    kv_exchange_t *exchange = (kv_exchange_t *)((char *)call - offsetof(kv_exchange_t, call));
    atomic_store(&exchange->outcome, status == KV_OK ? KV_OUTCOME_GOOD : KV_OUTCOME_FAILED);
    if (atomic_load(&exchange->given_up))
        status = KV_OK;
    kv_engine_end(exchange->engine, &exchange->op, status, NULL, 0);
}

void kv_exchange_init(kv_exchange_t *exchange, kv_store_t *store, kv_client_verb_t verb,
                      void (*free)(kv_exchange_t *exchange))
{
    atomic_init(&exchange->refs, 1);
    exchange->engine = store->runtime->engine;
    exchange->client = store->client;
    exchange->free = free;
    exchange->call = (kv_client_call_t){.verb = verb, .done = done};
}

kv_status_t kv_exchange_run(kv_exchange_t *exchange, kv_caller_t *caller)
{
    kv_handle_t *handle;
    int64_t ms = caller->timeout_ns / 1000000;
    exchange->call.timeout_ms = ms > 0 ? ms : 1;
    KV_TRY(kv_handle_new(exchange->engine, 1, &handle));
    kv_op_init(&exchange->op, NULL, 0, 0);
    exchange->op.finish = finish;
    exchange->op.handle = kv_handle_hold(handle);
    kv_status_t status = kv_engine_begin(exchange->engine, &exchange->op);
    if (status != KV_OK) {
        kv_handle_rele(exchange->op.handle);
        kv_handle_rele(handle);
        return status;
    }
    atomic_fetch_add(&exchange->refs, 1);
    status = kv_client_start(exchange->client, &exchange->call);
    if (status != KV_OK) {
        atomic_store(&exchange->outcome, KV_OUTCOME_FAILED);
        kv_engine_end(exchange->engine, &exchange->op, status, NULL, 0);
    }
    status = kv_handle_wait(handle, caller);
    kv_caller_detach(caller);
    if (status == KV_OK) {
        kv_error_t *error = kv_handle_error(handle);
        if (error != NULL)
            status = kv_error_raise(error);
    } else {
        char missing[128], name[NAME_BYTES];
        atomic_store(&exchange->given_up, true);
        kv_client_cancel(exchange->client, &exchange->call, missing, sizeof missing);
        kv_name_format(&exchange->name, name, sizeof name);
        if (status == KV_TIMEOUT)
            status =
                kv_fail(KV_TIMEOUT, "key %s: %s %s not answered within the deadline of %.3g s%s",
                        name, missing[0] != '\0' ? missing : "the servers",
                        missing[0] != '\0' ? "has" : "have", (double)caller->timeout_ns * 1e-9,
                        exchange->may_still != NULL ? exchange->may_still : "");
        if (kv_handle_done(handle))
            (void)kv_handle_error(handle); /* too late to be told */
    }
    kv_handle_rele(handle);
    return status;
}
