/* Stores: opening, closing, and the calls on keys.
 *
 * `local` and `device` do the same with values in host memory: each position of a value list stands
 * for one device, and the sum is made where the values are.
 *
 * The store's lock guards the table and nothing that takes long; the order on a key is kept by the
 * key's engine variable.
 */
#include "base/memory.h"
#include "ps/client.h"
#include "store/internal.h"
#include "store/nccl.h"

#include <ctype.h>
#include <string.h>

enum { NAME_BYTES = 96 };

kv_status_t kv_store_new(kv_runtime_t *runtime, const char *name, const kv_store_options_t *options,
                         kv_store_t **out)
{
    kv_kind_t kind;
    KV_TRY(kv_kind_parse(name, &kind));
    kv_nccl_team_t *team = kv_nccl_team_hold(options->team);
    if (kind.family == KV_KIND_NCCL && team == NULL)
        KV_TRY(kv_nccl_team_new(NULL, &team));
    kv_store_t *store = kv_calloc(1, sizeof *store);
    if (store == NULL)
        kv_nccl_team_rele(team);
    KV_TRY_ALLOC(store, "a store");
    store->team = team;
    store->runtime = runtime;
    store->kind = kind;
    store->client = options->client;
    store->ranks = options->team;
    store->host = (kv_host_t){.kernels = runtime->kernels,
                              .team = runtime->team,
                              .num_threads = options->num_threads > 0 ? options->num_threads
                                                                      : runtime->num_threads};
    for (size_t i = 0; i + 1 < sizeof store->name && name[i] != '\0'; i++)
        store->name[i] = (char)tolower((unsigned char)name[i]);
    kv_mutex_init(&store->lock, KV_RANK_STORE);
    kv_count(KV_COUNT_STORES, 1);
    *out = store;
    return KV_OK;
}

void kv_store_close(kv_store_t *store)
{
    kv_mutex_lock(&store->lock);
    store->closed = true;
    kv_table_t table = store->table;
    store->table = (kv_table_t){0};
    kv_updater_t *updater = store->updater;
    kv_optimizer_t *optimizer = store->optimizer;
    kv_nccl_team_t *team = store->team;
    store->updater = NULL;
    store->optimizer = NULL;
    store->team = NULL;
    kv_mutex_unlock(&store->lock);

    for (kv_entry_t *entry = table.first, *next; entry != NULL; entry = next) {
        next = entry->next;
        kv_var_retire(&entry->var);
    }
    kv_table_fini(&table);
    kv_optimizer_rele(optimizer);
    kv_nccl_team_rele(team);
    if (updater != NULL && atomic_fetch_sub(&updater->refs, 1) == 1)
        updater->free(updater);
}

void kv_store_free(kv_store_t *store)
{
    kv_store_close(store);
    kv_agreements_rele(store->adrift);
    kv_mutex_fini(&store->lock);
    kv_free(store);
    kv_count(KV_COUNT_STORES, -1);
}

kv_status_t kv_store_check_open(const kv_store_t *store)
{
    if (KV_UNLIKELY(store->runtime->generation != kv_fork_generation()))
        return kv_fail(KV_CLOSED, "the store belongs to the parent of this forked process; create "
                                  "a new one here");
    if (KV_UNLIKELY(store->closed))
        return kv_fail(KV_CLOSED, "the store is closed; create a new one");
    if (KV_LIKELY(store->kind.family != KV_KIND_DIST))
        return store->ranks == NULL ? KV_OK : kv_nccl_team_whole(store->ranks, false);
    if (store->client == NULL)
        return kv_fail(KV_INVALID, "this process is a server or the scheduler of its cluster and "
                                   "has no values to push or pull; call kvstore.serve()");
    return kv_client_check(store->client);
}

int32_t kv_store_rank(const kv_store_t *store)
{
    return store->client != NULL  ? kv_client_rank(store->client)
           : store->ranks != NULL ? kv_nccl_team_peers(store->ranks)->rank
                                  : 0;
}

