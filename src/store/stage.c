/* Arrays in device memory for stores that merge on the host: copies in pinned memory stand in for
 * them. The copies run on the arrays' own streams, so they come after what the owners have done;
 * the host waits for the values, the owners' streams for the outs.
 *
 * A value comes in slices with a mark behind each, so that what is done with it on the host begins
 * while the rest is still on its way. All that orders the copies behind other streams is put there
 * before the first of them: once a lane has come to its first copy, nothing but copies and sums of
 * this call is between it and the last.
 */
#include "base/memory.h"
#include "comm/device_work.h"
#include "store/internal.h"

#include <string.h>

enum { SLICE_BYTES = 1 << 20 };

/* A value, or the sum of several, on its way to the host. */
typedef struct coming {
    size_t bytes;
    kv_lane_t lane;
    bool leads; /* no value before it is on the same lane */
    kv_buffer_t *pinned;
    size_t num_marks, num_passed;
    kv_mark_t **marks; /* one behind each slice */
} coming_t;

typedef struct going {
    kv_view_t original;
    kv_mark_t *mark; /* behind what has been put there last */
} going_t;

struct kv_staged {
    kv_stage_t *stage;
    int32_t num_values, num_outs;
    coming_t *values;
    going_t *outs;
    kv_buffer_t *arrived; /* for all outs */
    bool uploaded;        /* slices have gone on */
};

struct kv_stage {
    kv_hold_t *hold; /* of the arrays; borrowed */
    int64_t num_groups;
    kv_staged_t groups[];
};

static size_t bytes_of(const kv_view_t *view)
{
    return (size_t)view->count * kv_dtype_bytes((kv_dtype_t)view->dtype);
}

static size_t num_slices(size_t bytes)
{
    return (bytes + SLICE_BYTES - 1) / SLICE_BYTES;
}

void kv_stage_free(kv_stage_t *stage)
{
    for (int64_t g = 0; stage != NULL && g < stage->num_groups; g++) {
        kv_staged_t *staged = &stage->groups[g];
        for (int32_t i = 0; i < staged->num_values; i++) {
            coming_t *value = &staged->values[i];
            if (value->num_passed < value->num_marks)
                kv_hold_until(stage->hold, value->marks[value->num_marks - 1]);
            for (size_t slice = 0; slice < value->num_marks; slice++)
                kv_mark_rele(value->marks[slice]);
            kv_buffer_rele(value->pinned);
        }
        for (int32_t i = 0; i < staged->num_outs; i++)
            kv_mark_rele(staged->outs[i].mark);
        kv_buffer_rele(staged->arrived);
    }
    kv_free(stage);
}

static void stand_in(kv_view_t *view, const kv_buffer_t *pinned)
{
    view->data = pinned->data;
    view->flags &= (uint8_t) ~(KV_VIEW_DEVICE | KV_VIEW_CUDA | KV_VIEW_FOLLOWS);
}

/* ------------------------------------------------------------------------------------ values */

/* The sum of `count` arrays in device memory, or the one. */
static kv_status_t sum_up(kv_device_work_t *work, const kv_view_t *values, int32_t count,
                          const void **out)
{
    const kv_view_t *first = &values[0];
    const void *sources[KV_DEVICE_SOURCES];
    size_t bytes = bytes_of(first);
    *out = first->data;
    if (count == 1 || bytes == 0)
        return KV_OK;
    for (int32_t i = 0; i < count; i++) {
        void *here = values[i].data;
        if (values[i].device != first->device) {
            KV_TRY(kv_device_temp(work, bytes, &here));
            KV_TRY(
                kv_device_copy(work, values[i].device, values[i].data, first->device, here, bytes));
        }
        sources[i] = here;
    }
    void *sum;
    KV_TRY(kv_device_temp(work, bytes, &sum));
    kv_device_sum_t job = {
        .count = first->count, .num_src = count, .num_dst = 1, .src = sources, .dst = &sum};
    *out = sum;
    return KV_DEVICE_DO(work, sum, work->lane.stream, (kv_dtype_t)first->dtype,
                        (kv_dtype_t)first->dtype, 1, &job);
}

/* The last slice's mark is that of the end of the work. */
static kv_status_t download(kv_device_work_t *work, const char *from, coming_t *coming)
{
    kv_buffer_t *pinned;
    KV_TRY(kv_device_pinned(work, coming->bytes, &pinned));
    coming->pinned = kv_buffer_hold(pinned);
    for (size_t at = 0; at < coming->bytes; at += SLICE_BYTES) {
        size_t rest = coming->bytes - at;
        if (at > 0) {
            KV_TRY(kv_mark_new(work->lane, &coming->marks[coming->num_marks]));
            coming->num_marks++;
        }
        KV_TRY(KV_DEVICE_DO(work, copy, work->lane.stream, KV_DEVICE_TO_HOST,
                            (int64_t)(rest < SLICE_BYTES ? rest : SLICE_BYTES), from + at,
                            (char *)pinned->data + at));
    }
    return KV_OK;
}

