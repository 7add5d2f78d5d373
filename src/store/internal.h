/* What the files of the store share: a key's entry, the table of keys, the checked call.
 *
 * An entry's name, type and shape never change. Its memory is guarded by its engine variable:
 * whoever has entered the variable may read, or write, `stored`, `merged` and `cache`. The table
 * and the fields marked so are guarded by the store's lock. An entry is freed by the last one who
 * uses its variable, after the table has retired it.
 */
#ifndef KV_STORE_INTERNAL_H
#define KV_STORE_INTERNAL_H

#include "base/thread.h"
#include "comm/device.h"
#include "comm/slots.h"
#include "kv.h"
#include "ps/client.h"

/* What compression has kept back, one residual for each position of a value list. */
typedef struct kv_residuals {
    uint64_t epoch; /* of the store's codec when they were begun */
    int32_t count;
    kv_buffer_t **buffers; /* [count], NULL where there is none yet */
} kv_residuals_t;

typedef struct kv_twins kv_twins_t;

typedef struct kv_entry kv_entry_t;
struct kv_entry {
    kv_var_t var;
    kv_name_t name; /* its text stands behind `shape` */
    uint64_t hash;
    kv_entry_t *prev, *next; /* store lock: order of init */
    uint64_t stamp;          /* store lock: the last call that named this key … */
    int64_t group;           /* … and its place among that call's keys */
    kv_dtype_t dtype;
    bool sparse; /* the value is row-sparse: `rows`, not `stored` */
    int ndim;
    int64_t count;     /* elements */
    size_t bytes;      /* of a dense value of the shape */
    int64_t row_count; /* elements of a row */
    size_t row_bytes;
    kv_remote_t *remote;     /* of a dist store: what its client knows of the key, which … */
    _Atomic bool deleted;    /* … is gone from the servers */
    kv_buffer_t *stored;     /* NULL: row-sparse, or on servers */
    kv_twins_t *twins;       /* of kind nccl: copies on other devices, or NULL */
    kv_rowset_t rows;        /* row-sparse */
    kv_buffer_t *merged;     /* what an updater gets as `recv` or servers are sent, or NULL */
    kv_rowset_t merged_rows; /* the same for a row-sparse push */
    kv_residuals_t residuals;
    kv_cache_t cache;
    bool skipped;       /* store lock: a pull has left out a row-sparse out */
    int64_t updates;    /* store lock: pushes counted by the optimizer, -1: none yet */
    kv_slots_t *slots;  /* store lock: the pointer */
    uint64_t optimizer; /* store lock: the number of the optimizer for which … */
    const kv_multiplier_t *multiplier; /* … this is the key's own, NULL: none … */
    bool plain_rate;                   /* … and kv_step_t's */
    /* 0: all residuals are finite as far as is known, 1: they are not, 2: that has been told. */
    atomic_int not_finite;
    int64_t shape[]; /* [ndim] */
};

/* Copies of a key on the other devices of its store. */
struct kv_twins {
    int count;
    kv_slots_t *mirrored; /* the key's state of which the twins have copies, a share; or NULL */
    kv_entry_t *entries[];
};

/* Open addressing, linear probing; a power of two of slots, at most half of them taken. */
typedef struct kv_table {
    kv_entry_t **slots;
    int64_t num_slots;
    int64_t num_entries;
    kv_entry_t *first, *last;
} kv_table_t;

typedef enum kv_key_type { KV_KEYS_OPEN, KV_KEYS_TEXT, KV_KEYS_NUMBER } kv_key_type_t;

typedef struct kv_agreement kv_agreement_t;

struct kv_store {
    kv_runtime_t *runtime;
    kv_kind_t kind;
    kv_client_t *client;   /* of a dist store; NULL in a server's process */
    kv_nccl_team_t *ranks; /* of kind nccl over several processes, borrowed; else NULL */
    kv_host_t host;
    char name[32];
    kv_mutex_t lock;
    /* Guarded by the lock: */
    _Atomic bool closed; /* written under the lock, read anywhere */
    kv_key_type_t key_type;
    kv_table_t table;
    kv_agreement_t *adrift; /* of a dist store: calls on keys that nobody waits for any more */
    kv_updater_t *updater;
    kv_optimizer_t *optimizer;
    kv_nccl_team_t *team;   /* of kind nccl, else NULL; NULL when closed */
    kv_optim_state_t state; /* of the optimizer … */
    uint64_t counted;       /* … and how often it has moved */
    kv_codec_t codec;
    uint64_t codec_epoch; /* moves with every change of the codec's type */
    uint64_t stamp;
};

