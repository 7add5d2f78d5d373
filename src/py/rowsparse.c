/* kvstore.RowSparse: a row-sparse array that the engine knows, as Python sees it. The type, its
 * attributes, views and waits; how one is made is in rowsparse_make.c.
 *
 * What reads the rows first takes its turn on the array's variable, as everywhere. A view (`data`,
 * `indices`) holds a share of the rows' memory besides the array, so it goes on showing the rows
 * that it was taken of when a pull replaces them; while one is alive it is counted in `exports`,
 * and calls of a store on the array are synchronous.
 */
#include "py/rowsparse.h"

#include "py/rowsparse_doc.h"
#include <stddef.h>
#include <string.h>
#include <structmember.h>

/* How long repr waits for pending writes. */
#define REPR_TIMEOUT_NS (1000 * INT64_C(1000000))

#define VIEW_NAME "kvstore.rows"

/* --------------------------------------------------------------------------------- views */

static void view_destroy(PyObject *capsule)
{
    PyObject *self = PyCapsule_GetPointer(capsule, VIEW_NAME);
    kv_buffer_rele(PyCapsule_GetContext(capsule));
    atomic_fetch_sub(&kv_as_rowsparse(self)->sparse->exports, 1);
    Py_DECREF(self);
}

/* Shares of the rows as they are when all writes (KV_WRITE: and reads) before are done, counted in
 * `exports` until rows_drop. The exception is set only for KV_CALLBACK. */
static kv_status_t rows_take(kv_py_rowsparse_t *self, kv_access_t access, int64_t timeout_ns,
                             kv_rowset_t *out)
{
    kv_turn_t turn;
    kv_sparse_t *sparse = self->sparse;
    KV_TRY(kv_sparse_turn(&turn, self->state, sparse, access, timeout_ns));
    *out = (kv_rowset_t){.num_rows = sparse->rows.num_rows};
    if (out->num_rows > 0) {
        out->indices = kv_buffer_hold(sparse->rows.indices);
        out->data = kv_buffer_hold(sparse->rows.data);
    }
    atomic_fetch_add(&sparse->exports, 1);
    kv_turn_end(&turn);
    return KV_OK;
}

static void rows_drop(kv_py_rowsparse_t *self, kv_rowset_t *rows)
{
    kv_rowset_fini(rows);
    atomic_fetch_sub(&self->sparse->exports, 1);
}

static PyObject *make_view(kv_py_rowsparse_t *self, kv_dtype_t dtype, int ndim,
                           const int64_t *shape, kv_buffer_t *buffer, bool readonly)
{
    PyObject *base = PyCapsule_New(self, VIEW_NAME, view_destroy);
    if (base == NULL)
        return NULL;
    Py_INCREF(self);
    atomic_fetch_add(&self->sparse->exports, 1);
    if (buffer != NULL)
        PyCapsule_SetContext(base, kv_buffer_hold(buffer));
    /* Without rows there is no memory, but NumPy wants an address. */
    void *data = buffer != NULL && buffer->data != NULL ? buffer->data : self->sparse;
    PyObject *view = kv_numpy_view(self->state, dtype, ndim, shape, data, base);
    if (view != NULL && readonly) {
        PyObject *done = PyObject_CallMethod(view, "setflags", "i", 0);
        if (done == NULL)
            Py_CLEAR(view);
        Py_XDECREF(done);
    }
    return view;
}

static PyObject *indices_view(kv_py_rowsparse_t *self, const kv_rowset_t *rows)
{
    return make_view(self, KV_INT64, 1, &rows->num_rows, rows->indices, true);
}

static PyObject *data_view(kv_py_rowsparse_t *self, const kv_rowset_t *rows)
{
    const kv_sparse_t *sparse = self->sparse;
    const kv_borrow_t *borrow = kv_borrow_of(rows->data);
    int64_t shape[KV_MAX_DIMS];
    shape[0] = rows->num_rows;
    memcpy(shape + 1, sparse->shape + 1, (size_t)(sparse->ndim - 1) * sizeof *shape);
    return make_view(self, sparse->dtype, sparse->ndim, shape, rows->data,
                     borrow != NULL && borrow->readonly);
}

