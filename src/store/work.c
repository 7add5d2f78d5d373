/* Carrying out a checked call in the calling thread: one operation a key, the updater inside it.
 *
 * All memory for dense work on one key is there before that work begins, so a call that runs out of
 * memory leaves that key as it was. Row-sparse outs get theirs when their rows are known: there the
 * error says that the value was updated.
 */
#include "base/memory.h"
#include "comm/device_work.h"
#include "store/internal.h"

#include <inttypes.h>
#include <string.h>

enum { LOCAL_POINTERS = 16, LOCAL_DEPS = 8 };

/* ------------------------------------------------------------------------- sizes of work */

static kv_var_t *var_of(const kv_view_t *view)
{
    return view->array != NULL    ? &view->array->var
           : view->sparse != NULL ? &view->sparse->var
                                  : NULL;
}

int32_t kv_group_num_deps(const kv_group_t *group)
{
    int32_t count = 1;
    for (int32_t i = 0; i < group->num_values; i++)
        count += var_of(&group->values[i]) != NULL;
    for (int32_t i = 0; i < group->num_outs; i++)
        count += var_of(&group->outs[i]) != NULL;
    return count;
}

/* Of row-sparse values nobody can tell before the arrays are held: they count as large. */
static bool knows_rows(const kv_group_t *group)
{
    return group->entry->sparse || (group->num_values > 0 && group->values[0].sparse != NULL) ||
           (group->num_outs > 0 && group->outs[0].sparse != NULL);
}

size_t kv_group_bytes(const kv_group_t *group)
{
    return knows_rows(group) ? KV_DETACH_BYTES + 1
                             : group->entry->bytes * (size_t)kv_work_pointers(group);
}

/* The same once all variables are held. */
static size_t held_bytes(const kv_group_t *group)
{
    const kv_entry_t *entry = group->entry;
    size_t rows = 0, dense = 0;
    for (int32_t i = 0; i < group->num_values; i++) {
        if (group->values[i].sparse != NULL)
            rows += (size_t)group->values[i].sparse->rows.num_rows;
        else
            dense++;
    }
    bool lazy =
        entry->sparse ||
        (group->step != NULL && kv_optim_is_lazy(group->step->optim, &group->step->numbers, false));
    if (group->num_values > 0 && !lazy)
        dense++;
    else if (entry->sparse)
        rows += (size_t)entry->rows.num_rows;
    for (int32_t i = 0; i < group->num_outs; i++) {
        if (group->row_ids != NULL)
            rows += (size_t)group->row_ids[i].count;
        else
            dense++;
    }
    return rows * entry->row_bytes + dense * entry->bytes;
}

int32_t kv_group_deps(const kv_group_t *group, bool push, bool with_outs, kv_dep_t *deps)
{
    int32_t count = 0;
    kv_var_t *var;
    deps[count++] = (kv_dep_t){.var = &group->entry->var, .access = push ? KV_WRITE : KV_READ};
    for (int32_t i = 0; i < group->num_values; i++)
        if ((var = var_of(&group->values[i])) != NULL)
            deps[count++] = (kv_dep_t){.var = var, .access = KV_READ};
    for (int32_t i = 0; with_outs && i < group->num_outs; i++)
        if ((var = var_of(&group->outs[i])) != NULL)
            deps[count++] = (kv_dep_t){.var = var, .access = KV_OVERWRITE};
    return count;
}

static size_t moved_bytes(const kv_plan_t *plan)
{
    size_t total = 0;
    for (int64_t g = 0; g < plan->num_groups; g++)
        total += kv_group_bytes(&plan->groups[g]);
    return total;
}

/* -------------------------------------------------------------------- in the calling thread */

/* Memory for the work on any one key of a plan. */
typedef struct scratch {
    const void *local_pointers[LOCAL_POINTERS];
    kv_dep_t local_deps[LOCAL_DEPS];
    const void **pointers;
    kv_dep_t *deps;
    char *staging;
    void *block;
} scratch_t;