/* See kv.h. */
struct kv_optimizer {
    _Atomic int64_t refs;
    uint64_t number;   /* no other optimizer of this process has it */
    uint64_t declared; /* servers know it by this one; 0: a local store's */
    const kv_optim_class_t *optim;
    kv_optim_numbers_t numbers;
    kv_schedule_t *schedule;
    int64_t num_multipliers;
    struct hashed *multipliers; /* sorted by the hash of their names */
};

/* ------------------------------------------------------------------------------- table.c */

/* Gives an entry for a value like this one, its memory not yet filled. `remote`: the value lies on
 * servers and the entry has no memory. */
KV_MUST_CHECK kv_status_t kv_entry_new(const kv_name_t *name, const kv_view_t *value, bool remote,
                                       kv_entry_t **out);

kv_entry_t *kv_table_find(const kv_table_t *table, const kv_name_t *name, uint64_t hash);
/* Makes room so that `extra` insertions cannot fail. */
KV_MUST_CHECK kv_status_t kv_table_reserve(kv_table_t *table, int64_t extra);
void kv_table_insert(kv_table_t *table, kv_entry_t *entry);
void kv_table_remove(kv_table_t *table, kv_entry_t *entry);
void kv_table_fini(kv_table_t *table); /* frees the slots, not the entries */

/* ------------------------------------------------------------------------------- check.c */

typedef struct kv_stage kv_stage_t;
typedef struct kv_staged kv_staged_t;

/* One key of a call, all its items taken together, its entry pinned. */
typedef struct kv_group {
    kv_entry_t *entry;
    int32_t num_values, num_outs;
    const kv_view_t *values, *outs;
    const kv_row_ids_t *row_ids; /* [num_outs] of row_sparse_pull, else NULL */
    kv_step_t *step;             /* the optimizer's numbers, NULL: no optimizer … */
    kv_slots_t *slots;           /* … and its state, one share */
    kv_staged_t *staged;         /* copies of its arrays in device memory, see stage.c; or NULL */
} kv_group_t;

/* A call whose keys have been resolved. */
typedef struct kv_plan {
    kv_group_t *groups;
    int64_t num_groups;
    kv_updater_t *updater;     /* one share, or NULL */
    kv_optimizer_t *optimizer; /* one share, or NULL */
    kv_nccl_team_t *team;      /* one share, or NULL: not of kind nccl */
    kv_codec_t codec;          /* for the dense floating values of a push */
    uint64_t codec_epoch;
    kv_group_t one;         /* the groups of a call with one item */
    kv_view_t *regrouped;   /* copies of the views, when a key stood in several items … */
    kv_row_ids_t *same_ids; /* … and of the row ids; they share the buffers of the call */
    kv_step_t *steps;
    kv_step_t one_step;
    bool cuda;               /* there are arrays in device memory … */
    kv_stage_t *stage;       /* … and these are their copies on the host; or NULL */
    kv_optim_state_t before; /* the optimizer's state when the call was counted … */
    uint64_t counted;        /* … and store->counted after it, 0: it was not */
} kv_plan_t;

/* Resolves and checks push, pull and pushpull. After an error nothing is left to undo. */
KV_MUST_CHECK kv_status_t kv_plan_init(kv_store_t *store, const kv_call_t *call, const char *verb,
                                       kv_plan_t *plan);
void kv_plan_fini(kv_plan_t *plan);
bool kv_call_has_cuda(const kv_call_t *call);

/* The checks of views against their entries, in the contract's order. */
KV_MUST_CHECK kv_status_t kv_groups_check(kv_engine_t *engine, const kv_group_t *groups,
                                          int64_t num_groups, const kv_call_t *call,
                                          const char *verb);

/* KV_CLOSED, or KV_BAD_TYPE when one of the names is of the other type than the store's keys. */
KV_MUST_CHECK kv_status_t kv_names_check_locked(const kv_store_t *store, const kv_item_t *items,
                                                int64_t num_items) KV_REQUIRES(&store->lock);

/* True when type and shape of the view are the entry's and its memory can be reached. Says nothing
 * of the form, dense or row-sparse. */
static inline bool kv_entry_accepts(const kv_entry_t *entry, const kv_view_t *view)
{
    if (KV_UNLIKELY((kv_dtype_t)view->dtype != entry->dtype || view->ndim != entry->ndim ||
                    (view->flags & KV_VIEW_DEVICE)))
        return false;
    for (int i = 0; i < entry->ndim; i++)
        if (KV_UNLIKELY(view->shape[i] != entry->shape[i]))
            return false;
    return true;
}

