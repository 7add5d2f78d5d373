/* kvstore.NDArray: an array that the engine knows, as Python sees it. The type, its attributes and
 * waits; how its memory is read and handed out is in export.c.
 */
#include "py/ndarray.h"
#include <stddef.h>
#include <structmember.h>

/* How long repr waits for pending writes. */
#define REPR_TIMEOUT_NS (1000 * INT64_C(1000000))

/* ---------------------------------------------------------------------------- attributes */

PyObject *kv_py_shape(int ndim, const int64_t *shape)
{
    PyObject *tuple = PyTuple_New(ndim);
    for (int i = 0; tuple != NULL && i < ndim; i++) {
        PyObject *extent = PyLong_FromLongLong(shape[i]);
        if (extent == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, extent);
    }
    return tuple;
}

static PyObject *ndarray_shape(PyObject *self, void *closure)
{
    (void)closure;
    return kv_py_shape(kv_as_ndarray(self)->array->ndim, kv_as_ndarray(self)->array->shape);
}

static PyObject *ndarray_dtype(PyObject *self, void *closure)
{
    (void)closure;
    PyObject *dtype = kv_ndarray_dtype(kv_as_ndarray(self));
    if (dtype == NULL && !PyErr_Occurred())
        dtype = PyUnicode_FromString(kv_dtype_name(kv_as_ndarray(self)->array->dtype));
    return dtype;
}

static PyObject *ndarray_ndim(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLong(kv_as_ndarray(self)->array->ndim);
}

static PyObject *ndarray_size(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromLongLong(kv_as_ndarray(self)->array->count);
}

static PyObject *ndarray_nbytes(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(kv_as_ndarray(self)->array->bytes);
}

static PyObject *ndarray_itemsize(PyObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(kv_dtype_bytes(kv_as_ndarray(self)->array->dtype));
}

static PyObject *ndarray_device(PyObject *self, void *closure)
{
    (void)self, (void)closure;
    return PyUnicode_FromString("cpu");
}

static PyObject *ndarray_dlpack_device(PyObject *self, PyObject *ignored)
{
    (void)self, (void)ignored;
    return Py_BuildValue("(ii)", 1, 0);
}

static Py_ssize_t ndarray_length(PyObject *self)
{
    const kv_array_t *array = kv_as_ndarray(self)->array;
    if (array->ndim == 0) {
        PyErr_SetString(PyExc_TypeError, "len() of an array without dimensions");
        return -1;
    }
    return (Py_ssize_t)array->shape[0];
}

/* With a length but without this, `if array:` would ask whether it has rows. */
static int ndarray_bool(PyObject *self)
{
    kv_py_fail(kv_as_ndarray(self)->state, KV_INVALID,
               "an array has no truth value; use asnumpy() with any() or all()");
    return -1;
}

/* The elements as text. Neither waits long nor takes away a stored error: a debugger may ask. NumPy
 * formats a view, after the turn: a thread that writes meanwhile shows as a mixture of old and new,
 * but no large array is copied for the few elements that are shown. */
static PyObject *contents_text(kv_py_ndarray_t *self)
{
    kv_array_t *array = self->array;
    if (array->generation != kv_fork_generation())
        return PyUnicode_FromString("<of the parent process>");
    if (atomic_load(&array->var.state) & KV_VAR_ERROR)
        return PyUnicode_FromString("<failed>");
    kv_status_t status;
    PyObject *view = kv_ndarray_view(self, KV_READ, REPR_TIMEOUT_NS, &status);
    if (view == NULL && (status == KV_TIMEOUT || status == KV_INVALID))
        return PyUnicode_FromString("<pending>");
    if (view == NULL && status == KV_CLOSED)
        return PyUnicode_FromString("<closed>");
    if (view == NULL && status != KV_CALLBACK)
        return kv_py_raise(self->state, status);
    if (view == NULL && array->dtype == KV_BFLOAT16 &&
        PyErr_ExceptionMatches(self->state->errors[KV_NOT_BUILT])) {
        PyErr_Clear();
        view = kv_array_numpy(self->state, array, KV_FLOAT32);
    }
    PyObject *format = view != NULL ? kv_numpy_function("array2string") : NULL;
    PyObject *args = format != NULL ? PyTuple_Pack(1, view) : NULL;
    PyObject *options =
        args != NULL ? Py_BuildValue("{ssss}", "separator", ", ", "prefix", "kvstore.NDArray(")
                     : NULL;
    PyObject *text = options != NULL ? PyObject_Call(format, args, options) : NULL;
    Py_XDECREF(options);
    Py_XDECREF(args);
    Py_XDECREF(format);
    Py_XDECREF(view);
    return text;
}