int32_t kv_store_num_workers(const kv_store_t *store)
{
    return store->client != NULL  ? kv_client_num_workers(store->client)
           : store->ranks != NULL ? kv_nccl_team_peers(store->ranks)->num_workers
                                  : 1;
}

uint64_t kv_store_generation(const kv_store_t *store)
{
    return store->runtime->generation;
}

const char *kv_store_kind(const kv_store_t *store)
{
    return store->name;
}

kv_status_t kv_store_set_updater(kv_store_t *store, kv_updater_t *updater)
{
    KV_TRY(kv_store_check_open(store));
    kv_mutex_lock(&store->lock);
    kv_updater_t *before = store->updater;
    kv_optimizer_t *optimizer = store->optimizer;
    if (optimizer != NULL)
        kv_store_forget_training_locked(store);
    store->updater = updater;
    store->optimizer = NULL;
    kv_mutex_unlock(&store->lock);
    kv_optimizer_rele(optimizer);
    if (before != NULL && atomic_fetch_sub(&before->refs, 1) == 1)
        before->free(before);
    return KV_OK;
}

/* -------------------------------------------------------------------------- init, broadcast */

/* Makes an entry for each item; `fresh` finds the names that stand twice. */
static kv_status_t make_entries(const kv_call_t *call, const char *verb, bool remote,
                                kv_table_t *fresh, kv_group_t *groups, int64_t *made)
{
    char name[NAME_BYTES];
    for (int64_t i = 0; i < call->num_items; i++) {
        const kv_item_t *item = &call->items[i];
        const kv_view_t *value = &item->values[0];
        kv_name_format(&item->name, name, sizeof name);
        if (kv_table_find(fresh, &item->name, kv_name_hash(&item->name)) != NULL)
            return kv_fail(KV_INVALID, "key %s stands twice in one %s", name, verb);
        if (value->dtype == KV_DTYPE_NONE)
            return kv_fail(KV_BAD_TYPE,
                           "the value of key %s has element type %s, which a store cannot hold (it "
                           "holds native float64, float32, float16, bfloat16, int8, uint8, int32, "
                           "int64)",
                           name, value->type_name != NULL ? value->type_name : "unknown");
        kv_entry_t *entry;
        KV_TRY(kv_entry_new(&item->name, value, remote, &entry));
        kv_table_insert(fresh, entry);
        groups[i] = (kv_group_t){.entry = entry,
                                 .num_values = item->num_values,
                                 .num_outs = item->num_outs,
                                 .values = item->values,
                                 .outs = item->outs};
        *made = i + 1;
    }
    return KV_OK;
}

static kv_status_t check_unknown_locked(const kv_store_t *store, const kv_call_t *call)
    KV_REQUIRES(&store->lock)
{
    KV_TRY(kv_names_check_locked(store, call->items, call->num_items));
    for (int64_t i = 0; i < call->num_items; i++) {
        const kv_name_t *name = &call->items[i].name;
        if (kv_table_find(&store->table, name, kv_name_hash(name)) != NULL) {
            char text[NAME_BYTES];
            return kv_fail(KV_INVALID, "key %s is initialised already; delete it first",
                           kv_name_format(name, text, sizeof text));
        }
    }
    return KV_OK;
}

/* Puts all entries into the store or none. */
static kv_status_t publish(kv_store_t *store, const kv_call_t *call, const kv_group_t *groups)
{
    kv_mutex_lock(&store->lock);
    kv_status_t status = check_unknown_locked(store, call);
    if (status == KV_OK)
        status = kv_table_reserve(&store->table, call->num_items);
    if (status == KV_OK) {
        for (int64_t i = 0; i < call->num_items; i++) {
            kv_var_pin(&groups[i].entry->var);
            kv_table_insert(&store->table, groups[i].entry);
        }
        store->key_type = call->items[0].name.text != NULL ? KV_KEYS_TEXT : KV_KEYS_NUMBER;
    }
    kv_mutex_unlock(&store->lock);
    return status;
}

