/* Copies between host and devices go through pinned memory: a copy of other memory would let the
 * thread wait for the device without a deadline.
 */
#include "comm/device_work.h"

#include "base/memory.h"
#include <string.h>

static _Thread_local char sentence[KV_DEVICE_SENTENCE];

char *kv_device_sentence(void)
{
    return sentence;
}

kv_status_t kv_device_do_check(kv_device_code_t code)
{
    return kv_device_check(code, sentence);
}

/* Room for one more in a list of pointers. */
static kv_status_t reserve(void ***list, int count, int *most)
{
    if (count < *most)
        return KV_OK;
    int more = *most * 2 + 8;
    void **longer = kv_alloc((size_t)more * sizeof *longer);
    KV_TRY_ALLOC(longer, "work on a device");
    if (count > 0)
        memcpy(longer, *list, (size_t)count * sizeof *longer);
    kv_free(*list);
    *list = longer;
    *most = more;
    return KV_OK;
}

kv_status_t kv_device_work_begin(kv_device_work_t *work, kv_lane_t lane)
{
    *work = (kv_device_work_t){.lane = lane};
    return kv_device_enter(&work->api);
}

kv_status_t kv_device_work_end(kv_device_work_t *work, kv_mark_t **mark)
{
    for (int i = 0; i < work->num_temps; i++)
        kv_lane_free(work->lane, NULL, work->temps[i]);
    kv_status_t status = kv_mark_new(work->lane, mark);
    for (int i = 0; i < work->num_pinned && status == KV_OK; i++)
        kv_mark_keep(*mark, kv_buffer_drop, work->pinned[i]);
    kv_free(work->temps);
    kv_free(work->pinned);
    kv_device_leave();
    return status;
}

kv_status_t kv_device_temp(kv_device_work_t *work, size_t bytes, void **out)
{
    *out = NULL;
    if (bytes == 0)
        return KV_OK;
    KV_TRY(reserve(&work->temps, work->num_temps, &work->max_temps));
    KV_TRY(KV_DEVICE_DO(work, alloc, work->lane.stream, (int64_t)bytes, out));
    work->temps[work->num_temps++] = *out;
    return KV_OK;
}

kv_status_t kv_device_pinned(kv_device_work_t *work, size_t bytes, kv_buffer_t **out)
{
    KV_TRY(reserve((void ***)&work->pinned, work->num_pinned, &work->max_pinned));
    KV_TRY(kv_pinned_new(work->lane.device, bytes, out));
    work->pinned[work->num_pinned++] = *out;
    return KV_OK;
}

kv_status_t kv_device_upload(kv_device_work_t *work, const void *from, size_t bytes, void *to)
{
    kv_buffer_t *pinned;
    if (bytes == 0)
        return KV_OK;
    KV_TRY(kv_device_pinned(work, bytes, &pinned));
    memcpy(pinned->data, from, bytes);
    return KV_DEVICE_DO(work, copy, work->lane.stream, KV_DEVICE_TO_DEVICE, (int64_t)bytes,
                        pinned->data, to);
}

kv_status_t kv_device_upload_view(kv_device_work_t *work, const kv_view_t *from, void *to)
{
    kv_buffer_t *pinned;
    size_t bytes = (size_t)from->count * kv_dtype_bytes((kv_dtype_t)from->dtype);
    if (from->strides == NULL)
        return kv_device_upload(work, from->data, bytes, to);
    if (bytes == 0)
        return KV_OK;
    KV_TRY(kv_device_pinned(work, bytes, &pinned));
    kv_view_gather(from, pinned->data);
    return KV_DEVICE_DO(work, copy, work->lane.stream, KV_DEVICE_TO_DEVICE, (int64_t)bytes,
                        pinned->data, to);
}

kv_status_t kv_device_download(kv_device_work_t *work, const void *from, size_t bytes,
                               kv_buffer_t **out)
{
    KV_TRY(kv_device_pinned(work, bytes, out));
    return KV_DEVICE_DO(work, copy, work->lane.stream, KV_DEVICE_TO_HOST, (int64_t)bytes, from,
                        (*out)->data);
}

kv_status_t kv_device_copy(kv_device_work_t *work, int from_device, const void *from, int to_device,
                           void *to, size_t bytes)
{
    if (from_device == to_device)
        return KV_DEVICE_DO(work, copy, work->lane.stream, KV_DEVICE_WITHIN, (int64_t)bytes, from,
                            to);
    return KV_DEVICE_DO(work, copy_peer, work->lane.stream, (int64_t)bytes, from_device, from,
                        to_device, to);
}

