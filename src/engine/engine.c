/* Engines: making and ending them, the end of a locked section, how a thread waits, and the errors
 * that wait_all delivers. */
#include "engine/internal.h"
#include <stdio.h>
#include <string.h>

static const kv_engine_kind_t *const kinds[] = {
    &kv_engine_threaded,
    &kv_engine_naive,
    &kv_engine_stepping,
};
enum { NUM_KINDS = sizeof kinds / sizeof kinds[0] };

kv_actor_t *kv_actor_self(void)
{
    static _Thread_local kv_actor_t self;
    return &self;
}

int kv_callback_depth(void)
{
    return kv_actor_self()->depth;
}

/* ------------------------------------------------------------------------ making and ending */

static kv_status_t fail_name(const char *name)
{
    char names[128];
    size_t length = 0;
    for (int i = 0; i < NUM_KINDS; i++)
        length += (size_t)snprintf(names + length, sizeof names - length, "%s%s", i > 0 ? ", " : "",
                                   kinds[i]->name);
    return kv_fail(KV_INVALID, "there is no engine '%s'; the engines are %s", name, names);
}

kv_status_t kv_engine_new(const char *name, uint64_t seed, int num_threads, kv_engine_t **out)
{
    int kind = 0;
    while (kind < NUM_KINDS && strcmp(kinds[kind]->name, name) != 0)
        kind++;
    if (kind == NUM_KINDS)
        return fail_name(name);

    kv_engine_t *engine = kv_calloc(1, sizeof *engine);
    KV_TRY_ALLOC(engine, "an engine");
    engine->max_threads = num_threads > 1 ? num_threads : 1;
    engine->threads = kv_calloc((size_t)engine->max_threads, sizeof *engine->threads);
    if (engine->threads == NULL) {
        kv_free(engine);
        return kv_fail(KV_NO_MEMORY, "no memory for an engine");
    }
    engine->kind = kinds[kind];
    engine->random = seed;
    kv_mutex_init(&engine->lock, KV_RANK_ENGINE);
    kv_cond_init(&engine->ended);
    kv_cond_init(&engine->work);
    *out = engine;
    return KV_OK;
}

const char *kv_engine_name(const kv_engine_t *engine)
{
    return engine->kind->name;
}

void kv_engine_close(kv_engine_t *engine)
{
    kv_mutex_lock(&engine->lock);
    atomic_store(&engine->closed, true);
    kv_engine_unlock(engine);
}

void kv_engine_stop(kv_engine_t *engine, kv_caller_t *caller)
{
    kv_wait_t wait = {.op = NULL};
    kv_status_t status = KV_OK;
    int64_t before;
    kv_engine_close(engine);
    kv_mutex_lock(&engine->lock);
    do {
        before = engine->pending;
        if (caller != NULL)
            caller->deadline_ns = 0;
        if (before > 0)
            status = kv_wait_locked(engine, &wait, caller);
    } while (status == KV_TIMEOUT && engine->pending < before);
    kv_engine_unlock(engine);
    engine->kind->join(engine);
}

void kv_engine_free(kv_engine_t *engine)
{
    for (int i = 0; i < engine->num_untold; i++)
        kv_error_rele(engine->untold[i].error);
    kv_cond_fini(&engine->work);
    kv_cond_fini(&engine->ended);
    kv_mutex_fini(&engine->lock);
    kv_free(engine->runnable);
    kv_free(engine->threads);
    kv_free(engine);
}

int64_t kv_engine_pending(kv_engine_t *engine)
{
    kv_mutex_lock(&engine->lock);
    int64_t pending = engine->pending;
    kv_engine_unlock(engine);
    return pending;
}

/* --------------------------------------------------------------- the end of a locked section */

/* In a thread that has a sentence of its own. */
static void run_task(kv_engine_t *engine, kv_op_t *op)
{
    kv_sentence_t sentence;
    kv_sentence_save(&sentence);
    kv_task_run(engine, op);
    kv_sentence_restore(&sentence);
}

/* Runs what is runnable until nothing is. A task that makes others runnable does not run them
 * itself: its thread is here already. */
static void drain(kv_engine_t *engine, kv_actor_t *self)
{
    kv_engine_t *outer = self->draining;
    self->draining = engine;
    for (;;) {
        kv_mutex_lock(&engine->lock);
        kv_op_t *op = kv_runnable_pop_locked(engine);
        kv_mutex_unlock(&engine->lock);
        if (op == NULL)
            break;
        run_task(engine, op);
    }
    self->draining = outer;
}

void kv_engine_unlock(kv_engine_t *engine)
{
    bool runnable = engine->kind->drains && engine->num_runnable > 0;
    kv_var_t *var = engine->freed;
    engine->freed = NULL;
    kv_mutex_unlock(&engine->lock);

    while (var != NULL) {
        kv_var_t *next = var->next_freed;
        kv_var_free(var);
        var = next;
    }
    if (runnable && kv_actor_self()->draining != engine)
        drain(engine, kv_actor_self());
}

/* -------------------------------------------------------------------------------- waiting */

static bool is_over_locked(kv_engine_t *engine, const kv_wait_t *wait) KV_REQUIRES(engine->lock)
{
    if (wait->op != NULL)
        return wait->op->num_missing == 0;
    if (wait->handle != NULL)
        return kv_handle_done(wait->handle);
    return engine->pending == 0;
}

static kv_status_t fail_timeout(const kv_wait_t *wait, const kv_caller_t *caller)
{
    double seconds = (double)caller->timeout_ns * 1e-9;
    if (wait->op != NULL)
        return kv_fail(KV_TIMEOUT,
                       "the wait for other operations on the same key or array took longer than "
                       "the deadline of %.3g s",
                       seconds);
    if (wait->handle != NULL)
        return kv_fail(KV_TIMEOUT,
                       "the operation did not end within the deadline of %.3g s; it goes on",
                       seconds);
    return kv_fail(KV_TIMEOUT, "operations were still pending after the deadline of %.3g s",
                   seconds);
}

