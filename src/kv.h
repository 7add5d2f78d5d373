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
#include "base/caller.h"
#include "base/status.h"
#include "comm/host.h"
#include "engine/engine.h"
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

typedef struct kv_store_options {
    int num_threads; /* of the kernels; 0: the runtime's */
} kv_store_options_t;

/* Gives an open store. KV_INVALID for an unknown kind; KV_NOT_BUILT for one that this build cannot
 * run, with what to do. The runtime is borrowed for the life of the store. */
KV_MUST_CHECK kv_status_t kv_store_new(kv_runtime_t *runtime, const char *kind,
                                       const kv_store_options_t *options, kv_store_t **out);
/* Refuses further calls, forgets all keys. Idempotent, does not block: operations under way keep
 * what they use. */
void kv_store_close(kv_store_t *store);
void kv_store_free(kv_store_t *store); /* closes; no call may be under way */

/* KV_CLOSED when it is closed or belongs to the parent of a forked process. */
KV_MUST_CHECK kv_status_t kv_store_check_open(const kv_store_t *store);
const char *kv_store_kind(const kv_store_t *store);    /* lower case, as asked for */
uint64_t kv_store_generation(const kv_store_t *store); /* of the process that made it */

/* A key: text (UTF-8, any bytes but none missing) or a number. */
typedef struct kv_name {
    const char *text; /* NULL: a number */
    size_t bytes;
    int64_t number;
} kv_name_t;

/* "'w'" or "3": for messages; long text is cut. Returns `text`. */
const char *kv_name_format(const kv_name_t *name, char *text, size_t bytes);

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

typedef struct kv_call {
    const kv_item_t *items;
    int64_t num_items;
    /* All views of the call; the items' `values` and `outs` point into these, in order. */
    const kv_view_t *values, *outs;
    int64_t num_values, num_outs;
    int32_t priority;
    /* False: the call returns when the values have been read and the outs written. True: it may
     * return before; all foreign memory then stays valid until `hold` is released (`hold` may be
     * NULL when every view is an array of ours). An updater makes any call synchronous. */
    bool async;
    kv_hold_t *hold;      /* the call takes shares of its own */
    kv_handle_t **handle; /* may be NULL; set when an asynchronous call succeeds: one share for the
                             caller. With an updater NULL: everything is done already */
    bool checked;         /* out: all checks passed, so an error comes from the work itself */
    int64_t num_done;     /* out: how many keys, in the order of their first appearance, the call
                             had dealt with when it ended */
} kv_call_t;

/* Each item has one value. KV_INVALID when a key is known already or stands twice. With outs
 * (broadcast) each out becomes the value in the same call. Synchronous. */
KV_MUST_CHECK kv_status_t kv_store_init(kv_store_t *store, kv_call_t *call, kv_caller_t *caller);

/* stored = update(sum of the values); with outs (pushpull) each out becomes the stored value in the
 * same operation. */
KV_MUST_CHECK kv_status_t kv_store_push(kv_store_t *store, kv_call_t *call, kv_caller_t *caller);

/* Each out becomes the stored value. */
KV_MUST_CHECK kv_status_t kv_store_pull(kv_store_t *store, kv_call_t *call, kv_caller_t *caller);

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
 * by holding them, their contents are unspecified once the updater has returned. */
typedef struct kv_update {
    const kv_name_t *name;
    kv_dtype_t dtype;
    int ndim;
    const int64_t *shape;
    kv_buffer_t *recv, *stored;
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
 * it began with. On failure the share is still the caller's. */
KV_MUST_CHECK kv_status_t kv_store_set_updater(kv_store_t *store, kv_updater_t *updater);

/* ---------------------------------------------------------------------------------- keys */

/* Drops the keys of a call's items, all or none; a name that stands twice is dropped once. Does not
 * block: operations that entered before keep what they use. KV_INVALID inside a key's own updater.
 */
KV_MUST_CHECK kv_status_t kv_store_delete(kv_store_t *store, const kv_call_t *call);

/* What a call on these keys would find wrong with them. */
KV_MUST_CHECK kv_status_t kv_store_check_keys(kv_store_t *store, const kv_call_t *call,
                                              const char *verb);

/* What init fixed. `shape` (may be NULL) gets up to KV_MAX_DIMS extents; `verb` is for messages. */
KV_MUST_CHECK kv_status_t kv_store_describe(kv_store_t *store, const kv_name_t *name,
                                            const char *verb, kv_dtype_t *dtype, int *ndim,
                                            int64_t *shape);
bool kv_store_contains(kv_store_t *store, const kv_name_t *name);

/* Gives the names of all keys in the order of their init, in one block to be freed with kv_free. */
KV_MUST_CHECK kv_status_t kv_store_keys(kv_store_t *store, kv_name_t **names, int64_t *num_names);

#endif
