/* Keys of a dist store: init, which all workers agree on, and delete.
 *
 * Rank 0's values are sent, the others' are only looked at; each call is one exchange with the
 * servers and returns when the keys are known to this worker. Entries have no value of their own,
 * only what the client knows of the key.
 *
 * A call is a task without variables while it is on its way, so wait_all and the interpreter's exit
 * know of it; a thread that gives up waiting leaves it behind.
 */
#include "base/memory.h"
#include "ps/client.h"
#include "store/internal.h"

#include <string.h>

enum { NAME_BYTES = 96 };

typedef struct agreement {
    kv_client_call_t call;
    kv_op_t op;
    _Atomic int32_t refs;  /* the task, and the thread that waits */
    _Atomic bool given_up; /* that thread has been told why it waits no more */
    kv_engine_t *engine;
    int64_t num_keys;
    kv_entry_t **entries; /* pinned */
    kv_declared_t *keys;  /* of an init */
    kv_buffer_t **staged; /* of an init: strided values */
    kv_row_sum_t *sums;   /* of an init: row-sparse values */
    kv_client_part_t *parts;
} agreement_t;

static void agreement_rele(agreement_t *agreement)
{
    if (atomic_fetch_sub(&agreement->refs, 1) > 1)
        return;
    for (int64_t i = 0; i < agreement->num_keys; i++) {
        kv_remote_free(agreement->keys[i].remote);
        kv_buffer_rele(agreement->staged[i]);
        kv_row_sum_fini(&agreement->sums[i]);
        kv_var_unpin(&agreement->entries[i]->var);
    }
    kv_free(agreement);
}

static void agreement_finish(kv_op_t *op)
{
    kv_handle_rele(op->handle);
    agreement_rele((agreement_t *)((char *)op - offsetof(agreement_t, op)));
}

static void agreement_done(kv_client_call_t *call, kv_status_t status)
{
    agreement_t *agreement = (agreement_t *)((char *)call - offsetof(agreement_t, call));
    if (atomic_load(&agreement->given_up))
        status = KV_OK;
    kv_engine_end(agreement->engine, &agreement->op, status, NULL, 0);
}

static kv_status_t agreement_new(kv_store_t *store, const kv_group_t *groups, int64_t num_groups,
                                 kv_client_verb_t verb, const kv_caller_t *caller,
                                 agreement_t **out)
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
    for (int64_t i = 0; i < num_groups; i++) {
        kv_entry_t *entry = groups[i].entry;
        kv_var_pin(&entry->var);
        agreement->entries[i] = entry;
        agreement->parts[i].remote = entry->remote;
        agreement->keys[i] = (kv_declared_t){.name = entry->name,
                                             .dtype = entry->dtype,
                                             .sparse = entry->sparse,
                                             .ndim = entry->ndim,
                                             .shape = entry->shape,
                                             .bytes = entry->bytes,
                                             .row_bytes = entry->row_bytes};
    }
    int64_t ms = caller->timeout_ns / 1000000;
    atomic_init(&agreement->refs, 1);
    agreement->engine = store->runtime->engine;
    agreement->call = (kv_client_call_t){.verb = verb,
                                         .timeout_ms = ms > 0 ? ms : 1,
                                         .parts = agreement->parts,
                                         .num_parts = verb == KV_CLIENT_DELETE ? num_groups : 0,
                                         .keys = agreement->keys,
                                         .num_keys = verb == KV_CLIENT_DECLARE ? num_groups : 0,
                                         .host = &store->host,
                                         .done = agreement_done};
    *out = agreement;
    return KV_OK;
}

