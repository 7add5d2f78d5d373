/* Carrying out a checked call: one operation a key, in the calling thread or as a task.
 *
 * The sum of the values goes to the stored value and to the outs in one pass over memory. Strided
 * values are staged first, strided outs are written from the stored value afterwards. All memory
 * that the work needs is there before it begins, so a call that runs out of memory has changed
 * nothing.
 */
#include "base/memory.h"
#include "store/internal.h"

#include <inttypes.h>
#include <string.h>

enum { LOCAL_POINTERS = 16, LOCAL_DEPS = 8, ALIGNMENT = 64 };

typedef struct work {
    const kv_host_t *host;
    kv_group_t group;
    bool push;
    const void **pointers; /* [num_values + num_outs + 1]: sources, then destinations */
    char *staging;         /* for the strided values, one after the other */
} work_t;

/* ------------------------------------------------------------------------- sizes of work */

static size_t staging_bytes(const kv_group_t *group)
{
    size_t each = (group->entry->bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, total = 0;
    for (int32_t i = 0; i < group->num_values; i++)
        if (group->values[i].strides != NULL)
            total += each;
    return total;
}

static int32_t count_pointers(const kv_group_t *group)
{
    return group->num_values + group->num_outs + 1;
}

/* Variables of the operation: the key and those of our own arrays. */
static int32_t count_deps(const kv_group_t *group)
{
    int32_t count = 1;
    for (int32_t i = 0; i < group->num_values; i++)
        count += group->values[i].array != NULL;
    for (int32_t i = 0; i < group->num_outs; i++)
        count += group->outs[i].array != NULL;
    return count;
}

static size_t moved_bytes(const kv_plan_t *plan)
{
    size_t total = 0;
    for (int64_t g = 0; g < plan->num_groups; g++)
        total += plan->groups[g].entry->bytes * (size_t)count_pointers(&plan->groups[g]);
    return total;
}

static int32_t fill_deps(const kv_group_t *group, bool push, bool with_outs, kv_dep_t *deps)
{
    int32_t count = 0;
    deps[count++] = (kv_dep_t){.var = &group->entry->var, .access = push ? KV_WRITE : KV_READ};
    for (int32_t i = 0; i < group->num_values; i++)
        if (group->values[i].array != NULL)
            deps[count++] = (kv_dep_t){.var = &group->values[i].array->var, .access = KV_READ};
    for (int32_t i = 0; with_outs && i < group->num_outs; i++)
        if (group->outs[i].array != NULL)
            deps[count++] = (kv_dep_t){.var = &group->outs[i].array->var, .access = KV_OVERWRITE};
    return count;
}

/* ------------------------------------------------------------------------------ the work */

/* Puts where the values' elements are, staged where strided, into pointers[0 .. num_values). */
static void gather_values(const work_t *work)
{
    char *staging = work->staging;
    size_t each = (work->group.entry->bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    for (int32_t i = 0; i < work->group.num_values; i++) {
        const kv_view_t *value = &work->group.values[i];
        work->pointers[i] = value->data;
        if (value->strides != NULL) {
            kv_view_gather(value, staging);
            work->pointers[i] = staging;
            staging += each;
        }
    }
}

/* Adds the contiguous outs to `destinations`, returns how many. */
static int32_t contiguous_outs(const kv_group_t *group, void **destinations)
{
    int32_t count = 0;
    for (int32_t i = 0; i < group->num_outs; i++)
        if (group->outs[i].strides == NULL)
            destinations[count++] = group->outs[i].data;
    return count;
}

static void scatter_outs(const kv_group_t *group, const void *contents)
{
    for (int32_t i = 0; i < group->num_outs; i++)
        if (group->outs[i].strides != NULL)
            kv_view_scatter(&group->outs[i], contents);
}

/* Copies `contents` into every out. */
static void copy_out(const work_t *work, const void *contents)
{
    const kv_entry_t *entry = work->group.entry;
    void **destinations = (void **)work->pointers;
    int32_t count = contiguous_outs(&work->group, destinations);
    if (count > 0)
        kv_host_sum(work->host, entry->dtype, entry->count, 1, &contents, count, destinations);
    scatter_outs(&work->group, contents);
}

/* With the variables held. */
static void run_work(const work_t *work)
{
    const kv_entry_t *entry = work->group.entry;
    void *stored = entry->stored->data;
    if (!work->push) {
        copy_out(work, stored);
        return;
    }
    int32_t num_values = work->group.num_values;
    gather_values(work);
    void **destinations = (void **)work->pointers + num_values;
    destinations[0] = stored;
    int32_t count = 1 + contiguous_outs(&work->group, destinations + 1);
    kv_host_sum(work->host, entry->dtype, entry->count, num_values, work->pointers, count,
                destinations);
    scatter_outs(&work->group, stored);
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
        size_t bytes = staging_bytes(group);
        pointers =
            (size_t)count_pointers(group) > pointers ? (size_t)count_pointers(group) : pointers;
        deps = (size_t)count_deps(group) > deps ? (size_t)count_deps(group) : deps;
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

/* What run_later does without a task, if the engine thinks that better than a queue. */
static bool run_inline(kv_store_t *store, const kv_group_t *group, const kv_call_t *call, bool push,
                       const scratch_t *scratch)
{
    kv_op_t op;
    size_t bytes = group->entry->bytes * (size_t)count_pointers(group);
    kv_op_init(&op, scratch->deps, fill_deps(group, push, true, scratch->deps), call->priority);
    if (!kv_engine_try_inline(store->runtime->engine, &op, bytes))
        return false;
    work_t work = {&store->host, *group, push, scratch->pointers, scratch->staging};
    run_work(&work);
    kv_engine_leave(store->runtime->engine, &op);
    return true;
}

static kv_status_t run_here(kv_store_t *store, const kv_group_t *group, const kv_call_t *call,
                            bool push, const scratch_t *scratch, kv_caller_t *caller)
{
    kv_op_t op;
    kv_op_init(&op, scratch->deps, fill_deps(group, push, true, scratch->deps), call->priority);
    KV_TRY(enter(store->runtime->engine, &op, caller));
    work_t work = {&store->host, *group, push, scratch->pointers, scratch->staging};
    run_work(&work);
    kv_engine_leave(store->runtime->engine, &op);
    return KV_OK;
}

/* What an updater has left goes to the outs. Foreign ones are written while the key is held; our
 * own arrays have variables that others may hold while they wait for the key, so these get a copy
 * that was taken under the key, in an operation of their own. */
static kv_status_t update_outs(kv_store_t *store, const kv_group_t *group, const kv_call_t *call,
                               const scratch_t *scratch, kv_buffer_t *snapshot, kv_caller_t *caller)
{
    work_t work = {&store->host, *group, false, scratch->pointers, NULL};
    kv_dep_t *deps = scratch->deps;
    kv_op_t op;
    int32_t count = fill_deps(
        &(kv_group_t){.entry = group->entry, .num_outs = group->num_outs, .outs = group->outs},
        false, true, deps);
    kv_op_init(&op, deps + 1, count - 1, call->priority);
    KV_TRY(enter(store->runtime->engine, &op, caller));
    copy_out(&work, snapshot->data);
    kv_engine_leave(store->runtime->engine, &op);
    return KV_OK;
}

static kv_status_t update_here(kv_store_t *store, const kv_plan_t *plan, const kv_group_t *group,
                               const kv_call_t *call, const scratch_t *scratch, kv_caller_t *caller)
{
    kv_entry_t *entry = group->entry;
    kv_engine_t *engine = store->runtime->engine;
    kv_op_t op;
    kv_buffer_t *snapshot = NULL;
    for (int32_t i = 0; i < group->num_outs && snapshot == NULL; i++)
        if (group->outs[i].array != NULL)
            KV_TRY(kv_buffer_new(entry->bytes, &snapshot));

    kv_op_init(&op, scratch->deps, fill_deps(group, true, false, scratch->deps), call->priority);
    kv_status_t status = enter(engine, &op, caller);
    if (status != KV_OK) {
        kv_buffer_rele(snapshot);
        return status;
    }
    if (entry->merged == NULL)
        status = kv_buffer_new(entry->bytes, &entry->merged);
    if (status == KV_OK) {
        work_t work = {&store->host, *group, true, scratch->pointers, scratch->staging};
        bool large = entry->bytes * (size_t)count_pointers(group) >= KV_DETACH_BYTES;
        if (large)
            kv_caller_detach(caller);
        gather_values(&work);
        void *merged = entry->merged->data;
        kv_host_sum(work.host, entry->dtype, entry->count, group->num_values, work.pointers, 1,
                    &merged);
        kv_caller_attach(caller);

        kv_engine_begin_callback(engine, &op);
        kv_update_t update = {&entry->name,  entry->dtype,  entry->ndim,       entry->shape,
                              entry->merged, entry->stored, &group->values[0], &entry->cache};
        status = plan->updater->run(plan->updater, &update, caller);
        if (status == KV_OK && group->num_outs > 0) {
            if (large)
                kv_caller_detach(caller);
            if (snapshot == NULL)
                copy_out(&work, entry->stored->data);
            else
                memcpy(snapshot->data, entry->stored->data, entry->bytes);
            kv_caller_attach(caller);
        }
    }
    kv_engine_leave(engine, &op);
    if (status == KV_OK && snapshot != NULL)
        status = update_outs(store, group, call, scratch, snapshot, caller);
    kv_buffer_rele(snapshot);
    return status;
}

/* --------------------------------------------------------------------------------- tasks */

typedef struct task {
    kv_op_t op;
    kv_host_t host;
    work_t work;
    kv_hold_t *hold;
    void *staging;
    kv_dep_t deps[]; /* then the views, then the pointers */
} task_t;

static void hold_rele(kv_hold_t *hold)
{
    if (hold != NULL && atomic_fetch_sub(&hold->refs, 1) == 1)
        hold->release(hold);
}

static kv_status_t task_run(kv_op_t *op)
{
    run_work(&((task_t *)op)->work);
    return KV_OK;
}

static void task_finish(kv_op_t *op)
{
    task_t *task = (task_t *)op;
    kv_handle_rele(op->handle);
    kv_var_unpin(&task->work.group.entry->var);
    hold_rele(task->hold);
    kv_free(task->staging);
    kv_free(task);
}

static kv_status_t task_new(kv_store_t *store, const kv_group_t *group, const kv_call_t *call,
                            bool push, kv_handle_t *handle, task_t **out)
{
    size_t deps = (size_t)count_deps(group), values = (size_t)group->num_values;
    size_t outs = (size_t)group->num_outs, staging = staging_bytes(group);
    task_t *task =
        kv_alloc(sizeof *task + deps * sizeof(kv_dep_t) + (values + outs) * sizeof(kv_view_t) +
                 (size_t)count_pointers(group) * sizeof(void *));
    KV_TRY_ALLOC(task, "a task");
    task->staging = NULL;
    if (staging > 0) {
        task->staging = kv_alloc_elements(staging);
        if (task->staging == NULL) {
            kv_free(task);
            return kv_fail(KV_NO_MEMORY, "no memory for staging strided values");
        }
    }
    kv_view_t *views = (kv_view_t *)(task->deps + deps);
    if (values > 0)
        memcpy(views, group->values, values * sizeof *views);
    if (outs > 0)
        memcpy(views + values, group->outs, outs * sizeof *views);
    task->host = store->host;
    task->work =
        (work_t){&task->host, *group, push, (const void **)(views + values + outs), task->staging};
    task->work.group.values = views;
    task->work.group.outs = views + values;
    kv_op_init(&task->op, task->deps, fill_deps(group, push, true, task->deps), call->priority);
    task->op.run = task_run;
    task->op.finish = task_finish;
    task->op.handle = handle != NULL ? kv_handle_hold(handle) : NULL;
    task->hold = call->hold;
    if (task->hold != NULL)
        atomic_fetch_add(&task->hold->refs, 1);
    kv_var_pin(&group->entry->var);
    *out = task;
    return KV_OK;
}

/* Hands the tasks over one by one; from the first that is refused on, the rest is dropped. The
 * handle gets the error once. */
static kv_status_t submit_tasks(kv_store_t *store, const kv_plan_t *plan, kv_call_t *call,
                                task_t **tasks, kv_handle_t *handle)
{
    kv_engine_t *engine = store->runtime->engine;
    kv_status_t status = KV_OK;
    for (int64_t g = 0; g < plan->num_groups; g++) {
        task_t *task = tasks[g];
        size_t bytes = plan->groups[g].entry->bytes * (size_t)count_pointers(&plan->groups[g]);
        kv_status_t ended = KV_OK;
        if (status == KV_OK && kv_engine_try_inline(engine, &task->op, bytes)) {
            run_work(&task->work);
            kv_engine_leave(engine, &task->op);
        } else if (status == KV_OK) {
            status = ended = kv_engine_submit(engine, &task->op);
            if (status == KV_OK) {
                call->num_done++;
                continue;
            }
        }
        if (handle != NULL)
            kv_handle_end_one(handle, ended);
        task_finish(&task->op);
        call->num_done += status == KV_OK;
    }
    return status;
}

static kv_status_t run_later(kv_store_t *store, const kv_plan_t *plan, kv_call_t *call, bool push)
{
    kv_handle_t *handle = NULL;
    task_t *one = NULL, **tasks = &one;
    int64_t made = 0;
    kv_status_t status = KV_OK;
    if (plan->num_groups > 1) {
        tasks = kv_alloc((size_t)plan->num_groups * sizeof(task_t *));
        KV_TRY_ALLOC(tasks, "tasks");
    }
    if (call->handle != NULL)
        status = kv_handle_new(store->runtime->engine, plan->num_groups, &handle);
    while (status == KV_OK && made < plan->num_groups) {
        status = task_new(store, &plan->groups[made], call, push, handle, &tasks[made]);
        made += status == KV_OK;
    }
    if (status == KV_OK)
        status = submit_tasks(store, plan, call, tasks, handle);
    else
        for (int64_t i = 0; i < made; i++)
            task_finish(&tasks[i]->op);
    if (tasks != &one)
        kv_free(tasks);
    if (call->handle != NULL && (status == KV_OK || call->num_done > 0)) {
        *call->handle = handle; /* it carries the error of those that were refused */
        return KV_OK;
    }
    if (handle != NULL && status != KV_OK) {
        /* The error comes out of this call; nobody else shall be told again. */
        (void)kv_handle_error(handle);
        kv_handle_rele(handle);
    }
    return status;
}

/* --------------------------------------------------------------------------------- calls */

/* An error names the key at which it happened and says what the call had done by then. */
static kv_status_t tell_progress(kv_status_t status, const kv_plan_t *plan, const kv_call_t *call)
{
    if (status == KV_CALLBACK || status == KV_INTERRUPTED)
        return status;
    char name[96];
    kv_name_format(&plan->groups[call->num_done].entry->name, name, sizeof name);
    if (call->num_done == 0)
        return kv_fail(status, "key %s: %s; nothing was changed", name, kv_status_message(status));
    return kv_fail(status,
                   "key %s: %s; the call had dealt with %" PRId64 " of its %" PRId64 " keys before",
                   name, kv_status_message(status), call->num_done, plan->num_groups);
}

kv_status_t kv_plan_run(kv_store_t *store, kv_plan_t *plan, kv_call_t *call, bool push,
                        kv_caller_t *caller)
{
    call->num_done = 0;
    scratch_t scratch;
    if (call->async && plan->updater == NULL) {
        if (plan->num_groups != 1 || call->handle != NULL)
            return run_later(store, plan, call, push);
        /* One small operation on idle variables needs no task. */
        KV_TRY(scratch_init(plan, &scratch));
        call->num_done = run_inline(store, &plan->groups[0], call, push, &scratch);
        kv_free(scratch.block);
        return call->num_done == 1 ? KV_OK : run_later(store, plan, call, push);
    }
    KV_TRY(scratch_init(plan, &scratch));
    if (plan->updater == NULL && moved_bytes(plan) >= KV_DETACH_BYTES)
        kv_caller_detach(caller);
    kv_status_t status = KV_OK;
    for (int64_t g = 0; g < plan->num_groups && status == KV_OK; g++) {
        const kv_group_t *group = &plan->groups[g];
        status = plan->updater != NULL ? update_here(store, plan, group, call, &scratch, caller)
                                       : run_here(store, group, call, push, &scratch, caller);
        call->num_done += status == KV_OK;
    }
    kv_caller_attach(caller);
    kv_free(scratch.block);
    return status == KV_OK ? KV_OK : tell_progress(status, plan, call);
}

kv_status_t kv_entry_fill(kv_store_t *store, kv_entry_t *entry, const kv_view_t *value,
                          kv_caller_t *caller)
{
    kv_dep_t dep = {.var = NULL, .access = KV_READ};
    kv_op_t op;
    if (value->array != NULL) {
        dep.var = &value->array->var;
        kv_op_init(&op, &dep, 1, 0);
        KV_TRY(enter(store->runtime->engine, &op, caller));
    }
    bool detach = !caller->detached && entry->bytes >= KV_DETACH_BYTES;
    if (detach)
        kv_caller_detach(caller);
    if (value->strides != NULL) {
        kv_view_gather(value, entry->stored->data);
    } else {
        const void *source = value->data;
        void *stored = entry->stored->data;
        kv_host_sum(&store->host, entry->dtype, entry->count, 1, &source, 1, &stored);
    }
    if (detach)
        kv_caller_attach(caller);
    if (value->array != NULL)
        kv_engine_leave(store->runtime->engine, &op);
    return KV_OK;
}
