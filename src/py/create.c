/* kvstore.array, zeros, ones, empty, full: new NDArrays.
 *
 * What an element type holds and how values are converted to it is NumPy's business; only bfloat16,
 * which NumPy has not, goes by way of float32 and our own kernels, so that it works without
 * ml_dtypes.
 */
#include "py/py.h"

#include "comm/device.h"
#include <string.h>

PyObject *kv_numpy_function(const char *function)
{
    PyObject *numpy = PyImport_ImportModule("numpy");
    PyObject *result = numpy != NULL ? PyObject_GetAttrString(numpy, function) : NULL;
    Py_XDECREF(numpy);
    return result;
}

/* Turns what NumPy raised about a user's value into our exception with the same words, and NumPy's
 * as its cause. Always returns NULL. */
static PyObject *complain(kv_state_t *state)
{
    bool of_type = PyErr_ExceptionMatches(PyExc_TypeError);
    if (!of_type && !PyErr_ExceptionMatches(PyExc_ValueError) &&
        !PyErr_ExceptionMatches(PyExc_OverflowError))
        return NULL;
    PyObject *cause = kv_py_take_exception();
    PyObject *text = PyObject_Str(cause);
    if (text != NULL)
        PyErr_SetObject(state->errors[of_type ? KV_BAD_TYPE : KV_INVALID], text);
    Py_XDECREF(text);
    PyObject *error = kv_py_take_exception();
    PyException_SetCause(error, cause);
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
    return NULL;
}

PyObject *kv_numpy_call(kv_state_t *state, const char *function, PyObject *value)
{
    PyObject *callable = kv_numpy_function(function);
    PyObject *result = callable != NULL ? PyObject_CallOneArg(callable, value) : NULL;
    Py_XDECREF(callable);
    return result != NULL ? result : complain(state);
}

/* ---------------------------------------------------------------------------- parameters */

static bool parse_extent(kv_state_t *state, PyObject *object, int64_t *out)
{
    int overflow = 0;
    PyObject *number = PyIndex_Check(object) ? PyNumber_Index(object) : NULL;
    if (number != NULL)
        *out = PyLong_AsLongLongAndOverflow(number, &overflow);
    else if (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_TypeError))
        kv_py_fail(state, KV_BAD_TYPE,
                   "a shape is an integer or a tuple of integers, and '%.100s' is neither",
                   Py_TYPE(object)->tp_name);
    if (overflow != 0)
        kv_py_fail(state, KV_INVALID, "an extent of a shape has more than 63 bits");
    Py_XDECREF(number);
    return number != NULL && overflow == 0;
}

int kv_py_extents(kv_state_t *state, PyObject *object, int64_t *shape)
{
    if (!PyTuple_Check(object) && !PyList_Check(object))
        return parse_extent(state, object, shape) ? 1 : -1;
    /* A tuple of our own: an extent's __index__ may change a list. */
    PyObject *extents = PySequence_Tuple(object);
    if (extents == NULL)
        return -1;
    Py_ssize_t ndim = PyTuple_GET_SIZE(extents);
    bool good = ndim <= KV_MAX_DIMS;
    if (!good)
        kv_py_fail(state, KV_INVALID, "an array has at most %d dimensions, not %zd", KV_MAX_DIMS,
                   ndim);
    for (Py_ssize_t i = 0; good && i < ndim; i++)
        good = parse_extent(state, PyTuple_GET_ITEM(extents, i), &shape[i]);
    Py_DECREF(extents);
    return good ? (int)ndim : -1;
}

/* None and NULL give `fallback`. */
static bool parse_dtype(kv_state_t *state, PyObject *like, kv_dtype_t fallback, kv_dtype_t *out)
{
    *out = fallback;
    if (like == NULL || like == Py_None)
        return true;
    *out = kv_numpy_dtype(state, like);
    return *out != KV_DTYPE_NONE;
}

/* --------------------------------------------------------------------------- filled arrays */

/* The bytes of one element of this value. */
static bool make_element(kv_state_t *state, kv_dtype_t dtype, PyObject *value, void *element)
{
    if (dtype == KV_BFLOAT16) {
        kv_runtime_t *runtime = kv_py_runtime(state);
        if (runtime == NULL)
            return false;
        double number = PyFloat_AsDouble(value);
        if (number == -1.0 && PyErr_Occurred()) {
            complain(state);
            return false;
        }
        float single = (float)number;
        runtime->kernels->float32_to[KV_BFLOAT16](1, &single, element);
        return true;
    }
    void *data;
    PyObject *scalar = kv_numpy_empty(state, dtype, 0, NULL, &data);
    PyObject *copyto = scalar != NULL ? kv_numpy_function("copyto") : NULL;
    PyObject *args = copyto != NULL ? PyTuple_Pack(2, scalar, value) : NULL;
    PyObject *options = args != NULL ? Py_BuildValue("{ss}", "casting", "unsafe") : NULL;
    PyObject *done = NULL;
    if (options != NULL) {
        done = PyObject_Call(copyto, args, options);
        if (done == NULL)
            complain(state);
        else
            memcpy(element, data, kv_dtype_bytes(dtype));
    }
    Py_XDECREF(done);
    Py_XDECREF(options);
    Py_XDECREF(args);
    Py_XDECREF(copyto);
    Py_XDECREF(scalar);
    return done != NULL;
}