static kv_status_t begin_value(const kv_view_t *values, int32_t count, coming_t *coming)
{
    kv_device_work_t work;
    kv_mark_t *mark = NULL;
    const void *from;
    coming->bytes = bytes_of(&values[0]);
    coming->lane = kv_view_lane(&values[0]);
    if (coming->bytes == 0)
        return kv_buffer_new(0, &coming->pinned);
    KV_TRY(kv_device_work_begin(&work, coming->lane));
    kv_status_t status = sum_up(&work, values, count, &from);
    if (status == KV_OK)
        status = download(&work, from, coming);
    kv_status_t ended = kv_device_work_end(&work, &mark);
    if (ended == KV_OK)
        coming->marks[coming->num_marks++] = mark;
    return status == KV_OK ? ended : status;
}

/* How many values in front are summed where they are. */
static int32_t mergeable(const kv_store_t *store, const kv_group_t *group)
{
    if (!store->kind.device || group->num_values > KV_DEVICE_SOURCES || group->num_values == 0)
        return 1;
    for (int32_t i = 0; i < group->num_values; i++)
        if (!kv_view_is_cuda(&group->values[i]))
            return 1;
    return group->num_values;
}

static kv_status_t join_lanes(const kv_store_t *store, const kv_group_t *group)
{
    int32_t merged = mergeable(store, group);
    for (int32_t i = 1; i < merged; i++)
        KV_TRY(kv_lane_join(kv_view_lane(&group->values[i]), kv_view_lane(&group->values[0])));
    return KV_OK;
}

/* The first value of most lists stands for all of them: this ends at once. */
static bool leads(const kv_stage_t *stage, const kv_staged_t *staged, const coming_t *coming)
{
    for (const kv_staged_t *before = stage->groups; before <= staged; before++)
        for (int32_t i = 0; i < before->num_values && &before->values[i] != coming; i++)
            if (before->values[i].leads && kv_lane_same(before->values[i].lane, coming->lane))
                return false;
    return coming->bytes > 0;
}

/* Gives the group views of its own, as yet of the arrays themselves, and puts the copies in order.
 */
static kv_status_t begin_values(const kv_store_t *store, kv_group_t *group, kv_view_t *views,
                                kv_mark_t **marks)
{
    kv_staged_t *staged = group->staged;
    int32_t merged = mergeable(store, group), count = group->num_values;
    const kv_view_t *values = group->values;
    if (count > 0)
        memcpy(views, values, (size_t)count * sizeof *views);
    group->values = views;
    group->num_values -= count > 0 ? merged - 1 : 0;
    for (int32_t i = 0; i < count; i += merged) {
        if (!kv_view_is_cuda(&values[i]))
            continue;
        coming_t *coming = &staged->values[staged->num_values++];
        coming->marks = marks;
        marks += num_slices(bytes_of(&values[i]));
        KV_TRY(begin_value(&values[i], merged, coming));
        coming->leads = leads(staged->stage, staged, coming);
        stand_in(&views[i], coming->pinned);
    }
    return KV_OK;
}

static kv_status_t begin_outs(kv_group_t *group, kv_view_t *views)
{
    kv_staged_t *staged = group->staged;
    int32_t count = 0;
    for (int32_t i = 0; i < group->num_outs; i++)
        if (kv_view_is_cuda(&group->outs[i]))
            staged->outs[staged->num_outs++].original = group->outs[i];
    if (staged->num_outs > 0) {
        const kv_view_t *first = &staged->outs[0].original;
        KV_TRY(kv_pinned_new(first->device, bytes_of(first), &staged->arrived));
        views[count] = *first;
        stand_in(&views[count++], staged->arrived);
    }
    for (int32_t i = 0; i < group->num_outs; i++)
        if (!kv_view_is_cuda(&group->outs[i]))
            views[count++] = group->outs[i];
    group->outs = views;
    group->num_outs = count;
    return KV_OK;
}

/* Room for everything that the groups may need. */
static kv_status_t stage_new(kv_plan_t *plan, kv_view_t **views, kv_mark_t ***marks)
{
    size_t values = 0, outs = 0, slices = 0, groups = (size_t)plan->num_groups;
    for (size_t g = 0; g < groups; g++) {
        const kv_group_t *group = &plan->groups[g];
        values += (size_t)group->num_values;
        outs += (size_t)group->num_outs;
        slices += (size_t)group->num_values * num_slices(group->entry->bytes);
    }
    kv_stage_t *stage =
        kv_calloc(1, sizeof *stage + groups * sizeof(kv_staged_t) + values * sizeof(coming_t) +
                         outs * sizeof(going_t) + (values + outs) * sizeof(kv_view_t) +
                         slices * sizeof(kv_mark_t *));
    KV_TRY_ALLOC(stage, "copies of arrays in device memory");
    stage->num_groups = plan->num_groups;
    coming_t *next_value = (coming_t *)(stage->groups + groups);
    going_t *next_out = (going_t *)(next_value + values);
    *views = (kv_view_t *)(next_out + outs);
    *marks = (kv_mark_t **)(*views + values + outs);
    for (size_t g = 0; g < groups; g++) {
        kv_group_t *group = &plan->groups[g];
        group->staged = &stage->groups[g];
        *group->staged = (kv_staged_t){.stage = stage, .values = next_value, .outs = next_out};
        next_value += group->num_values;
        next_out += group->num_outs;
    }
    plan->stage = stage;
    return KV_OK;
}

