/* What the files of RowSparse share: rowsparse.c, the type and its views, and rowsparse_make.c, the
 * ways to make one.
 */
#ifndef KV_PY_ROWSPARSE_H
#define KV_PY_ROWSPARSE_H

#include "comm/rows.h"
#include "py/ndarray.h"

typedef struct kv_borrow kv_borrow_t;

typedef struct kv_py_rowsparse {
    PyObject_HEAD
    kv_state_t *state;
    kv_sparse_t *sparse; /* never NULL */
    PyObject *weakrefs;
    kv_borrow_t *borrow; /* while its rows are in the user's memory */
} kv_py_rowsparse_t;

/* Memory of the user's under the rows of one RowSparse, in its place (`copy=False`). It lives as
 * long as its buffer and counts as one of the array's exports, so no operation is under way there
 * when a call has returned. The buffer says that it has no bytes: kv_rowset_make takes new memory
 * for other rows, and nothing is written here. */
struct kv_borrow {
    kv_buffer_t buffer;
    kv_release_t release;
    kv_lease_t lease;
    bool readonly;
    kv_py_rowsparse_t *object; /* with the GIL: NULL once it is gone */
};

/* The borrow behind a buffer, NULL for memory of ours. */
const kv_borrow_t *kv_borrow_of(const kv_buffer_t *buffer);
/* The object goes, its rows may stay. */
void kv_borrow_forget(kv_borrow_t *borrow);

static inline kv_py_rowsparse_t *kv_as_rowsparse(PyObject *object)
{
    return (kv_py_rowsparse_t *)object;
}

static inline kv_host_t kv_host_of(const kv_runtime_t *runtime)
{
    return (kv_host_t){runtime->kernels, runtime->team, runtime->num_threads};
}

/* Waits for the turn on an array; no Python code may run until kv_turn_end. */
KV_MUST_CHECK static inline kv_status_t kv_sparse_turn(kv_turn_t *turn, kv_state_t *state,
                                                       kv_sparse_t *sparse, kv_access_t access,
                                                       int64_t timeout_ns)
{
    return kv_turn_begin(turn, state, &sparse->var, sparse->generation, access, timeout_ns);
}

/* Gives an array with the same rows. False with an exception. */
bool kv_sparse_copy(kv_state_t *state, kv_sparse_t *source, kv_sparse_t **out);
/* Gives an array with the contents of an object: a RowSparse, or the non-zero rows of a dense
 * array. `like` (may be NULL): of its shape and type, or InvalidArgumentError, ArrayTypeError. */
bool kv_sparse_from(kv_state_t *state, PyObject *object, const kv_sparse_t *like,
                    kv_sparse_t **out);

/* Slots and methods of the type. */
PyObject *kv_rowsparse_new(PyTypeObject *type, PyObject *args, PyObject *keywords);
PyObject *kv_rowsparse_zeros(PyObject *type, PyObject *const *args, Py_ssize_t num_args,
                             PyObject *keyword_names);
PyObject *kv_rowsparse_from_dense(PyObject *type, PyObject *array);
PyObject *kv_rowsparse_from_scipy(PyObject *type, PyObject *matrix);
PyObject *kv_rowsparse_from_torch(PyObject *type, PyObject *tensor);
PyObject *kv_rowsparse_toscipy(PyObject *self, PyObject *ignored);
PyObject *kv_rowsparse_to_torch(PyObject *self, PyObject *ignored);
PyObject *kv_rowsparse_copy(PyObject *self, PyObject *ignored);

#endif
