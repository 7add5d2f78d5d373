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
#include "kv.h"

typedef struct kv_entry kv_entry_t;
struct kv_entry {
    kv_var_t var;
    kv_name_t name; /* its text stands behind `shape` */
    uint64_t hash;
    kv_entry_t *prev, *next; /* store lock: order of init */
    uint64_t stamp;          /* store lock: the last call that named this key … */
    int64_t group;           /* … and its place among that call's keys */
    kv_dtype_t dtype;
    int ndim;
    int64_t count;
    size_t bytes;
    kv_buffer_t *stored;
    kv_buffer_t *merged; /* what an updater gets as `recv`, NULL until there was one */
    kv_cache_t cache;
    int64_t shape[]; /* [ndim] */
};

/* Open addressing, linear probing; a power of two of slots, at most half of them taken. */
typedef struct kv_table {
    kv_entry_t **slots;
    int64_t num_slots;
    int64_t num_entries;
    kv_entry_t *first, *last;
} kv_table_t;

typedef enum kv_key_type { KV_KEYS_OPEN, KV_KEYS_TEXT, KV_KEYS_NUMBER } kv_key_type_t;

struct kv_store {
    kv_runtime_t *runtime;
    kv_host_t host;
    char name[32];
    kv_mutex_t lock;
    /* Guarded by the lock: */
    _Atomic bool closed; /* written under the lock, read anywhere */
    kv_key_type_t key_type;
    kv_table_t table;
    kv_updater_t *updater;
    uint64_t stamp;
};

/* ---------------------------------------------------------------------- table.c and entry.c */

uint64_t kv_name_hash(const kv_name_t *name);

/* Gives an entry for a value like this one, its memory not yet filled. */
KV_MUST_CHECK kv_status_t kv_entry_new(const kv_name_t *name, kv_dtype_t dtype, int ndim,
                                       const int64_t *shape, kv_entry_t **out);

kv_entry_t *kv_table_find(const kv_table_t *table, const kv_name_t *name, uint64_t hash);
/* Makes room so that `extra` insertions cannot fail. */
KV_MUST_CHECK kv_status_t kv_table_reserve(kv_table_t *table, int64_t extra);
void kv_table_insert(kv_table_t *table, kv_entry_t *entry);
void kv_table_remove(kv_table_t *table, kv_entry_t *entry);
void kv_table_fini(kv_table_t *table); /* frees the slots, not the entries */

/* ------------------------------------------------------------------------------- check.c */

/* One key of a call, all its items taken together, its entry pinned. */
typedef struct kv_group {
    kv_entry_t *entry;
    int32_t num_values, num_outs;
    const kv_view_t *values, *outs;
} kv_group_t;

/* A call whose keys have been resolved. */
typedef struct kv_plan {
    kv_group_t *groups;
    int64_t num_groups;
    kv_updater_t *updater; /* one share, or NULL */
    kv_group_t one;        /* the groups of a call with one item */
    kv_view_t *regrouped;  /* copies of the views, when a key stood in several items */
} kv_plan_t;

/* Resolves and checks push, pull and pushpull. After an error nothing is left to undo. */
KV_MUST_CHECK kv_status_t kv_plan_init(kv_store_t *store, const kv_call_t *call, const char *verb,
                                       kv_plan_t *plan);
void kv_plan_fini(kv_plan_t *plan);

/* The checks of views against their entries, in the contract's order. */
KV_MUST_CHECK kv_status_t kv_groups_check(const kv_group_t *groups, int64_t num_groups,
                                          const kv_call_t *call, const char *verb);

/* KV_CLOSED, or KV_BAD_TYPE when one of the names is of the other type than the store's keys. */
KV_MUST_CHECK kv_status_t kv_names_check_locked(const kv_store_t *store, const kv_item_t *items,
                                                int64_t num_items) KV_REQUIRES(&store->lock);

/* True when the view can go into, or come from, the entry: type, shape, memory. */
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

/* -------------------------------------------------------------------------------- work.c */

/* Carries out a checked call: key after key in this thread, or as one task a key. `push`: the
 * values go into the keys first. */
KV_MUST_CHECK kv_status_t kv_plan_run(kv_store_t *store, kv_plan_t *plan, kv_call_t *call,
                                      bool push, kv_caller_t *caller);

/* The first value of a new entry, not yet in the table. */
KV_MUST_CHECK kv_status_t kv_entry_fill(kv_store_t *store, kv_entry_t *entry,
                                        const kv_view_t *value, kv_caller_t *caller);

#endif