/* --------------------------------------------------------------------------- optimizer.c */

/* KV_BAD_TYPE, KV_INVALID unless the optimizer can update all keys. */
KV_MUST_CHECK kv_status_t kv_plan_check_updates(const kv_plan_t *plan);
/* Checks that, counts the pushes of a checked call and gives each group its step and its slots, or
 * leaves everything as it was. Asks the schedule. */
KV_MUST_CHECK kv_status_t kv_plan_count(kv_store_t *store, kv_plan_t *plan);
/* Takes back the counts of all keys but the first `num_done`, unless others have counted since. */
void kv_plan_uncount(kv_store_t *store, const kv_plan_t *plan, int64_t num_done);

/* The quick way's: whether a push of the key can be counted here, without a schedule or memory to
 * be made, and the counting. */
bool kv_entry_can_count_locked(const kv_store_t *store, const kv_entry_t *entry)
    KV_REQUIRES(&store->lock);
void kv_entry_count_locked(kv_store_t *store, kv_entry_t *entry, kv_step_t *step)
    KV_REQUIRES(&store->lock);

/* The step of a push of the key that would come after count `t`, as far as it can be known without
 * the schedule. */
void kv_optimizer_resume(const kv_optimizer_t *optimizer, const kv_entry_t *entry,
                         const kv_optim_state_t *state, int64_t t, kv_step_t *step);

/* Forgets counts and slots of all keys. */
void kv_store_forget_training_locked(kv_store_t *store) KV_REQUIRES(&store->lock);

/* The first counts of an optimizer that begins. */
void kv_optim_state_begin(kv_optim_state_t *state, int64_t begin_num_update);

/* ------------------------------------------------------------------------------- apply.c */

/* One key's share of a call, with all variables of it held. */
typedef struct kv_work {
    const kv_host_t *host;
    kv_group_t group;
    bool push;
    kv_codec_t codec; /* KV_CODEC_NONE unless the values pass through it */
    uint64_t codec_epoch;
    const void *stored;      /* what pulls read: the entry's value, or NULL … */
    const kv_rowset_t *rows; /* … and its rows, or those of them that are asked for */
    const void **pointers;   /* [kv_work_pointers]: sources, then destinations */
    char *staging;           /* kv_work_staging bytes for the strided values, one after the other */
    kv_caller_t *caller;     /* who waits for a device; NULL: a thread of the engine */
    kv_hold_t *hold;         /* keeps arrays in device memory valid; NULL: there are none */
} kv_work_t;

size_t kv_work_staging(const kv_group_t *group);
int32_t kv_work_pointers(const kv_group_t *group);

kv_work_t kv_work_of(const kv_host_t *host, const kv_plan_t *plan, const kv_group_t *group,
                     bool push, const void **pointers, char *staging);

/* Gives a residual for each value of the group; those of another codec go. */
KV_MUST_CHECK kv_status_t kv_work_residuals(const kv_work_t *work, void **out);
/* So many of a key's residuals are not finite. */
void kv_entry_note_not_finite(kv_entry_t *entry, int64_t count);

/* Places for at least `count` residuals, the new ones NULL. */
KV_MUST_CHECK kv_status_t kv_residuals_grow(kv_residuals_t *residuals, int32_t count);
void kv_residuals_fini(kv_residuals_t *residuals);

/* Does it. After an error *delivering tells whether it was in writing outs, of which some may have
 * been written; else everything is as it was. */
KV_MUST_CHECK kv_status_t kv_work_run(kv_work_t *work, bool *delivering);
/* Adds to the message of an error in writing outs what has happened nevertheless. */
KV_MUST_CHECK kv_status_t kv_work_undelivered(bool push, kv_status_t status);

/* The sum of the values for an updater: entry->merged, or entry->merged_rows. */
KV_MUST_CHECK kv_status_t kv_work_merge(const kv_work_t *work);
/* The sum of dense values in host memory. */
void kv_work_add_up(const kv_work_t *work, void *sum);

/* The weight of a dense key for the optimizer, its state made where it is missing. */
KV_MUST_CHECK kv_status_t kv_work_weight(const kv_work_t *work, kv_weight_t *out);

int64_t kv_entry_num_rows(const kv_entry_t *entry); /* stored ones */