static PyObject *ndarray_repr(PyObject *self)
{
    PyObject *shape = ndarray_shape(self, NULL);
    PyObject *contents = shape != NULL ? contents_text(kv_as_ndarray(self)) : NULL;
    PyObject *text = NULL;
    if (contents != NULL)
        text = PyUnicode_FromFormat("kvstore.NDArray(%U, shape=%R, dtype=%s, device=cpu)", contents,
                                    shape, kv_dtype_name(kv_as_ndarray(self)->array->dtype));
    Py_XDECREF(contents);
    Py_XDECREF(shape);
    return text;
}

/* --------------------------------------------------------------------------------- waits */

PyObject *kv_turn_wait(kv_state_t *state, kv_var_t *var, uint64_t generation, const char *function,
                       kv_access_t access, PyObject *const *args, Py_ssize_t num_args,
                       PyObject *keyword_names)
{
    static const kv_param_t params[] = {{"timeout", false}};
    const kv_signature_t signature = {function, 1, 1, params};
    PyObject *timeout;
    int64_t timeout_ns;
    kv_py_release_now();
    if (!kv_py_parse(&signature, args, num_args, keyword_names, &timeout) ||
        !kv_py_timeout(state, timeout != NULL ? timeout : Py_None, KV_PY_DEFAULT_TIMEOUT_NS,
                       &timeout_ns))
        return NULL;
    kv_turn_t turn;
    kv_status_t status = kv_turn_begin(&turn, state, var, generation, access, timeout_ns);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    kv_turn_end(&turn);
    Py_RETURN_NONE;
}

static PyObject *wait_turn(PyObject *object, const char *function, kv_access_t access,
                           PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    kv_py_ndarray_t *self = kv_as_ndarray(object);
    kv_ndarray_forget_dropped(self);
    return kv_turn_wait(self->state, &self->array->var, self->array->generation, function, access,
                        args, num_args, keyword_names);
}

static PyObject *ndarray_wait_to_read(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                                      PyObject *keyword_names)
{
    return wait_turn(self, "wait_to_read", KV_READ, args, num_args, keyword_names);
}

static PyObject *ndarray_wait_to_write(PyObject *self, PyObject *const *args, Py_ssize_t num_args,
                                       PyObject *keyword_names)
{
    return wait_turn(self, "wait_to_write", KV_WRITE, args, num_args, keyword_names);
}

/* ------------------------------------------------------------------------------ the type */

static PyObject *ndarray_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    (void)type, (void)args, (void)keywords;
    PyErr_SetString(PyExc_TypeError, "an NDArray is made by kvstore.array(), zeros(), ones(), "
                                     "empty() or full(), not by calling the type");
    return NULL;
}

static int ndarray_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(kv_as_ndarray(self)->dropped);
    return 0;
}

static int ndarray_clear(PyObject *self)
{
    Py_CLEAR(kv_as_ndarray(self)->dropped);
    return 0;
}

static void ndarray_dealloc(PyObject *object)
{
    kv_py_ndarray_t *self = kv_as_ndarray(object);
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->weakrefs != NULL)
        PyObject_ClearWeakRefs(object);
    Py_CLEAR(self->dropped);
    /* In a forked child another thread of the parent may have been in the middle of a change of
     * the variable. */
    if (self->array->generation == kv_fork_generation())
        kv_array_retire(self->array);
    type->tp_free(object);
    Py_DECREF(type);
}

