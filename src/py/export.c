/* The ways to an NDArray's memory: copies, the buffer protocol, NumPy views, DLPack.
 *
 * What reads or hands out the memory first takes its turn on the array's variable, like any
 * operation, and so comes after everything that entered before. A view that outlives the call (a
 * buffer, a NumPy array, a DLPack tensor) is counted in `exports` from within a turn as writer, and
 * holds the NDArray; while one is alive, the store treats the memory as the user's own.
 *
 * NumPy asks a foreign array for its buffer first, drops whatever that raises, and then calls
 * __array__. The error of a failed operation is delivered only once, and a KeyboardInterrupt as
 * well, so both would be lost there and the array's contents taken for good. What getbuffer raised
 * is therefore kept (`dropped`), and __array__ raises it again if it is the next call of the same
 * thread on this array.
 */
#include "py/dlpack.h"
#include "py/ndarray.h"
#include <pythread.h>
#include <string.h>

#define EXPORT_NAME "kvstore.export"

/* --------------------------------------------------------------------------------- turns */

kv_status_t kv_turn_begin(kv_turn_t *turn, kv_state_t *state, kv_var_t *var, uint64_t generation,
                          kv_access_t access, int64_t timeout_ns)
{
    if (generation != kv_fork_generation())
        return kv_fail(KV_CLOSED, "the array belongs to the parent of this forked process");
    kv_runtime_t *runtime = kv_py_runtime(state);
    if (runtime == NULL)
        return KV_CALLBACK;
    turn->engine = runtime->engine;
    turn->kernels = runtime->kernels;
    turn->dep = (kv_dep_t){.var = var, .access = access};
    kv_op_init(&turn->op, &turn->dep, 1, 0);
    kv_py_caller_init(&turn->caller, timeout_ns);
    return kv_engine_enter(turn->engine, &turn->op, &turn->caller.base);
}

void kv_turn_end(kv_turn_t *turn)
{
    kv_engine_leave(turn->engine, &turn->op);
}

bool kv_array_copy_out(kv_state_t *state, kv_array_t *array, kv_dtype_t dtype, void *data)
{
    kv_turn_t turn;
    kv_status_t status = kv_turn_begin(&turn, state, &array->var, array->generation, KV_READ,
                                       KV_PY_DEFAULT_TIMEOUT_NS);
    if (status != KV_OK) {
        kv_py_raise(state, status);
        return false;
    }
    if (array->bytes >= KV_DETACH_BYTES)
        kv_caller_detach(&turn.caller.base);
    if (dtype == array->dtype)
        memcpy(data, array->buffer->data, array->bytes);
    else
        turn.kernels->float32_from[array->dtype](array->count, array->buffer->data, data);
    kv_turn_end(&turn);
    kv_caller_attach(&turn.caller.base);
    return true;
}

PyObject *kv_array_numpy(kv_state_t *state, kv_array_t *array, kv_dtype_t dtype)
{
    void *data;
    PyObject *copy = kv_numpy_empty(state, dtype, array->ndim, array->shape, &data);
    if (copy != NULL && !kv_array_copy_out(state, array, dtype, data))
        Py_CLEAR(copy);
    return copy;
}

/* --------------------------------------------------------------------------------- views */

/* Waits for pending readers and writers, then counts one view more. */
static kv_status_t export_begin(kv_py_ndarray_t *self, kv_access_t access, int64_t timeout_ns)
{
    kv_turn_t turn;
    KV_TRY(kv_turn_begin(&turn, self->state, &self->array->var, self->array->generation, access,
                         timeout_ns));
    atomic_fetch_add(&self->array->exports, 1);
    kv_turn_end(&turn);
    return KV_OK;
}

static void export_end(kv_py_ndarray_t *self)
{
    atomic_fetch_sub(&self->array->exports, 1);
}

static void export_destroy(PyObject *capsule)
{
    PyObject *self = PyCapsule_GetPointer(capsule, EXPORT_NAME);
    export_end(kv_as_ndarray(self));
    Py_DECREF(self);
}

/* An object that is one view of the array for as long as it lives. */
static PyObject *export_new(kv_py_ndarray_t *self, kv_access_t access, int64_t timeout_ns,
                            kv_status_t *status)
{
    *status = export_begin(self, access, timeout_ns);
    if (*status != KV_OK)
        return NULL;
    PyObject *capsule = PyCapsule_New(self, EXPORT_NAME, export_destroy);
    if (capsule == NULL) {
        export_end(self);
        *status = KV_CALLBACK;
    } else {
        Py_INCREF(self);
    }
    return capsule;
}

