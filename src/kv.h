/* The core's face: a key-value store for arrays, usable from plain C.
 *
 * A store keeps one value a key. `push` sums the values given for a key and updates the stored one,
 * `pull` copies it out. All calls are thread-safe; the order of the calls on a key is the order in
 * which they entered. Nothing is changed before everything in a call has been checked; when several
 * things are wrong the first of this order is reported: store closed, key type, key known, element
 * type, shape, writable.
 *
 * Everything passed in is borrowed for the length of the call, unless `async` is given.
 */
#ifndef KV_KV_H
#define KV_KV_H

#include "array/array.h"
#include "array/sparse.h"
#include "base/caller.h"
#include "base/name.h"
#include "base/status.h"
#include "comm/host.h"
#include "compress/codec.h"
#include "engine/engine.h"
#include "optim/optim.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ------------------------------------------------------------------------------- runtime */

/* Threads that a store may ask for at most. */
enum { KV_MAX_THREADS = 1024 };

/* What all stores and arrays of a process share: one engine, one team, one kernel table. A test may
 * hold two. */
typedef struct kv_runtime {
    kv_engine_t *engine;
    kv_team_t *team;
    kv_var_t nccl; /* written by each push that uses NCCL: one at a time in a process */
    const kv_kernels_t *kernels;
    int num_threads;     /* KVSTORE_NUM_THREADS, or the processors of this process */
    uint64_t generation; /* kv_fork_generation of its birth */
} kv_runtime_t;

/* Gives a runtime made by the settings in force. Starts no thread. */
KV_MUST_CHECK kv_status_t kv_runtime_new(kv_runtime_t **out);
/* Refuses new work, runs what was submitted, joins all threads. Blocks; `caller` (may be NULL) as
 * in kv_engine_stop. */
void kv_runtime_stop(kv_runtime_t *runtime, kv_caller_t *caller);
void kv_runtime_free(kv_runtime_t *runtime); /* after stop */

/* --------------------------------------------------------------------------------- kinds */

/* What a name such as "dist_sync_device" asks for. */
typedef struct kv_kind {
    enum { KV_KIND_LOCAL, KV_KIND_DEVICE, KV_KIND_NCCL, KV_KIND_DIST } family;
    bool async;  /* dist: every push is applied on its own */
    bool device; /* merging inside a process is done on the values' device */
} kv_kind_t;

/* Parses a kind, letter case free. KV_INVALID for a name that is none, with the nearest one. */
KV_MUST_CHECK kv_status_t kv_kind_parse(const char *name, kv_kind_t *out);
/* The i-th name, NULL past the last. */
const char *kv_kind_name(int i);

/* -------------------------------------------------------------------------------- stores */

typedef struct kv_store kv_store_t;

typedef struct kv_client kv_client_t; /* ps/client.h */
typedef struct kv_remote kv_remote_t;
typedef struct kv_nccl_team kv_nccl_team_t; /* store/nccl.h */

typedef struct kv_store_options {
    int num_threads; /* of the kernels; 0: the runtime's */
    kv_client_t
        *client; /* of a dist store: this worker's, borrowed for the life of the store. NULL:
                    the process is a server or the scheduler, and the store only says so */
    kv_nccl_team_t *team; /* of kind nccl over several processes: this one's place among them,
                             borrowed for the life of the store; else NULL */
} kv_store_options_t;

/* Gives an open store. KV_INVALID for an unknown kind; KV_NOT_BUILT for one that this build cannot
 * run, with what to do. The runtime is borrowed for the life of the store. */
KV_MUST_CHECK kv_status_t kv_store_new(kv_runtime_t *runtime, const char *kind,
                                       const kv_store_options_t *options, kv_store_t **out);
/* Refuses further calls, forgets all keys. Idempotent, does not block: operations under way keep
 * what they use. */
void kv_store_close(kv_store_t *store);
void kv_store_free(kv_store_t *store); /* closes; no call may be under way */

/* KV_CLOSED when it is closed or belongs to the parent of a forked process; KV_PEER_LOST when a
 * node of its cluster is gone. */