/* Whether values are merged in host memory, wherever they come from. */
static bool merges_here(const kv_store_t *store)
{
    return store->kind.family == KV_KIND_LOCAL || store->kind.family == KV_KIND_DIST;
}

/* Carries out a checked call whose arrays are where they can be used. */
static kv_status_t run(kv_store_t *store, kv_plan_t *plan, kv_call_t *call, bool push,
                       kv_caller_t *caller)
{
    bool async = call->async;
    kv_status_t status = kv_nccl_team_check(plan->team);
    if (status != KV_OK)
        return kv_nccl_team_failed(plan->team, status, caller);
    /* Nobody would look, after a task, whether its numbers are any. */
    bool looks = call->num_outs > 0 && kv_nccl_team_works(plan->team);
    call->async = async && plan->stage == NULL && !looks;
    status = store->client != NULL ? kv_dist_run(store, plan, call, push, caller)
                                   : kv_plan_run(store, plan, call, push, caller);
    call->async = async;
    /* Values that were waited for are told only if nothing has failed meanwhile. */
    if (status == KV_OK && call->num_outs > 0)
        status = kv_nccl_team_check(plan->team);
    return status == KV_OK ? KV_OK : kv_nccl_team_failed(plan->team, status, caller);
}

kv_status_t kv_store_init(kv_store_t *store, kv_call_t *call, kv_caller_t *caller)
{
    const char *verb = call->num_outs > 0 ? "broadcast" : "init";
    call->checked = false;
    call->num_done = 0;
    KV_TRY(kv_store_check_open(store));
    if (call->num_items == 0)
        return KV_OK;
    kv_store_lock(store);
    kv_status_t status = check_unknown_locked(store, call);
    kv_nccl_team_t *team = status == KV_OK ? kv_nccl_team_hold(store->team) : NULL;
    kv_mutex_unlock(&store->lock);
    KV_TRY(status);

    kv_table_t fresh = {0};
    bool remote = store->kind.family == KV_KIND_DIST, kept = false;
    int64_t made = 0;
    kv_plan_t plan = {.steps = &plan.one_step,
                      .team = team,
                      .groups = kv_alloc((size_t)call->num_items * sizeof(kv_group_t))};
    if (plan.groups == NULL)
        kv_nccl_team_rele(team);
    KV_TRY_ALLOC(plan.groups, "the keys of a call");
    status = kv_table_reserve(&fresh, call->num_items);
    if (status == KV_OK)
        status = make_entries(call, verb, remote, &fresh, plan.groups, &made);
    if (status == KV_OK)
        status = kv_groups_check(store->runtime->engine, plan.groups, call->num_items, call, verb);
    plan.num_groups = made;
    plan.cuda = kv_call_has_cuda(call);
    if (status == KV_OK && plan.cuda && merges_here(store))
        status = kv_plan_stage(store, &plan, call->hold);
    for (int64_t i = 0; i < made && status == KV_OK && plan.stage != NULL; i++)
        status = kv_staged_wait(plan.groups[i].staged, caller);
    if (status == KV_OK && remote)
        status = kv_dist_declare(store, plan.groups, call->num_items, caller, &kept);
    for (int64_t i = 0; i < call->num_items && status == KV_OK && !remote; i++)
        status = kv_entry_fill(store, plan.groups[i].entry, &plan.groups[i].values[0], call->hold,
                               caller);
    if (status == KV_OK && store->ranks != NULL)
        status = kv_nccl_init(store, &plan, verb, call, caller);
    kv_table_fini(&fresh);
    if (status == KV_OK)
        status = publish(store, call, plan.groups);
    if (status != KV_OK) {
        for (int64_t i = 0; i < made && !kept; i++)
            kv_var_retire(&plan.groups[i].entry->var);
        kv_stage_free(plan.stage);
        kv_free(plan.groups);
        kv_nccl_team_rele(team);
        return status;
    }
    call->checked = true;
    for (int64_t i = 0; i < plan.num_groups; i++)
        plan.groups[i].num_values = 0;
    if (call->num_outs > 0)
        status = run(store, &plan, call, false, caller);
    kv_plan_fini(&plan);
    if (status == KV_OK || status == KV_INTERRUPTED)
        return status;
    return kv_fail(status, "%s; the call has initialised its keys", kv_status_message(status));
}

