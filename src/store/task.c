/* A checked call as tasks, one a key: the call returns before the work is done. A task has copies
 * of everything that it needs, and shares of what it uses.
 */
#include "base/memory.h"
#include "store/internal.h"

#include <string.h>

typedef struct task {
    kv_op_t op;
    kv_host_t host;
    kv_work_t work;
    kv_step_t step;
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
    bool delivering;
    return kv_work_run(&((task_t *)op)->work, &delivering);
}

static void task_finish(kv_op_t *op)
{
    task_t *task = (task_t *)op;
    kv_handle_rele(op->handle);
    kv_slots_rele(task->work.group.slots);
    for (int32_t i = 0; task->work.group.row_ids != NULL && i < task->work.group.num_outs; i++)
        kv_buffer_rele(task->work.group.row_ids[i].ids);
    kv_var_unpin(&task->work.group.entry->var);
    hold_rele(task->hold);
    kv_free(task->staging);
    kv_free(task);
}

static kv_status_t task_new(kv_store_t *store, const kv_plan_t *plan, const kv_group_t *group,
                            const kv_call_t *call, bool push, kv_handle_t *handle, task_t **out)
{
    size_t deps = (size_t)kv_group_num_deps(group), values = (size_t)group->num_values;
    size_t outs = (size_t)group->num_outs, staging = kv_work_staging(group);
    size_t ids = group->row_ids != NULL ? outs : 0;
    task_t *task =
        kv_alloc(sizeof *task + deps * sizeof(kv_dep_t) + (values + outs) * sizeof(kv_view_t) +
                 ids * sizeof(kv_row_ids_t) + (size_t)kv_work_pointers(group) * sizeof(void *));
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
    kv_row_ids_t *row_ids = (kv_row_ids_t *)(views + values + outs);
    for (size_t i = 0; i < ids; i++) {
        row_ids[i] = group->row_ids[i];
        kv_buffer_hold(row_ids[i].ids);
    }
    task->host = store->host;
    task->work =
        kv_work_of(&task->host, plan, group, push, (const void **)(row_ids + ids), task->staging);
    if (group->step != NULL) {
        task->step = *group->step;
        task->work.group.step = &task->step;
        atomic_fetch_add(&group->slots->refs, 1);
    }
    task->work.group.row_ids = ids > 0 ? row_ids : NULL;
    task->work.group.values = views;
    task->work.group.outs = views + values;
    kv_op_init(&task->op, task->deps, kv_group_deps(group, push, true, task->deps), call->priority);
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
                                bool push, task_t **tasks, kv_handle_t *handle)
{
    kv_engine_t *engine = store->runtime->engine;
    kv_status_t status = KV_OK;
    for (int64_t g = 0; g < plan->num_groups; g++) {
        task_t *task = tasks[g];
        size_t bytes = kv_group_bytes(&plan->groups[g]);
        kv_status_t ended = KV_OK;
        bool delivering = false;
        if (status == KV_OK && kv_engine_try_inline(engine, &task->op, bytes)) {
            ended = status = kv_work_run(&task->work, &delivering);
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
        call->num_done += status == KV_OK || (push && delivering);
    }
    return status;
}

kv_status_t kv_plan_submit(kv_store_t *store, const kv_plan_t *plan, kv_call_t *call, bool push)
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
        status = task_new(store, plan, &plan->groups[made], call, push, handle, &tasks[made]);
        made += status == KV_OK;
    }
    if (status == KV_OK)
        status = submit_tasks(store, plan, call, push, tasks, handle);
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
