/* The threaded engine: threads that take the runnable tasks in order of priority.
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
    .join = join,
};