/* ----------------------------------------------------------------------------- push, pull */

/* The first key of the call that compression has just been found to do no good any more. */
static void tell_not_finite(const kv_plan_t *plan, kv_call_t *call)
{
    for (int64_t g = 0; g < plan->num_groups && call->not_finite[0] == '\0'; g++) {
        int seen = 1;
        kv_entry_t *entry = plan->groups[g].entry;
        if (atomic_load(&entry->not_finite) == 1 &&
            atomic_compare_exchange_strong(&entry->not_finite, &seen, 2))
            kv_name_format(&entry->name, call->not_finite, sizeof call->not_finite);
    }
}

/* Servers that wait for all workers' pushes take the step that worker 0 has counted. */
static bool counts(const kv_store_t *store)
{
    return store->client == NULL || store->kind.async || kv_client_rank(store->client) == 0;
}

static kv_status_t plan_and_run(kv_store_t *store, kv_call_t *call, const char *verb, bool push,
                                kv_caller_t *caller)
{
    kv_plan_t plan;
    call->checked = false;
    call->num_done = 0;
    KV_TRY(kv_store_check_open(store));
    KV_TRY(kv_plan_init(store, call, verb, &plan));
    kv_status_t status = KV_OK;
    if (KV_UNLIKELY(plan.cuda) && merges_here(store))
        status = kv_plan_stage(store, &plan, call->hold);
    if (status == KV_OK && push && store->ranks != NULL)
        status = kv_plan_check_nccl(&plan);
    if (status == KV_OK && plan.optimizer != NULL)
        status = counts(store) ? kv_plan_count(store, &plan) : kv_plan_check_updates(&plan);
    if (status == KV_OK) {
        call->checked = true;
        status = run(store, &plan, call, push, caller);
        if (status != KV_OK)
            kv_plan_uncount(store, &plan, call->num_done);
    }
    if (plan.codec.type != KV_CODEC_NONE)
        tell_not_finite(&plan, call);
    kv_plan_fini(&plan);
    return status;
}

kv_status_t kv_store_push(kv_store_t *store, kv_call_t *call, kv_caller_t *caller)
{
    return plan_and_run(store, call, call->num_outs > 0 ? "pushpull" : "push", true, caller);
}

kv_status_t kv_store_pull(kv_store_t *store, kv_call_t *call, kv_caller_t *caller)
{
    return plan_and_run(store, call, "pull", false, caller);
}

kv_status_t kv_store_row_sparse_pull(kv_store_t *store, kv_call_t *call, kv_caller_t *caller)
{
    return plan_and_run(store, call, "row_sparse_pull", false, caller);
}

/* ---------------------------------------------------------------------------------- keys */

/* The entry of a known key. */
static kv_status_t find_locked(const kv_store_t *store, const kv_name_t *name, const char *verb,
                               kv_entry_t **out) KV_REQUIRES(&store->lock)
{
    kv_item_t item = {.name = *name};
    KV_TRY(kv_names_check_locked(store, &item, 1));
    kv_entry_t *entry = kv_table_find(&store->table, name, kv_name_hash(name));
    if (entry == NULL) {
        char text[NAME_BYTES];
        return kv_fail(KV_NO_KEY, "%s of key %s, which was not initialised; call init first", verb,
                       kv_name_format(name, text, sizeof text));
    }
    *out = entry;
    return KV_OK;
}