static kv_status_t scratch_init(const kv_plan_t *plan, scratch_t *scratch)
{
    size_t pointers = 0, deps = 0, staging = 0;
    for (int64_t g = 0; g < plan->num_groups; g++) {
        const kv_group_t *group = &plan->groups[g];
        size_t bytes = kv_work_staging(group);
        pointers =
            (size_t)kv_work_pointers(group) > pointers ? (size_t)kv_work_pointers(group) : pointers;
        deps = (size_t)kv_group_num_deps(group) > deps ? (size_t)kv_group_num_deps(group) : deps;
        staging = bytes > staging ? bytes : staging;
    }
    scratch->pointers = scratch->local_pointers;
    scratch->deps = scratch->local_deps;
    scratch->staging = NULL;
    scratch->block = NULL;
    if (KV_LIKELY(pointers <= LOCAL_POINTERS && deps <= LOCAL_DEPS && staging == 0))
        return KV_OK;
    scratch->block =
        kv_alloc_elements(staging + deps * sizeof(kv_dep_t) + pointers * sizeof(void *));
    KV_TRY_ALLOC(scratch->block, "staging strided values");
    scratch->staging = scratch->block;
    scratch->deps = (kv_dep_t *)(scratch->staging + staging);
    scratch->pointers = (const void **)(scratch->deps + deps);
    return KV_OK;
}

static kv_status_t enter(kv_engine_t *engine, kv_op_t *op, kv_caller_t *caller)
{
    if (KV_LIKELY(kv_engine_try_enter(engine, op)))
        return KV_OK;
    return kv_engine_enter(engine, op, caller);
}

static kv_status_t run_here(kv_store_t *store, const kv_plan_t *plan, const kv_group_t *group,
                            const kv_call_t *call, bool push, const scratch_t *scratch,
                            bool *delivering, kv_caller_t *caller)
{
    kv_op_t op;
    kv_op_init(&op, scratch->deps, kv_group_deps(group, push, true, scratch->deps), call->priority);
    KV_TRY(enter(store->runtime->engine, &op, caller));
    kv_work_t work =
        kv_work_of(&store->host, plan, group, push, scratch->pointers, scratch->staging);
    work.caller = caller;
    work.hold = call->hold;
    kv_status_t status = kv_work_run(&work, delivering);
    kv_engine_leave(store->runtime->engine, &op);
    return status;
}

/* All keys of a call at once, as one operation: those of one device share launches, and NCCL takes
 * a list as a whole. */
static kv_status_t run_together(kv_store_t *store, const kv_plan_t *plan, kv_call_t *call,
                                bool push, const scratch_t *scratch, bool *delivering,
                                kv_caller_t *caller)
{
    bool by_nccl = push && kv_plan_takes_nccl(plan), done = false;
    int32_t num_deps = by_nccl;
    for (int64_t g = 0; g < plan->num_groups; g++)
        num_deps += kv_group_num_deps(&plan->groups[g]);
    size_t count = (size_t)plan->num_groups;
    kv_work_t *works = kv_alloc(count * sizeof *works + (size_t)num_deps * sizeof(kv_dep_t));
    KV_TRY_ALLOC(works, "the keys of a call");
    kv_dep_t *deps = (kv_dep_t *)(works + count);
    num_deps = by_nccl;
    if (by_nccl)
        deps[0] = (kv_dep_t){.var = &store->runtime->nccl, .access = KV_WRITE};
    for (int64_t g = 0; g < plan->num_groups; g++)
        num_deps += kv_group_deps(&plan->groups[g], push, true, deps + num_deps);
    kv_op_t op;
    kv_op_init(&op, deps, num_deps, call->priority);
    kv_status_t status = enter(store->runtime->engine, &op, caller);
    if (status == KV_OK) {
        for (size_t g = 0; g < count; g++) {
            works[g] = kv_work_of(&store->host, plan, &plan->groups[g], push, scratch->pointers,
                                  scratch->staging);
            works[g].caller = caller;
            works[g].hold = call->hold;
        }
        if (by_nccl)
            status = kv_nccl_push(plan, works, caller, &done, delivering);
        if (status == KV_OK && done)
            call->num_done = plan->num_groups;
        else if (status == KV_OK)
            status = kv_works_run(works, plan->num_groups, &call->num_done, delivering);
        kv_engine_leave(store->runtime->engine, &op);
    }
    kv_free(works);
    return status;
}

