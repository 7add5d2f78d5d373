/* Keys of a dist store: init, which all workers agree on, and delete.
 *
 * Rank 0's values are sent, the others' are only looked at; each call is one exchange with the
 * servers and returns when the keys are known to this worker. Entries have no value of their own,
 * only what the client knows of the key.
 *
 * A call whose thread has given up waiting goes on. What it changes on the servers (an init by rank
 * 0, a delete) it still may: the store keeps such calls in `adrift`, and whoever looks for keys
 * next lets those that have ended take effect here too (kv_store_lock).
 */
#include "base/memory.h"
#include "store/exchange.h"

#include <string.h>

typedef kv_agreement_t agreement_t;

struct kv_agreement {
    kv_exchange_t exchange; /* first */
    bool kept;              /* an init in `adrift`: the entries are the agreement's … */
    bool taken;             /* store lock: … or the store's */
    agreement_t *next;      /* store lock: in `adrift` */
    int64_t num_keys;
    kv_entry_t **entries; /* pinned */
    kv_declared_t *keys;  /* of an init */
    kv_buffer_t **staged; /* of an init: strided values */
    kv_row_sum_t *sums;   /* of an init: row-sparse values */
    kv_client_part_t *parts;
};

static void agreement_free(kv_exchange_t *exchange)
{
    agreement_t *agreement = (agreement_t *)exchange;
    for (int64_t i = 0; i < agreement->num_keys; i++) {
        kv_remote_free(agreement->keys[i].remote);
        kv_buffer_rele(agreement->staged[i]);
        kv_row_sum_fini(&agreement->sums[i]);
        if (agreement->kept && !agreement->taken)
            kv_var_retire(&agreement->entries[i]->var);
        kv_var_unpin(&agreement->entries[i]->var);
    }
    kv_free(agreement);
}

static kv_status_t agreement_new(kv_store_t *store, const kv_group_t *groups, int64_t num_groups,
                                 kv_client_verb_t verb, agreement_t **out)
{
    size_t each = sizeof(kv_declared_t) + sizeof(kv_client_part_t) + sizeof(kv_row_sum_t) +
                  2 * sizeof(void *);
    agreement_t *agreement = kv_calloc(1, sizeof *agreement + (size_t)num_groups * each);
    KV_TRY_ALLOC(agreement, "the keys of a call");
    agreement->keys = (kv_declared_t *)(agreement + 1);
    agreement->parts = (kv_client_part_t *)(agreement->keys + num_groups);
    agreement->sums = (kv_row_sum_t *)(agreement->parts + num_groups);
    agreement->entries = (kv_entry_t **)(agreement->sums + num_groups);
    agreement->staged = (kv_buffer_t **)(agreement->entries + num_groups);
    agreement->num_keys = num_groups;
    kv_mutex_lock(&store->lock);
    bool whole = store->optimizer != NULL && store->optimizer->optim == kv_optim_python();
    kv_mutex_unlock(&store->lock);
    for (int64_t i = 0; i < num_groups; i++) {
        kv_entry_t *entry = groups[i].entry;
        kv_var_pin(&entry->var);
        agreement->entries[i] = entry;
        agreement->parts[i].remote = entry->remote;
        agreement->keys[i] = (kv_declared_t){.name = entry->name,
                                             .dtype = entry->dtype,
                                             .sparse = entry->sparse,
                                             .whole = whole,
                                             .ndim = entry->ndim,
                                             .shape = entry->shape,
                                             .bytes = entry->bytes,
                                             .row_bytes = entry->row_bytes};
    }
    kv_exchange_init(&agreement->exchange, store, verb, agreement_free);
    if (num_groups > 0)
        agreement->exchange.name = agreement->entries[0]->name;
    kv_client_call_t *call = &agreement->exchange.call;
    call->parts = agreement->parts;
    call->num_parts = verb == KV_CLIENT_DELETE ? num_groups : 0;
    call->keys = agreement->keys;
    call->num_keys = verb == KV_CLIENT_DECLARE ? num_groups : 0;
    call->host = &store->host;
    if (verb == KV_CLIENT_DELETE)
        agreement->exchange.may_still = "; it may be deleted all the same";
    else if (kv_client_rank(store->client) == 0)
        agreement->exchange.may_still = "; it may be initialised all the same";
    *out = agreement;
    return KV_OK;
}