/* Copies what is written already, up to a piece that stays in the cache. */
static void fill(const kv_array_t *array, const void *element)
{
    enum { PIECE = 32 * 1024 };
    char *data = array->buffer->data;
    size_t item = kv_dtype_bytes(array->dtype), written = item;
    if (array->bytes == 0)
        return;
    memcpy(data, element, item);
    while (written < array->bytes) {
        size_t bytes = written < PIECE ? written : PIECE;
        if (bytes > array->bytes - written)
            bytes = array->bytes - written;
        memcpy(data + written, data, bytes);
        written += bytes;
    }
}

/* `value` NULL leaves the contents unspecified. */
static PyObject *make_filled(kv_state_t *state, PyObject *shape, PyObject *like, PyObject *value)
{
    int64_t extents[KV_MAX_DIMS];
    kv_dtype_t dtype;
    char element[8];
    kv_array_t *array;
    int ndim = kv_py_extents(state, shape, extents);
    if (ndim < 0 || !parse_dtype(state, like, KV_FLOAT32, &dtype) ||
        (value != NULL && !make_element(state, dtype, value, element)))
        return NULL;
    kv_status_t status = kv_array_new(dtype, ndim, extents, &array);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    if (value != NULL && array->bytes < KV_DETACH_BYTES) {
        fill(array, element);
    } else if (value != NULL) {
        Py_BEGIN_ALLOW_THREADS fill(array, element);
        Py_END_ALLOW_THREADS
    }
    return kv_ndarray_wrap(state, array);
}

static PyObject *make_constant(PyObject *module, const kv_signature_t *signature,
                               PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names,
                               long number)
{
    PyObject *values[2];
    kv_py_release_now();
    if (!kv_py_parse(signature, args, num_args, keyword_names, values))
        return NULL;
    PyObject *value = PyLong_FromLong(number);
    if (value == NULL)
        return NULL;
    PyObject *result = make_filled(kv_py_state(module), values[0], values[1], value);
    Py_DECREF(value);
    return result;
}

static const kv_param_t shape_dtype[] = {{"shape", true}, {"dtype", false}};

static PyObject *create_zeros(PyObject *module, PyObject *const *args, Py_ssize_t num_args,
                              PyObject *keyword_names)
{
    static const kv_signature_t signature = {"zeros", 2, 2, shape_dtype};
    return make_constant(module, &signature, args, num_args, keyword_names, 0);
}

static PyObject *create_ones(PyObject *module, PyObject *const *args, Py_ssize_t num_args,
                             PyObject *keyword_names)
{
    static const kv_signature_t signature = {"ones", 2, 2, shape_dtype};
    return make_constant(module, &signature, args, num_args, keyword_names, 1);
}

static PyObject *create_empty(PyObject *module, PyObject *const *args, Py_ssize_t num_args,
                              PyObject *keyword_names)
{
    static const kv_signature_t signature = {"empty", 2, 2, shape_dtype};
    PyObject *values[2];
    kv_py_release_now();
    if (!kv_py_parse(&signature, args, num_args, keyword_names, values))
        return NULL;
    return make_filled(kv_py_state(module), values[0], values[1], NULL);
}

static PyObject *create_full(PyObject *module, PyObject *const *args, Py_ssize_t num_args,
                             PyObject *keyword_names)
{
    static const kv_param_t params[] = {{"shape", true}, {"fill_value", true}, {"dtype", false}};
    static const kv_signature_t signature = {"full", 3, 3, params};
    PyObject *values[3];
    kv_py_release_now();
    if (!kv_py_parse(&signature, args, num_args, keyword_names, values))
        return NULL;
    return make_filled(kv_py_state(module), values[0], values[2], values[1]);
}

/* ------------------------------------------------------------------------ arrays of others */

static bool fetch(kv_state_t *state, const kv_view_t *view, void *data)
{
    kv_py_caller_t caller;
    kv_py_caller_init(&caller, KV_PY_DEFAULT_TIMEOUT_NS);
    kv_caller_detach(&caller.base);
    kv_status_t status = kv_device_fetch(view, data, &caller.base);
    kv_caller_attach(&caller.base);
    if (status != KV_OK)
        kv_py_raise(state, status);
    return status == KV_OK;
}