/* A task's work without a task, if the engine thinks that better than a queue. */
static bool run_inline(kv_store_t *store, const kv_plan_t *plan, const kv_call_t *call, bool push,
                       const scratch_t *scratch, bool *delivering, kv_status_t *status,
                       kv_caller_t *caller)
{
    kv_op_t op;
    const kv_group_t *group = &plan->groups[0];
    kv_op_init(&op, scratch->deps, kv_group_deps(group, push, true, scratch->deps), call->priority);
    bool sparse = knows_rows(group);
    if (!kv_engine_try_inline(store->runtime->engine, &op, sparse ? 0 : kv_group_bytes(group)))
        return false;
    if (sparse && held_bytes(group) >= KV_DETACH_BYTES) {
        kv_engine_leave(store->runtime->engine, &op);
        return false;
    }
    kv_work_t work =
        kv_work_of(&store->host, plan, group, push, scratch->pointers, scratch->staging);
    work.caller = caller;
    *status = kv_work_run(&work, delivering);
    kv_engine_leave(store->runtime->engine, &op);
    return true;
}

/* ------------------------------------------------------------------------------- updaters */

/* A copy of the stored value, for outs that are written after the key has been left. */
typedef struct snapshot {
    kv_buffer_t *dense;
    kv_rowset_t rows;
} snapshot_t;

static void snapshot_fini(snapshot_t *snapshot)
{
    kv_buffer_rele(snapshot->dense);
    kv_rowset_fini(&snapshot->rows);
}

static kv_status_t snapshot_take(const kv_entry_t *entry, snapshot_t *out, kv_caller_t *caller)
{
    if (!entry->sparse && kv_buffer_place(entry->stored) != NULL)
        return kv_buffer_fetch(entry->stored, out->dense->data, caller);
    if (!entry->sparse) {
        memcpy(out->dense->data, entry->stored->data, entry->bytes);
        return KV_OK;
    }
    KV_TRY(kv_rowset_make(&out->rows, entry->rows.num_rows, entry->row_bytes));
    if (entry->rows.num_rows > 0) {
        memcpy(out->rows.indices->data, entry->rows.indices->data,
               (size_t)entry->rows.num_rows * sizeof(int64_t));
        memcpy(out->rows.data->data, entry->rows.data->data,
               (size_t)entry->rows.num_rows * entry->row_bytes);
    }
    return KV_OK;
}

/* What an updater has left goes to the outs. Foreign ones are written while the key is held; our
 * own arrays have variables that others may hold while they wait for the key, so these get a copy
 * that was taken under the key, in an operation of their own. */
static kv_status_t update_outs(kv_store_t *store, const kv_plan_t *plan, const kv_group_t *group,
                               const kv_call_t *call, const scratch_t *scratch,
                               const snapshot_t *snapshot, kv_caller_t *caller)
{
    kv_dep_t *deps = scratch->deps;
    kv_op_t op;
    int32_t count = kv_group_deps(
        &(kv_group_t){.entry = group->entry, .num_outs = group->num_outs, .outs = group->outs},
        false, true, deps);
    kv_op_init(&op, deps + 1, count - 1, call->priority);
    KV_TRY(enter(store->runtime->engine, &op, caller));
    kv_work_t work = kv_work_of(&store->host, plan, group, false, scratch->pointers, NULL);
    work.stored = snapshot->dense != NULL ? snapshot->dense->data : NULL;
    work.rows = &snapshot->rows;
    work.caller = caller;
    work.hold = call->hold;
    kv_status_t status = plan->cuda ? kv_work_deliver(&work, work.stored) : kv_work_copy_out(&work);
    kv_engine_leave(store->runtime->engine, &op);
    return status;
}