KV_MUST_CHECK kv_status_t kv_store_check_open(const kv_store_t *store);
const char *kv_store_kind(const kv_store_t *store);    /* lower case, as asked for */
int32_t kv_store_rank(const kv_store_t *store);        /* of this worker; 0 in one process */
int32_t kv_store_num_workers(const kv_store_t *store); /* 1 in one process */
uint64_t kv_store_generation(const kv_store_t *store); /* of the process that made it */

/* One key of a call with its values and outs. A name may stand in several items of a call; its
 * values and outs are then taken together (init, broadcast: KV_INVALID). */
typedef struct kv_item {
    kv_name_t name;
    int32_t num_values, num_outs;
    const kv_view_t *values; /* [num_values] */
    const kv_view_t *outs;   /* [num_outs] */
} kv_item_t;

/* What an asynchronous call keeps alive: released once, by any thread, when nothing reads or writes
 * the caller's memory any more. */
typedef struct kv_hold kv_hold_t;
struct kv_hold {
    _Atomic int64_t refs;
    void (*release)(kv_hold_t *hold);
};

/* Sorted, distinct row ids; shared by counting its buffer. */
typedef struct kv_row_ids {
    kv_buffer_t *ids; /* int64[count] */
    int64_t count;
} kv_row_ids_t;

typedef struct kv_call {
    const kv_item_t *items;
    int64_t num_items;
    /* All views of the call; the items' `values` and `outs` point into these, in order. */
    const kv_view_t *values, *outs;
    int64_t num_values, num_outs;
    const kv_row_ids_t *row_ids; /* [num_outs], of row_sparse_pull; else NULL */
    int32_t priority;
    /* False: the call returns when the values have been read and the outs written. True: it may
     * return before; all foreign memory then stays valid until `hold` is released (`hold` may be
     * NULL when every view is an array of ours). An updater makes any call synchronous. */
    bool async;
    /* The call takes shares of its own: until asynchronous work is done, and, whatever the call is,
     * until devices are done with CUDA memory, which stays valid so long. */
    kv_hold_t *hold;
    kv_handle_t **handle; /* may be NULL; set when an asynchronous call succeeds: one share for the
                             caller. With an updater NULL: everything is done already */
    bool checked;         /* out: all checks passed, so an error comes from the work itself */
    int64_t num_done;     /* out: how many keys, in the order of their first appearance, the call
                             had dealt with when it ended */
    char not_finite[96];  /* out, "" if there is none: the name of a key whose compression residual
                             has been seen to hold a NaN or an infinity (told once a key) */
} kv_call_t;

/* Each item has one value. KV_INVALID when a key is known already or stands twice. With outs
 * (broadcast) each out becomes the value in the same call. Synchronous. */
KV_MUST_CHECK kv_status_t kv_store_init(kv_store_t *store, kv_call_t *call, kv_caller_t *caller);

/* stored = update(sum of the values); with outs (pushpull) each out becomes the stored value in the
 * same operation.
 *
 * Values in device memory, in a dist store: they go out while they come. KV_DEVICE and every error
 * of a wait mean that nothing has gone out, as long as the devices have not come to the values of
 * the call. Once they have, all of it goes out, whatever the caller's deadline or poll says; if a
 * device fails then, the servers may have any part of it, KV_DEVICE says so, and every later call
 * of the store is KV_PEER_LOST. */
KV_MUST_CHECK kv_status_t kv_store_push(kv_store_t *store, kv_call_t *call, kv_caller_t *caller);

/* Each out becomes the stored value. */
KV_MUST_CHECK kv_status_t kv_store_pull(kv_store_t *store, kv_call_t *call, kv_caller_t *caller);

/* Each out, a row-sparse array, becomes the rows call->row_ids of the stored value; rows that a
 * row-sparse value has not are zeros. KV_INVALID for an id outside the shape. */
KV_MUST_CHECK kv_status_t kv_store_row_sparse_pull(kv_store_t *store, kv_call_t *call,
                                                   kv_caller_t *caller);

/* The quick way for one key with one value (push), one out (pull), or both (pushpull), each
 * foreign, contiguous, `out` writable. *done = false: nothing has happened; the key is busy, too
 * large, or something is wrong: the general call does it or tells. Else the status is that of the
 * updater. */
KV_MUST_CHECK kv_status_t kv_store_try_small(kv_store_t *store, const kv_name_t *name,
                                             const kv_view_t *value, const kv_view_t *out,
                                             kv_caller_t *caller, bool *done);

