/* Work that is put on one lane in one go: copies in and out through pinned memory, memory that is
 * needed meanwhile, and the state of optimizers on devices. Everything is put on the lane at once
 * and runs later; the mark at the end tells when.
 */
#ifndef KV_COMM_DEVICE_WORK_H
#define KV_COMM_DEVICE_WORK_H

#include "comm/device.h"
#include "comm/slots.h"

typedef struct kv_device_work {
    const kv_device_api_t *api;
    kv_lane_t lane;
    void **temps;         /* device memory, freed at the end */
    kv_buffer_t **pinned; /* kept until the work is done */
    int num_temps, max_temps, num_pinned, max_pinned;
} kv_device_work_t;

/* Calls a function of the table with this work's device first; the rest of the arguments without
 * the sentence. */
#define KV_DEVICE_DO(work, function, ...)                                                          \
    kv_device_do_check(                                                                            \
        (work)->api->function((work)->lane.device, __VA_ARGS__, kv_device_sentence()))

/* A sentence of this thread, and what became of it. */
char *kv_device_sentence(void);
kv_status_t kv_device_do_check(kv_device_code_t code);

/* Must be ended if it succeeds. The thread's current device is another one until then. */
KV_MUST_CHECK kv_status_t kv_device_work_begin(kv_device_work_t *work, kv_lane_t lane);
/* Frees what was needed, in the order of the lane; the mark stands behind everything, with one
 * share. On an error there is none, and what is pinned stays so for ever: nobody could tell when
 * the device has done with it. */
KV_MUST_CHECK kv_status_t kv_device_work_end(kv_device_work_t *work, kv_mark_t **mark);

/* Gives device memory until the end of the work; NULL for no bytes. */
KV_MUST_CHECK kv_status_t kv_device_temp(kv_device_work_t *work, size_t bytes, void **out);
/* Gives pinned memory until the mark has passed. */
KV_MUST_CHECK kv_status_t kv_device_pinned(kv_device_work_t *work, size_t bytes, kv_buffer_t **out);
/* Host memory, contiguous or a view of any strides, is read now and comes to the device in order.
 */
KV_MUST_CHECK kv_status_t kv_device_upload(kv_device_work_t *work, const void *from, size_t bytes,
                                           void *to);
KV_MUST_CHECK kv_status_t kv_device_upload_view(kv_device_work_t *work, const kv_view_t *from,
                                                void *to);
/* Gives pinned memory that has the bytes once the mark has passed: borrowed from the work, whose
 * end keeps it until then; who reads it later holds it. */
KV_MUST_CHECK kv_status_t kv_device_download(kv_device_work_t *work, const void *from, size_t bytes,
                                             kv_buffer_t **out);
KV_MUST_CHECK kv_status_t kv_device_copy(kv_device_work_t *work, int from_device, const void *from,
                                         int to_device, void *to, size_t bytes);

/* Replaces a buffer in host memory, or of another place, by one of this place with its contents. */
KV_MUST_CHECK kv_status_t kv_device_take(kv_device_work_t *work, kv_place_t *place,
                                         kv_buffer_t **buffer);

/* kv_slots_weight for a value on the place's device: what the slots have elsewhere comes there. */
KV_MUST_CHECK kv_status_t kv_device_weight(kv_device_work_t *work, kv_place_t *place,
                                           kv_slots_t *slots, const kv_step_t *step,
                                           kv_dtype_t dtype, int64_t num_rows, int64_t row_count,
                                           void *data, kv_weight_t *out);

/* Copies a buffer in device memory to the host, by way of the device's own lane; waits. */
KV_MUST_CHECK kv_status_t kv_buffer_fetch(const kv_buffer_t *buffer, void *to, kv_caller_t *caller);
/* Replaces a buffer in device memory by one of the host; others and NULL are left alone. */
KV_MUST_CHECK kv_status_t kv_buffer_bring_home(kv_buffer_t **buffer, kv_caller_t *caller);

#endif
