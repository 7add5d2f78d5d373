/* Memory of devices, as stores use it: lanes, on which work is put, marks, which tell its end, and
 * buffers on devices and in pinned memory of the host.
 *
 * Work is put on the stream of the array that a call brings where there is one, so that its order
 * with what the array's owner does is the stream's own. A value that calls on several streams use
 * has a place, which keeps the mark of the newest work on it: who puts more work on the value lets
 * his lane come after that mark first, and leaves a mark of his own.
 *
 * All functions may be called by any thread, locks of lower rank held; those without a caller never
 * wait for a device. They leave the thread's current device as it was. KV_DEVICE: the device's own
 * sentence; KV_NOT_BUILT: there is no plug-in.
 */
#ifndef KV_COMM_DEVICE_H
#define KV_COMM_DEVICE_H

#include "array/array.h"
#include "base/caller.h"
#include "kernels/device_load.h"

/* ---------------------------------------------------------------------------------- lanes */

/* A stream of a device: the store's own, or somebody else's. */
typedef struct kv_lane {
    int device;
    void *stream;
} kv_lane_t;

/* Gives the device's own lane, made at first use. The first call of a process may take seconds.
 * KV_DEVICE for a device that is not there, with how many there are. */
KV_MUST_CHECK kv_status_t kv_lane_own(int device, kv_lane_t *out);

/* Whether this process has had a lane. If not, nothing is in device memory. */
bool kv_device_used(void);

static inline bool kv_lane_same(kv_lane_t a, kv_lane_t b)
{
    return a.device == b.device && a.stream == b.stream;
}

/* What is put on `to` later comes after all that is on `from` now. */
KV_MUST_CHECK kv_status_t kv_lane_join(kv_lane_t from, kv_lane_t to);

/* Gives the plug-in's table for use until kv_device_leave, which makes the thread's current device
 * again what it was: the table's functions change it. May be nested. */
KV_MUST_CHECK kv_status_t kv_device_enter(const kv_device_api_t **out);
void kv_device_leave(void);

/* ---------------------------------------------------------------------------------- marks */

/* A point in the order of a lane, shared by counting. It never moves. */
typedef struct kv_mark kv_mark_t;

/* Gives a mark at the end of what is on the lane now, with one share. */
KV_MUST_CHECK kv_status_t kv_mark_new(kv_lane_t lane, kv_mark_t **out);
kv_mark_t *kv_mark_hold(kv_mark_t *mark);
void kv_mark_rele(kv_mark_t *mark); /* NULL is allowed */
/* What is put on the lane later comes after the mark. */
KV_MUST_CHECK kv_status_t kv_mark_before(const kv_mark_t *mark, kv_lane_t lane);
/* Whether all work before the mark is done. */
KV_MUST_CHECK kv_status_t kv_mark_passed(const kv_mark_t *mark, bool *passed);
/* Waits for that, detached if it takes long; KV_TIMEOUT, KV_INTERRUPTED, KV_CALLBACK as in
 * kv_engine_enter. `caller` NULL: a thread of the engine, which waits KV_DEVICE_WAIT_NS at most. */
#define KV_DEVICE_WAIT_NS (300 * INT64_C(1000000000))
KV_MUST_CHECK kv_status_t kv_mark_wait(const kv_mark_t *mark, kv_caller_t *caller);

/* Calls drop(what) once, when the mark has passed or its device is lost: by kv_device_reap, in any
 * thread, no lock held; or now, if there is no memory to remember it: then after a wait as above,
 * without a caller. */
void kv_mark_keep(kv_mark_t *mark, void (*drop)(void *what), void *what);
/* Drops what has been kept for marks that have passed. Cheap when there is nothing. The binding
 * does it at each call. */
void kv_device_reap(void);
/* Waits until nothing is kept, a few seconds at most, and frees what is kept for later use. At the
 * end of a process, and of tests. */
void kv_device_settle(void);

/* --------------------------------------------------------------------------------- buffers */

/* Where a value is, and how far work on it has come; shared by counting by the value and its
 * buffers. */
typedef struct kv_place kv_place_t;

KV_MUST_CHECK kv_status_t kv_place_new(int device, kv_place_t **out);
kv_place_t *kv_place_hold(kv_place_t *place);
void kv_place_rele(kv_place_t *place); /* NULL is allowed */
int kv_place_device(const kv_place_t *place);

/* Around work on the value, by whoever may read or write it. Begin: what is put on the lane from
 * now on comes after all that has been done with the value; *after, a share or NULL, is for the
 * end. End: `mark`, which stands behind the work on that lane, becomes the place's newest, or,
 * where other readers have ended work meanwhile, one that stands behind theirs too. Takes `after`.
 */
KV_MUST_CHECK kv_status_t kv_place_begin(kv_place_t *place, kv_lane_t lane, kv_mark_t **after);
KV_MUST_CHECK kv_status_t kv_place_end(kv_place_t *place, kv_lane_t lane, kv_mark_t *mark,
                                       kv_mark_t *after);

/* Gives memory on the place's device, contents unspecified, for work on the lane that is ended by
 * kv_place_end. Freed behind the place's newest mark. The host may not touch it. */
KV_MUST_CHECK kv_status_t kv_device_buffer_new(kv_place_t *place, kv_lane_t lane, size_t bytes,
                                               kv_buffer_t **out);
/* Frees memory of the lane's device in the order of the lane, behind a mark if that is not NULL.
 * What a device that is lost does not free is lost with it. */
void kv_lane_free(kv_lane_t lane, const kv_mark_t *mark, void *pointer);

/* The place of a buffer in device memory; NULL: the host's. */
kv_place_t *kv_buffer_place(const kv_buffer_t *buffer);

/* Gives pinned memory of the host, for copies that do not wait. Blocks, in sizes of powers of two,
 * are used again. */
KV_MUST_CHECK kv_status_t kv_pinned_new(int device, size_t bytes, kv_buffer_t **out);
/* Frees the blocks that nobody uses. */
void kv_pinned_trim(void);
/* A drop for kv_mark_keep. */
void kv_buffer_drop(void *buffer);

/* Copies a contiguous view in device memory to the host: on its stream, and waits. */
KV_MUST_CHECK kv_status_t kv_device_fetch(const kv_view_t *view, void *to, kv_caller_t *caller);

#endif