/* Runs a task of those that the engine gives to a thread that waits, or sleeps until something may
 * have changed. */
static void pass_time_locked(kv_engine_t *engine, const kv_wait_t *wait, int64_t deadline_ns,
                             int64_t poll_ns) KV_REQUIRES(engine->lock)
{
    kv_op_t *op = engine->kind->take_locked(engine, wait, deadline_ns);
    if (wait->handle != NULL)
        wait->handle->num_waiting++;
    if (op != NULL) {
        kv_engine_unlock(engine);
        run_task(engine, op);
        kv_mutex_lock(&engine->lock);
    } else {
        kv_cond_wait_until(wait->cond, &engine->lock,
                           deadline_ns < poll_ns ? deadline_ns : poll_ns);
    }
    if (wait->handle != NULL)
        wait->handle->num_waiting--;
}

static kv_status_t wait_loop_locked(kv_engine_t *engine, const kv_wait_t *wait, kv_caller_t *caller)
    KV_REQUIRES(engine->lock)
{
    int64_t deadline = caller != NULL ? kv_caller_deadline(caller) : INT64_MAX;
    int64_t poll_at = caller != NULL ? kv_clock_ns() + KV_POLL_NS : INT64_MAX;
    while (!is_over_locked(engine, wait)) {
        pass_time_locked(engine, wait, deadline, poll_at);
        if (caller == NULL || is_over_locked(engine, wait))
            continue;
        if (kv_clock_ns() >= poll_at) {
            kv_engine_unlock(engine);
            kv_status_t status = caller->poll(caller);
            kv_mutex_lock(&engine->lock);
            KV_TRY(status);
            poll_at = kv_clock_ns() + KV_POLL_NS;
        }
        if (!is_over_locked(engine, wait) && kv_clock_ns() >= deadline)
            return fail_timeout(wait, caller);
    }
    return KV_OK;
}

kv_status_t kv_wait_locked(kv_engine_t *engine, kv_wait_t *wait, kv_caller_t *caller)
{
    /* An operation's turn concerns one thread, everything else comes by `ended`. */
    bool own = wait->op != NULL && !engine->kind->waiters_run;
    kv_cond_t cond;
    if (own)
        kv_cond_init(&cond);
    wait->cond = own ? &cond : &engine->ended;

    /* Before the lock is dropped for the first time: a walk of another thread must see this wait as
     * soon as the walk for this one is over. A handler that runs in the poll may come here again.
     */
    kv_actor_t *self = kv_actor_self();
    kv_wait_t *outer = self->wait;
    kv_engine_t *outer_engine = atomic_load(&self->engine);
    self->wait = wait;
    atomic_store(&self->engine, engine);
    if (caller != NULL) {
        kv_engine_unlock(engine);
        kv_caller_detach(caller);
        kv_mutex_lock(&engine->lock);
    }
    kv_status_t status = wait_loop_locked(engine, wait, caller);
    self->wait = outer;
    atomic_store(&self->engine, outer_engine);

    if (own)
        kv_cond_fini(&cond);
    return status;
}

/* ------------------------------------------------------------------------- errors, wait_all */

void kv_untold_sweep_locked(kv_engine_t *engine)
{
    int kept = 0;
    for (int i = 0; i < engine->num_untold; i++) {
        if (atomic_load(&engine->untold[i].error->told))
            kv_error_rele(engine->untold[i].error);
        else
            engine->untold[kept++] = engine->untold[i];
    }
    engine->num_untold = kept;
}

void kv_untold_add_locked(kv_engine_t *engine, kv_error_t *error, uint64_t sequence)
{
    kv_untold_sweep_locked(engine);
    if (engine->num_untold == KV_UNTOLD_ERRORS)
        return; /* it still stands on the variables */
    engine->untold[engine->num_untold++] = (kv_untold_t){kv_error_hold(error), sequence};
}

/* The untold error of the operation submitted first, with its share; NULL if there is none. */
static kv_error_t *take_untold_locked(kv_engine_t *engine) KV_REQUIRES(engine->lock)
{
    kv_untold_sweep_locked(engine);
    if (engine->num_untold == 0)
        return NULL;
    int first = 0;
    for (int i = 1; i < engine->num_untold; i++) {
        if (engine->untold[i].sequence < engine->untold[first].sequence)
            first = i;
    }
    kv_error_t *error = engine->untold[first].error;
    engine->untold[first] = engine->untold[--engine->num_untold];
    return error;
}

kv_status_t kv_engine_wait_all(kv_engine_t *engine, kv_caller_t *caller)
{
    kv_actor_t *self = kv_actor_self();
    bool was_detached = caller->detached;
    kv_status_t status = KV_OK;
    kv_error_t *error = NULL;
    kv_wait_t wait = {.op = NULL};

    if (self->depth > 0)
        return kv_fail(KV_INVALID, "waiting for everything from inside an updater would wait for "
                                   "that updater");
    kv_mutex_lock(&engine->lock);
    if (self->wait != NULL && self->wait->op != NULL)
        status = kv_fail(KV_INVALID, "waiting for everything would wait for the call that the "
                                     "signal handler it is made from has interrupted");
    else if (engine->pending > 0)
        status = kv_wait_locked(engine, &wait, caller);
    if (status == KV_OK)
        error = take_untold_locked(engine);
    kv_engine_unlock(engine);
    if (!was_detached)
        kv_caller_attach(caller);
    if (error != NULL) {
        status = kv_error_raise(error);
        kv_error_rele(error);
    }
    return status;
}
