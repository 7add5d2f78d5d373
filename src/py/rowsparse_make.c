/* The ways to a RowSparse: from rows and their ids, from a dense array and back, from another one,
 * and from and to the sparse arrays of SciPy and PyTorch (in Python, kvstore/_row_sparse.py).
 *
 * The ids are always copied: those in use must stay in order and inside the shape, or a kernel
 * would write past a dense array, and the memory of an array of the user's may change at any time.
 */
#include "py/rowsparse.h"

#include "base/memory.h"
#include <inttypes.h>
#include <stddef.h>
#include <string.h>

/* --------------------------------------------------------------------------------- borrowing */

static void borrow_free(kv_release_t *release)
{
    kv_borrow_t *borrow = (kv_borrow_t *)((char *)release - offsetof(kv_borrow_t, release));
    if (borrow->object != NULL) {
        borrow->object->borrow = NULL;
        atomic_fetch_sub(&borrow->object->sparse->exports, 1);
    }
    kv_lease_drop(&borrow->lease);
    kv_free(borrow);
    kv_count(KV_COUNT_BUFFERS, -1);
}

static void borrow_release(kv_buffer_t *buffer)
{
    kv_py_release_later(&((kv_borrow_t *)buffer)->release);
}

const kv_borrow_t *kv_borrow_of(const kv_buffer_t *buffer)
{
    static_assert(offsetof(kv_borrow_t, buffer) == 0, "a borrow is found by its buffer");
    return buffer != NULL && buffer->release == borrow_release ? (const kv_borrow_t *)buffer : NULL;
}

void kv_borrow_forget(kv_borrow_t *borrow)
{
    if (borrow != NULL)
        borrow->object = NULL;
}

