/* What the two files of NDArray share: ndarray.c, the type, and export.c, the ways to its memory.
 */
#ifndef KV_PY_NDARRAY_H
#define KV_PY_NDARRAY_H

#include "py/py.h"

static inline kv_py_ndarray_t *kv_as_ndarray(PyObject *object)
{
    return (kv_py_ndarray_t *)object;
}

/* An operation on one array, dense or row-sparse, run by this thread. */
typedef struct kv_turn {
    kv_engine_t *engine;
    const kv_kernels_t *kernels;
    kv_dep_t dep;
    kv_op_t op;
    kv_py_caller_t caller;
} kv_turn_t;

/* Waits for the turn on an array's variable; `generation` is the array's. KV_CALLBACK: the
 * exception is set. No Python code may run until its end. */
KV_MUST_CHECK kv_status_t kv_turn_begin(kv_turn_t *turn, kv_state_t *state, kv_var_t *var,
                                        uint64_t generation, kv_access_t access,
                                        int64_t timeout_ns);
void kv_turn_end(kv_turn_t *turn);
/* wait_to_read and wait_to_write, by their name. */
PyObject *kv_turn_wait(kv_state_t *state, kv_var_t *var, uint64_t generation, const char *function,
                       kv_access_t access, PyObject *const *args, Py_ssize_t num_args,
                       PyObject *keyword_names);

/* A NumPy array over the memory, taken in a turn with this access. NULL with a status; the
 * exception is set only if that is KV_CALLBACK. */
PyObject *kv_ndarray_view(kv_py_ndarray_t *self, kv_access_t access, int64_t timeout_ns,
                          kv_status_t *status);
/* The NumPy element type, NULL without an exception for bfloat16 where ml_dtypes is missing. */
PyObject *kv_ndarray_dtype(kv_py_ndarray_t *self);

/* To be called by whatever looks at the array, but for __array__ (see export.c). */
void kv_ndarray_forget_dropped(kv_py_ndarray_t *self);

/* Slots and methods of the type. */
int kv_ndarray_getbuffer(PyObject *object, Py_buffer *view, int flags);
void kv_ndarray_releasebuffer(PyObject *object, Py_buffer *view);
PyObject *kv_ndarray_asnumpy(PyObject *object, PyObject *ignored);
PyObject *kv_ndarray_to_numpy(PyObject *object, PyObject *const *args, Py_ssize_t num_args,
                              PyObject *keyword_names);
PyObject *kv_ndarray_to_dlpack(PyObject *object, PyObject *const *args, Py_ssize_t num_args,
                               PyObject *keyword_names);

#endif