/* The caller's share goes, or becomes the store's if nobody has waited for the end of a call that
 * may change something. True: the entries are not the caller's any more. */
static bool leave(kv_store_t *store, agreement_t *agreement)
{
    if (!atomic_load(&agreement->exchange.given_up) || agreement->exchange.may_still == NULL) {
        kv_exchange_rele(&agreement->exchange);
        return false;
    }
    bool kept = agreement->exchange.call.verb == KV_CLIENT_DECLARE;
    agreement->kept = kept;
    kv_mutex_lock(&store->lock);
    agreement->next = store->adrift;
    store->adrift = agreement;
    kv_mutex_unlock(&store->lock);
    return kept;
}

/* -------------------------------------------------------------------------- init, broadcast */

/* With the values held: where they lie without strides, or what rows there are. */
static kv_status_t stage(const kv_host_t *host, agreement_t *agreement, const kv_group_t *groups)
{
    for (int64_t i = 0; i < agreement->num_keys; i++) {
        const kv_view_t *value = &groups[i].values[0];
        if (value->sparse != NULL) {
            const kv_entry_t *entry = agreement->entries[i];
            const kv_rowset_t *rows = &value->sparse->rows;
            KV_TRY(kv_row_sum_init(host, entry->dtype, entry->row_count, 1, &rows,
                                   &agreement->sums[i]));
            agreement->keys[i].rows = &agreement->sums[i];
            continue;
        }
        agreement->keys[i].value = value->data;
        if (value->strides == NULL)
            continue;
        KV_TRY(kv_buffer_new(agreement->entries[i]->bytes, &agreement->staged[i]));
        kv_view_gather(value, agreement->staged[i]->data);
        agreement->keys[i].value = agreement->staged[i]->data;
    }
    return KV_OK;
}

static kv_status_t declare(kv_store_t *store, agreement_t *agreement, const kv_group_t *groups,
                           kv_dep_t *deps, kv_caller_t *caller)
{
    int32_t num_deps = 0;
    for (int64_t i = 0; i < agreement->num_keys; i++) {
        const kv_view_t *value = &groups[i].values[0];
        if (value->array != NULL || value->sparse != NULL)
            deps[num_deps++] =
                (kv_dep_t){.var = value->array != NULL ? &value->array->var : &value->sparse->var,
                           .access = KV_READ};
    }
    kv_op_t op;
    kv_op_init(&op, deps, num_deps, 0);
    KV_TRY(kv_engine_enter(store->runtime->engine, &op, caller));
    bool was_detached = caller->detached;
    kv_caller_detach(caller);
    kv_status_t status =
        kv_client_rank(store->client) == 0 ? stage(&store->host, agreement, groups) : KV_OK;
    if (status == KV_OK)
        status = kv_exchange_run(&agreement->exchange, caller);
    kv_engine_leave(store->runtime->engine, &op);
    if (!was_detached)
        kv_caller_attach(caller);
    return status;
}

kv_status_t kv_dist_declare(kv_store_t *store, const kv_group_t *groups, int64_t num_groups,
                            kv_caller_t *caller, bool *kept)
{
    agreement_t *agreement;
    *kept = false;
    KV_TRY(agreement_new(store, groups, num_groups, KV_CLIENT_DECLARE, &agreement));
    kv_dep_t *deps = kv_alloc((size_t)num_groups * sizeof *deps);
    kv_status_t status = deps != NULL ? declare(store, agreement, groups, deps, caller)
                                      : kv_fail(KV_NO_MEMORY, "no memory for the keys of a call");
    for (int64_t i = 0; i < num_groups && status == KV_OK; i++) {
        groups[i].entry->remote = agreement->keys[i].remote;
        agreement->keys[i].remote = NULL;
    }
    kv_free(deps);
    *kept = leave(store, agreement);
    return status;
}