/* Takes the lease on success. NULL with an exception. */
static kv_borrow_t *borrow_new(const kv_view_t *view, kv_lease_t *lease)
{
    kv_borrow_t *borrow = kv_alloc(sizeof *borrow);
    if (borrow == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    *borrow = (kv_borrow_t){
        .buffer = {.data = view->data, .bytes = 0, .release = borrow_release},
        .release = {.free = borrow_free},
        .lease = *lease,
        .readonly = view->flags & KV_VIEW_READONLY,
    };
    atomic_init(&borrow->buffer.refs, 1);
    *lease = (kv_lease_t){.owner = NULL};
    kv_count(KV_COUNT_BUFFERS, 1);
    return borrow;
}

/* ------------------------------------------------------------------------- rows and their ids */

/* Whether a view can be copied from: dense, in memory within reach, of a type that stores hold. */
static bool check_dense(kv_state_t *state, const kv_view_t *view, const char *what)
{
    if (view->sparse != NULL)
        kv_py_fail(state, KV_BAD_TYPE, "%s must be a dense array, not a RowSparse", what);
    else if (kv_view_beyond(view))
        kv_py_fail(
            state, KV_BAD_TYPE,
            "%s must be in memory of the host or of a CUDA device: bring it to the host first",
            what);
    else if (view->dtype == KV_DTYPE_NONE)
        kv_py_fail(state, KV_BAD_TYPE,
                   "a RowSparse cannot hold elements of type %.100s, but native float64, float32, "
                   "float16, bfloat16, int8, uint8, int32, int64",
                   view->type_name);
    else
        return true;
    return false;
}

/* Whether `data` has a row of the shape for each of `num_rows` ids. */
static bool check_rows(kv_state_t *state, const kv_view_t *data, int64_t num_rows, int ndim,
                       const int64_t *shape)
{
    char due[128], given[128], whole[128];
    int64_t extents[KV_MAX_DIMS];
    bool same = ndim > 0 && data->ndim == ndim;
    for (int i = 1; same && i < ndim; i++)
        same = data->shape[i] == shape[i];
    if (same && data->shape[0] == num_rows)
        return true;
    if (same) {
        kv_py_fail(state, KV_INVALID,
                   "data has %" PRId64 " rows, but there are %" PRId64 " indices", data->shape[0],
                   num_rows);
    } else if (ndim == 0) {
        kv_py_fail(state, KV_INVALID,
                   "a row-sparse array has at least one dimension, that of its "
                   "rows; the shape is ()");
    } else {
        extents[0] = num_rows;
        memcpy(extents + 1, shape + 1, (size_t)(ndim - 1) * sizeof *shape);
        kv_py_fail(state, KV_INVALID,
                   "data has the shape %s; %" PRId64 " indices into the shape %s need %s",
                   kv_shape_format(data->ndim, data->shape, given, sizeof given), num_rows,
                   kv_shape_format(ndim, shape, whole, sizeof whole),
                   kv_shape_format(ndim, extents, due, sizeof due));
    }
    return false;
}

/* A view for copy=False. An NDArray hands out a view of its memory, which makes the store's calls
 * on it synchronous. */
static bool data_in(kv_state_t *state, PyObject *data, bool copy, kv_view_t *view,
                    kv_lease_t *lease)
{
    if (!kv_py_array_in(state, data, false, view, lease))
        return false;
    if (copy || view->array == NULL)
        return true;
    kv_status_t status;
    kv_lease_drop(lease);
    PyObject *shown =
        kv_ndarray_view(kv_as_ndarray(data), KV_WRITE, KV_PY_DEFAULT_TIMEOUT_NS, &status);
    if (shown == NULL) {
        kv_py_raise(state, status);
        return false;
    }
    bool done = kv_py_array_in(state, shown, false, view, lease);
    Py_DECREF(shown);
    return done;
}

/* The rows of `data`, in place or copied, for an array that nobody else knows yet. */
static bool fill(kv_state_t *state, kv_sparse_t *sparse, const kv_view_t *view, kv_lease_t *lease,
                 int64_t num_rows, kv_buffer_t *ids, bool copy, kv_borrow_t **borrow)
{
    kv_buffer_t *data;
    if (num_rows == 0)
        return true;
    if (copy) {
        kv_status_t status = kv_buffer_new((size_t)num_rows * sparse->row_bytes, &data);
        if (status != KV_OK) {
            kv_py_raise(state, status);
            return false;
        }
        if (!kv_view_copy_out(state, view, data->data)) {
            kv_buffer_rele(data);
            return false;
        }
    } else {
        *borrow = borrow_new(view, lease);
        if (*borrow == NULL)
            return false;
        data = &(*borrow)->buffer;
    }
    sparse->rows =
        (kv_rowset_t){.num_rows = num_rows, .indices = kv_buffer_hold(ids), .data = data};
    return true;
}

PyObject *kv_rowsparse_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static const char *names[] = {"data", "indices", "shape", "copy", NULL};
    kv_state_t *state = PyType_GetModuleState(type);
    PyObject *data, *indices, *shape, *result = NULL;
    int copy = 1, ndim, num_dims;
    int64_t extents[KV_MAX_DIMS], num_rows;
    kv_buffer_t *ids = NULL;
    kv_sparse_t *sparse = NULL;
    kv_borrow_t *borrow = NULL;
    kv_view_t view;
    kv_lease_t lease = {.owner = NULL};
    kv_py_release_now();
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO|$p:RowSparse", (char **)names, &data,
                                     &indices, &shape, &copy))
        return NULL;
    ndim = kv_py_extents(state, shape, extents);
    if (ndim < 0 || !kv_py_integers(state, indices, "indices", &ids, &num_rows, &num_dims) ||
        !data_in(state, data, copy, &view, &lease))
        goto end;
    if (num_dims != 1) {
        kv_py_fail(state, KV_INVALID, "indices must have one dimension, not %d", num_dims);
        goto end;
    }
    if (!check_dense(state, &view, "data") || !check_rows(state, &view, num_rows, ndim, extents))
        goto end;
    if (!copy && (view.flags & KV_VIEW_DEVICE)) {
        kv_py_fail(state, KV_INVALID,
                   "copy=False needs data in host memory: row-sparse arrays live there");
        goto end;
    }
    if (!copy && view.strides != NULL) {
        kv_py_fail(
            state, KV_INVALID,
            "copy=False needs data that is aligned and C-contiguous; numpy.ascontiguousarray "
            "makes it so");
        goto end;
    }
    kv_status_t status = kv_row_ids_check(num_rows, ids->data, extents[0]);
    if (status == KV_OK)
        status = kv_sparse_new((kv_dtype_t)view.dtype, ndim, extents, &sparse);
    if (status != KV_OK) {
        kv_py_raise(state, status);
        goto end;
    }
    if (!fill(state, sparse, &view, &lease, num_rows, ids, copy, &borrow)) {
        kv_sparse_retire(sparse);
        goto end;
    }
    result = kv_rowsparse_wrap(state, sparse);
    if (result != NULL && borrow != NULL) {
        borrow->object = kv_as_rowsparse(result);
        kv_as_rowsparse(result)->borrow = borrow;
        atomic_fetch_add(&sparse->exports, 1);
    }
end:
    kv_lease_drop(&lease);
    kv_buffer_rele(ids);
    return result;
}