/* Every out becomes the stored value, or the rows asked for. */
KV_MUST_CHECK kv_status_t kv_work_copy_out(const kv_work_t *work);

/* ------------------------------------------------------------------------------ device.c
 * All with the key held. */

static inline bool kv_view_is_cuda(const kv_view_t *view)
{
    return (view->flags & KV_VIEW_CUDA) != 0;
}

/* Where work on an array in device memory is in order with its owner's. */
static inline kv_lane_t kv_view_lane(const kv_view_t *view)
{
    return (kv_lane_t){.device = view->device, .stream = view->stream};
}

/* Keeps the arrays of a call until the mark has passed. NULL is allowed. */
void kv_hold_until(kv_hold_t *hold, kv_mark_t *mark);

/* Whether a value is in device memory. */
bool kv_group_brings_cuda(const kv_group_t *group);
/* Whether the key or one of the arrays is. */
bool kv_work_on_device(const kv_work_t *work);
/* kv_work_run for such work. */
KV_MUST_CHECK kv_status_t kv_work_run_on_device(const kv_work_t *work, bool *delivering);
/* kv_work_run for several keys, all held: those of one device share launches. All or, after an
 * error, nobody knows how many are done. */
KV_MUST_CHECK kv_status_t kv_works_run(kv_work_t *works, int64_t count, int64_t *num_done,
                                       bool *delivering);
/* kv_work_merge for values of which the first is in device memory: the key comes there. */
KV_MUST_CHECK kv_status_t kv_work_merge_on_device(const kv_work_t *work);
/* Likewise where the first is in host memory, and others are not: these come there. */
KV_MUST_CHECK kv_status_t kv_work_merge_here(const kv_work_t *work);
/* kv_work_copy_out for outs that may be in device memory, of a value that is in the host's:
 * `stored`, or the work's rows. The key need not be held. */
KV_MUST_CHECK kv_status_t kv_work_deliver(const kv_work_t *work, const void *stored);
/* Everything that work on the host needs of the key comes to host memory. The key is written. */
KV_MUST_CHECK kv_status_t kv_work_bring_home(const kv_work_t *work);

/* Lends the key to an updater that works on a lane, or comes after it and lets it come after
 * itself: that of the first value, if it is on the key's device. Then takes it back. */
KV_MUST_CHECK kv_status_t kv_work_lend(const kv_work_t *work, kv_lane_t *lane, kv_mark_t **after);
KV_MUST_CHECK kv_status_t kv_work_take_back(const kv_work_t *work, kv_lane_t lane,
                                            kv_mark_t *after);

/* -------------------------------------------------------------------------------- nccl.c
 * See store/nccl.h for the teams. */

/* Whether the values of a push are such as NCCL adds up: dense, one on each of several devices. */
bool kv_plan_takes_nccl(const kv_plan_t *plan);
/* Over several processes a push goes by NCCL or not at all. KV_INVALID says what is needed,
 * KV_PEER_LOST that a process has left. */
KV_MUST_CHECK kv_status_t kv_plan_check_nccl(const kv_plan_t *plan);
/* The push, with keys, arrays and the runtime's `nccl` held; `works` as for kv_works_run. Not
 * *fits: other devices than those of the pushes before, and nothing was done. */
KV_MUST_CHECK kv_status_t kv_nccl_push(const kv_plan_t *plan, const kv_work_t *works,
                                       kv_caller_t *caller, bool *fits, bool *launched);
/* Over several processes: new keys, filled and not in the table yet, get the value that worker 0
 * has given them. All processes do it at once. */
KV_MUST_CHECK kv_status_t kv_nccl_init(kv_store_t *store, const kv_plan_t *plan, const char *verb,
                                       const kv_call_t *call, kv_caller_t *caller);
/* A pull of a key with twins, held: each out from its own device. */
KV_MUST_CHECK kv_status_t kv_work_pull_twins(const kv_work_t *work, bool *delivering);
/* The key is changed alone. */
void kv_entry_drop_twins(kv_entry_t *entry);

/* ------------------------------------------------------------------------------- stage.c */

/* For stores that merge on the host: values in device memory are copied there, slice by slice,
 * where a kind merges on devices several of a key as their sum; their views become views of host
 * memory, those of a key's outs on devices one, its first. The copies are only put in order: nobody
 * may read a value before kv_staged_next has told that it is there. */