static PyObject *rowsparse_indices(PyObject *object, void *closure)
{
    (void)closure;
    kv_py_rowsparse_t *self = kv_as_rowsparse(object);
    kv_rowset_t rows;
    kv_py_release_now();
    kv_status_t status = rows_take(self, KV_READ, KV_PY_DEFAULT_TIMEOUT_NS, &rows);
    if (status != KV_OK)
        return kv_py_raise(self->state, status);
    PyObject *view = indices_view(self, &rows);
    rows_drop(self, &rows);
    return view;
}

static PyObject *rowsparse_data(PyObject *object, void *closure)
{
    (void)closure;
    kv_py_rowsparse_t *self = kv_as_rowsparse(object);
    kv_rowset_t rows;
    kv_py_release_now();
    kv_status_t status = rows_take(self, KV_WRITE, KV_PY_DEFAULT_TIMEOUT_NS, &rows);
    if (status != KV_OK)
        return kv_py_raise(self->state, status);
    PyObject *view = data_view(self, &rows);
    rows_drop(self, &rows);
    return view;
}

/* ---------------------------------------------------------------------------- attributes */

static PyObject *rowsparse_shape(PyObject *self, void *closure)
{
    (void)closure;
    return kv_py_shape(kv_as_rowsparse(self)->sparse->ndim, kv_as_rowsparse(self)->sparse->shape);
}

static PyObject *rowsparse_dtype(PyObject *object, void *closure)
{
    (void)closure;
    kv_py_rowsparse_t *self = kv_as_rowsparse(object);
    PyObject *dtype = kv_numpy_dtype_object(self->state, self->sparse->dtype);
    if (dtype == NULL && PyErr_ExceptionMatches(self->state->errors[KV_NOT_BUILT])) {
        PyErr_Clear();
        dtype = PyUnicode_FromString(kv_dtype_name(self->sparse->dtype));
    }
    return dtype;
}

static PyObject *rowsparse_ndim(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLong(kv_as_rowsparse(self)->sparse->ndim);
}

static PyObject *rowsparse_size(PyObject *self, void *closure)
{
    (void)closure;
    const kv_sparse_t *sparse = kv_as_rowsparse(self)->sparse;
    return PyLong_FromLongLong(sparse->shape[0] * sparse->row_count);
}

/* The number of rows, once all writes before are done; -1 with an exception. */
static int64_t count_rows(kv_py_rowsparse_t *self)
{
    kv_turn_t turn;
    kv_py_release_now();
    kv_status_t status =
        kv_sparse_turn(&turn, self->state, self->sparse, KV_READ, KV_PY_DEFAULT_TIMEOUT_NS);
    if (status != KV_OK) {
        kv_py_raise(self->state, status);
        return -1;
    }
    int64_t num_rows = self->sparse->rows.num_rows;
    kv_turn_end(&turn);
    return num_rows;
}

static PyObject *rowsparse_num_rows(PyObject *self, void *closure)
{
    (void)closure;
    int64_t num_rows = count_rows(kv_as_rowsparse(self));
    return num_rows >= 0 ? PyLong_FromLongLong(num_rows) : NULL;
}

static PyObject *rowsparse_nbytes(PyObject *self, void *closure)
{
    (void)closure;
    int64_t num_rows = count_rows(kv_as_rowsparse(self));
    size_t one = sizeof(int64_t) + kv_as_rowsparse(self)->sparse->row_bytes;
    return num_rows >= 0 ? PyLong_FromSize_t((size_t)num_rows * one) : NULL;
}

/* The closure is the text. */
static PyObject *rowsparse_text(PyObject *self, void *closure)
{
    (void)self;
    return PyUnicode_FromString(closure);
}

static Py_ssize_t rowsparse_length(PyObject *self)
{
    return (Py_ssize_t)kv_as_rowsparse(self)->sparse->shape[0];
}

/* With a length but without this, `if array:` would ask whether it has rows. */
static int rowsparse_bool(PyObject *self)
{
    kv_py_fail(kv_as_rowsparse(self)->state, KV_INVALID,
               "an array has no truth value; use asnumpy() with any() or all()");
    return -1;
}

/* ---------------------------------------------------------------------------------- text */

