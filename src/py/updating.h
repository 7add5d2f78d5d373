/* Optimizers in Python on servers: rounds handed to the thread that serves. */
#ifndef KV_PY_UPDATING_H
#define KV_PY_UPDATING_H

#include "ps/server.h"
#include "py/py.h"

typedef struct kv_py_kept kv_py_kept_t;

/* The round that Python has, if any. */
typedef struct kv_py_updating {
    bool is;
    kv_server_update_t update;
    kv_py_kept_t *kept; /* its wrapper for what it keeps */
} kv_py_updating_t;

/* kvstore._core.Node.next_update and end_update. */
PyObject *kv_py_updating_next(kv_state_t *state, kv_server_t *server, int64_t timeout_ns,
                              kv_py_updating_t *updating);
PyObject *kv_py_updating_end(kv_state_t *state, kv_server_t *server, PyObject *failure,
                             PyObject *kept, PyObject *stored, kv_py_updating_t *updating);
/* Of a node that goes without having ended its round. */
void kv_py_updating_drop(kv_py_updating_t *updating, bool at_home);

#endif