bool kv_view_copy_out(kv_state_t *state, const kv_view_t *view, void *data)
{
    if (view->array != NULL)
        return kv_array_copy_out(state, view->array, view->array->dtype, data);
    if (view->flags & KV_VIEW_DEVICE)
        return fetch(state, view, data);
    size_t bytes = (size_t)view->count * kv_dtype_bytes((kv_dtype_t)view->dtype);
    PyThreadState *thread = bytes >= KV_DETACH_BYTES ? PyEval_SaveThread() : NULL;
    if (view->strides != NULL)
        kv_view_gather(view, data);
    else if (bytes > 0)
        memcpy(data, view->data, bytes);
    if (thread != NULL)
        PyEval_RestoreThread(thread);
    return true;
}

/* A new array with the elements of a view. */
static PyObject *copy_view(kv_state_t *state, const kv_view_t *view)
{
    kv_array_t *array;
    kv_status_t status = kv_array_new((kv_dtype_t)view->dtype, view->ndim, view->shape, &array);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    if (!kv_view_copy_out(state, view, array->buffer->data)) {
        kv_array_retire(array);
        return NULL;
    }
    return kv_ndarray_wrap(state, array);
}

/* A new array of bfloat16 from the float32 elements of a view without strides. */
static PyObject *copy_to_bfloat16(kv_state_t *state, const kv_view_t *view)
{
    kv_array_t *array;
    kv_runtime_t *runtime = kv_py_runtime(state);
    if (runtime == NULL)
        return NULL;
    kv_status_t status = kv_array_new(KV_BFLOAT16, view->ndim, view->shape, &array);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    Py_BEGIN_ALLOW_THREADS runtime->kernels->float32_to[KV_BFLOAT16](array->count, view->data,
                                                                     array->buffer->data);
    Py_END_ALLOW_THREADS return kv_ndarray_wrap(state, array);
}

/* A new array of another element type than the view of `source` has. */
static PyObject *copy_converted(kv_state_t *state, PyObject *source, const kv_view_t *view,
                                kv_dtype_t target)
{
    PyObject *own = NULL, *numbers = NULL, *type = NULL, *changed = NULL, *result = NULL;
    kv_view_t changed_view;
    kv_lease_t lease;
    if (view->dtype == KV_BFLOAT16 || (view->flags & KV_VIEW_DEVICE)) {
        own = copy_view(state, view);
        if (own != NULL)
            numbers =
                kv_array_numpy(state, kv_ndarray_array(state, own),
                               view->dtype == KV_BFLOAT16 ? KV_FLOAT32 : (kv_dtype_t)view->dtype);
    } else {
        numbers = kv_numpy_call(state, "asarray", source);
    }
    type = kv_numpy_dtype_object(state, target == KV_BFLOAT16 ? KV_FLOAT32 : target);
    if (numbers == NULL || type == NULL)
        goto end;
    changed = PyObject_CallMethod(numbers, "astype", "Os", type, "C");
    if (changed == NULL) {
        complain(state);
        goto end;
    }
    if (!kv_py_array_in(state, changed, false, &changed_view, &lease))
        goto end;
    result = target == KV_BFLOAT16 ? copy_to_bfloat16(state, &changed_view)
                                   : copy_view(state, &changed_view);
    kv_lease_drop(&lease);
end:
    Py_XDECREF(changed);
    Py_XDECREF(type);
    Py_XDECREF(numbers);
    Py_XDECREF(own);
    return result;
}

static PyObject *create_array(PyObject *module, PyObject *const *args, Py_ssize_t num_args,
                              PyObject *keyword_names)
{
    static const kv_param_t params[] = {{"object", true}, {"dtype", false}};
    static const kv_signature_t signature = {"array", 2, 2, params};
    kv_state_t *state = kv_py_state(module);
    PyObject *values[2], *source, *result = NULL;
    kv_dtype_t target;
    kv_view_t view;
    kv_lease_t lease;
    kv_py_release_now();
    if (!kv_py_parse(&signature, args, num_args, keyword_names, values) ||
        !parse_dtype(state, values[1], KV_DTYPE_NONE, &target))
        return NULL;
    if (PyList_Check(values[0]) || PyTuple_Check(values[0]) || PyLong_Check(values[0]) ||
        PyFloat_Check(values[0]))
        source = kv_numpy_call(state, "asarray", values[0]);
    else if (kv_rowsparse_check(state, values[0]))
        source = kv_sparse_numpy(state, kv_rowsparse_array(values[0]));
    else
        source = Py_NewRef(values[0]);
    if (source == NULL)
        return NULL;
    if (!kv_py_array_in(state, source, false, &view, &lease))
        goto end;
    if (kv_view_beyond(&view))
        kv_py_fail(state, KV_BAD_TYPE,
                   "kvstore.array copies memory of the host and of CUDA devices: bring '%.100s' to "
                   "the host first",
                   Py_TYPE(source)->tp_name);
    else if ((view.flags & KV_VIEW_DEVICE) && view.dtype == KV_DTYPE_NONE)
        kv_py_fail(state, KV_BAD_TYPE,
                   "an array cannot hold elements of type %.100s: convert them, or bring '%.100s' "
                   "to the host first",
                   view.type_name, Py_TYPE(source)->tp_name);
    else if (view.dtype != KV_DTYPE_NONE && (target == KV_DTYPE_NONE || target == view.dtype))
        result = copy_view(state, &view);
    else if (target != KV_DTYPE_NONE)
        result = copy_converted(state, source, &view, target);
    else
        kv_py_fail(state, KV_BAD_TYPE,
                   "an array cannot hold elements of type %.100s: give dtype= to convert them",
                   view.type_name);
    kv_lease_drop(&lease);
end:
    Py_DECREF(source);
    return result;
}