kv_status_t kv_device_take(kv_device_work_t *work, kv_place_t *place, kv_buffer_t **buffer)
{
    kv_buffer_t *before = *buffer, *taken;
    kv_place_t *other = kv_buffer_place(before);
    if (KV_LIKELY(other == place))
        return KV_OK;
    KV_TRY(kv_device_buffer_new(place, work->lane, before->bytes, &taken));
    kv_status_t status;
    if (other == NULL) {
        status = kv_device_upload(work, before->data, before->bytes, taken->data);
    } else {
        kv_mark_t *after = NULL, *mark = NULL;
        status = kv_place_begin(other, work->lane, &after);
        if (status == KV_OK)
            status = kv_device_copy(work, kv_place_device(other), before->data,
                                    kv_place_device(place), taken->data, before->bytes);
        if (status == KV_OK)
            status = kv_mark_new(work->lane, &mark);
        if (status == KV_OK)
            status = kv_place_end(other, work->lane, mark, after);
        else
            kv_mark_rele(after);
        kv_mark_rele(mark);
    }
    if (status != KV_OK) {
        kv_buffer_rele(taken);
        return status;
    }
    *buffer = taken;
    kv_buffer_rele(before);
    return KV_OK;
}

/* ----------------------------------------------------------------------------------- slots */

typedef struct maker {
    kv_slot_maker_t base;
    kv_device_work_t *work;
    kv_place_t *place;
} maker_t;

static kv_status_t make_slot(kv_slot_maker_t *base, kv_dtype_t dtype, int64_t count,
                             const void *weight, kv_buffer_t **buffer)
{
    maker_t *maker = (maker_t *)base;
    kv_device_work_t *work = maker->work;
    kv_dtype_t wide = kv_dtype_wide(dtype);
    size_t bytes = (size_t)count * kv_dtype_bytes(wide);
    kv_buffer_t *made;
    if (*buffer != NULL)
        return kv_device_take(work, maker->place, buffer);
    KV_TRY(kv_device_buffer_new(maker->place, work->lane, bytes, &made));
    kv_device_sum_t job = {
        .count = count, .num_src = 1, .num_dst = 1, .src = &weight, .dst = &made->data};
    kv_status_t status =
        weight != NULL && count > 0
            ? KV_DEVICE_DO(work, sum, work->lane.stream, dtype, wide, 1, &job)
            : KV_DEVICE_DO(work, zero, work->lane.stream, (int64_t)bytes, made->data);
    if (status != KV_OK)
        kv_buffer_rele(made);
    else
        *buffer = made;
    return status;
}

kv_status_t kv_device_weight(kv_device_work_t *work, kv_place_t *place, kv_slots_t *slots,
                             const kv_step_t *step, kv_dtype_t dtype, int64_t num_rows,
                             int64_t row_count, void *data, kv_weight_t *out)
{
    maker_t maker = {.base = {make_slot}, .work = work, .place = place};
    return kv_slots_weight_by(slots, &maker.base, step, dtype, num_rows, row_count, data, out);
}

/* --------------------------------------------------------------------------------- the host */

kv_status_t kv_buffer_fetch(const kv_buffer_t *buffer, void *to, kv_caller_t *caller)
{
    kv_place_t *place = kv_buffer_place(buffer);
    kv_device_work_t work;
    kv_lane_t lane;
    kv_buffer_t *arrived = NULL;
    kv_mark_t *after = NULL, *mark = NULL;
    if (buffer->bytes == 0)
        return KV_OK;
    KV_TRY(kv_lane_own(kv_place_device(place), &lane));
    KV_TRY(kv_device_work_begin(&work, lane));
    kv_status_t status = kv_place_begin(place, lane, &after);
    if (status == KV_OK) {
        status = kv_device_download(&work, buffer->data, buffer->bytes, &arrived);
        if (status == KV_OK)
            kv_buffer_hold(arrived);
        else
            arrived = NULL;
    }
    kv_status_t ended = kv_device_work_end(&work, &mark);
    if (status == KV_OK)
        status = ended;
    if (ended == KV_OK) {
        kv_status_t placed = kv_place_end(place, lane, mark, after);
        status = status == KV_OK ? placed : status;
    } else {
        kv_mark_rele(after);
    }
    if (status == KV_OK)
        status = kv_mark_wait(mark, caller);
    if (status == KV_OK)
        memcpy(to, arrived->data, buffer->bytes);
    kv_buffer_rele(arrived);
    kv_mark_rele(mark);
    return status;
}

kv_status_t kv_buffer_bring_home(kv_buffer_t **buffer, kv_caller_t *caller)
{
    kv_buffer_t *home;
    if (*buffer == NULL || kv_buffer_place(*buffer) == NULL)
        return KV_OK;
    KV_TRY(kv_buffer_new((*buffer)->bytes, &home));
    kv_status_t status = kv_buffer_fetch(*buffer, home->data, caller);
    if (status != KV_OK) {
        kv_buffer_rele(home);
        return status;
    }
    kv_buffer_rele(*buffer);
    *buffer = home;
    return KV_OK;
}
