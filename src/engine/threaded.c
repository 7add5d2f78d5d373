/* The threaded engine: threads that take the runnable tasks in order of priority.
 *
 * A thread that waits takes the first in order as well, if it is one that it waits for: a push and
 * the wait for it then cost no change of threads, and of many tasks the waiter does its part. It
 * takes no other, which could keep it longer than what it came for. Tasks are local work of a
 * bounded length, but nobody knows which; so near its deadline a thread takes none.
 *
 * They are started when there is more to run than threads without work, and stay until the engine
 * stops. `num_idle` counts those that have nothing to do yet, the starting ones too, until they
 * have noticed; so comparing it with the number of runnable tasks does not start one too many.
 */
#include "engine/internal.h"

static void *work(void *context)
{
    kv_engine_t *engine = context;
    kv_mutex_lock(&engine->lock);
    for (;;) {
        engine->num_idle--;
        kv_op_t *op = kv_runnable_pop_locked(engine);
        if (op != NULL) {
            kv_engine_unlock(engine);
            kv_task_run(engine, op);
            kv_mutex_lock(&engine->lock);
            engine->num_idle++;
            continue;
        }
        engine->num_idle++;
        if (engine->stopping)
            break;
        kv_cond_wait(&engine->work, &engine->lock);
    }
    kv_engine_unlock(engine);
    return NULL;
}

static kv_status_t start_locked(kv_engine_t *engine) KV_REQUIRES(engine->lock)
{
    KV_TRY(kv_thread_start(&engine->threads[engine->num_threads], "kv-engine", work, engine));
    engine->num_threads++;
    engine->num_idle++;
    return KV_OK;
}

static bool wants_inline(kv_engine_t *engine, size_t work_bytes)
{
    (void)engine;
    return work_bytes <= KV_DETACH_BYTES;
}

static kv_status_t prepare_locked(kv_engine_t *engine) KV_REQUIRES(engine->lock)
{
    return engine->num_threads > 0 ? KV_OK : start_locked(engine);
}

static void runnable_locked(kv_engine_t *engine) KV_REQUIRES(engine->lock)
{
    if (engine->stopping)
        return; /* a callback has ended after all; nobody waits for its followers any more */
    if (engine->num_runnable > engine->num_idle && engine->num_threads < engine->max_threads) {
        kv_sentence_t sentence;
        kv_sentence_save(&sentence);
        if (start_locked(engine) == KV_OK)
            return;
        kv_sentence_restore(&sentence); /* those that run will do */
    }
    kv_cond_signal(&engine->work);
}

/* Of the operations before a turn only the next ones: what they wait for runs as always. */
static bool is_waited_for_locked(kv_engine_t *engine, const kv_wait_t *wait, const kv_op_t *task)
    KV_REQUIRES(engine->lock)
{
    (void)engine;
    if (wait->handle != NULL)
        return task->handle == wait->handle;
    if (wait->op == NULL)
        return true;
    for (int32_t i = 0; i < wait->op->num_deps; i++) {
        const kv_dep_t *dep = &wait->op->deps[i];
        if (!dep->granted && dep->var->head->op == task)
            return true;
    }
    return false;
}

static kv_op_t *take_locked(kv_engine_t *engine, const kv_wait_t *wait, int64_t deadline_ns)
    KV_REQUIRES(engine->lock)
{
    if (engine->num_runnable == 0 || !is_waited_for_locked(engine, wait, engine->runnable[0]) ||
        deadline_ns - kv_clock_ns() < KV_POLL_NS)
        return NULL;
    return kv_runnable_pop_locked(engine);
}

static void join(kv_engine_t *engine)
{
    kv_mutex_lock(&engine->lock);
    engine->stopping = true;
    kv_cond_broadcast(&engine->work);
    kv_engine_unlock(engine);
    for (; engine->num_threads > 0; engine->num_threads--)
        kv_thread_join(engine->threads[engine->num_threads - 1]);
}

const kv_engine_kind_t kv_engine_threaded = {
    .name = "threaded",
    .wants_inline = wants_inline,
    .prepare_locked = prepare_locked,
    .runnable_locked = runnable_locked,
    .take_locked = take_locked,
    .join = join,
};