/* Starts the call and waits for its end. */
static kv_status_t agree(kv_store_t *store, agreement_t *agreement, kv_caller_t *caller)
{
    kv_handle_t *handle;
    KV_TRY(kv_handle_new(agreement->engine, 1, &handle));
    kv_op_init(&agreement->op, NULL, 0, 0);
    agreement->op.finish = agreement_finish;
    agreement->op.handle = kv_handle_hold(handle);
    kv_status_t status = kv_engine_begin(agreement->engine, &agreement->op);
    if (status != KV_OK) {
        kv_handle_rele(agreement->op.handle);
        kv_handle_rele(handle);
        return status;
    }
    atomic_fetch_add(&agreement->refs, 1);
    status = kv_client_start(store->client, &agreement->call);
    if (status != KV_OK)
        kv_engine_end(agreement->engine, &agreement->op, status, NULL, 0);
    status = kv_handle_wait(handle, caller);
    kv_caller_detach(caller);
    if (status == KV_OK) {
        kv_error_t *error = kv_handle_error(handle);
        if (error != NULL)
            status = kv_error_raise(error);
    } else {
        char missing[128], name[NAME_BYTES];
        atomic_store(&agreement->given_up, true);
        kv_client_cancel(store->client, &agreement->call, missing, sizeof missing);
        kv_name_format(&agreement->entries[0]->name, name, sizeof name);
        if (status == KV_TIMEOUT)
            status =
                kv_fail(KV_TIMEOUT, "key %s: %s %s not answered within the deadline of %.3g s",
                        name, missing[0] != '\0' ? missing : "the servers",
                        missing[0] != '\0' ? "has" : "have", (double)caller->timeout_ns * 1e-9);
        if (kv_handle_done(handle))
            (void)kv_handle_error(handle); /* too late to be told */
    }
    kv_handle_rele(handle);
    return status;
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
    KV_TRY(kv_engine_enter(agreement->engine, &op, caller));
    bool was_detached = caller->detached;
    kv_caller_detach(caller);
    kv_status_t status =
        kv_client_rank(store->client) == 0 ? stage(&store->host, agreement, groups) : KV_OK;
    if (status == KV_OK)
        status = agree(store, agreement, caller);
    kv_engine_leave(agreement->engine, &op);
    if (!was_detached)
        kv_caller_attach(caller);
    return status;
}

kv_status_t kv_dist_declare(kv_store_t *store, const kv_group_t *groups, int64_t num_groups,
                            kv_caller_t *caller)
{
    agreement_t *agreement;
    KV_TRY(agreement_new(store, groups, num_groups, KV_CLIENT_DECLARE, caller, &agreement));
    kv_dep_t *deps = kv_alloc((size_t)num_groups * sizeof *deps);
    kv_status_t status = deps != NULL ? declare(store, agreement, groups, deps, caller)
                                      : kv_fail(KV_NO_MEMORY, "no memory for the keys of a call");
    for (int64_t i = 0; i < num_groups && status == KV_OK; i++) {
        groups[i].entry->remote = agreement->keys[i].remote;
        agreement->keys[i].remote = NULL;
    }
    kv_free(deps);
    agreement_rele(agreement);
    return status;
}

/* --------------------------------------------------------------------------------- delete */

/* Behind all calls on these keys that this worker has begun: they are held until the client has
 * the call. */
kv_status_t kv_dist_delete(kv_store_t *store, const kv_plan_t *plan, kv_caller_t *caller)
{
    agreement_t *agreement;
    KV_TRY(
        agreement_new(store, plan->groups, plan->num_groups, KV_CLIENT_DELETE, caller, &agreement));
    kv_dep_t *deps = kv_alloc((size_t)plan->num_groups * sizeof *deps);
    kv_status_t status =
        deps != NULL ? KV_OK : kv_fail(KV_NO_MEMORY, "no memory for the keys of a call");
    if (status == KV_OK) {
        for (int64_t i = 0; i < plan->num_groups; i++)
            deps[i] = (kv_dep_t){.var = &plan->groups[i].entry->var, .access = KV_WRITE};
        kv_op_t op;
        kv_op_init(&op, deps, (int32_t)plan->num_groups, 0);
        status = kv_engine_enter(agreement->engine, &op, caller);
        if (status == KV_OK) {
            status = agree(store, agreement, caller);
            for (int64_t i = 0; i < plan->num_groups && status == KV_OK; i++)
                plan->groups[i].entry->deleted = true;
            kv_engine_leave(agreement->engine, &op);
            kv_caller_attach(caller);
        }
    }
    kv_free(deps);
    agreement_rele(agreement);
    return status;
}
