/* The engines without threads of their own.
 *
 * naive: tasks run in the thread that made them runnable, as soon as it has dropped the lock; one
 * after the other, in order of priority. A program of one thread runs everything in the order of
 * its calls, which makes this engine the oracle of the others.
 *
 * stepping: tasks stay until some thread waits, and that thread runs them in an order picked by the
 * seed until its wait is over. With one thread a run can be repeated.
 */
#include "engine/internal.h"

static kv_status_t prepare_locked(kv_engine_t *engine)
{
    (void)engine;
    return KV_OK;
}

static void join(kv_engine_t *engine)
{
    (void)engine;
}

static bool always_inline(kv_engine_t *engine, size_t work_bytes)
{
    (void)engine;
    (void)work_bytes;
    return true;
}

static void runs_at_unlock_locked(kv_engine_t *engine)
{
    (void)engine;
}

static kv_op_t *take_nothing_locked(kv_engine_t *engine, const kv_wait_t *wait, int64_t deadline_ns)
{
    (void)engine, (void)wait, (void)deadline_ns;
    return NULL;
}

const kv_engine_kind_t kv_engine_naive = {
    .name = "naive",
    .drains = true,
    .wants_inline = always_inline,
    .prepare_locked = prepare_locked,
    .runnable_locked = runs_at_unlock_locked,
    .take_locked = take_nothing_locked,
    .join = join,
};

/* A counter through a mixer: any seed will do, 0 too. */
uint64_t kv_stepping_random_locked(kv_engine_t *engine)
{
    uint64_t x = engine->random += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static bool inline_by_seed(kv_engine_t *engine, size_t work_bytes)
{
    (void)work_bytes;
    kv_mutex_lock(&engine->lock);
    bool now = kv_stepping_random_locked(engine) & 1;
    kv_engine_unlock(engine);
    return now;
}

static void wake_waiters_locked(kv_engine_t *engine)
{
    kv_cond_broadcast(&engine->ended);
}

static kv_op_t *take_any_locked(kv_engine_t *engine, const kv_wait_t *wait, int64_t deadline_ns)
    KV_REQUIRES(engine->lock)
{
    (void)wait, (void)deadline_ns;
    if (engine->num_runnable == 0)
        return NULL;
    return kv_runnable_pick_locked(engine, kv_stepping_random_locked(engine));
}

const kv_engine_kind_t kv_engine_stepping = {
    .name = "stepping",
    .waiters_run = true,
    .wants_inline = inline_by_seed,
    .prepare_locked = prepare_locked,
    .runnable_locked = wake_waiters_locked,
    .take_locked = take_any_locked,
    .join = join,
};