static PyObject *format_array(PyObject *array, const char *prefix, int threshold)
{
    PyObject *format = kv_numpy_function("array2string");
    PyObject *args = format != NULL ? PyTuple_Pack(1, array) : NULL;
    PyObject *options = args != NULL ? Py_BuildValue("{ss,ss,si}", "separator", ", ", "prefix",
                                                     prefix, "threshold", threshold)
                                     : NULL;
    PyObject *text = options != NULL ? PyObject_Call(format, args, options) : NULL;
    Py_XDECREF(options);
    Py_XDECREF(args);
    Py_XDECREF(format);
    return text;
}

/* Rows and ids as text. Neither waits long nor takes away a stored error: a debugger may ask. */
static PyObject *contents_text(kv_py_rowsparse_t *self)
{
    kv_sparse_t *sparse = self->sparse;
    kv_rowset_t rows;
    if (sparse->generation != kv_fork_generation())
        return PyUnicode_FromString("<of the parent process>");
    if (atomic_load(&sparse->var.state) & KV_VAR_ERROR)
        return PyUnicode_FromString("<failed>");
    kv_status_t status = rows_take(self, KV_READ, REPR_TIMEOUT_NS, &rows);
    if (status == KV_TIMEOUT || status == KV_INVALID)
        return PyUnicode_FromString("<pending>");
    if (status == KV_CLOSED)
        return PyUnicode_FromString("<closed>");
    if (status != KV_OK)
        return kv_py_raise(self->state, status);
    PyObject *data = data_view(self, &rows), *indices = NULL, *data_text = NULL;
    PyObject *indices_text = NULL, *text = NULL;
    if (data != NULL) {
        data_text = format_array(data, "kvstore.RowSparse(", 100);
    } else if (PyErr_ExceptionMatches(self->state->errors[KV_NOT_BUILT])) {
        PyErr_Clear();
        data_text = PyUnicode_FromString("<to be shown by ml_dtypes>");
    }
    indices = data_text != NULL ? indices_view(self, &rows) : NULL;
    indices_text = indices != NULL ? format_array(indices, "", 10) : NULL;
    if (indices_text != NULL)
        text = PyUnicode_FromFormat("%U, indices=%U", data_text, indices_text);
    Py_XDECREF(indices_text);
    Py_XDECREF(data_text);
    Py_XDECREF(indices);
    Py_XDECREF(data);
    rows_drop(self, &rows);
    return text;
}

static PyObject *rowsparse_repr(PyObject *self)
{
    PyObject *shape = rowsparse_shape(self, NULL);
    PyObject *contents = shape != NULL ? contents_text(kv_as_rowsparse(self)) : NULL;
    PyObject *text = NULL;
    if (contents != NULL)
        text =
            PyUnicode_FromFormat("kvstore.RowSparse(%U, shape=%R, dtype=%s, device=cpu)", contents,
                                 shape, kv_dtype_name(kv_as_rowsparse(self)->sparse->dtype));
    Py_XDECREF(contents);
    Py_XDECREF(shape);
    return text;
}

/* ----------------------------------------------------------------------- dense, in and out */

static PyObject *rowsparse_asnumpy(PyObject *self, PyObject *ignored)
{
    (void)ignored;
    kv_py_release_now();
    return kv_sparse_numpy(kv_as_rowsparse(self)->state, kv_as_rowsparse(self)->sparse);
}

static PyObject *rowsparse_to_numpy(PyObject *object, PyObject *const *args, Py_ssize_t num_args,
                                    PyObject *keyword_names)
{
    static const kv_param_t params[] = {{"dtype", false}, {"copy", false}};
    static const kv_signature_t signature = {"__array__", 2, 2, params};
    kv_py_rowsparse_t *self = kv_as_rowsparse(object);
    PyObject *values[2];
    kv_py_release_now();
    if (!kv_py_parse(&signature, args, num_args, keyword_names, values))
        return NULL;
    int copy = values[1] != NULL && values[1] != Py_None ? PyObject_IsTrue(values[1]) : 1;
    if (copy < 0)
        return NULL;
    if (copy == 0)
        return kv_py_fail(self->state, KV_INVALID,
                          "a row-sparse array cannot become dense without a copy");
    PyObject *dense = kv_sparse_numpy(self->state, self->sparse);
    if (dense == NULL || values[0] == NULL || values[0] == Py_None)
        return dense;
    PyObject *result =
        PyObject_CallMethod(dense, "astype", "OssOO", values[0], "K", "unsafe", Py_True, Py_False);
    Py_DECREF(dense);
    return result;
}

