/* Variables: the state word, pins, retiring, and the path that takes no lock.
 *
 * Memory order: a compare-and-swap that enters is `acquire` and pairs with the one that leaves,
 * which is `release`: what the last holder did to the value is visible to the next. The leaving one
 * is `acquire` too, because it may be the last of all, and who frees must see what everybody did.
 * The loads before them only supply the expected value, so `relaxed` does.
 *
 * Why leaving is a compare-and-swap and no subtraction: as soon as the count has fallen, somebody
 * else may take the variable out of its queue and free it, so a leaver that has to look at the
 * queue must look first. While QUEUED is set counts change under the lock only.
 */
#include "engine/internal.h"

void kv_var_init(kv_var_t *var, bool poisons, void (*on_free)(void *context), void *context)
{
    *var = (kv_var_t){.poisons = poisons, .on_free = on_free, .context = context};
}

void kv_var_free(kv_var_t *var)
{
    kv_error_rele(var->error);
    if (var->on_free != NULL)
        var->on_free(var->context);
}

void kv_var_pin(kv_var_t *var)
{
    atomic_fetch_add(&var->state, KV_VAR_PIN);
}

void kv_var_unpin(kv_var_t *var)
{
    if (kv_state_is_over(atomic_fetch_sub(&var->state, KV_VAR_PIN) - KV_VAR_PIN))
        kv_var_free(var);
}

void kv_var_retire(kv_var_t *var)
{
    if (kv_state_is_over(atomic_fetch_or(&var->state, KV_VAR_RETIRED) | KV_VAR_RETIRED))
        kv_var_free(var);
}

bool kv_var_held_here(const kv_var_t *var)
{
    return atomic_load(&var->actor) == kv_actor_self();
}

/* What may be among many variables: a bit for each that is, so that what has none need not be
 * looked for. */
enum { MANY = 16, SEEN_BITS = 1 << 16 };

static bool may_be_seen(uint64_t *seen, const kv_var_t *var)
{
    uint64_t bit = (uint64_t)(uintptr_t)var * UINT64_C(0x9e3779b97f4a7c15) >> 48;
    bool before = (seen[bit / 64] >> bit % 64 & 1) != 0;
    seen[bit / 64] |= UINT64_C(1) << bit % 64;
    return before;
}

static int32_t find(const kv_dep_t *deps, int32_t count, const kv_var_t *var)
{
    int32_t i = 0;
    while (i < count && deps[i].var != var)
        i++;
    return i;
}

/* Each variable once, where it came first; returns how many there are. */
static int32_t unite(kv_op_t *op, kv_dep_t *deps, int32_t num_deps, uint64_t *seen)
{
    int32_t kept = 0;
    for (int32_t i = 0; i < num_deps; i++) {
        bool looks = seen == NULL || may_be_seen(seen, deps[i].var);
        int32_t same = looks ? find(deps, kept, deps[i].var) : kept;
        /* A read and an overwrite together look at what was there. */
        if (same < kept && deps[same].access != deps[i].access)
            deps[same].access = KV_WRITE;
        else if (same == kept)
            deps[kept++] = (kv_dep_t){.var = deps[i].var, .access = deps[i].access, .op = op};
    }
    return kept;
}

static int32_t unite_many(kv_op_t *op, kv_dep_t *deps, int32_t num_deps)
{
    uint64_t seen[SEEN_BITS / 64] = {0};
    return unite(op, deps, num_deps, seen);
}

void kv_op_init(kv_op_t *op, kv_dep_t *deps, int32_t num_deps, int32_t priority)
{
    int32_t kept =
        num_deps > MANY ? unite_many(op, deps, num_deps) : unite(op, deps, num_deps, NULL);
    *op = (kv_op_t){.deps = deps, .num_deps = kept, .priority = priority, .caller_run = true};
}

