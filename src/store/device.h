/* Work on the keys of one device, for the files that gather it (device.c), put it in order
 * (device_batch.c) and launch it (device_launch.c).
 */
#ifndef KV_STORE_DEVICE_H
#define KV_STORE_DEVICE_H

#include "comm/device_work.h"
#include "optim/pass.h"
#include "store/internal.h"

enum { KV_BATCH_LANES = 64, KV_BATCH_NORMS = 4 };

/* One key's share of the work. */
typedef struct kv_unit {
    const kv_work_t *work;
    kv_buffer_t **target; /* where the values go: the stored value, or what an updater gets */
    kv_place_t *place;
    kv_mark_t *after;
    bool begun;       /* kv_place_begin */
    const void **src; /* [num_values], on the device */
    void **dst;       /* [num_dst]: the target, if it is a push, and the outs there */
    int num_dst;
    /* With a codec, [num_values] each, and the sum that goes to a step, in the wide type. */
    void **codes, **residuals, *sum;
    kv_device_coded_t *coded;
    /* Of a step. */
    kv_weight_t weight;
    kv_pass_t pass;
    bool stepped;
    void *direction;      /* LAMB's */
    void *rooms;          /* for the sums of squares */
    kv_buffer_t *norms;   /* double[KV_BATCH_NORMS], pinned */
    kv_buffer_t *arrived; /* the value for outs in host memory, pinned */
} kv_unit_t;

typedef struct kv_batch {
    kv_device_work_t on;
    kv_unit_t *units;
    int64_t num_units;
    kv_lane_t others[KV_BATCH_LANES]; /* of arrays on other streams */
    int num_others;
    bool waits;            /* for an array whose owner does not follow its stream */
    void *jobs;            /* room for a list of jobs, one for each value of all units … */
    kv_buffer_t *unfinite; /* uint64[num_units] with a codec: residuals that are not, pinned */
    kv_caller_t *caller;
} kv_batch_t;

/* The largest job. */
typedef union kv_device_job {
    kv_device_sum_t sum;
    kv_device_step_t step;
    kv_device_squares_t squares;
    kv_device_encode_t encode;
    kv_device_decode_t decode;
} kv_device_job_t;

/* Puts the sums, codes and steps of all units on the lane. Waits where a step takes norms. After an
 * error some units may be done, and others not. */
KV_MUST_CHECK kv_status_t kv_batch_launch(kv_batch_t *batch);

/* Does the work on keys that are on the device, or come there by it; all are held, and belong to
 * one call. `target` NULL, or the buffer that one push writes instead of the stored value.
 * *launched: whether something may have been changed. */
KV_MUST_CHECK kv_status_t kv_batch_run(const kv_work_t *const *works, int64_t count, int device,
                                       kv_buffer_t **target, bool *launched);

/* Those outs of the work that are in host memory get the value, which is there too. */
KV_MUST_CHECK kv_status_t kv_deliver_here(kv_work_t work, const void *stored);

static inline bool kv_unit_codes(const kv_unit_t *unit)
{
    return unit->work->push && unit->work->codec.type != KV_CODEC_NONE;
}

static inline bool kv_unit_steps(const kv_unit_t *unit)
{
    return unit->work->push && unit->work->group.step != NULL;
}

#endif
