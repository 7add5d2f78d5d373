/* A Python function as the store's updater. */
#ifndef KV_PY_UPDATER_H
#define KV_PY_UPDATER_H

#include "py/py.h"

/* Gives an updater with one share that holds `function`. NULL with an exception. */
kv_updater_t *kv_py_updater_new(kv_state_t *state, PyObject *function);

/* What a function sees of an update, new references; NULL with an exception. A NumPy array over a
 * buffer; a RowSparse over rows, its own to replace. */
PyObject *kv_py_update_view(kv_state_t *state, const kv_update_t *update, kv_buffer_t *buffer);
PyObject *kv_py_update_rows(kv_state_t *state, const kv_update_t *update, const kv_rowset_t *rows);
/* The stored rows become those that the function has left in this RowSparse. */
KV_MUST_CHECK kv_status_t kv_py_update_take(kv_state_t *state, const kv_update_t *update,
                                            PyObject *view);

/* Borrowed. */
PyObject *kv_py_updater_function(const kv_updater_t *updater);

#endif