/* ------------------------------------------------------------------------------- updater */

/* Something that the updater keeps with a key; dropped with the key, by any thread, no lock held.
 */
typedef struct kv_cache {
    void *data;
    void (*drop)(void *data); /* NULL: nothing is kept */
} kv_cache_t;

/* What an updater sees. `recv` is memory of the store, never the caller's; both buffers may be kept
 * by holding them, their contents are unspecified once the updater has returned. What is row-sparse
 * stands in the row set instead, and its buffer is NULL; `stored_rows` may be replaced. */
typedef struct kv_update {
    const kv_name_t *name;
    kv_dtype_t dtype;
    int ndim;
    const int64_t *shape;
    kv_buffer_t *recv, *stored;
    int device;   /* where both buffers are: a CUDA device's number; -1: the host */
    void *stream; /* of that device: what is put on it finds the buffers' elements, and what is put
                     on it after the updater finds them as the updater has left them */
    const kv_rowset_t *recv_rows;
    kv_rowset_t *stored_rows;
    const kv_view_t *first; /* the first pushed value: tells the array library */
    kv_cache_t *cache;
} kv_update_t;

/* An updater, shared by counting: the store has one share, each push under way another. */
typedef struct kv_updater kv_updater_t;
struct kv_updater {
    _Atomic int64_t refs;
    /* Called attached, in the pushing thread, while the key is held. KV_CALLBACK: the caller's
     * exception is set. */
    kv_status_t (*run)(kv_updater_t *updater, const kv_update_t *update, kv_caller_t *caller);
    /* Called by whoever drops the last share, any thread, no lock held. */
    void (*free)(kv_updater_t *updater);
};

/* Takes one share of `updater`; NULL restores assignment. A push under way keeps the updater that
 * it began with. On failure the share is still the caller's. In a dist store, whose values are out
 * of an updater's reach, only NULL, which drops the optimizer. */
KV_MUST_CHECK kv_status_t kv_store_set_updater(kv_store_t *store, kv_updater_t *updater);

/* ----------------------------------------------------------------------------- optimizer */

/* What tells the learning rate. Called attached, in the pushing thread, no lock held. */
typedef struct kv_schedule kv_schedule_t;
struct kv_schedule {
    kv_status_t (*rate)(kv_schedule_t *schedule, int64_t num_update, double *rate);
    void (*free)(kv_schedule_t *schedule); /* any thread, no lock held */
};

/* What one key has of its own. */
typedef struct kv_multiplier {
    kv_name_t name;
    double lr, wd;
    bool plain_rate; /* kv_step_t */
} kv_multiplier_t;

/* A built-in optimizer with its numbers: never changed, shared by counting. */
typedef struct kv_optimizer kv_optimizer_t;

/* Gives one share. Checks the numbers; copies the multipliers; takes `schedule` (may be NULL), also
 * on failure. `declared`: the number by which the servers of a dist store know it, 0: none. */
KV_MUST_CHECK kv_status_t kv_optimizer_new(const kv_optim_class_t *optim,
                                           const kv_optim_numbers_t *numbers,
                                           kv_schedule_t *schedule,
                                           const kv_multiplier_t *multipliers,
                                           int64_t num_multipliers, uint64_t declared,
                                           kv_optimizer_t **out);
void kv_optimizer_rele(kv_optimizer_t *optimizer); /* NULL is allowed */

/* From now on pushes update the stored values by this optimizer. One of the same class as before
 * goes on with counts and state; another one, or an updater, begins anew. Takes one share, on
 * failure it is still the caller's. */
KV_MUST_CHECK kv_status_t kv_store_set_optimizer(kv_store_t *store, kv_optimizer_t *optimizer);

/* ---------------------------------------------------------------------------- compression */

/* How the values of later pushes travel. Residuals are kept while the type is the same. */
KV_MUST_CHECK kv_status_t kv_store_set_compression(kv_store_t *store, const kv_codec_t *codec);

/* --------------------------------------------------------------------------------- states */

/* A part of a key's training state: `slot` "m", "master", "residual.0", …, with an element type of
 * its own. */
