/* The lists of variables: who enters, who is granted, who leaves.
 *
 * A variable's list holds its operations in the order in which they entered; `waiting` points to
 * the first that is not granted, all before it are. An operation that entered without the lock
 * stands in no list and shows only in the counts. QUEUED is set exactly while the list is not
 * empty, and both change under the lock only; while it is set, so do the counts of readers and
 * writers. A variable with a queue is never freed.
 *
 * Whoever sets QUEUED looks at the counts afterwards (pump): a holder that left before that did not
 * see the flag and will not look; one that leaves later finds it and comes for the lock.
 */
#include "engine/internal.h"

static void granted_all_locked(kv_engine_t *engine, kv_op_t *op) KV_REQUIRES(engine->lock)
{
    if (!op->caller_run)
        kv_task_ready_locked(engine, op);
    else if (op->actor != NULL && op->actor->wait != NULL)
        kv_cond_broadcast(op->actor->wait->cond);
}

/* Grants the variable to the operations at the front of its queue, as far as it goes. */
static void pump_locked(kv_engine_t *engine, kv_var_t *var) KV_REQUIRES(engine->lock)
{
    while (var->waiting != NULL) {
        kv_dep_t *dep = var->waiting;
        uint64_t busy = dep->access == KV_READ ? KV_VAR_WRITER : KV_VAR_WRITER | KV_VAR_READERS;
        if ((atomic_load(&var->state) & busy) != 0)
            return;
        atomic_fetch_add(&var->state, kv_access_unit(dep->access));
        dep->granted = true;
        var->waiting = dep->next;
        if (!dep->op->caller_run)
            kv_task_granted_locked(engine, dep->op, dep);
        if (--dep->op->num_missing == 0)
            granted_all_locked(engine, dep->op);
    }
}

static void append_locked(kv_engine_t *engine, kv_dep_t *dep) KV_REQUIRES(engine->lock)
{
    (void)engine;
    kv_var_t *var = dep->var;
    dep->granted = false;
    dep->queued = true;
    dep->prev = var->tail;
    dep->next = NULL;
    if (var->tail != NULL)
        var->tail->next = dep;
    else
        var->head = dep;
    var->tail = dep;
    if (var->waiting == NULL)
        var->waiting = dep;
    atomic_fetch_or(&var->state, KV_VAR_QUEUED);
}

static void unlink_locked(kv_engine_t *engine, kv_dep_t *dep) KV_REQUIRES(engine->lock)
{
    (void)engine;
    kv_var_t *var = dep->var;
    if (var->waiting == dep)
        var->waiting = dep->next;
    if (dep->prev != NULL)
        dep->prev->next = dep->next;
    else
        var->head = dep->next;
    if (dep->next != NULL)
        dep->next->prev = dep->prev;
    else
        var->tail = dep->prev;
    dep->queued = false;
}

void kv_queue_enter_locked(kv_engine_t *engine, kv_op_t *op)
{
    op->num_missing = op->num_deps;
    for (int32_t i = 0; i < op->num_deps; i++)
        append_locked(engine, &op->deps[i]);
    for (int32_t i = 0; i < op->num_deps; i++)
        pump_locked(engine, op->deps[i].var);
    if (op->num_deps == 0)
        granted_all_locked(engine, op);
}

/* Gives up the variable if this change of its state was the last. After a change that was not, the
 * variable may be gone at any time and is not looked at again. */
static void settle_locked(kv_engine_t *engine, kv_var_t *var, uint64_t state)
    KV_REQUIRES(engine->lock)
{
    if (kv_state_is_over(state)) {
        var->next_freed = engine->freed;
        engine->freed = var;
    }
}

static void leave_one_locked(kv_engine_t *engine, kv_dep_t *dep) KV_REQUIRES(engine->lock)
{
    kv_var_t *var = dep->var;
    uint64_t unit = dep->queued && !dep->granted ? 0 : kv_access_unit(dep->access);
    if (var->head == NULL) {
        /* Entered without the lock, and the queue that was seen on the way out has gone. */
        settle_locked(engine, var, atomic_fetch_sub(&var->state, unit) - unit);
        return;
    }
    atomic_fetch_sub(&var->state, unit);
    if (dep->queued)
        unlink_locked(engine, dep);
    pump_locked(engine, var);
    if (var->head == NULL)
        settle_locked(engine, var, atomic_fetch_and(&var->state, ~KV_VAR_QUEUED) & ~KV_VAR_QUEUED);
}

void kv_queue_leave_locked(kv_engine_t *engine, kv_op_t *op, int32_t first)
{
    for (int32_t i = first; i < op->num_deps; i++)
        leave_one_locked(engine, &op->deps[i]);
}

void kv_var_store_error_locked(kv_engine_t *engine, kv_var_t *var, kv_error_t *error)
{
    (void)engine;
    kv_error_rele(var->error);
    var->error = error != NULL ? kv_error_hold(error) : NULL;
    if (error != NULL)
        atomic_fetch_or(&var->state, KV_VAR_ERROR);
    else
        atomic_fetch_and(&var->state, ~KV_VAR_ERROR);
}
