/* The quick way for one key and one small array: what plan, scratch and operation would do, for the
 * one case that is worth it. A training loop with many small keys lives on it: the general call
 * costs a few times more than the copy itself.
 */
#include "base/memory.h"
#include "store/internal.h"

#include <string.h>

enum { SMALL_BYTES = KV_DETACH_BYTES / 4 };

/* Whether two arrays of `bytes` share some of their memory and not all. */
static bool overlap_in_part(const kv_view_t *a, const kv_view_t *b, size_t bytes)
{
    uintptr_t low = (uintptr_t)a->data, high = (uintptr_t)b->data;
    return low != high && (low < high ? high - low : low - high) < bytes;
}

static bool acceptable(const kv_entry_t *entry, const kv_view_t *value, const kv_view_t *out)
{
    return entry->bytes < SMALL_BYTES && !entry->sparse &&
           (value == NULL || kv_entry_accepts(entry, value)) &&
           (out == NULL || kv_entry_accepts(entry, out)) &&
           (value == NULL || out == NULL || !overlap_in_part(value, out, entry->bytes));
}

/* With the key held: whether a part of it is in device memory. */
static bool on_device(const kv_entry_t *entry)
{
    const kv_slots_t *slots = entry->slots;
    const kv_buffer_t *buffers[KV_MAX_SLOTS + 3] = {entry->stored, entry->merged};
    if (slots != NULL) {
        buffers[2] = slots->master;
        memcpy(&buffers[3], slots->slot, sizeof slots->slot);
    }
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        if (buffers[i] != NULL && kv_buffer_place(buffers[i]) != NULL)
            return true;
    return false;
}

/* With the key held. */
static void copy(const kv_entry_t *entry, void *to, const void *from)
{
    if (to != from)
        memcpy(to, from, entry->bytes);
}

static kv_status_t update(kv_store_t *store, kv_entry_t *entry, kv_updater_t *updater,
                          const kv_view_t *value, const kv_view_t *out, kv_op_t *op,
                          kv_caller_t *caller)
{
    if (KV_UNLIKELY(entry->merged == NULL))
        KV_TRY(kv_buffer_new(entry->bytes, &entry->merged));
    copy(entry, entry->merged->data, value->data);
    kv_engine_begin_callback(store->runtime->engine, op);
    kv_update_t seen = {.name = &entry->name,
                        .dtype = entry->dtype,
                        .ndim = entry->ndim,
                        .shape = entry->shape,
                        .recv = entry->merged,
                        .stored = entry->stored,
                        .device = -1,
                        .first = value,
                        .cache = &entry->cache};
    KV_TRY(updater->run(updater, &seen, caller));
    if (out != NULL)
        copy(entry, out->data, entry->stored->data);
    return KV_OK;
}

/* A step of the optimizer. */
static kv_status_t step_on(kv_store_t *store, kv_entry_t *entry, kv_slots_t *slots, kv_step_t *step,
                           const kv_view_t *value, const kv_view_t *out)
{
    kv_work_t work = {.host = &store->host,
                      .group = {.entry = entry, .step = step, .slots = slots}};
    kv_weight_t weight;
    const void *source = value->data;
    void *destination = out != NULL ? out->data : NULL;
    kv_gradients_t gradients = {.num_src = 1, .src = &source};
    KV_TRY(kv_work_weight(&work, &weight));
    kv_host_update(&store->host, step, &weight, &gradients, out != NULL, &destination);
    return KV_OK;
}

kv_status_t kv_store_try_small(kv_store_t *store, const kv_name_t *name, const kv_view_t *value,
                               const kv_view_t *out, kv_caller_t *caller, bool *done)
{
    *done = false;
    if (KV_UNLIKELY(store->runtime->generation != kv_fork_generation() || store->client != NULL))
        return KV_OK;
    kv_engine_t *engine = store->runtime->engine;
    uint64_t hash = kv_name_hash(name);
    kv_dep_t dep;
    kv_updater_t *updater = NULL;
    kv_slots_t *slots = NULL;
    kv_step_t step;
    kv_mutex_lock(&store->lock);
    kv_entry_t *entry = kv_table_find(&store->table, name, hash);
    if (KV_LIKELY(entry != NULL && acceptable(entry, value, out) &&
                  (value == NULL || store->codec.type == KV_CODEC_NONE) &&
                  (value == NULL || store->optimizer == NULL ||
                   kv_entry_can_count_locked(store, entry)))) {
        dep.var = &entry->var;
        dep.access = value != NULL ? KV_WRITE : KV_READ;
        *done = kv_engine_try_enter_one(engine, &dep);
        if (KV_UNLIKELY(*done && kv_device_used()) && on_device(entry)) {
            kv_engine_leave_one(engine, &dep);
            *done = false;
        }
        if (*done && value != NULL && store->updater != NULL) {
            updater = store->updater;
            atomic_fetch_add_explicit(&updater->refs, 1, memory_order_relaxed);
        } else if (*done && value != NULL && store->optimizer != NULL) {
            kv_entry_count_locked(store, entry, &step);
            slots = entry->slots;
            atomic_fetch_add_explicit(&slots->refs, 1, memory_order_relaxed);
        }
    }
    kv_mutex_unlock(&store->lock);
    if (!*done)
        return KV_OK;

    void *stored = entry->stored->data;
    if (slots != NULL) {
        kv_status_t status = step_on(store, entry, slots, &step, value, out);
        kv_engine_leave_one(engine, &dep);
        kv_slots_rele(slots);
        return status;
    }
    if (updater == NULL) {
        if (value != NULL)
            copy(entry, stored, value->data);
        if (out != NULL)
            copy(entry, out->data, stored);
        kv_engine_leave_one(engine, &dep);
        return KV_OK;
    }
    kv_op_t op;
    kv_op_init(&op, &dep, 1, 0);
    kv_status_t status = update(store, entry, updater, value, out, &op, caller);
    kv_engine_leave(engine, &op);
    if (atomic_fetch_sub(&updater->refs, 1) == 1)
        updater->free(updater);
    return status;
}