/* What the updater sees, and its call. */
static kv_status_t call_updater(const kv_plan_t *plan, const kv_group_t *group, kv_lane_t lane,
                                kv_caller_t *caller)
{
    kv_entry_t *entry = group->entry;
    bool rows = group->values[0].sparse != NULL;
    kv_update_t update = {.name = &entry->name,
                          .dtype = entry->dtype,
                          .ndim = entry->ndim,
                          .shape = entry->shape,
                          .recv = rows ? NULL : entry->merged,
                          .stored = entry->stored,
                          .device = lane.device,
                          .stream = lane.stream,
                          .recv_rows = rows ? &entry->merged_rows : NULL,
                          .stored_rows = entry->sparse ? &entry->rows : NULL,
                          .first = &group->values[0],
                          .cache = &entry->cache};
    return plan->updater->run(plan->updater, &update, caller);
}

/* The updater, and around it the order of its work on a device. */
static kv_status_t run_updater(const kv_plan_t *plan, const kv_work_t *work, kv_caller_t *caller)
{
    kv_mark_t *after = NULL;
    kv_lane_t lane = {.device = -1};
    if (KV_LIKELY(!(work->group.values[0].flags & KV_VIEW_CUDA)))
        return call_updater(plan, &work->group, lane, caller);
    KV_TRY(kv_work_lend(work, &lane, &after));
    kv_status_t status = call_updater(plan, &work->group, lane, caller);
    kv_status_t ended = kv_work_take_back(work, lane, after);
    return status == KV_OK ? ended : status;
}

/* With the key held. `apart`: the outs are written later, from the snapshot. *delivering: the
 * updater has done its work. */
static kv_status_t update_held(kv_store_t *store, const kv_plan_t *plan, const kv_group_t *group,
                               const scratch_t *scratch, kv_op_t *op, bool apart,
                               snapshot_t *snapshot, bool *delivering, const kv_call_t *call,
                               kv_caller_t *caller)
{
    bool large = kv_group_bytes(group) >= KV_DETACH_BYTES;
    if (large)
        kv_caller_detach(caller);
    kv_work_t work =
        kv_work_of(&store->host, plan, group, true, scratch->pointers, scratch->staging);
    work.caller = caller;
    work.hold = call->hold;
    kv_status_t status = kv_work_merge(&work);
    kv_caller_attach(caller);
    KV_TRY(status);
    kv_engine_begin_callback(store->runtime->engine, op);
    KV_TRY(run_updater(plan, &work, caller));
    *delivering = true;
    if (group->num_outs == 0)
        return KV_OK;
    if (large)
        kv_caller_detach(caller);
    work.push = false;
    status = apart ? snapshot_take(group->entry, snapshot, caller) : kv_work_run(&work, delivering);
    kv_caller_attach(caller);
    return status;
}

static kv_status_t update_here(kv_store_t *store, const kv_plan_t *plan, const kv_group_t *group,
                               const kv_call_t *call, const scratch_t *scratch, bool *delivering,
                               kv_caller_t *caller)
{
    kv_op_t op;
    snapshot_t snapshot = {0};
    bool apart = false;
    *delivering = false;
    for (int32_t i = 0; i < group->num_outs; i++)
        apart = apart || var_of(&group->outs[i]) != NULL;
    kv_op_init(&op, scratch->deps, kv_group_deps(group, true, false, scratch->deps),
               call->priority);
    if (apart && !group->entry->sparse)
        KV_TRY(kv_buffer_new(group->entry->bytes, &snapshot.dense));
    kv_status_t status = enter(store->runtime->engine, &op, caller);
    if (status == KV_OK) {
        status = update_held(store, plan, group, scratch, &op, apart, &snapshot, delivering, call,
                             caller);
        kv_engine_leave(store->runtime->engine, &op);
    }
    if (status == KV_OK && apart)
        status = update_outs(store, plan, group, call, scratch, &snapshot, caller);
    snapshot_fini(&snapshot);
    return status != KV_OK && *delivering ? kv_work_undelivered(true, status) : status;
}

/* --------------------------------------------------------------------------------- calls */

/* An error names the key at which it happened and says what the call had done by then. */
static kv_status_t tell_progress(kv_status_t status, const kv_plan_t *plan, const kv_group_t *group,
                                 bool delivering, const kv_call_t *call)
{
    if (status == KV_CALLBACK || status == KV_INTERRUPTED)
        return status;
    char name[96];
    kv_name_format(&group->entry->name, name, sizeof name);
    if (call->num_done == 0 && !delivering)
        return kv_fail(status, "key %s: %s; nothing was changed", name, kv_status_message(status));
    return kv_fail(
        status, "key %s: %s; the call had dealt with %" PRId64 " of its %" PRId64 " keys by then",
        name, kv_status_message(status), call->num_done, plan->num_groups);
}

