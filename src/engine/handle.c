/* Handles: what stands for the tasks of one call. */
#include "engine/internal.h"

kv_status_t kv_handle_new(kv_engine_t *engine, int64_t num_tasks, kv_handle_t **out)
{
    kv_handle_t *handle = kv_calloc(1, sizeof *handle);
    KV_TRY_ALLOC(handle, "a handle");
    handle->engine = engine;
    atomic_init(&handle->refs, 1);
    atomic_init(&handle->num_left, num_tasks);
    kv_count(KV_COUNT_HANDLES, 1);
    *out = handle;
    return KV_OK;
}

kv_handle_t *kv_handle_hold(kv_handle_t *handle)
{
    atomic_fetch_add(&handle->refs, 1);
    return handle;
}

void kv_handle_rele(kv_handle_t *handle)
{
    if (handle == NULL || atomic_fetch_sub(&handle->refs, 1) > 1)
        return;
    kv_error_rele(handle->error);
    kv_count(KV_COUNT_HANDLES, -1);
    kv_free(handle);
}

bool kv_handle_done(kv_handle_t *handle)
{
    return atomic_load(&handle->num_left) <= 0;
}

kv_error_t *kv_handle_error(kv_handle_t *handle)
{
    if (!kv_handle_done(handle) || handle->error == NULL)
        return NULL;
    kv_error_mark_told(handle->error);
    return handle->error;
}

const kv_error_t *kv_handle_peek(const kv_handle_t *handle)
{
    return atomic_load(&handle->num_left) <= 0 ? handle->error : NULL;
}

/* ------------------------------------------------------------------------- ends of tasks */

void kv_handle_link_locked(kv_handle_t *handle, kv_op_t *op)
{
    op->handle_prev = NULL;
    op->handle_next = handle->tasks;
    if (handle->tasks != NULL)
        handle->tasks->handle_prev = op;
    handle->tasks = op;
}

/* The operation that came first gives the error, whichever failed first. */
static void fail(kv_handle_t *handle, kv_error_t *error, uint64_t sequence)
{
    if (handle->error != NULL && handle->error_sequence < sequence)
        return;
    kv_error_rele(handle->error);
    handle->error = kv_error_hold(error);
    handle->error_sequence = sequence;
}

void kv_handle_unlink_locked(kv_handle_t *handle, kv_op_t *op, kv_error_t *error)
{
    if (op->handle_prev != NULL)
        op->handle_prev->handle_next = op->handle_next;
    else
        handle->tasks = op->handle_next;
    if (op->handle_next != NULL)
        op->handle_next->handle_prev = op->handle_prev;
    if (error != NULL)
        fail(handle, error, op->sequence);
}

/* With the notification taken out, the lock dropped and the thread's name left, so that who takes a
 * notification back can wait until it is over. */
static void notify_unlocked(kv_handle_t *handle, void (*notify)(void *context), void *context)
{
    notify(context);
    kv_mutex_lock(&handle->engine->lock);
    handle->notifying = NULL;
    kv_cond_broadcast(&handle->engine->ended);
    kv_engine_unlock(handle->engine);
}

void kv_handle_count_down(kv_handle_t *handle)
{
    kv_engine_t *engine = handle->engine;
    void (*notify)(void *context) = NULL;
    void *context = NULL;

    kv_mutex_lock(&engine->lock);
    if (atomic_fetch_sub(&handle->num_left, 1) == 1) {
        if (handle->num_waiting > 0) {
            if (handle->error != NULL)
                kv_error_mark_told(handle->error);
            kv_cond_broadcast(&engine->ended);
        }
        notify = handle->notify;
        context = handle->notify_context;
        handle->notify = NULL;
        if (notify != NULL)
            handle->notifying = kv_actor_self();
    }
    kv_engine_unlock(engine);
    if (notify != NULL)
        notify_unlocked(handle, notify, context);
}

void kv_handle_end_one(kv_handle_t *handle, kv_status_t status)
{
    if (status != KV_OK) {
        kv_engine_t *engine = handle->engine;
        kv_error_t *error = kv_error_capture(status);
        kv_mutex_lock(&engine->lock);
        uint64_t sequence = ++engine->sequence;
        /* The cause of these two is an exception in the caller's own runtime: nobody else can
         * deliver it. */
        if (status != KV_CALLBACK && status != KV_INTERRUPTED)
            kv_untold_add_locked(engine, error, sequence);
        fail(handle, error, sequence);
        kv_engine_unlock(engine);
        kv_error_rele(error);
    }
    kv_handle_count_down(handle);
}

/* -------------------------------------------------------------------------------- waiting */

kv_status_t kv_handle_wait(kv_handle_t *handle, kv_caller_t *caller)
{
    kv_engine_t *engine = handle->engine;
    bool was_detached = caller->detached;
    kv_status_t status = KV_OK;

    kv_mutex_lock(&engine->lock);
    if (!kv_handle_done(handle)) {
        kv_actor_t *self = kv_actor_self();
        kv_wait_t wait = {.handle = handle};
        int32_t circle = kv_walk_locked(engine, self, &wait);
        status = circle > 0 ? kv_walk_fail(self, circle) : kv_wait_locked(engine, &wait, caller);
    }
    if (status == KV_OK && handle->error != NULL) {
        kv_error_mark_told(handle->error);
        kv_untold_sweep_locked(engine);
    }
    kv_engine_unlock(engine);
    if (!was_detached)
        kv_caller_attach(caller);
    return status;
}

void kv_handle_notify(kv_handle_t *handle, void (*notify)(void *context), void *context)
{
    kv_engine_t *engine = handle->engine;
    kv_actor_t *self = kv_actor_self();

    kv_mutex_lock(&engine->lock);
    if (notify == NULL) {
        while (handle->notifying != NULL && handle->notifying != self)
            kv_cond_wait(&engine->ended, &engine->lock);
    }
    bool now = notify != NULL && kv_handle_done(handle);
    handle->notify = now ? NULL : notify;
    handle->notify_context = context;
    kv_engine_unlock(engine);
    if (now)
        notify(context);
}