/* -------------------------------------------------------------------------------- table */

PyDoc_STRVAR(array_doc,
             "array($module, /, object, dtype=None)\n--\n\n"
             "Copy an array, or (nested) lists of numbers, into a new NDArray.\n\n"
             "Parameters\n"
             "----------\n"
             "object : array or list of numbers\n"
             "    Anything with DLPack or the buffer protocol, in memory of the host or, if it\n"
             "    is contiguous, of a CUDA device; lists go through `numpy.asarray`.\n"
             "dtype : dtype-like, optional\n"
             "    Element type to convert to. By default that of `object`.\n\n"
             "Returns\n"
             "-------\n"
             "NDArray\n\n"
             "Examples\n"
             "--------\n"
             ">>> kvstore.array([[1, 2], [3, 4]], dtype='float32')\n"
             "kvstore.NDArray([[1., 2.],\n"
             "                 [3., 4.]], shape=(2, 2), dtype=float32, device=cpu)\n");

#define CONSTANT_DOC(name, what, example)                                                          \
    name "($module, /, shape, dtype='float32')\n--\n\n"                                            \
         "Make a new NDArray " what ".\n\n"                                                        \
         "Parameters\n"                                                                            \
         "----------\n"                                                                            \
         "shape : int or tuple of int\n"                                                           \
         "dtype : dtype-like, optional\n\n"                                                        \
         "Returns\n"                                                                               \
         "-------\n"                                                                               \
         "NDArray\n\n"                                                                             \
         "Examples\n"                                                                              \
         "--------\n" example

PyDoc_STRVAR(
    zeros_doc,
    CONSTANT_DOC("zeros", "full of zeros",
                 ">>> kvstore.zeros(3)\n"
                 "kvstore.NDArray([0., 0., 0.], shape=(3,), dtype=float32, device=cpu)\n"));

PyDoc_STRVAR(ones_doc,
             CONSTANT_DOC("ones", "full of ones",
                          ">>> kvstore.ones(2, dtype='int64')\n"
                          "kvstore.NDArray([1, 1], shape=(2,), dtype=int64, device=cpu)\n"));

PyDoc_STRVAR(empty_doc, CONSTANT_DOC("empty", "whose contents are not specified",
                                     ">>> kvstore.empty((2, 3)).shape\n"
                                     "(2, 3)\n"));

PyDoc_STRVAR(full_doc, "full($module, /, shape, fill_value, dtype='float32')\n--\n\n"
                       "Make a new NDArray full of one value.\n\n"
                       "Parameters\n"
                       "----------\n"
                       "shape : int or tuple of int\n"
                       "fill_value : number\n"
                       "dtype : dtype-like, optional\n\n"
                       "Returns\n"
                       "-------\n"
                       "NDArray\n\n"
                       "Examples\n"
                       "--------\n"
                       ">>> kvstore.full(2, 0.5)\n"
                       "kvstore.NDArray([0.5, 0.5], shape=(2,), dtype=float32, device=cpu)\n");

#define FAST(function) (PyCFunction)(void (*)(void))(function)

static PyMethodDef create_functions[] = {
    {"array", FAST(create_array), METH_FASTCALL | METH_KEYWORDS, array_doc},
    {"zeros", FAST(create_zeros), METH_FASTCALL | METH_KEYWORDS, zeros_doc},
    {"ones", FAST(create_ones), METH_FASTCALL | METH_KEYWORDS, ones_doc},
    {"empty", FAST(create_empty), METH_FASTCALL | METH_KEYWORDS, empty_doc},
    {"full", FAST(create_full), METH_FASTCALL | METH_KEYWORDS, full_doc},
    {NULL, NULL, 0, NULL},
};

int kv_create_setup(PyObject *module)
{
    return PyModule_AddFunctions(module, create_functions);
}
