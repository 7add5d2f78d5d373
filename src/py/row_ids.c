/* Row ids from Python: integers of any type and shape as int64, and the sorted set of them.
 *
 * The four integer types that a store holds are widened here, straight from the user's memory. All
 * others (int16, uint64, a foreign byte order, lists) are rare and go through NumPy.
 */
#include "py/py.h"

#include "base/memory.h"
#include "comm/rows.h"
#include <string.h>

/* --------------------------------------------------------------------------------- refusals */

/* Puts "row_ids: " before the message of an error of ours about what is no array. */
static void name_argument(kv_state_t *state, const char *what)
{
    if (!PyErr_ExceptionMatches(state->errors[KV_BAD_TYPE]) &&
        !PyErr_ExceptionMatches(state->errors[KV_INVALID]))
        return;
    PyObject *error = kv_py_take_exception();
    PyObject *text = PyUnicode_FromFormat("%s: %S", what, error);
    PyObject *arguments = text != NULL ? PyTuple_Pack(1, text) : NULL;
    if (arguments == NULL || PyObject_SetAttrString(error, "args", arguments) < 0)
        PyErr_Clear();
    Py_XDECREF(arguments);
    Py_XDECREF(text);
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
}

static void refuse_type(kv_state_t *state, const char *what, const char *type)
{
    kv_py_fail(state, KV_BAD_TYPE, "%s must be integers, not %.100s", what, type);
}

/* --------------------------------------------------------------------- types that stores hold */

static bool is_integer(kv_dtype_t dtype)
{
    return dtype == KV_INT64 || dtype == KV_INT32 || dtype == KV_INT8 || dtype == KV_UINT8;
}

#define WIDEN(type)                                                                                \
    for (int64_t i = 0; i < count; i++)                                                            \
        to[i] = ((const type *)from)[i];                                                           \
    break

static void widen(kv_dtype_t dtype, int64_t count, const void *from, int64_t *to)
{
    switch (dtype) {
    case KV_INT32:
        WIDEN(int32_t);
    case KV_INT8:
        WIDEN(int8_t);
    case KV_UINT8:
        WIDEN(uint8_t);
    default: /* int64 */
        if (count > 0)
            memcpy(to, from, (size_t)count * sizeof *to);
    }
}

/* The elements of a view of integers in a new buffer. */
static kv_buffer_t *widened(kv_state_t *state, const kv_view_t *view)
{
    kv_dtype_t dtype = (kv_dtype_t)view->dtype;
    kv_buffer_t *wide = NULL;
    void *narrow = NULL;
    int64_t count;
    size_t bytes;
    /* A broadcast array may have more elements than memory has. */
    kv_status_t status = kv_shape_size(KV_INT64, 1, &view->count, &count, &bytes);
    if (status == KV_OK)
        status = kv_buffer_new(bytes, &wide);
    if (status != KV_OK) {
        kv_py_raise(state, status);
        return NULL;
    }
    const void *from = view->data;
    if (!kv_view_in_place(view)) {
        if (dtype != KV_INT64 &&
            (narrow = kv_alloc_elements((size_t)count * kv_dtype_bytes(dtype))) == NULL) {
            PyErr_NoMemory();
            goto error;
        }
        from = narrow != NULL ? narrow : wide->data;
        if (!kv_view_copy_out(state, view, narrow != NULL ? narrow : wide->data))
            goto error;
    }
    if (from != wide->data) {
        PyThreadState *thread = bytes >= KV_DETACH_BYTES ? PyEval_SaveThread() : NULL;
        widen(dtype, count, from, wide->data);
        if (thread != NULL)
            PyEval_RestoreThread(thread);
    }
    kv_free(narrow);
    return wide;
error:
    kv_free(narrow);
    kv_buffer_rele(wide);
    return NULL;
}

/* --------------------------------------------------------------------------------- by NumPy */

/* For an array of integers of another type: a NumPy array of int64. `wraps`: the numbers were
 * unsigned and of 64 bits, so those that have become negative are too large. */
static PyObject *to_int64(kv_state_t *state, PyObject *object, const char *what, bool *wraps)
{
    PyObject *array = NULL, *dtype = NULL, *kind = NULL, *size = NULL, *int64 = NULL;
    PyObject *result = NULL;
    array = kv_numpy_call(state, "asarray", object);
    dtype = array != NULL ? PyObject_GetAttrString(array, "dtype") : NULL;
    kind = dtype != NULL ? PyObject_GetAttrString(dtype, "kind") : NULL;
    size = kind != NULL ? PyObject_GetAttrString(dtype, "itemsize") : NULL;
    if (size == NULL)
        goto end;
    bool is_unsigned = PyUnicode_CompareWithASCIIString(kind, "u") == 0;
    if (!is_unsigned && PyUnicode_CompareWithASCIIString(kind, "i") != 0) {
        PyObject *text = PyObject_Str(dtype);
        const char *name = text != NULL ? PyUnicode_AsUTF8(text) : NULL;
        if (name != NULL)
            refuse_type(state, what, name);
        Py_XDECREF(text);
        goto end;
    }
    *wraps = is_unsigned && PyLong_AsLong(size) == sizeof(int64_t);
    int64 = kv_numpy_dtype_object(state, KV_INT64);
    if (int64 != NULL)
        result = PyObject_CallMethod(array, "astype", "Os", int64, "C");
end:
    Py_XDECREF(int64);
    Py_XDECREF(size);
    Py_XDECREF(kind);
    Py_XDECREF(dtype);
    Py_XDECREF(array);
    return result;
}