PyObject *kv_ndarray_view(kv_py_ndarray_t *self, kv_access_t access, int64_t timeout_ns,
                          kv_status_t *status)
{
    const kv_array_t *array = self->array;
    PyObject *base = export_new(self, access, timeout_ns, status);
    if (base == NULL)
        return NULL;
    PyObject *view = kv_numpy_view(self->state, array->dtype, array->ndim, array->shape,
                                   array->buffer->data, base);
    if (view == NULL)
        *status = KV_CALLBACK;
    return view;
}

/* ------------------------------------------------------------------------ buffer protocol */

static const char *buffer_format(kv_dtype_t dtype)
{
    switch (dtype) {
    case KV_FLOAT64:
        return "d";
    case KV_FLOAT32:
        return "f";
    case KV_FLOAT16:
        return "e";
    case KV_INT8:
        return "b";
    case KV_UINT8:
        return "B";
    case KV_INT32:
        return "i";
    case KV_INT64:
        return sizeof(long) == 8 ? "l" : "q"; /* what NumPy calls its int64 */
    default:
        return NULL;
    }
}

void kv_ndarray_forget_dropped(kv_py_ndarray_t *self)
{
    if (self->dropped != NULL && self->dropped_thread == PyThread_get_thread_ident())
        Py_CLEAR(self->dropped);
}

static void keep_dropped(kv_py_ndarray_t *self)
{
    PyObject *exception = kv_py_take_exception();
    Py_XSETREF(self->dropped, Py_NewRef(exception));
    self->dropped_thread = PyThread_get_thread_ident();
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_DECREF(exception);
}