kv_status_t kv_plan_run(kv_store_t *store, kv_plan_t *plan, kv_call_t *call, bool push,
                        kv_caller_t *caller)
{
    call->num_done = 0;
    scratch_t scratch;
    kv_status_t status = KV_OK;
    bool delivering = false;
    /* Work on devices is only put in order here: there is nothing to wait for. */
    if (call->async && plan->updater == NULL && !plan->cuda) {
        if (plan->num_groups != 1 || call->handle != NULL)
            return kv_plan_submit(store, plan, call, push);
        /* One small operation on idle variables needs no task. */
        KV_TRY(scratch_init(plan, &scratch));
        bool done = run_inline(store, plan, call, push, &scratch, &delivering, &status, caller);
        call->num_done = done && (status == KV_OK || (push && delivering));
        kv_free(scratch.block);
        return done ? status : kv_plan_submit(store, plan, call, push);
    }
    KV_TRY(scratch_init(plan, &scratch));
    bool on_device = plan->cuda && plan->stage == NULL;
    if (plan->updater == NULL && !on_device && moved_bytes(plan) >= KV_DETACH_BYTES)
        kv_caller_detach(caller);
    const kv_group_t *group = plan->groups;
    bool together = on_device && plan->updater == NULL &&
                    (plan->num_groups > 1 || (push && kv_plan_takes_nccl(plan)));
    if (together)
        status = run_together(store, plan, call, push, &scratch, &delivering, caller);
    for (int64_t g = 0; g < plan->num_groups && status == KV_OK && !together; g++) {
        group = &plan->groups[g];
        delivering = false;
        status = kv_staged_wait(group->staged, caller);
        if (status == KV_OK)
            status = plan->updater != NULL
                         ? update_here(store, plan, group, call, &scratch, &delivering, caller)
                         : run_here(store, plan, group, call, push, &scratch, &delivering, caller);
        if (status == KV_OK)
            status = kv_staged_finish(group->staged, caller);
        call->num_done += status == KV_OK || (push && delivering);
    }
    kv_caller_attach(caller);
    kv_free(scratch.block);
    return status == KV_OK ? KV_OK : tell_progress(status, plan, group, delivering, call);
}

kv_status_t kv_entry_fill(kv_store_t *store, kv_entry_t *entry, const kv_view_t *value,
                          kv_hold_t *hold, kv_caller_t *caller)
{
    kv_dep_t dep = {.var = NULL, .access = KV_READ};
    kv_op_t op;
    dep.var = var_of(value);
    if (dep.var != NULL) {
        kv_op_init(&op, &dep, 1, 0);
        KV_TRY(enter(store->runtime->engine, &op, caller));
    }
    bool detach = !caller->detached && !(value->flags & KV_VIEW_CUDA) &&
                  (entry->sparse || entry->bytes >= KV_DETACH_BYTES);
    if (detach)
        kv_caller_detach(caller);
    kv_status_t status = KV_OK;
    if (value->sparse != NULL || (value->flags & KV_VIEW_CUDA)) {
        kv_work_t work = {.host = &store->host,
                          .group = {.entry = entry, .num_values = 1, .values = value},
                          .push = true,
                          .caller = caller,
                          .hold = hold};
        bool delivering;
        kv_buffer_rele(entry->stored); /* the device has its own */
        entry->stored = NULL;
        status = kv_work_run(&work, &delivering);
    } else if (value->strides != NULL) {
        kv_view_gather(value, entry->stored->data);
    } else {
        const void *source = value->data;
        void *stored = entry->stored->data;
        kv_host_sum(&store->host, entry->dtype, entry->count, 1, &source, 1, &stored);
    }
    if (detach)
        kv_caller_attach(caller);
    if (dep.var != NULL)
        kv_engine_leave(store->runtime->engine, &op);
    return status;
}