/* 1 for a number that is zero, 0 for an object that is no number, -1 with an exception. */
static int is_zero(kv_state_t *state, PyObject *value)
{
    if (!PyLong_Check(value) && !PyFloat_Check(value))
        return 0;
    int truth = PyObject_IsTrue(value);
    if (truth > 0)
        kv_py_fail(state, KV_BAD_TYPE,
                   "the only number that all rows can be set to is 0; other values need an array");
    return truth == 0 ? 1 : -1;
}

static bool is_whole(PyObject *key)
{
    if (key == Py_Ellipsis)
        return true;
    if (!PySlice_Check(key))
        return false;
    const PySliceObject *slice = (PySliceObject *)key;
    return slice->start == Py_None && slice->stop == Py_None && slice->step == Py_None;
}

static int rowsparse_assign(PyObject *object, PyObject *key, PyObject *value)
{
    kv_py_rowsparse_t *self = kv_as_rowsparse(object);
    kv_sparse_t *sparse = self->sparse, *source = NULL;
    kv_rowset_t rows = {.num_rows = 0};
    kv_turn_t turn;
    kv_py_release_now();
    if (value == NULL || !is_whole(key)) {
        kv_py_fail(self->state, KV_BAD_TYPE,
                   "a RowSparse takes only x[:] = value, all rows at once; x.data[i] = row changes "
                   "a row that is there");
        return -1;
    }
    int zero = is_zero(self->state, value);
    if (zero < 0 || (zero == 0 && !kv_sparse_from(self->state, value, sparse, &source)))
        return -1;
    kv_status_t status =
        kv_sparse_turn(&turn, self->state, sparse, KV_OVERWRITE, KV_PY_DEFAULT_TIMEOUT_NS);
    if (status == KV_OK) {
        rows = sparse->rows;
        sparse->rows = (kv_rowset_t){.num_rows = 0};
        if (source != NULL) {
            sparse->rows = source->rows;
            source->rows = (kv_rowset_t){.num_rows = 0};
        }
        kv_turn_end(&turn);
    } else {
        kv_py_raise(self->state, status);
    }
    kv_rowset_fini(&rows);
    kv_sparse_retire(source);
    kv_py_release_now(); /* of the user's memory, if the rows were there */
    return status == KV_OK ? 0 : -1;
}

/* --------------------------------------------------------------------------------- waits */

static PyObject *rowsparse_wait_to_read(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                                        PyObject *keyword_names)
{
    kv_sparse_t *sparse = kv_as_rowsparse(self)->sparse;
    return kv_turn_wait(kv_as_rowsparse(self)->state, &sparse->var, sparse->generation,
                        "wait_to_read", KV_READ, args, num_args, keyword_names);
}

static PyObject *rowsparse_wait_to_write(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                                         PyObject *keyword_names)
{
    kv_sparse_t *sparse = kv_as_rowsparse(self)->sparse;
    return kv_turn_wait(kv_as_rowsparse(self)->state, &sparse->var, sparse->generation,
                        "wait_to_write", KV_WRITE, args, num_args, keyword_names);
}

/* ------------------------------------------------------------------------------ the type */

static void rowsparse_dealloc(PyObject *object)
{
    kv_py_rowsparse_t *self = kv_as_rowsparse(object);
    PyTypeObject *type = Py_TYPE(object);
    if (self->weakrefs != NULL)
        PyObject_ClearWeakRefs(object);
    kv_borrow_forget(self->borrow);
    /* In a forked child another thread of the parent may have been in the middle of a change of
     * the variable. */
    if (self->sparse->generation == kv_fork_generation())
        kv_sparse_retire(self->sparse);
    type->tp_free(object);
    Py_DECREF(type);
}

PyObject *kv_rowsparse_wrap(kv_state_t *state, kv_sparse_t *sparse)
{
    PyTypeObject *type = state->rowsparse_type;
    PyObject *object = type->tp_alloc(type, 0);
    if (object == NULL) {
        kv_sparse_retire(sparse);
        return NULL;
    }
    kv_as_rowsparse(object)->state = state;
    kv_as_rowsparse(object)->sparse = sparse;
    return object;
}