static inline bool take(kv_dep_t *dep)
{
    const uint64_t closed = KV_VAR_WRITER | KV_VAR_QUEUED | KV_VAR_ERROR;
    uint64_t busy = dep->access == KV_READ ? closed : closed | KV_VAR_READERS;
    uint64_t unit = kv_access_unit(dep->access);
    uint64_t state = atomic_load_explicit(&dep->var->state, memory_order_relaxed);
    do {
        if (KV_UNLIKELY((state & busy) != 0))
            return false;
    } while (!atomic_compare_exchange_weak_explicit(&dep->var->state, &state, state + unit,
                                                    memory_order_acquire, memory_order_relaxed));
    return true;
}

/* False if the variable has a queue and the lock is needed. */
static inline bool give_back(kv_dep_t *dep)
{
    kv_var_t *var = dep->var;
    uint64_t unit = kv_access_unit(dep->access);
    uint64_t state = atomic_load_explicit(&var->state, memory_order_relaxed);
    do {
        if (KV_UNLIKELY((state & KV_VAR_QUEUED) != 0))
            return false;
    } while (!atomic_compare_exchange_weak_explicit(&var->state, &state, state - unit,
                                                    memory_order_acq_rel, memory_order_relaxed));
    if (KV_UNLIKELY(kv_state_is_over(state - unit)))
        kv_var_free(var);
    return true;
}

/* Gives back the held variables from `first` up to the end of the list. */
static inline void leave_from(kv_engine_t *engine, kv_op_t *op, int32_t first)
{
    for (int32_t i = first; i < op->num_deps; i++) {
        if (KV_UNLIKELY(!give_back(&op->deps[i]))) {
            kv_mutex_lock(&engine->lock);
            kv_queue_leave_locked(engine, op, i);
            kv_engine_unlock(engine);
            return;
        }
    }
}

bool kv_engine_try_enter(kv_engine_t *engine, kv_op_t *op)
{
    /* `relaxed`: a call that runs at the same time as kv_engine_close may come before or after. */
    if (KV_UNLIKELY(atomic_load_explicit(&engine->closed, memory_order_relaxed)))
        return false;
    for (int32_t i = 0; i < op->num_deps; i++) {
        if (KV_UNLIKELY(!take(&op->deps[i]))) {
            int32_t num_deps = op->num_deps;
            op->num_deps = i;
            leave_from(engine, op, 0);
            op->num_deps = num_deps;
            return false;
        }
    }
    return true;
}

void kv_engine_give_back(kv_engine_t *engine, kv_op_t *op, int32_t first)
{
    leave_from(engine, op, first);
    if (op->num_deps > first)
        op->num_deps = first;
}

void kv_engine_begin_callback(kv_engine_t *engine, kv_op_t *op)
{
    kv_engine_give_back(engine, op, 1);
    op->callback = kv_actor_self();
    op->callback->depth++;
    if (op->num_deps == 1 && op->deps[0].access != KV_READ)
        atomic_store_explicit(&op->deps[0].var->actor, op->callback, memory_order_relaxed);
}

/* `relaxed`, here and above: this thread reads its own stores, and a walk of another needs them
 * only once this thread waits too, which it begins under the engine's lock. */
static void end_callback(kv_op_t *op)
{
    op->callback->depth--;
    op->callback = NULL;
    if (op->num_deps == 1 && op->deps[0].access != KV_READ)
        atomic_store_explicit(&op->deps[0].var->actor, NULL, memory_order_relaxed);
}

void kv_engine_leave(kv_engine_t *engine, kv_op_t *op)
{
    if (KV_UNLIKELY(op->callback != NULL))
        end_callback(op);
    leave_from(engine, op, 0);
}

bool kv_engine_try_enter_one(kv_engine_t *engine, kv_dep_t *dep)
{
    return !atomic_load_explicit(&engine->closed, memory_order_relaxed) && take(dep);
}

void kv_engine_leave_one(kv_engine_t *engine, kv_dep_t *dep)
{
    if (KV_LIKELY(give_back(dep)))
        return;
    kv_op_t op;
    kv_dep_t again = *dep;
    kv_op_init(&op, &again, 1, 0);
    leave_from(engine, &op, 0);
}