PyObject *kv_ndarray_wrap(kv_state_t *state, kv_array_t *array)
{
    PyTypeObject *type = state->ndarray_type;
    PyObject *object = type->tp_alloc(type, 0);
    if (object == NULL) {
        kv_array_retire(array);
        return NULL;
    }
    kv_as_ndarray(object)->state = state;
    kv_as_ndarray(object)->array = array;
    return object;
}

kv_array_t *kv_ndarray_array(kv_state_t *state, PyObject *object)
{
    return Py_IS_TYPE(object, state->ndarray_type) ? kv_as_ndarray(object)->array : NULL;
}

/* ------------------------------------------------------------------------- documentation */

PyDoc_STRVAR(
    ndarray_doc,
    "An array that the store's engine knows.\n\n"
    "A call of a store on it may return before the work is done; whatever looks at the array "
    "later\n"
    "waits for that. NumPy functions take it as it is. Made by `kvstore.array`, `zeros`, `ones`,\n"
    "`empty`, `full`, and by `pull` without `out`.\n\n"
    "Examples\n"
    "--------\n"
    ">>> a = kvstore.ones((2, 2))\n"
    ">>> a\n"
    "kvstore.NDArray([[1., 1.],\n"
    "                 [1., 1.]], shape=(2, 2), dtype=float32, device=cpu)\n"
    ">>> float(numpy.sum(a))\n"
    "4.0\n");

PyDoc_STRVAR(asnumpy_doc,
             "asnumpy($self, /)\n--\n\n"
             "Copy the array into a new NumPy array, once all writes before are done.\n\n"
             "Returns\n"
             "-------\n"
             "numpy.ndarray\n\n"
             "Examples\n"
             "--------\n"
             ">>> kvstore.array([1.0, 2.0]).asnumpy()\n"
             "array([1., 2.])\n");

PyDoc_STRVAR(
    array_doc,
    "__array__($self, /, dtype=None, copy=None)\n--\n\n"
    "Give the array to NumPy: a writable view of the same memory where that is possible.\n\n"
    "Waits for pending reads and writes. While the view is alive, calls of a store on this array\n"
    "return only when they are done with it.\n\n"
    "Parameters\n"
    "----------\n"
    "dtype : dtype-like, optional\n"
    "    Another element type than the array's makes a copy.\n"
    "copy : bool, optional\n"
    "    True: always copy. False: raise where a copy would be needed.\n\n"
    "Examples\n"
    "--------\n"
    ">>> a = kvstore.zeros(2)\n"
    ">>> numpy.asarray(a)[0] = 5\n"
    ">>> a.asnumpy()\n"
    "array([5., 0.], dtype=float32)\n");

PyDoc_STRVAR(
    dlpack_doc,
    "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n"
    "Give the memory to another array library, without a copy.\n\n"
    "Waits for pending reads and writes. While the other library's array is alive, calls of a "
    "store\n"
    "on this array return only when they are done with it.\n\n"
    "Examples\n"
    "--------\n"
    ">>> a = kvstore.array([1.0, 2.0])\n"
    ">>> numpy.from_dlpack(a)\n"
    "array([1., 2.])\n");

PyDoc_STRVAR(dlpack_device_doc, "__dlpack_device__($self, /)\n--\n\n"
                                "The device of the memory in DLPack's numbers: (1, 0), the CPU.\n");

PyDoc_STRVAR(wait_to_read_doc,
             "wait_to_read($self, /, timeout=None)\n--\n\n"
             "Wait until everything that will write the array by calls made so far has done so.\n\n"
             "Raises the error of such a call if it failed.\n\n"
             "Parameters\n"
             "----------\n"
             "timeout : float, optional\n"
             "    Seconds, 300 by default; then `kvstore.TimeoutError`.\n\n"
             "Examples\n"
             "--------\n"
             ">>> a = kvstore.zeros(2)\n"
             ">>> a.wait_to_read()\n");