KV_MUST_CHECK kv_status_t kv_plan_stage(const kv_store_t *store, kv_plan_t *plan, kv_hold_t *hold);
/* Waits until all work that is not the stage's own lies behind, so that only copies are left. */
KV_MUST_CHECK kv_status_t kv_stage_begun(const kv_stage_t *stage, kv_caller_t *caller);
/* What is still on its way goes on, and keeps its memory. NULL is allowed. */
void kv_stage_free(kv_stage_t *stage);

/* Of one key. NULL is allowed, and has no bytes. */
size_t kv_staged_bytes(const kv_staged_t *staged); /* of its values together */
/* Waits for the next slice of the values, in their order; *there: the bytes of all that have come.
 */
KV_MUST_CHECK kv_status_t kv_staged_next(kv_staged_t *staged, size_t *there, kv_caller_t *caller);
/* Waits for all of them. */
KV_MUST_CHECK kv_status_t kv_staged_wait(kv_staged_t *staged, kv_caller_t *caller);
/* Whether that is what stands in for the outs in device memory. */
bool kv_staged_arrives(const kv_staged_t *staged, const void *out);
/* These bytes have come there, and go on to the outs. Does not wait. */
KV_MUST_CHECK kv_status_t kv_staged_upload(kv_staged_t *staged, size_t offset, size_t bytes);
/* All has come there: what has not gone on does so. Waits for outs whose owner's later work may be
 * on another stream. */
KV_MUST_CHECK kv_status_t kv_staged_finish(kv_staged_t *staged, kv_caller_t *caller);

/* ------------------------------------------------------------------------------ sparse.c */

/* The sum of the values of a push; it points into them. */
KV_MUST_CHECK kv_status_t kv_work_sum_rows(const kv_work_t *work, kv_row_sum_t *sum);
/* A push of row-sparse values, but for its outs. */
KV_MUST_CHECK kv_status_t kv_work_push_rows(const kv_work_t *work);
KV_MUST_CHECK kv_status_t kv_work_merge_rows(const kv_work_t *work);
/* The outs that are row-sparse, and all outs of a row-sparse key. */
KV_MUST_CHECK kv_status_t kv_work_pull_rows(const kv_work_t *work);

/* -------------------------------------------------------------------------------- task.c */

/* Carries out a checked call as one task a key, without waiting. */
KV_MUST_CHECK kv_status_t kv_plan_submit(kv_store_t *store, const kv_plan_t *plan, kv_call_t *call,
                                         bool push);

/* -------------------------------------------------------------- dist.c, dist_keys.c: servers */

/* Carries out a checked call: as kv_plan_run, over the wire. */
KV_MUST_CHECK kv_status_t kv_dist_run(kv_store_t *store, kv_plan_t *plan, kv_call_t *call,
                                      bool push, kv_caller_t *caller);
/* Agrees with all workers on new keys; their entries get what the client knows of them. On an
 * error *kept tells that the entries are not the caller's any more: the call may still succeed, and
 * then they come into the store. */
KV_MUST_CHECK kv_status_t kv_dist_declare(kv_store_t *store, const kv_group_t *groups,
                                          int64_t num_groups, kv_caller_t *caller, bool *kept);
/* Agrees with all workers that the keys go. */
KV_MUST_CHECK kv_status_t kv_dist_delete(kv_store_t *store, const kv_plan_t *plan,
                                         kv_caller_t *caller);

/* Lets calls in `adrift` that have ended take effect on the table of keys. */
void kv_dist_settle(kv_store_t *store);
/* Drops the store's shares of a list. */
void kv_agreements_rele(kv_agreement_t *agreement);

/* Takes the lock for one who looks for keys. */
static inline void kv_store_lock(kv_store_t *store) KV_ACQUIRES(&store->lock)
{
    kv_mutex_lock(&store->lock);
    if (KV_UNLIKELY(store->adrift != NULL)) {
        kv_mutex_unlock(&store->lock);
        kv_dist_settle(store);
        kv_mutex_lock(&store->lock);
    }
}

/* Takes an entry out of the table if it is there. It is pinned. */
void kv_store_remove_locked(kv_store_t *store, kv_entry_t *entry) KV_REQUIRES(&store->lock);

/* ---------------------------------------------------------------------------- dist_rows.c */

/* What one key of a call sends and gets as rows. Of zeros where there is nothing of that. */
typedef struct kv_dist_rows {
    kv_row_sum_t sum;  /* what goes out; it may point into `parts` */
    kv_rowset_t parts; /* parts of rows, see kv_remote_row_bytes */
    kv_row_ids_t asked, asked_parts;
    const kv_row_ids_t *row_ids; /* [num_outs] of row_sparse_pull, one share each; else NULL */
    bool distinct;               /* they are not all the same */
    kv_rowset_t arrived;         /* the rows that were asked for, or all of a row-sparse key */
    kv_buffer_t **found;         /* these as they came */
} kv_dist_rows_t;