/* --------------------------------------------------------------------------------- delete */

/* Behind all calls on these keys that this worker has begun: they are held until the client has
 * the call. */
kv_status_t kv_dist_delete(kv_store_t *store, const kv_plan_t *plan, kv_caller_t *caller)
{
    agreement_t *agreement;
    KV_TRY(agreement_new(store, plan->groups, plan->num_groups, KV_CLIENT_DELETE, &agreement));
    kv_dep_t *deps = kv_alloc((size_t)plan->num_groups * sizeof *deps);
    kv_status_t status =
        deps != NULL ? KV_OK : kv_fail(KV_NO_MEMORY, "no memory for the keys of a call");
    if (status == KV_OK) {
        for (int64_t i = 0; i < plan->num_groups; i++)
            deps[i] = (kv_dep_t){.var = &plan->groups[i].entry->var, .access = KV_WRITE};
        kv_op_t op;
        kv_op_init(&op, deps, (int32_t)plan->num_groups, 0);
        status = kv_engine_enter(store->runtime->engine, &op, caller);
        if (status == KV_OK) {
            status = kv_exchange_run(&agreement->exchange, caller);
            for (int64_t i = 0; i < plan->num_groups && status == KV_OK; i++)
                plan->groups[i].entry->deleted = true;
            kv_engine_leave(store->runtime->engine, &op);
            kv_caller_attach(caller);
        }
    }
    kv_free(deps);
    leave(store, agreement);
    return status;
}

/* ------------------------------------------------------------ calls that nobody waits for */

/* False: there is no memory for it now. */
static bool take_keys_locked(kv_store_t *store, agreement_t *agreement) KV_REQUIRES(&store->lock)
{
    if (store->closed)
        return true;
    if (kv_table_reserve(&store->table, agreement->num_keys) != KV_OK)
        return false;
    for (int64_t i = 0; i < agreement->num_keys; i++) {
        agreement->entries[i]->remote = agreement->keys[i].remote;
        agreement->keys[i].remote = NULL;
        kv_table_insert(&store->table, agreement->entries[i]);
    }
    store->key_type = agreement->keys[0].name.text != NULL ? KV_KEYS_TEXT : KV_KEYS_NUMBER;
    agreement->taken = true;
    return true;
}

static bool take_effect_locked(kv_store_t *store, agreement_t *agreement) KV_REQUIRES(&store->lock)
{
    if (agreement->kept)
        return take_keys_locked(store, agreement);
    for (int64_t i = 0; i < agreement->num_keys; i++) {
        agreement->entries[i]->deleted = true;
        kv_store_remove_locked(store, agreement->entries[i]); /* it is pinned here */
    }
    return true;
}

void kv_dist_settle(kv_store_t *store)
{
    agreement_t *ended = NULL, *agreement;
    kv_mutex_lock(&store->lock);
    for (agreement_t **link = &store->adrift; (agreement = *link) != NULL;) {
        int outcome = atomic_load(&agreement->exchange.outcome);
        if (outcome == KV_OUTCOME_OPEN ||
            (outcome == KV_OUTCOME_GOOD && !take_effect_locked(store, agreement))) {
            link = &agreement->next;
            continue;
        }
        *link = agreement->next;
        agreement->next = ended;
        ended = agreement;
    }
    kv_mutex_unlock(&store->lock);
    kv_agreements_rele(ended);
}

void kv_agreements_rele(kv_agreement_t *agreement)
{
    for (kv_agreement_t *next; agreement != NULL; agreement = next) {
        next = agreement->next;
        kv_exchange_rele(&agreement->exchange);
    }
}