bool kv_rowsparse_check(kv_state_t *state, PyObject *object)
{
    return Py_IS_TYPE(object, state->rowsparse_type);
}

kv_sparse_t *kv_rowsparse_array(PyObject *object)
{
    return kv_as_rowsparse(object)->sparse;
}

/* -------------------------------------------------------------------------------- tables */

#define FAST(function) (PyCFunction)(void (*)(void))(function)

static PyMethodDef rowsparse_methods[] = {
    {"zeros", FAST(kv_rowsparse_zeros), METH_FASTCALL | METH_KEYWORDS | METH_CLASS, zeros_doc},
    {"from_dense", kv_rowsparse_from_dense, METH_O | METH_CLASS, from_dense_doc},
    {"from_scipy", kv_rowsparse_from_scipy, METH_O | METH_CLASS, from_scipy_doc},
    {"from_torch", kv_rowsparse_from_torch, METH_O | METH_CLASS, from_torch_doc},
    {"asnumpy", rowsparse_asnumpy, METH_NOARGS, asnumpy_doc},
    {"todense", rowsparse_asnumpy, METH_NOARGS, todense_doc},
    {"toscipy", kv_rowsparse_toscipy, METH_NOARGS, toscipy_doc},
    {"to_torch", kv_rowsparse_to_torch, METH_NOARGS, to_torch_doc},
    {"copy", kv_rowsparse_copy, METH_NOARGS, copy_doc},
    {"wait_to_read", FAST(rowsparse_wait_to_read), METH_FASTCALL | METH_KEYWORDS, wait_to_read_doc},
    {"wait_to_write", FAST(rowsparse_wait_to_write), METH_FASTCALL | METH_KEYWORDS,
     wait_to_write_doc},
    {"__array__", FAST(rowsparse_to_numpy), METH_FASTCALL | METH_KEYWORDS, array_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef rowsparse_attributes[] = {
    {"data", rowsparse_data, NULL, data_doc, NULL},
    {"indices", rowsparse_indices, NULL, indices_doc, NULL},
    {"shape", rowsparse_shape, NULL, "Extents, a tuple of int.", NULL},
    {"dtype", rowsparse_dtype, NULL,
     "Element type: a numpy.dtype, or 'bfloat16' where ml_dtypes is missing.", NULL},
    {"ndim", rowsparse_ndim, NULL, "Number of dimensions.", NULL},
    {"size", rowsparse_size, NULL, "Number of elements of the shape.", NULL},
    {"num_rows", rowsparse_num_rows, NULL, "Number of rows that are there; waits for writes.",
     NULL},
    {"nbytes", rowsparse_nbytes, NULL, "Bytes of the rows and their ids; waits for writes.", NULL},
    {"stype", rowsparse_text, NULL, "The form of storage: 'row_sparse'.", (void *)"row_sparse"},
    {"device", rowsparse_text, NULL, "Where the memory is: 'cpu'.", (void *)"cpu"},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef rowsparse_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(kv_py_rowsparse_t, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot rowsparse_slots[] = {
    {Py_tp_doc, (void *)rowsparse_doc},
    {Py_tp_new, (void *)kv_rowsparse_new},
    {Py_tp_dealloc, (void *)rowsparse_dealloc},
    {Py_tp_repr, (void *)rowsparse_repr},
    {Py_tp_methods, rowsparse_methods},
    {Py_tp_getset, rowsparse_attributes},
    {Py_tp_members, rowsparse_members},
    {Py_mp_length, (void *)rowsparse_length},
    {Py_mp_ass_subscript, (void *)rowsparse_assign},
    {Py_nb_bool, (void *)rowsparse_bool},
    {0, NULL},
};

static PyType_Spec rowsparse_spec = {
    .name = "kvstore.RowSparse",
    .basicsize = sizeof(kv_py_rowsparse_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = rowsparse_slots,
};

int kv_rowsparse_setup(PyObject *module, kv_state_t *state)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &rowsparse_spec, NULL);
    if (type == NULL)
        return -1;
    state->rowsparse_type = (PyTypeObject *)type;
    return PyModule_AddObjectRef(module, "RowSparse", type);
}
