/* Sums and broadcasts between devices by NVIDIA's NCCL, which is opened at run time.
 *
 * How a store uses it, with a lane for each device of its list, in the order of the list:
 *
 *     kv_nccl_new(n, devices, caller, &nccl)       once; seconds
 *     for each key and device: order the lane behind what the arrays wait for (kv_place_begin)
 *     kv_nccl_sum(nccl, lanes, num_keys, jobs, caller)      a group for the whole list
 *     for each device: a mark behind it (kv_mark_new), which the places get (kv_place_end)
 *     to wait for values: kv_mark_wait with a deadline, and then kv_nccl_check: without that an
 *         error that came while the devices worked would be numbers nobody vouches for
 *     a wait that ends with KV_TIMEOUT: kv_nccl_abort, which ends what the devices still do
 *     kv_nccl_free(nccl, caller)       when the arrays of its calls may go, too
 *
 * Work is put on the lanes, and what is put there later comes after it: a call waits, detached,
 * until NCCL has put it there (the first one connects the devices), never for the devices. Calls of
 * several threads on one group enter one after the other. Two groups that share devices may wait
 * for each other for ever if a device comes to their work in another order than the next one does:
 * a process has one group for its devices, or no work of two at once.
 *
 * A failure, a deadline and an interrupt while a call is inside NCCL end the group: nothing is sure
 * about what is under way, so its communicators are aborted, and every later call is refused with
 * KV_DEVICE and the first error's sentence. A new group may be made then.
 *
 * Arithmetic: NCCL adds in an order of its own, and rounds each sum of two float16 or bfloat16
 * values to that type, where a store of kind `device` rounds once. With more than two devices the
 * last bits of floating sums may differ from those of other kinds; all devices get the same.
 *
 * All functions may be called by any thread, no lock held; kv_nccl_free when nobody else does. A
 * `caller` of NULL waits KV_DEVICE_WAIT_NS at most.
 */
#ifndef KV_COMM_NCCL_H
#define KV_COMM_NCCL_H

#include "comm/device.h"

/* Opens NCCL, if this process has not, and tells its file and version (22707 is 2.27.7). `file` is
 * valid for ever. Looked for: what KVSTORE_NCCL names; else a copy that is in this process already,
 * the folder's, which may be NULL, the system's. KV_NOT_BUILT: none, or too old, and what to
 * install. Other functions use what was opened, or open it without a folder. */
KV_MUST_CHECK kv_status_t kv_nccl_load(const char *folder, const char **file, int *version);

/* Devices of one process, or of several, that work together. */
typedef struct kv_nccl kv_nccl_t;

/* Gives a group of this process alone. Devices differ. KV_TIMEOUT, KV_INTERRUPTED, KV_CALLBACK: by
 * the caller; KV_DEVICE, KV_NOT_BUILT. */
KV_MUST_CHECK kv_status_t kv_nccl_new(int num_devices, const int *devices, kv_caller_t *caller,
                                      kv_nccl_t **out);

/* Several processes: one makes an id, each joins with it, as so many ranks of all from `first_rank`
 * on, and all must within the time that a caller has. An id serves one group. */
enum { KV_NCCL_ID_BYTES = 128 };
typedef struct kv_nccl_id {
    char bytes[KV_NCCL_ID_BYTES];
} kv_nccl_id_t;

KV_MUST_CHECK kv_status_t kv_nccl_id(kv_nccl_id_t *out);
KV_MUST_CHECK kv_status_t kv_nccl_join(const kv_nccl_id_t *id, int num_ranks, int first_rank,
                                       int num_devices, const int *devices, kv_caller_t *caller,
                                       kv_nccl_t **out);

/* One key: an array on each device of this process, in their order. All ranks have the same jobs in
 * the same order, and all processes make the same calls in the same order. */
typedef struct kv_nccl_job {
    kv_dtype_t dtype;
    int64_t count;
    const void *const *src; /* dst[i] may be src[i]; other overlaps are not allowed */
    void *const *dst;
} kv_nccl_job_t;

/* Every dst = the sum of all src of all ranks. `lanes`: one for each device, in their order. The
 * lists are read before the call returns. */
KV_MUST_CHECK kv_status_t kv_nccl_sum(kv_nccl_t *nccl, const kv_lane_t *lanes, int num_jobs,
                                      const kv_nccl_job_t *jobs, kv_caller_t *caller);
/* Every dst = the src of rank `root`; the other src are not looked at. */
KV_MUST_CHECK kv_status_t kv_nccl_broadcast(kv_nccl_t *nccl, const kv_lane_t *lanes, int root,
                                            int num_jobs, const kv_nccl_job_t *jobs,
                                            kv_caller_t *caller);

/* KV_DEVICE if the group is lost, also by an error that came after its call: it is aborted then.
 * Does not wait. */
KV_MUST_CHECK kv_status_t kv_nccl_check(kv_nccl_t *nccl);

/* Ends the group and what the devices do for it, from any thread; a call that is inside NCCL
 * returns KV_DEVICE soon. `why` is a sentence for those who call later. */
void kv_nccl_abort(kv_nccl_t *nccl, const char *why);

/* Waits for the work of the devices, for the caller's time at most (NULL: ten seconds), and ends
 * the group: later calls are refused. All processes do it together. KV_TIMEOUT and other errors:
 * what was not done by then is aborted. Of a lost group it does nothing. */
KV_MUST_CHECK kv_status_t kv_nccl_end(kv_nccl_t *nccl, kv_caller_t *caller);
/* The same, and frees the group, which may be NULL. */
KV_MUST_CHECK kv_status_t kv_nccl_free(kv_nccl_t *nccl, kv_caller_t *caller);

#endif
