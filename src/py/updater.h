/* A Python function as the store's updater. */
#ifndef KV_PY_UPDATER_H
#define KV_PY_UPDATER_H

#include "py/py.h"

/* Gives an updater with one share that holds `function`. NULL with an exception. */
kv_updater_t *kv_py_updater_new(kv_state_t *state, PyObject *function);

/* Borrowed. */
PyObject *kv_py_updater_function(const kv_updater_t *updater);

#endif
