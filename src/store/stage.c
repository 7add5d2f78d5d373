/* Arrays in device memory for stores that merge on the host: copies in pinned memory stand in for
 * them. The copies run on the arrays' own streams, so they come after what the owners have done;
 * the host waits for the values, the owners' streams for the outs.
 */
#include "base/memory.h"
#include "comm/device_work.h"
#include "store/internal.h"

#include <string.h>

/* What stands in for one array. */
typedef struct stand_in {
    kv_view_t original;
    kv_buffer_t *pinned;
    kv_mark_t *mark; /* of a value: it has come */
} stand_in_t;

struct kv_stage {
    int64_t num_values, num_outs;
    stand_in_t *values, *outs;
    kv_view_t views[]; /* of all groups */
};

static size_t bytes_of(const kv_view_t *view)
{
    return (size_t)view->count * kv_dtype_bytes((kv_dtype_t)view->dtype);
}

void kv_stage_free(kv_stage_t *stage)
{
    if (stage == NULL)
        return;
    for (int64_t i = 0; i < stage->num_values; i++) {
        kv_buffer_rele(stage->values[i].pinned);
        kv_mark_rele(stage->values[i].mark);
    }
    for (int64_t i = 0; i < stage->num_outs; i++)
        kv_buffer_rele(stage->outs[i].pinned);
    kv_free(stage);
}

static void stand_in(kv_view_t *view, const kv_buffer_t *pinned)
{
    view->data = pinned->data;
    view->flags &= (uint8_t) ~(KV_VIEW_DEVICE | KV_VIEW_CUDA | KV_VIEW_FOLLOWS);
}

/* The sum of `count` arrays in device memory, or the one, comes to the host. Arrays on other
 * devices and streams are put in order with the first, on whose stream all is done. */
static kv_status_t download(kv_device_work_t *work, const kv_view_t *values, int32_t count,
                            kv_buffer_t **pinned)
{
    const kv_view_t *first = &values[0];
    const void *from = first->data, *sources[KV_DEVICE_SOURCES];
    size_t bytes = bytes_of(first);
    for (int32_t i = 0; i < count && count > 1; i++) {
        void *here = values[i].data;
        KV_TRY(kv_lane_join(kv_view_lane(&values[i]), work->lane));
        if (values[i].device != first->device) {
            KV_TRY(kv_device_temp(work, bytes, &here));
            KV_TRY(
                kv_device_copy(work, values[i].device, values[i].data, first->device, here, bytes));
        }
        sources[i] = here;
    }
    if (count > 1 && bytes > 0) {
        void *sum;
        KV_TRY(kv_device_temp(work, bytes, &sum));
        kv_device_sum_t job = {
            .count = first->count, .num_src = count, .num_dst = 1, .src = sources, .dst = &sum};
        KV_TRY(KV_DEVICE_DO(work, sum, work->lane.stream, (kv_dtype_t)first->dtype,
                            (kv_dtype_t)first->dtype, 1, &job));
        from = sum;
    }
    if (bytes == 0)
        return kv_buffer_new(0, pinned);
    KV_TRY(kv_device_download(work, from, bytes, pinned));
    kv_buffer_hold(*pinned);
    return KV_OK;
}

static kv_status_t begin_value(kv_stage_t *stage, const kv_view_t *values, int32_t count)
{
    kv_device_work_t work;
    kv_buffer_t *pinned = NULL;
    kv_mark_t *mark = NULL;
    KV_TRY(kv_device_work_begin(&work, kv_view_lane(&values[0])));
    kv_status_t status = download(&work, values, count, &pinned);
    kv_status_t ended = kv_device_work_end(&work, &mark);
    if (status == KV_OK)
        stage->values[stage->num_values++] =
            (stand_in_t){.original = values[0], .pinned = pinned, .mark = mark};
    else
        kv_mark_rele(mark);
    return status == KV_OK ? ended : status;
}

/* How many values in front are summed where they are. */
static int32_t mergeable(const kv_store_t *store, const kv_group_t *group)
{
    if (!store->kind.device || group->num_values > KV_DEVICE_SOURCES)
        return 1;
    for (int32_t i = 0; i < group->num_values; i++)
        if (!kv_view_is_cuda(&group->values[i]))
            return 1;
    return group->num_values;
}

