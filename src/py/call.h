/* A store call's arguments: keys, values and outs in MXNet's list forms, flattened for the core.
 *
 * Every item of a user's list is held by a reference of our own as soon as it has been read, so the
 * list may change while the GIL is away.
 */
#ifndef KV_PY_CALL_H
#define KV_PY_CALL_H

#include "py/py.h"

enum { KV_LOCAL_VIEWS = 4, KV_LOCAL_ITEMS = 1 };

/* Views that grow, each with what keeps it valid. */
typedef struct kv_views {
    kv_view_t *views;
    kv_lease_t *leases;
    int64_t count, capacity;
    kv_view_t local_views[KV_LOCAL_VIEWS];
    kv_lease_t local_leases[KV_LOCAL_VIEWS];
} kv_views_t;

/* Lives on the caller's stack, or on the heap for a call that may outlast it (`async`). */
typedef struct kv_args {
    kv_call_t call;
    kv_state_t *state;
    const char *verb;
    kv_item_t *items;
    PyObject **keys; /* [num_items] strong references, NULL until converted */
    int64_t num_items;
    bool listed;     /* the key was a list */
    bool python_ran; /* a producer or a key may have run Python code between two conversions */
    kv_views_t values, outs;
    kv_row_ids_t *row_ids; /* [outs.count] of row_sparse_pull, each with a share; else NULL */
    kv_item_t local_items[KV_LOCAL_ITEMS];
    PyObject *local_keys[KV_LOCAL_ITEMS];
    kv_hold_t hold; /* heap only */
    kv_release_t release;
    kv_hold_t *kept; /* a share, or NULL; see kv_args_keep */
} kv_args_t;

/* Converts. `value` and `out` may be NULL; `single`: exactly one value a key (init). With
 * `out_is_value` the values are the outs too. False with an exception, nothing to undo. */
bool kv_args_init(kv_args_t *args, kv_state_t *state, const char *verb, PyObject *key,
                  PyObject *value, PyObject *out, bool single, bool out_is_value);
/* Adds the row ids: an array for all outs, or a list with one for each, nested for a list of keys.
 * False with an exception; the call must still be ended. */
bool kv_args_row_ids(kv_args_t *args, PyObject *row_ids);
/* Looks at the NumPy arrays once more: Python code that ran since may have let another thread
 * reshape one, and a view points into the array. From here to the end of the checks none may run.
 * False with an exception; the call must still be ended. */
bool kv_args_look_again(kv_args_t *args);
/* What a synchronous call has put on a device may run after it: the hold that the call gets takes
 * over what keeps its CUDA arrays valid. Afterwards kv_args_look_again must not be called. False
 * with an exception; the call must still be ended. */
bool kv_args_keep(kv_args_t *args);
/* Leaves an empty call; may be called again. */
void kv_args_fini(kv_args_t *args);

/* On the heap, with a hold; kv_args_drop gives the caller's share back. NULL with an exception. */
kv_args_t *kv_args_new(void);
void kv_args_drop(kv_args_t *args);

/* Whether all arrays are ours and no view of one is alive: then the call may return at once. */
bool kv_args_all_ours(const kv_args_t *args);

/* One key, borrowed from the object. */
bool kv_py_name(kv_state_t *state, PyObject *key, kv_name_t *name);
PyObject *kv_py_name_object(const kv_name_t *name);

/* All keys of the call as plain int and str, a list. */
PyObject *kv_args_keys(const kv_args_t *args);
/* The first `count` distinct keys of the call as a list. */
PyObject *kv_args_first_keys(const kv_args_t *args, int64_t count);

#endif
