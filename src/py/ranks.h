/* kvstore._core.Ranks, for those who make stores. */
#ifndef KV_PY_RANKS_H
#define KV_PY_RANKS_H

#include "py/py.h"

int kv_ranks_setup(PyObject *module, kv_state_t *state);
/* Borrowed, valid as long as the object; NULL if it is none. */
kv_nccl_team_t *kv_py_ranks_team(kv_state_t *state, PyObject *object);

/* kvstore._core.nccl_id: what one process makes and all join a group with. */
PyObject *kv_py_nccl_id(PyObject *module, PyObject *unused);

#endif