PyObject *kv_rowsparse_zeros(PyObject *type, PyObject *const *args, Py_ssize_t num_args,
                             PyObject *keyword_names)
{
    static const kv_param_t params[] = {{"shape", true}, {"dtype", false}};
    static const kv_signature_t signature = {"zeros", 2, 2, params};
    kv_state_t *state = PyType_GetModuleState((PyTypeObject *)type);
    PyObject *values[2];
    int64_t extents[KV_MAX_DIMS];
    kv_sparse_t *sparse;
    kv_dtype_t dtype = KV_FLOAT32;
    kv_py_release_now();
    if (!kv_py_parse(&signature, args, num_args, keyword_names, values))
        return NULL;
    int ndim = kv_py_extents(state, values[0], extents);
    if (ndim < 0)
        return NULL;
    if (values[1] != NULL && values[1] != Py_None &&
        (dtype = kv_numpy_dtype(state, values[1])) == KV_DTYPE_NONE)
        return NULL;
    kv_status_t status = kv_sparse_new(dtype, ndim, extents, &sparse);
    return status == KV_OK ? kv_rowsparse_wrap(state, sparse) : kv_py_raise(state, status);
}

/* --------------------------------------------------------------------------- the rows of others */

/* The rows with a non-zero of contiguous memory, for an array that nobody else knows yet. */
static kv_status_t gather(const kv_host_t *host, kv_sparse_t *sparse, const void *dense)
{
    kv_buffer_t *ids;
    size_t bytes = (size_t)sparse->shape[0] * sizeof(int64_t);
    if (sparse->row_count == 0)
        return KV_OK;
    KV_TRY(kv_buffer_new(bytes, &ids));
    int64_t num_rows =
        kv_rows_nonzero(host, sparse->dtype, sparse->shape[0], sparse->row_count, dense, ids->data);
    kv_status_t status = KV_OK;
    if (num_rows > 0)
        status = kv_rowset_make(&sparse->rows, num_rows, sparse->row_bytes);
    if (num_rows > 0 && status == KV_OK) {
        memcpy(sparse->rows.indices->data, ids->data, (size_t)num_rows * sizeof(int64_t));
        kv_rows_gather(host, sparse->row_bytes, num_rows, ids->data, dense,
                       sparse->rows.data->data);
    }
    kv_buffer_rele(ids);
    return status;
}

/* The same of a view of any kind. */
static bool gather_view(kv_state_t *state, kv_sparse_t *sparse, const kv_view_t *view)
{
    void *staged = NULL;
    size_t bytes = (size_t)sparse->shape[0] * sparse->row_bytes;
    kv_runtime_t *runtime = kv_py_runtime(state);
    if (runtime == NULL)
        return false;
    if (!kv_view_in_place(view)) {
        staged = kv_alloc_elements(bytes);
        if (staged == NULL) {
            PyErr_NoMemory();
            return false;
        }
        if (!kv_view_copy_out(state, view, staged)) {
            kv_free(staged);
            return false;
        }
    }
    const kv_host_t host = kv_host_of(runtime);
    PyThreadState *thread = bytes >= KV_DETACH_BYTES ? PyEval_SaveThread() : NULL;
    kv_status_t status = gather(&host, sparse, staged != NULL ? staged : view->data);
    if (thread != NULL)
        PyEval_RestoreThread(thread);
    kv_free(staged);
    if (status != KV_OK)
        kv_py_raise(state, status);
    return status == KV_OK;
}

bool kv_sparse_copy(kv_state_t *state, kv_sparse_t *source, kv_sparse_t **out)
{
    kv_sparse_t *copy;
    kv_turn_t turn;
    kv_status_t status = kv_sparse_new(source->dtype, source->ndim, source->shape, &copy);
    if (status != KV_OK) {
        kv_py_raise(state, status);
        return false;
    }
    status = kv_sparse_turn(&turn, state, source, KV_READ, KV_PY_DEFAULT_TIMEOUT_NS);
    if (status == KV_OK) {
        const kv_rowset_t *rows = &source->rows;
        size_t bytes = (size_t)rows->num_rows * source->row_bytes;
        if (bytes >= KV_DETACH_BYTES)
            kv_caller_detach(&turn.caller.base);
        if (rows->num_rows > 0)
            status = kv_rowset_make(&copy->rows, rows->num_rows, source->row_bytes);
        if (rows->num_rows > 0 && status == KV_OK) {
            memcpy(copy->rows.indices->data, rows->indices->data,
                   (size_t)rows->num_rows * sizeof(int64_t));
            memcpy(copy->rows.data->data, rows->data->data, bytes);
        }
        kv_turn_end(&turn);
        kv_caller_attach(&turn.caller.base);
    }
    if (status != KV_OK) {
        kv_py_raise(state, status);
        kv_sparse_retire(copy);
        return false;
    }
    *out = copy;
    return true;
}