/* Gives the group views of its own, as yet of the arrays themselves, and puts the copies in order.
 */
static kv_status_t begin_group(const kv_store_t *store, kv_stage_t *stage, kv_group_t *group,
                               kv_view_t *views)
{
    int32_t merged = group->num_values > 0 ? mergeable(store, group) : 1;
    const kv_view_t *values = group->values, *outs = group->outs;
    if (group->num_values > 0)
        memcpy(views, values, (size_t)group->num_values * sizeof *views);
    kv_view_t *own_outs = views + group->num_values;
    if (group->num_outs > 0)
        memcpy(own_outs, outs, (size_t)group->num_outs * sizeof *views);
    for (int32_t i = 0; i < group->num_values; i += merged) {
        if (!kv_view_is_cuda(&values[i]))
            continue;
        KV_TRY(begin_value(stage, &values[i], merged));
        stand_in(&views[i], stage->values[stage->num_values - 1].pinned);
    }
    if (group->num_values > 0)
        group->num_values -= merged - 1;
    for (int32_t i = 0; i < group->num_outs; i++) {
        kv_buffer_t *pinned;
        if (!kv_view_is_cuda(&outs[i]))
            continue;
        KV_TRY(kv_pinned_new(outs[i].device, bytes_of(&outs[i]), &pinned));
        stage->outs[stage->num_outs++] = (stand_in_t){.original = outs[i], .pinned = pinned};
        stand_in(&own_outs[i], pinned);
    }
    group->values = views;
    group->outs = own_outs;
    return KV_OK;
}

kv_status_t kv_plan_stage(const kv_store_t *store, kv_plan_t *plan, kv_caller_t *caller)
{
    size_t values = 0, outs = 0;
    for (int64_t g = 0; g < plan->num_groups; g++) {
        values += (size_t)plan->groups[g].num_values;
        outs += (size_t)plan->groups[g].num_outs;
    }
    kv_stage_t *stage =
        kv_calloc(1, sizeof *stage + (values + outs) * (sizeof(kv_view_t) + sizeof(stand_in_t)));
    KV_TRY_ALLOC(stage, "copies of arrays in device memory");
    stage->values = (stand_in_t *)(stage->views + values + outs);
    stage->outs = stage->values + values;
    plan->stage = stage;
    kv_view_t *next = stage->views;
    for (int64_t g = 0; g < plan->num_groups; g++) {
        int32_t used = plan->groups[g].num_values + plan->groups[g].num_outs;
        KV_TRY(begin_group(store, stage, &plan->groups[g], next));
        next += used;
    }
    for (int64_t i = 0; i < stage->num_values; i++)
        KV_TRY(kv_mark_wait(stage->values[i].mark, caller));
    return KV_OK;
}

static kv_status_t finish_out(const stand_in_t *out, kv_hold_t *hold, kv_caller_t *caller)
{
    kv_device_work_t work;
    kv_mark_t *mark = NULL;
    kv_lane_t lane = kv_view_lane(&out->original);
    size_t bytes = bytes_of(&out->original);
    if (bytes == 0)
        return KV_OK;
    KV_TRY(kv_device_work_begin(&work, lane));
    kv_status_t status = KV_DEVICE_DO(&work, copy, lane.stream, KV_DEVICE_TO_DEVICE, (int64_t)bytes,
                                      out->pinned->data, out->original.data);
    kv_status_t ended = kv_device_work_end(&work, &mark);
    status = status == KV_OK ? ended : status;
    if (mark != NULL) {
        kv_mark_keep(mark, kv_buffer_drop, kv_buffer_hold(out->pinned));
        kv_hold_until(hold, mark);
    }
    if (status == KV_OK && !(out->original.flags & KV_VIEW_FOLLOWS))
        status = kv_mark_wait(mark, caller);
    kv_mark_rele(mark);
    return status;
}

kv_status_t kv_plan_unstage(const kv_plan_t *plan, kv_hold_t *hold, kv_caller_t *caller)
{
    for (int64_t i = 0; i < plan->stage->num_outs; i++)
        KV_TRY(finish_out(&plan->stage->outs[i], hold, caller));
    return KV_OK;
}