/* Shape and strides, allocated: Py_ssize_t need not be the type int64_t. */
static Py_ssize_t *buffer_extents(const kv_array_t *array)
{
    Py_ssize_t *extents = PyMem_New(Py_ssize_t, 2 * (size_t)array->ndim + 1);
    if (extents == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    Py_ssize_t stride = (Py_ssize_t)kv_dtype_bytes(array->dtype);
    for (int i = array->ndim - 1; i >= 0; i--) {
        extents[i] = (Py_ssize_t)array->shape[i];
        extents[array->ndim + i] = stride;
        stride *= array->shape[i] > 0 ? (Py_ssize_t)array->shape[i] : 1;
    }
    return extents;
}

int kv_ndarray_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    kv_py_ndarray_t *self = kv_as_ndarray(object);
    kv_array_t *array = self->array;
    const char *format = buffer_format(array->dtype);
    kv_py_release_now();
    kv_ndarray_forget_dropped(self);
    view->obj = NULL;
    if (format == NULL) {
        PyErr_Format(PyExc_BufferError,
                     "the buffer protocol has no %s; numpy.asarray() or from_dlpack() can show it",
                     kv_dtype_name(array->dtype));
        return -1;
    }
    Py_ssize_t *extents = buffer_extents(array);
    if (extents == NULL)
        return -1;
    *view = (Py_buffer){
        .buf = array->buffer->data,
        .len = (Py_ssize_t)array->bytes,
        .itemsize = (Py_ssize_t)kv_dtype_bytes(array->dtype),
        .ndim = array->ndim,
        .format = (char *)format,
        .shape = array->ndim > 0 ? extents : NULL,
        .strides = array->ndim > 0 ? extents + array->ndim : NULL,
        .internal = extents,
    };
    if ((flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS && !PyBuffer_IsContiguous(view, 'F')) {
        PyErr_SetString(PyExc_BufferError, "the array is C-contiguous, not Fortran-contiguous");
        goto error;
    }
    if ((flags & PyBUF_FORMAT) != PyBUF_FORMAT)
        view->format = NULL;
    if ((flags & PyBUF_STRIDES) != PyBUF_STRIDES)
        view->strides = NULL;
    if ((flags & PyBUF_ND) != PyBUF_ND)
        view->shape = NULL;
    kv_status_t status = export_begin(self, KV_WRITE, KV_PY_DEFAULT_TIMEOUT_NS);
    if (status != KV_OK) {
        kv_py_raise(self->state, status);
        keep_dropped(self);
        goto error;
    }
    view->obj = Py_NewRef(object);
    return 0;
error:
    PyMem_Free(extents);
    return -1;
}

void kv_ndarray_releasebuffer(PyObject *object, Py_buffer *view)
{
    PyMem_Free(view->internal);
    export_end(kv_as_ndarray(object));
}

/* --------------------------------------------------------------------------------- NumPy */

PyObject *kv_ndarray_asnumpy(PyObject *self, PyObject *ignored)
{
    (void)ignored;
    kv_py_release_now();
    return kv_array_numpy(kv_as_ndarray(self)->state, kv_as_ndarray(self)->array,
                          kv_as_ndarray(self)->array->dtype);
}

PyObject *kv_ndarray_dtype(kv_py_ndarray_t *self)
{
    PyObject *dtype = kv_numpy_dtype_object(self->state, self->array->dtype);
    if (dtype == NULL && PyErr_ExceptionMatches(self->state->errors[KV_NOT_BUILT]))
        PyErr_Clear();
    return dtype;
}

/* Whether `asked` (NULL and None: any) is the element type. -1 with an exception. */
static int is_own_dtype(kv_py_ndarray_t *self, PyObject *asked)
{
    if (asked == NULL || asked == Py_None)
        return 1;
    PyObject *own = kv_ndarray_dtype(self);
    if (own == NULL)
        return PyErr_Occurred() ? -1 : 0;
    int same = PyObject_RichCompareBool(own, asked, Py_EQ);
    Py_DECREF(own);
    return same;
}

static PyObject *convert_copy(kv_py_ndarray_t *self, PyObject *dtype)
{
    kv_dtype_t own = self->array->dtype;
    PyObject *copy =
        kv_array_numpy(self->state, self->array, own == KV_BFLOAT16 ? KV_FLOAT32 : own);
    if (copy == NULL)
        return NULL;
    PyObject *result = PyObject_CallMethod(copy, "astype", "O", dtype);
    Py_DECREF(copy);
    return result;
}

PyObject *kv_ndarray_to_numpy(PyObject *object, PyObject *const *args, Py_ssize_t num_args,
                              PyObject *keyword_names)
{
    static const kv_param_t params[] = {{"dtype", false}, {"copy", false}};
    static const kv_signature_t signature = {"__array__", 2, 2, params};
    kv_py_ndarray_t *self = kv_as_ndarray(object);
    PyObject *values[2];
    kv_py_release_now();
    if (self->dropped != NULL && self->dropped_thread == PyThread_get_thread_ident()) {
        PyObject *exception = self->dropped;
        self->dropped = NULL;
        PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
        Py_DECREF(exception);
        return NULL;
    }
    if (!kv_py_parse(&signature, args, num_args, keyword_names, values))
        return NULL;
    int copy = -1; /* if needed */
    if (values[1] != NULL && values[1] != Py_None && (copy = PyObject_IsTrue(values[1])) < 0)
        return NULL;
    int same = is_own_dtype(self, values[0]);
    if (same < 0)
        return NULL;
    if (!same && copy == 0)
        return kv_py_fail(self->state, KV_INVALID,
                          "an array of another element type than %s cannot be made without a copy",
                          kv_dtype_name(self->array->dtype));
    if (!same)
        return convert_copy(self, values[0]);
    if (copy == 1)
        return kv_array_numpy(self->state, self->array, self->array->dtype);
    kv_status_t status;
    PyObject *view = kv_ndarray_view(self, KV_WRITE, KV_PY_DEFAULT_TIMEOUT_NS, &status);
    return view != NULL ? view : kv_py_raise(self->state, status);
}

/* -------------------------------------------------------------------------------- DLPack */

/* A copy in an array of its own. */
static PyObject *own_copy(kv_py_ndarray_t *self)
{
    kv_array_t *copy;
    kv_status_t status =
        kv_array_new(self->array->dtype, self->array->ndim, self->array->shape, &copy);
    if (status != KV_OK)
        return kv_py_raise(self->state, status);
    if (!kv_array_copy_out(self->state, self->array, copy->dtype, copy->buffer->data)) {
        kv_array_retire(copy);
        return NULL;
    }
    return kv_ndarray_wrap(self->state, copy);
}

PyObject *kv_ndarray_to_dlpack(PyObject *object, PyObject *const *args, Py_ssize_t num_args,
                               PyObject *keyword_names)
{
    static const kv_dl_device_t CPU = {.type = KV_DL_CPU};
    kv_state_t *state = kv_as_ndarray(object)->state;
    kv_dlpack_asked_t asked;
    kv_py_release_now();
    kv_ndarray_forget_dropped(kv_as_ndarray(object));
    if (!kv_dlpack_parse(CPU, args, num_args, keyword_names, &asked))
        return NULL;
    if (asked.stream != NULL)
        return kv_py_fail(state, KV_INVALID, "an array on the CPU has no stream: stream is None");
    PyObject *source = asked.copy ? own_copy(kv_as_ndarray(object)) : Py_NewRef(object);
    if (source == NULL)
        return NULL;
    kv_status_t status;
    kv_array_t *array = kv_as_ndarray(source)->array;
    PyObject *result = NULL;
    PyObject *owner =
        export_new(kv_as_ndarray(source), KV_WRITE, KV_PY_DEFAULT_TIMEOUT_NS, &status);
    if (owner == NULL)
        kv_py_raise(state, status);
    else
        result = kv_dlpack_export(array, owner, CPU, asked.versioned);
    Py_XDECREF(owner);
    Py_DECREF(source);
    return result;
}