PyDoc_STRVAR(
    wait_to_write_doc,
    "wait_to_write($self, /, timeout=None)\n--\n\n"
    "Wait until everything that will read or write the array by calls made so far has done so.\n\n"
    "Raises the error of such a call if it failed.\n\n"
    "Parameters\n"
    "----------\n"
    "timeout : float, optional\n"
    "    Seconds, 300 by default; then `kvstore.TimeoutError`.\n\n"
    "Examples\n"
    "--------\n"
    ">>> a = kvstore.zeros(2)\n"
    ">>> a.wait_to_write()\n");

/* -------------------------------------------------------------------------------- tables */

#define FAST(function) (PyCFunction)(void (*)(void))(function)

static PyMethodDef ndarray_methods[] = {
    {"asnumpy", kv_ndarray_asnumpy, METH_NOARGS, asnumpy_doc},
    {"wait_to_read", FAST(ndarray_wait_to_read), METH_FASTCALL | METH_KEYWORDS, wait_to_read_doc},
    {"wait_to_write", FAST(ndarray_wait_to_write), METH_FASTCALL | METH_KEYWORDS,
     wait_to_write_doc},
    {"__array__", FAST(kv_ndarray_to_numpy), METH_FASTCALL | METH_KEYWORDS, array_doc},
    {"__dlpack__", FAST(kv_ndarray_to_dlpack), METH_FASTCALL | METH_KEYWORDS, dlpack_doc},
    {"__dlpack_device__", ndarray_dlpack_device, METH_NOARGS, dlpack_device_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef ndarray_attributes[] = {
    {"shape", ndarray_shape, NULL, "Extents, a tuple of int.", NULL},
    {"dtype", ndarray_dtype, NULL,
     "Element type: a numpy.dtype, or 'bfloat16' where ml_dtypes is missing.", NULL},
    {"ndim", ndarray_ndim, NULL, "Number of dimensions.", NULL},
    {"size", ndarray_size, NULL, "Number of elements.", NULL},
    {"nbytes", ndarray_nbytes, NULL, "Bytes of all elements.", NULL},
    {"itemsize", ndarray_itemsize, NULL, "Bytes of one element.", NULL},
    {"device", ndarray_device, NULL, "Where the memory is: 'cpu'.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef ndarray_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(kv_py_ndarray_t, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot ndarray_slots[] = {
    {Py_tp_doc, (void *)ndarray_doc},
    {Py_tp_new, (void *)ndarray_new},
    {Py_tp_dealloc, (void *)ndarray_dealloc},
    {Py_tp_traverse, (void *)ndarray_traverse},
    {Py_tp_clear, (void *)ndarray_clear},
    {Py_tp_repr, (void *)ndarray_repr},
    {Py_tp_methods, ndarray_methods},
    {Py_tp_getset, ndarray_attributes},
    {Py_tp_members, ndarray_members},
    {Py_mp_length, (void *)ndarray_length},
    {Py_nb_bool, (void *)ndarray_bool},
    {Py_bf_getbuffer, (void *)kv_ndarray_getbuffer},
    {Py_bf_releasebuffer, (void *)kv_ndarray_releasebuffer},
    {0, NULL},
};

static PyType_Spec ndarray_spec = {
    .name = "kvstore.NDArray",
    .basicsize = sizeof(kv_py_ndarray_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = ndarray_slots,
};

int kv_ndarray_setup(PyObject *module, kv_state_t *state)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &ndarray_spec, NULL);
    if (type == NULL)
        return -1;
    state->ndarray_type = (PyTypeObject *)type;
    if (PyModule_AddObjectRef(module, "NDArray", type) < 0)
        return -1;
    return kv_create_setup(module);
}