kv_status_t kv_store_check_keys(kv_store_t *store, const kv_call_t *call, const char *verb)
{
    kv_plan_t plan;
    KV_TRY(kv_store_check_open(store));
    KV_TRY(kv_plan_init(store, call, verb, &plan));
    kv_plan_fini(&plan);
    return KV_OK;
}

void kv_store_remove_locked(kv_store_t *store, kv_entry_t *entry)
{
    if (kv_table_find(&store->table, &entry->name, entry->hash) != entry)
        return;
    kv_table_remove(&store->table, entry);
    kv_var_retire(&entry->var); /* frees nothing: it is pinned */
}

kv_status_t kv_store_delete(kv_store_t *store, const kv_call_t *call, kv_caller_t *caller)
{
    kv_plan_t plan;
    KV_TRY(kv_store_check_open(store));
    KV_TRY(kv_plan_init(store, call, "delete", &plan));
    kv_status_t status = KV_OK;
    if (store->client != NULL && plan.num_groups > 0)
        status = kv_dist_delete(store, &plan, caller);
    kv_mutex_lock(&store->lock);
    for (int64_t g = 0; g < plan.num_groups && status == KV_OK; g++)
        kv_store_remove_locked(store, plan.groups[g].entry);
    kv_mutex_unlock(&store->lock);
    kv_plan_fini(&plan);
    return status;
}

kv_status_t kv_store_describe(kv_store_t *store, const kv_name_t *name, const char *verb,
                              kv_dtype_t *dtype, bool *sparse, int *ndim, int64_t *shape)
{
    kv_entry_t *entry = NULL;
    KV_TRY(kv_store_check_open(store));
    kv_store_lock(store);
    kv_status_t status = find_locked(store, name, verb, &entry);
    if (status == KV_OK) {
        *dtype = entry->dtype;
        *ndim = entry->ndim;
        if (sparse != NULL)
            *sparse = entry->sparse;
        if (shape != NULL && entry->ndim > 0)
            memcpy(shape, entry->shape, (size_t)entry->ndim * sizeof *shape);
    }
    kv_mutex_unlock(&store->lock);
    return status;
}

bool kv_store_first_skip(kv_store_t *store, const kv_name_t *name)
{
    kv_mutex_lock(&store->lock);
    kv_entry_t *entry = kv_table_find(&store->table, name, kv_name_hash(name));
    bool first = entry != NULL && !entry->skipped;
    if (first)
        entry->skipped = true;
    kv_mutex_unlock(&store->lock);
    return first;
}

bool kv_store_contains(kv_store_t *store, const kv_name_t *name)
{
    kv_store_lock(store);
    bool found = kv_table_find(&store->table, name, kv_name_hash(name)) != NULL;
    kv_mutex_unlock(&store->lock);
    return found;
}

kv_status_t kv_store_keys(kv_store_t *store, kv_name_t **names, int64_t *num_names)
{
    KV_TRY(kv_store_check_open(store));
    kv_store_lock(store);
    size_t bytes = 0;
    int64_t count = 0;
    for (const kv_entry_t *entry = store->table.first; entry != NULL; entry = entry->next, count++)
        bytes += sizeof(kv_name_t) + (entry->name.text != NULL ? entry->name.bytes : 0);
    kv_name_t *copy = kv_alloc(bytes);
    if (copy == NULL) {
        kv_mutex_unlock(&store->lock);
        return kv_fail(KV_NO_MEMORY, "no memory for the list of keys");
    }
    char *text = (char *)(copy + count);
    int64_t i = 0;
    for (const kv_entry_t *entry = store->table.first; entry != NULL; entry = entry->next, i++) {
        copy[i] = entry->name;
        if (entry->name.text != NULL) {
            memcpy(text, entry->name.text, entry->name.bytes);
            copy[i].text = text;
            text += entry->name.bytes;
        }
    }
    kv_mutex_unlock(&store->lock);
    *names = copy;
    *num_names = count;
    return KV_OK;
}
