/* Operations run by the engine: handing over, the runnable ones, running one to its end. */
#include "engine/internal.h"
#include <string.h>

/* ------------------------------------------------------------------------------- runnable */

static bool comes_before(const kv_op_t *a, const kv_op_t *b)
{
    return a->priority != b->priority ? a->priority > b->priority : a->sequence < b->sequence;
}

/* Every task has its room before it is queued, so that granting needs no memory. */
static kv_status_t make_room_locked(kv_engine_t *engine) KV_REQUIRES(engine->lock)
{
    if (engine->pending < engine->runnable_room)
        return KV_OK;
    int64_t room = engine->runnable_room > 0 ? 2 * engine->runnable_room : 64;
    kv_op_t **grown = kv_alloc((size_t)room * sizeof *grown);
    KV_TRY_ALLOC(grown, "the queue of operations");
    if (engine->num_runnable > 0)
        memcpy(grown, engine->runnable, (size_t)engine->num_runnable * sizeof *grown);
    kv_free(engine->runnable);
    engine->runnable = grown;
    engine->runnable_room = room;
    return KV_OK;
}

static void push_locked(kv_engine_t *engine, kv_op_t *op) KV_REQUIRES(engine->lock)
{
    kv_op_t **heap = engine->runnable;
    int64_t place = engine->num_runnable++;
    while (place > 0 && comes_before(op, heap[(place - 1) / 2])) {
        heap[place] = heap[(place - 1) / 2];
        place = (place - 1) / 2;
    }
    heap[place] = op;
}

kv_op_t *kv_runnable_pop_locked(kv_engine_t *engine)
{
    if (engine->num_runnable == 0)
        return NULL;
    kv_op_t **heap = engine->runnable;
    kv_op_t *first = heap[0];
    kv_op_t *moved = heap[--engine->num_runnable];
    int64_t place = 0;
    for (;;) {
        int64_t child = 2 * place + 1;
        if (child >= engine->num_runnable)
            break;
        if (child + 1 < engine->num_runnable && comes_before(heap[child + 1], heap[child]))
            child++;
        if (!comes_before(heap[child], moved))
            break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = moved;
    return first;
}

/* Leaves the order of a heap broken: an engine uses this one or the other. */
kv_op_t *kv_runnable_pick_locked(kv_engine_t *engine, uint64_t number)
{
    if (engine->num_runnable == 0)
        return NULL;
    uint64_t place = number % (uint64_t)engine->num_runnable;
    kv_op_t *picked = engine->runnable[place];
    engine->runnable[place] = engine->runnable[--engine->num_runnable];
    return picked;
}

/* ---------------------------------------------------------------------------------- tasks */

void kv_task_granted_locked(kv_engine_t *engine, kv_op_t *op, const kv_dep_t *dep)
{
    (void)engine;
    kv_var_t *var = dep->var;
    int32_t index = (int32_t)(dep - op->deps);
    if (var->error == NULL || !var->poisons || dep->access == KV_OVERWRITE)
        return;
    if (op->error != NULL && op->error_dep < index)
        return;
    kv_error_rele(op->error);
    op->error = kv_error_hold(var->error);
    op->error_dep = index;
}

void kv_task_ready_locked(kv_engine_t *engine, kv_op_t *op)
{
    for (int32_t i = 0; i < op->num_deps; i++) {
        kv_var_t *var = op->deps[i].var;
        if (var->error != NULL && var->poisons && op->deps[i].access == KV_OVERWRITE)
            kv_var_store_error_locked(engine, var, NULL);
    }
    push_locked(engine, op);
    engine->kind->runnable_locked(engine);
}

/* Counts a task as pending. */
static kv_status_t begin_locked(kv_engine_t *engine, kv_op_t *op) KV_REQUIRES(engine->lock)
{
    if (atomic_load(&engine->closed))
        return kv_fail(KV_CLOSED, "kvstore has shut down");
    KV_TRY(make_room_locked(engine));
    KV_TRY(engine->kind->prepare_locked(engine));
    kv_count(KV_COUNT_TASKS, 1);
    engine->pending++;
    op->caller_run = false;
    op->sequence = ++engine->sequence;
    if (op->handle != NULL)
        kv_handle_link_locked(op->handle, op);
    return KV_OK;
}

kv_status_t kv_engine_submit(kv_engine_t *engine, kv_op_t *op)
{
    kv_mutex_lock(&engine->lock);
    kv_status_t status = begin_locked(engine, op);
    if (status == KV_OK)
        kv_queue_enter_locked(engine, op);
    kv_engine_unlock(engine);
    return status;
}

kv_status_t kv_engine_begin(kv_engine_t *engine, kv_op_t *op)
{
    kv_mutex_lock(&engine->lock);
    kv_status_t status = begin_locked(engine, op);
    kv_engine_unlock(engine);
    return status;
}

/* The last access of the task to its variables. */
static void end_locked(kv_engine_t *engine, kv_op_t *op, kv_error_t *error, kv_var_t *const *also,
                       int64_t num_also) KV_REQUIRES(engine->lock)
{
    if (error != NULL) {
        /* The newest error stands on a variable, told or not, so that what is delivered does not
         * depend on when a handle was asked; wait_all has the older ones. */
        for (int32_t i = 0; i < op->num_deps; i++) {
            if (op->deps[i].access != KV_READ)
                kv_var_store_error_locked(engine, op->deps[i].var, error);
        }
        for (int64_t i = 0; i < num_also; i++)
            kv_var_store_error_locked(engine, also[i], error);
        kv_untold_add_locked(engine, error, op->sequence);
    }
    if (op->handle != NULL)
        kv_handle_unlink_locked(op->handle, op, error);
    kv_queue_leave_locked(engine, op, 0);
}

void kv_engine_end(kv_engine_t *engine, kv_op_t *op, kv_status_t status, kv_var_t *const *also,
                   int64_t num_also)
{
    kv_error_t *error = status != KV_OK ? kv_error_capture(status) : NULL;
    kv_error_rele(op->error);
    /* `finish` gives back the task's share. */
    kv_handle_t *handle = op->handle != NULL ? kv_handle_hold(op->handle) : NULL;

    kv_mutex_lock(&engine->lock);
    end_locked(engine, op, error, also, num_also);
    kv_engine_unlock(engine);

    kv_error_rele(error);
    op->finish(op);
    kv_count(KV_COUNT_TASKS, -1);
    if (handle != NULL) {
        kv_handle_count_down(handle);
        kv_handle_rele(handle);
    }

    kv_mutex_lock(&engine->lock);
    if (--engine->pending == 0)
        kv_cond_broadcast(&engine->ended);
    kv_engine_unlock(engine);
}

void kv_task_run(kv_engine_t *engine, kv_op_t *op)
{
    kv_status_t status = KV_OK;
    if (op->error != NULL)
        status = kv_fail(op->error->status, "%s", op->error->message);
    else if (kv_fault_hit(KV_FAULT_ENGINE_RUN))
        status = kv_fail(KV_NO_MEMORY, "injected");
    if (status == KV_OK && op->start != NULL) {
        op->start(op);
        return;
    }
    kv_engine_end(engine, op, status == KV_OK ? op->run(op) : status, NULL, 0);
}