kv_status_t kv_plan_stage(const kv_store_t *store, kv_plan_t *plan, kv_hold_t *hold)
{
    kv_view_t *views = NULL;
    kv_mark_t **marks = NULL;
    KV_TRY(stage_new(plan, &views, &marks));
    plan->stage->hold = hold;
    for (int64_t g = 0; g < plan->num_groups; g++)
        KV_TRY(join_lanes(store, &plan->groups[g]));
    for (int64_t g = 0; g < plan->num_groups; g++) {
        kv_group_t *group = &plan->groups[g];
        int32_t values = group->num_values, outs = group->num_outs;
        KV_TRY(begin_values(store, group, views, marks));
        views += values;
        marks += (size_t)values * num_slices(group->entry->bytes);
        KV_TRY(begin_outs(group, views));
        views += outs;
    }
    return KV_OK;
}

kv_status_t kv_stage_begun(const kv_stage_t *stage, kv_caller_t *caller)
{
    for (int64_t g = 0; g < stage->num_groups; g++)
        for (int32_t i = 0; i < stage->groups[g].num_values; i++)
            if (stage->groups[g].values[i].leads)
                KV_TRY(kv_mark_wait(stage->groups[g].values[i].marks[0], caller));
    return KV_OK;
}

size_t kv_staged_bytes(const kv_staged_t *staged)
{
    size_t bytes = 0;
    for (int32_t i = 0; staged != NULL && i < staged->num_values; i++)
        bytes += staged->values[i].bytes;
    return bytes;
}

kv_status_t kv_staged_next(kv_staged_t *staged, size_t *there, kv_caller_t *caller)
{
    int32_t i = 0;
    *there = 0;
    while (i < staged->num_values && staged->values[i].num_passed == staged->values[i].num_marks)
        *there += staged->values[i++].bytes;
    if (i == staged->num_values)
        return KV_OK;
    coming_t *value = &staged->values[i];
    KV_TRY(kv_mark_wait(value->marks[value->num_passed], caller));
    size_t bytes = ++value->num_passed * SLICE_BYTES;
    *there += bytes < value->bytes ? bytes : value->bytes;
    return KV_OK;
}

kv_status_t kv_staged_wait(kv_staged_t *staged, kv_caller_t *caller)
{
    for (size_t there = 0, bytes = kv_staged_bytes(staged); there < bytes;)
        KV_TRY(kv_staged_next(staged, &there, caller));
    return KV_OK;
}

/* -------------------------------------------------------------------------------------- outs */

static kv_status_t upload(const kv_staged_t *staged, going_t *out, size_t offset, size_t bytes)
{
    kv_device_work_t work;
    kv_mark_t *mark = NULL;
    kv_lane_t lane = kv_view_lane(&out->original);
    KV_TRY(kv_device_work_begin(&work, lane));
    kv_status_t status = KV_DEVICE_DO(&work, copy, lane.stream, KV_DEVICE_TO_DEVICE, (int64_t)bytes,
                                      (const char *)staged->arrived->data + offset,
                                      (char *)out->original.data + offset);
    kv_status_t ended = kv_device_work_end(&work, &mark);
    if (mark != NULL) {
        kv_mark_keep(mark, kv_buffer_drop, kv_buffer_hold(staged->arrived));
        kv_hold_until(staged->stage->hold, mark);
        kv_mark_rele(out->mark);
        out->mark = mark;
    }
    return status == KV_OK ? ended : status;
}

bool kv_staged_arrives(const kv_staged_t *staged, const void *out)
{
    return staged != NULL && staged->arrived != NULL && staged->arrived->data == out;
}

kv_status_t kv_staged_upload(kv_staged_t *staged, size_t offset, size_t bytes)
{
    staged->uploaded = true;
    for (int32_t i = 0; i < staged->num_outs; i++)
        KV_TRY(upload(staged, &staged->outs[i], offset, bytes));
    return KV_OK;
}

kv_status_t kv_staged_finish(kv_staged_t *staged, kv_caller_t *caller)
{
    if (staged == NULL || staged->num_outs == 0 || staged->arrived->bytes == 0)
        return KV_OK;
    if (!staged->uploaded)
        KV_TRY(kv_staged_upload(staged, 0, staged->arrived->bytes));
    for (int32_t i = 0; i < staged->num_outs; i++)
        if (!(staged->outs[i].original.flags & KV_VIEW_FOLLOWS))
            KV_TRY(kv_mark_wait(staged->outs[i].mark, caller));
    return KV_OK;
}