static inline bool kv_dist_rows_arrive(const kv_dist_rows_t *rows)
{
    return rows->row_ids != NULL || rows->found != NULL;
}

/* Describes for the client what a group pushes, or is to get. With the arrays held. */
KV_MUST_CHECK kv_status_t kv_dist_rows_send(kv_dist_rows_t *rows, const kv_host_t *host,
                                            const kv_group_t *group, kv_client_part_t *part);
KV_MUST_CHECK kv_status_t kv_dist_rows_ask(kv_dist_rows_t *rows, const kv_host_t *host,
                                           const kv_group_t *group, kv_client_part_t *part);
/* The client has read what it needs. */
void kv_dist_rows_issued(kv_dist_rows_t *rows);
/* What has arrived goes to the outs, whose order may change: rows, or with `stored` not NULL the
 * whole dense value. */
KV_MUST_CHECK kv_status_t kv_dist_rows_deliver(kv_dist_rows_t *rows, const kv_host_t *host,
                                               const kv_entry_t *entry, const void *stored,
                                               int32_t num_outs, kv_view_t *outs);
size_t kv_dist_rows_bytes(const kv_dist_rows_t *rows, const kv_entry_t *entry, int32_t num_outs,
                          const kv_view_t *outs); /* that delivering moves, about */
void kv_dist_rows_fini(kv_dist_rows_t *rows, const kv_entry_t *entry, int32_t num_outs);

/* -------------------------------------------------------- states.c, dist_states.c: files */

/* A part as it lies in memory: how large one of its rows is, and its dimensions in a file. */
typedef struct kv_state_layout {
    size_t row_bytes;
    int ndim;
} kv_state_layout_t;

static inline kv_state_layout_t kv_state_layout(const kv_entry_t *entry, bool per_row)
{
    size_t wide = kv_dtype_bytes(kv_dtype_wide(entry->dtype));
    return per_row ? (kv_state_layout_t){wide, 1}
                   : (kv_state_layout_t){wide * (size_t)entry->row_count, entry->ndim};
}

/* KV_NO_KEY for a key that is deleted by now. */
KV_MUST_CHECK kv_status_t kv_dist_check_key(const kv_entry_t *entry);

/* With the key held: its count and its parts as servers have them, -1 and none if it was not pushed
 * with this optimizer. state->parts has room for all parts. */
KV_MUST_CHECK kv_status_t kv_dist_get_state(kv_store_t *store, kv_entry_t *entry,
                                            const kv_optimizer_t *optimizer,
                                            kv_states_share_t share, kv_key_state_t *state,
                                            kv_caller_t *caller);

/* What one key will get. */
typedef struct kv_arrival {
    kv_entry_t *entry;
    int64_t count;     /* -1: its state goes */
    kv_slots_t *slots; /* in a dist store of the whole value, on its way to servers */
    kv_residuals_t residuals;
} kv_arrival_t;

/* With the keys held: gives servers what the keys get. */
KV_MUST_CHECK kv_status_t kv_dist_set_states(kv_store_t *store, const kv_arrival_t *arrivals,
                                             int64_t num_arrivals, const kv_optimizer_t *optimizer,
                                             const kv_optim_state_t *whole, kv_caller_t *caller);

/* -------------------------------------------------------------------------------- work.c */

/* Variables of the operation: the key and those of our own arrays. */
int32_t kv_group_num_deps(const kv_group_t *group);
int32_t kv_group_deps(const kv_group_t *group, bool push, bool with_outs, kv_dep_t *deps);

/* Memory that the work on one key moves, as far as it can be known before. */
size_t kv_group_bytes(const kv_group_t *group);

/* Carries out a checked call: key after key in this thread, or as one task a key. `push`: the
 * values go into the keys first. */
KV_MUST_CHECK kv_status_t kv_plan_run(kv_store_t *store, kv_plan_t *plan, kv_call_t *call,
                                      bool push, kv_caller_t *caller);

/* The first value of a new entry, not yet in the table. */
KV_MUST_CHECK kv_status_t kv_entry_fill(kv_store_t *store, kv_entry_t *entry,
                                        const kv_view_t *value, kv_hold_t *hold,
                                        kv_caller_t *caller);

#endif