static bool check_signs(kv_state_t *state, const char *what, int64_t count, const int64_t *numbers)
{
    for (int64_t i = 0; i < count; i++) {
        if (numbers[i] < 0) {
            kv_py_fail(state, KV_INVALID, "%s: %llu at position %lld is above 2^63-1", what,
                       (unsigned long long)numbers[i], (long long)i);
            return false;
        }
    }
    return true;
}

/* ------------------------------------------------------------------------------ any integers */

/* A view of the integers. `source` is what it is a view of, an object of the user's or of ours. */
static bool integers_in(kv_state_t *state, PyObject *source, bool listed, const char *what,
                        kv_view_t *view, kv_lease_t *lease, bool *wraps)
{
    if (!kv_py_array_in(state, source, false, view, lease)) {
        name_argument(state, what);
        return false;
    }
    if (view->sparse == NULL && is_integer((kv_dtype_t)view->dtype) && !kv_view_beyond(view))
        return true;
    /* What NumPy makes of an empty list is of float64. */
    if (listed && view->count == 0 && view->dtype == KV_FLOAT64)
        return true;
    bool foreign = view->dtype == KV_DTYPE_NONE && !(view->flags & KV_VIEW_DEVICE);
    if (view->sparse != NULL)
        refuse_type(state, what, "a RowSparse");
    else if (view->dtype != KV_DTYPE_NONE && !is_integer((kv_dtype_t)view->dtype))
        refuse_type(state, what, kv_dtype_name((kv_dtype_t)view->dtype));
    else if (!foreign)
        kv_py_fail(state, KV_BAD_TYPE,
                   "%s must be in host memory: bring '%.100s' to the host first", what,
                   Py_TYPE(source)->tp_name);
    kv_lease_drop(lease);
    if (!foreign)
        return false;
    PyObject *converted = to_int64(state, source, what, wraps);
    bool done = converted != NULL && kv_py_array_in(state, converted, false, view, lease);
    Py_XDECREF(converted);
    return done;
}

bool kv_py_integers(kv_state_t *state, PyObject *object, const char *what, kv_buffer_t **out,
                    int64_t *count, int *ndim)
{
    kv_view_t view;
    kv_lease_t lease = {.owner = NULL};
    kv_buffer_t *numbers = NULL;
    bool listed = PyList_Check(object) || PyTuple_Check(object), wraps = false;
    if (PyBytes_Check(object)) {
        refuse_type(state, what, "bytes");
        return false;
    }
    PyObject *source = listed ? kv_numpy_call(state, "asarray", object) : Py_NewRef(object);
    if (source == NULL)
        name_argument(state, what);
    if (source == NULL || !integers_in(state, source, listed, what, &view, &lease, &wraps))
        goto end;
    int64_t found = view.count;
    int dims = view.ndim;
    numbers = widened(state, &view);
    if (numbers != NULL && wraps && !check_signs(state, what, found, numbers->data)) {
        kv_buffer_rele(numbers);
        numbers = NULL;
    }
    if (numbers != NULL) {
        *out = numbers;
        *count = found;
        if (ndim != NULL)
            *ndim = dims;
    }
end:
    kv_lease_drop(&lease);
    Py_XDECREF(source);
    return numbers != NULL;
}

bool kv_py_row_ids(kv_state_t *state, PyObject *object, kv_buffer_t **ids, int64_t *count)
{
    kv_buffer_t *numbers;
    int64_t given;
    kv_runtime_t *runtime = kv_py_runtime(state);
    if (runtime == NULL || !kv_py_integers(state, object, "row_ids", &numbers, &given, NULL))
        return false;
    size_t bytes = (size_t)given * sizeof(int64_t);
    int64_t *scratch = kv_alloc_elements(bytes);
    if (scratch == NULL) {
        kv_buffer_rele(numbers);
        PyErr_NoMemory();
        return false;
    }
    const kv_host_t host = {runtime->kernels, runtime->team, runtime->num_threads};
    PyThreadState *thread = bytes >= KV_DETACH_BYTES ? PyEval_SaveThread() : NULL;
    *count = kv_row_ids_unique(&host, given, numbers->data, scratch);
    if (thread != NULL)
        PyEval_RestoreThread(thread);
    kv_free(scratch);
    *ids = numbers;
    return true;
}
