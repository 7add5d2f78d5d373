/* What a call does to keys whose value, or whose arrays, lie in device memory.
 *
 * A key of a store that merges on devices lives where its values are: the first push of an array in
 * device memory takes it to that device, with its contents and all that training has left, and
 * there it stays. Only what a device cannot do (row-sparse values, an updater for host arrays)
 * brings it home again.
 *
 * Work on the keys of one device is put on one lane, small keys together in few launches: the
 * stream of the first array there, since what its owner does is in order with it then. Arrays on
 * other streams are put in order by marks. The host waits only for arrays whose owner's stream is
 * not known, for outs in host memory, and for the norms of layer-wise optimizers.
 */
#include "base/memory.h"
#include "store/device.h"

#include <string.h>

/* --------------------------------------------------------------------------- where things are */

static int device_of(const kv_buffer_t *buffer)
{
    kv_place_t *place = buffer != NULL ? kv_buffer_place(buffer) : NULL;
    return place != NULL ? kv_place_device(place) : -1;
}

static const kv_view_t *first_cuda(const kv_view_t *views, int32_t count)
{
    for (int32_t i = 0; i < count; i++)
        if (kv_view_is_cuda(&views[i]))
            return &views[i];
    return NULL;
}

bool kv_group_brings_cuda(const kv_group_t *group)
{
    return first_cuda(group->values, group->num_values) != NULL;
}

bool kv_work_on_device(const kv_work_t *work)
{
    const kv_group_t *group = &work->group;
    return device_of(group->entry->stored) >= 0 || kv_group_brings_cuda(group) ||
           first_cuda(group->outs, group->num_outs) != NULL;
}

/* The device that the key is on, or comes to by this work; -1: the work is done on the host. */
static int home_of(const kv_work_t *work)
{
    const kv_group_t *group = &work->group;
    int home = device_of(group->entry->stored);
    if (home >= 0 || !work->push)
        return home;
    const kv_view_t *first = first_cuda(group->values, group->num_values);
    return first != NULL ? first->device : -1;
}

kv_status_t kv_work_bring_home(const kv_work_t *work)
{
    kv_entry_t *entry = work->group.entry;
    kv_slots_t *slots = work->group.slots;
    KV_TRY(kv_buffer_bring_home(&entry->stored, work->caller));
    for (int32_t i = 0; i < entry->residuals.count; i++)
        KV_TRY(kv_buffer_bring_home(&entry->residuals.buffers[i], work->caller));
    if (slots == NULL)
        return KV_OK;
    KV_TRY(kv_buffer_bring_home(&slots->master, work->caller));
    for (int i = 0; i < KV_MAX_SLOTS; i++)
        KV_TRY(kv_buffer_bring_home(&slots->slot[i], work->caller));
    return KV_OK;
}

/* ----------------------------------------------------------------------- a key on the host */

/* The value, or of a row-sparse key the dense value, to one out in device memory. */
static kv_status_t upload_out(const kv_work_t *work, const kv_view_t *out, const void *value)
{
    kv_device_work_t on;
    kv_mark_t *mark = NULL;
    KV_TRY(kv_device_work_begin(&on, kv_view_lane(out)));
    kv_status_t status = kv_device_upload(&on, value, work->group.entry->bytes, out->data);
    kv_status_t ended = kv_device_work_end(&on, &mark);
    status = status == KV_OK ? ended : status;
    if (mark != NULL)
        kv_hold_until(work->hold, mark);
    if (status == KV_OK && !(out->flags & KV_VIEW_FOLLOWS))
        status = kv_mark_wait(mark, work->caller);
    kv_mark_rele(mark);
    return status;
}

static kv_status_t upload_outs(const kv_work_t *work, const void *value)
{
    for (int32_t i = 0; i < work->group.num_outs; i++)
        if (kv_view_is_cuda(&work->group.outs[i]))
            KV_TRY(upload_out(work, &work->group.outs[i], value));
    return KV_OK;
}

/* A row-sparse key made dense for its outs in device memory. */
static kv_status_t densify(const kv_work_t *work)
{
    const kv_entry_t *entry = work->group.entry;
    kv_buffer_t *dense;
    const void *pointers[2];
    KV_TRY(kv_buffer_new(entry->bytes, &dense));
    kv_view_t out = {.data = dense->data,
                     .shape = entry->shape,
                     .count = entry->count,
                     .ndim = entry->ndim,
                     .dtype = (uint8_t)entry->dtype};
    kv_work_t pull = *work;
    pull.push = false;
    pull.group.values = NULL;
    pull.group.num_values = 0;
    pull.group.outs = &out;
    pull.group.num_outs = 1;
    pull.pointers = pointers;
    kv_status_t status = kv_work_copy_out(&pull);
    if (status == KV_OK)
        status = upload_outs(work, dense->data);
    kv_buffer_rele(dense);
    return status;
}

kv_status_t kv_work_deliver(const kv_work_t *work, const void *stored)
{
    KV_TRY(kv_deliver_here(*work, stored));
    if (first_cuda(work->group.outs, work->group.num_outs) == NULL)
        return KV_OK;
    return work->group.entry->sparse ? densify(work) : upload_outs(work, stored);
}

static kv_status_t run_here(const kv_work_t *work, bool *delivering)
{
    kv_entry_t *entry = work->group.entry;
    if (work->push) {
        kv_work_t push = *work;
        KV_TRY(kv_work_bring_home(work));
        push.group.num_outs = 0;
        KV_TRY(kv_work_run(&push, delivering));
    }
    *delivering = true;
    return kv_work_deliver(work, entry->sparse ? NULL : entry->stored->data);
}