/* Whether a view has the shape and element type of an array. */
static bool check_like(kv_state_t *state, const kv_view_t *view, const kv_sparse_t *like)
{
    char due[256], given[256];
    bool same = like->ndim == view->ndim;
    for (int i = 0; same && i < like->ndim; i++)
        same = like->shape[i] == view->shape[i];
    if (!same)
        kv_py_fail(state, KV_INVALID, "the array has the shape %s, the value %s",
                   kv_shape_format(like->ndim, like->shape, due, sizeof due),
                   kv_shape_format(view->ndim, view->shape, given, sizeof given));
    else if (like->dtype != (kv_dtype_t)view->dtype)
        kv_py_fail(state, KV_BAD_TYPE, "the array holds %s, the value %s",
                   kv_dtype_name(like->dtype), kv_dtype_name((kv_dtype_t)view->dtype));
    else
        return true;
    return false;
}

bool kv_sparse_from(kv_state_t *state, PyObject *object, const kv_sparse_t *like, kv_sparse_t **out)
{
    kv_view_t view;
    kv_lease_t lease;
    kv_sparse_t *made;
    bool done = false;
    if (!kv_py_array_in(state, object, false, &view, &lease))
        return false;
    if ((view.sparse == NULL && !check_dense(state, &view, "the array")) ||
        (like != NULL && !check_like(state, &view, like)))
        goto end;
    if (view.sparse != NULL) {
        done = kv_sparse_copy(state, view.sparse, out);
        goto end;
    }
    kv_status_t status = kv_sparse_new((kv_dtype_t)view.dtype, view.ndim, view.shape, &made);
    if (status != KV_OK) {
        kv_py_raise(state, status);
    } else if (!gather_view(state, made, &view)) {
        kv_sparse_retire(made);
    } else {
        *out = made;
        done = true;
    }
end:
    kv_lease_drop(&lease);
    return done;
}

PyObject *kv_rowsparse_from_dense(PyObject *type, PyObject *array)
{
    kv_state_t *state = PyType_GetModuleState((PyTypeObject *)type);
    kv_sparse_t *made;
    kv_py_release_now();
    return kv_sparse_from(state, array, NULL, &made) ? kv_rowsparse_wrap(state, made) : NULL;
}

PyObject *kv_rowsparse_copy(PyObject *self, PyObject *ignored)
{
    (void)ignored;
    kv_state_t *state = kv_as_rowsparse(self)->state;
    kv_sparse_t *copy;
    kv_py_release_now();
    return kv_sparse_copy(state, kv_as_rowsparse(self)->sparse, &copy)
               ? kv_rowsparse_wrap(state, copy)
               : NULL;
}

/* --------------------------------------------------------------------------------- dense */

PyObject *kv_sparse_numpy(kv_state_t *state, kv_sparse_t *sparse)
{
    void *data;
    kv_turn_t turn;
    kv_runtime_t *runtime = kv_py_runtime(state);
    if (runtime == NULL)
        return NULL;
    PyObject *dense = kv_numpy_empty(state, sparse->dtype, sparse->ndim, sparse->shape, &data);
    if (dense == NULL)
        return NULL;
    kv_status_t status = kv_sparse_turn(&turn, state, sparse, KV_READ, KV_PY_DEFAULT_TIMEOUT_NS);
    if (status == KV_OK) {
        const kv_host_t host = kv_host_of(runtime);
        const kv_rowset_t *rows = &sparse->rows;
        size_t bytes = (size_t)sparse->shape[0] * sparse->row_bytes;
        kv_row_sum_t sum;
        if (bytes >= KV_DETACH_BYTES)
            kv_caller_detach(&turn.caller.base);
        if (bytes > 0 && (status = kv_row_sum_init(&host, sparse->dtype, sparse->row_count, 1,
                                                   &rows, &sum)) == KV_OK) {
            kv_rows_to_dense(&host, &sum, sparse->shape[0], 1, &data);
            kv_row_sum_fini(&sum);
        }
        kv_turn_end(&turn);
        kv_caller_attach(&turn.caller.base);
    }
    if (status != KV_OK) {
        kv_py_raise(state, status);
        Py_CLEAR(dense);
    }
    return dense;
}

/* ------------------------------------------------------------------------ libraries of others */

static PyObject *convert(const char *function, PyObject *object)
{
    kv_py_release_now();
    PyObject *module = PyImport_ImportModule("kvstore._row_sparse");
    PyObject *result = module != NULL ? PyObject_CallMethod(module, function, "O", object) : NULL;
    Py_XDECREF(module);
    return result;
}

PyObject *kv_rowsparse_from_scipy(PyObject *type, PyObject *matrix)
{
    (void)type;
    return convert("from_scipy", matrix);
}

PyObject *kv_rowsparse_from_torch(PyObject *type, PyObject *tensor)
{
    (void)type;
    return convert("from_torch", tensor);
}

PyObject *kv_rowsparse_toscipy(PyObject *self, PyObject *ignored)
{
    (void)ignored;
    return convert("toscipy", self);
}

PyObject *kv_rowsparse_to_torch(PyObject *self, PyObject *ignored)
{
    (void)ignored;
    return convert("to_torch", self);
}
