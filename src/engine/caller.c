/* Operations run by their caller: entering by the queue, when the path without a lock (var.c) did
 * not do. */
#include "engine/internal.h"

/* The error that entering raises, with one share. If there is none, errors that were delivered
 * elsewhere are dropped, and those of arrays that the operation overwrites. */
static kv_error_t *take_error_locked(kv_engine_t *engine, kv_op_t *op) KV_REQUIRES(engine->lock)
{
    for (int32_t i = 0; i < op->num_deps; i++) {
        kv_dep_t *dep = &op->deps[i];
        kv_error_t *error = dep->var->error;
        if (error == NULL || dep->access == KV_OVERWRITE || atomic_load(&error->told))
            continue;
        kv_error_hold(error);
        kv_var_store_error_locked(engine, dep->var, NULL);
        return error;
    }
    for (int32_t i = 0; i < op->num_deps; i++) {
        kv_dep_t *dep = &op->deps[i];
        kv_error_t *error = dep->var->error;
        if (error != NULL && (atomic_load(&error->told) || dep->var->poisons))
            kv_var_store_error_locked(engine, dep->var, NULL);
    }
    return NULL;
}

/* Waits for the turn of an operation that stands in the queues. */
static kv_status_t wait_turn_locked(kv_engine_t *engine, kv_op_t *op, kv_caller_t *caller)
    KV_REQUIRES(engine->lock)
{
    kv_actor_t *self = kv_actor_self();
    kv_wait_t wait = {.op = op};
    int32_t circle = kv_walk_locked(engine, self, &wait);
    if (circle > 0)
        return kv_walk_fail(self, circle);
    op->actor = self;
    kv_status_t status = kv_wait_locked(engine, &wait, caller);
    op->actor = NULL;
    return status;
}

static kv_status_t enter_queue(kv_engine_t *engine, kv_op_t *op, kv_caller_t *caller)
{
    bool was_detached = caller->detached;
    kv_status_t status = KV_OK;
    kv_error_t *error = NULL;

    kv_mutex_lock(&engine->lock);
    if (atomic_load(&engine->closed)) {
        kv_engine_unlock(engine);
        return kv_fail(KV_CLOSED, "kvstore has shut down");
    }
    kv_queue_enter_locked(engine, op);
    if (op->num_missing > 0)
        status = wait_turn_locked(engine, op, caller);
    if (status == KV_OK)
        error = take_error_locked(engine, op);
    if (status != KV_OK || error != NULL)
        kv_queue_leave_locked(engine, op, 0);
    kv_engine_unlock(engine);

    if (!was_detached)
        kv_caller_attach(caller);
    if (error != NULL) {
        status = kv_error_raise(error);
        kv_error_rele(error);
    }
    return status;
}

kv_status_t kv_engine_enter(kv_engine_t *engine, kv_op_t *op, kv_caller_t *caller)
{
    if (KV_LIKELY(kv_engine_try_enter(engine, op)))
        return KV_OK;
    return enter_queue(engine, op, caller);
}

bool kv_engine_try_inline(kv_engine_t *engine, kv_op_t *op, size_t work_bytes)
{
    return engine->kind->wants_inline(engine, work_bytes) && kv_engine_try_enter(engine, op);
}