/* The values of the work with those of devices copied to the host: *out, and their memory. */
static kv_status_t fetch_values(const kv_work_t *work, kv_view_t **out, kv_buffer_t **room)
{
    int32_t count = work->group.num_values;
    size_t bytes = work->group.entry->bytes;
    kv_view_t *views = *out = kv_alloc((size_t)count * sizeof *views);
    KV_TRY_ALLOC(views, "the values of a call");
    KV_TRY(kv_buffer_new((size_t)count * bytes, room));
    for (int32_t i = 0; i < count; i++) {
        views[i] = work->group.values[i];
        if (!kv_view_is_cuda(&views[i]))
            continue;
        views[i].data = (char *)(*room)->data + (size_t)i * bytes;
        views[i].flags = 0;
        KV_TRY(kv_device_fetch(&work->group.values[i], views[i].data, work->caller));
    }
    return KV_OK;
}

/* The work by way of `run`, with values of devices copied to the host. */
static kv_status_t run_fetched(const kv_work_t *work,
                               kv_status_t (*run)(const kv_work_t *work, bool *delivering),
                               bool *delivering)
{
    kv_work_t host = *work;
    kv_view_t *views = NULL;
    kv_buffer_t *room = NULL;
    kv_status_t status = fetch_values(work, &views, &room);
    host.group.values = views;
    if (status == KV_OK)
        status = run(&host, delivering);
    kv_buffer_rele(room);
    kv_free(views);
    return status;
}

/* ------------------------------------------------------------------------------------- calls */

kv_status_t kv_work_run_on_device(const kv_work_t *work, bool *delivering)
{
    bool launched = false;
    *delivering = false;
    if (work->push)
        kv_entry_drop_twins(work->group.entry);
    else if (work->group.entry->twins != NULL)
        return kv_work_pull_twins(work, delivering);
    int home = home_of(work);
    bool rows = work->push && work->group.values[0].sparse != NULL;
    kv_status_t status = home < 0 || rows ? run_here(work, delivering)
                         : work->group.num_values > KV_DEVICE_SOURCES
                             ? run_fetched(work, run_here, delivering)
                             : kv_batch_run(&work, 1, home, NULL, &launched);
    *delivering = *delivering || launched;
    if (launched && work->push && (status == KV_DEVICE || status == KV_TIMEOUT))
        return kv_fail(status, "%s; the value may have been updated", kv_status_message(status));
    return status == KV_OK || !*delivering ? status : kv_work_undelivered(work->push, status);
}

/* Whether the work can share launches with that of other keys. */
static bool can_share(const kv_work_t *work)
{
    return home_of(work) >= 0 && work->group.num_values <= KV_DEVICE_SOURCES &&
           work->group.entry->twins == NULL &&
           !(work->push && work->group.values[0].sparse != NULL);
}

kv_status_t kv_works_run(kv_work_t *works, int64_t count, int64_t *num_done, bool *delivering)
{
    const kv_work_t **together = kv_alloc((size_t)count * (sizeof *together + sizeof(bool)));
    KV_TRY_ALLOC(together, "work on a device");
    bool *done = (bool *)(together + count);
    kv_status_t status = KV_OK;
    memset(done, 0, (size_t)count * sizeof *done);
    *num_done = 0;
    for (int64_t i = 0; i < count && status == KV_OK; i++) {
        int64_t shared = 0;
        int home = home_of(&works[i]);
        if (done[i])
            continue;
        if (!can_share(&works[i])) {
            status = kv_work_run(&works[i], delivering);
            continue;
        }
        for (int64_t j = i; j < count; j++) {
            if (!done[j] && can_share(&works[j]) && home_of(&works[j]) == home) {
                together[shared++] = &works[j];
                done[j] = true;
            }
        }
        *delivering = false;
        status = kv_batch_run(together, shared, home, NULL, delivering);
    }
    kv_free(together);
    if (status == KV_OK)
        *num_done = count;
    return status;
}

kv_status_t kv_work_merge_on_device(const kv_work_t *work)
{
    bool launched;
    if (work->group.num_values > KV_DEVICE_SOURCES)
        return kv_fail(KV_INVALID,
                       "%d CUDA values were pushed for an updater, %d at once are possible",
                       work->group.num_values, KV_DEVICE_SOURCES);
    kv_work_t merge = *work;
    const kv_work_t *one = &merge;
    merge.group.num_outs = 0;
    return kv_batch_run(&one, 1, home_of(work), &work->group.entry->merged, &launched);
}

static kv_status_t merge(const kv_work_t *work, bool *delivering)
{
    (void)delivering;
    return kv_work_merge(work);
}

kv_status_t kv_work_merge_here(const kv_work_t *work)
{
    return run_fetched(work, merge, NULL);
}

/* ---------------------------------------------------------------------------------- updaters */

kv_status_t kv_work_lend(const kv_work_t *work, kv_lane_t *lane, kv_mark_t **after)
{
    kv_place_t *place = kv_buffer_place(work->group.entry->stored);
    *lane = kv_view_lane(&work->group.values[0]);
    if (lane->device != kv_place_device(place))
        KV_TRY(kv_lane_own(kv_place_device(place), lane));
    return kv_place_begin(place, *lane, after);
}

kv_status_t kv_work_take_back(const kv_work_t *work, kv_lane_t lane, kv_mark_t *after)
{
    kv_mark_t *mark;
    kv_status_t status = kv_mark_new(lane, &mark);
    if (status != KV_OK) {
        kv_mark_rele(after);
        return status;
    }
    status = kv_place_end(kv_buffer_place(work->group.entry->stored), lane, mark, after);
    kv_mark_rele(mark);
    return status;
}