typedef struct kv_state_part {
    char slot[32];
    kv_dtype_t dtype;
    int ndim; /* 1: one number a row or the like; else that of the value */
    const int64_t *shape;
    int64_t bytes;     /* what KV_STATE_PACKED has for a shape */
    kv_buffer_t *data; /* one share */
} kv_state_part_t;

/* The slot of all that an optimizer in Python keeps with a key of a dist store: uint8, one
 * dimension, opaque here. */
#define KV_STATE_PACKED "packed"

/* What a store has learned of one key besides its value. */
typedef struct kv_key_state {
    kv_name_t name;
    int64_t count; /* pushes counted; -1: none, there are only residuals */
    int num_parts;
    kv_state_part_t *parts;
} kv_key_state_t;

typedef struct kv_states {
    kv_optim_state_t whole;
    uint64_t counted; /* moves whenever the store counts or its counts are replaced */
    int64_t total;    /* the counts of all keys, as the store has them */
    kv_codec_t codec;
    int64_t num_keys;
    kv_key_state_t *keys;
} kv_states_t;

/* How much of it. */
typedef enum kv_states_share {
    KV_STATES_ALL,
    KV_STATES_COUNTS, /* what this process counts, no state of keys: of a dist store, whose other
                         workers see to the rest. Never waits */
    KV_STATES_CHECK,  /* of an import: all checks, nothing is changed */
    KV_STATES_PUSHED, /* of an export: how often keys were pushed, without their states */
} kv_states_share_t;

/* Gives a copy of everything that training has left, each key between two of its operations. The
 * state of a row-sparse key has its full shape. Waits as a pull does. In a dist store the keys'
 * counts and states are those of the servers, after all pushes that this worker has made before,
 * and there are no residuals; KV_STATES_COUNTS gives no keys. What an optimizer in Python keeps
 * there is one part, KV_STATE_PACKED. */
KV_MUST_CHECK kv_status_t kv_store_export_states(kv_store_t *store, kv_states_share_t share,
                                                 kv_states_t *out, kv_caller_t *caller);
/* Replaces it for the keys that are in `states`; all keys are known. Checks everything first:
 * KV_INVALID names key and slot. Counts and slots need an optimizer, residuals do not.
 * `keep_whole`: states->whole is not looked at. In a dist store the states go to the servers and
 * residuals stay as they are; after an error of a server or of the wait the sentence says that a
 * part may have arrived. KV_STATES_COUNTS: KV_INVALID if the store has counted since
 * states->counted, unless that is 0. */
KV_MUST_CHECK kv_status_t kv_store_import_states(kv_store_t *store, const kv_states_t *states,
                                                 bool keep_whole, kv_states_share_t share,
                                                 kv_caller_t *caller);
void kv_states_fini(kv_states_t *states);

/* ---------------------------------------------------------------------------------- keys */

/* Drops the keys of a call's items, all or none; a name that stands twice is dropped once.
 * Operations that entered before keep what they use. Blocks in a dist store only: until all workers
 * have called it. KV_INVALID inside a key's own updater. */
KV_MUST_CHECK kv_status_t kv_store_delete(kv_store_t *store, const kv_call_t *call,
                                          kv_caller_t *caller);

/* What a call on these keys would find wrong with them. */
KV_MUST_CHECK kv_status_t kv_store_check_keys(kv_store_t *store, const kv_call_t *call,
                                              const char *verb);

/* True the first time it is asked for this key: a pull that skips row-sparse outs warns once. */
bool kv_store_first_skip(kv_store_t *store, const kv_name_t *name);

/* What init fixed. `sparse` (may be NULL): the value is row-sparse. `shape` (may be NULL) gets up
 * to KV_MAX_DIMS extents; `verb` is for messages. */
KV_MUST_CHECK kv_status_t kv_store_describe(kv_store_t *store, const kv_name_t *name,
                                            const char *verb, kv_dtype_t *dtype, bool *sparse,
                                            int *ndim, int64_t *shape);
bool kv_store_contains(kv_store_t *store, const kv_name_t *name);

/* Gives the names of all keys in the order of their init, in one block to be freed with kv_free. */
KV_MUST_CHECK kv_status_t kv_store_keys(kv_store_t *store, kv_name_t **names, int64_t *num_names);

#endif
