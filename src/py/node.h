/* kvstore._core.Node. */
#ifndef KV_PY_NODE_H
#define KV_PY_NODE_H

#include "ps/client.h"
#include "ps/server.h"
#include "py/py.h"

int kv_node_setup(PyObject *module, kv_state_t *state);
/* The client of a worker's node; NULL for anything else. */
kv_client_t *kv_py_node_client(kv_state_t *state, PyObject *object);

#endif
