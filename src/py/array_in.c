/* Arrays from Python objects: the order in which an object is asked what it is, the buffer
 * protocol, and the words for what is no array.
 *
 * NumPy's arrays also speak DLPack and the buffer protocol; they come first because that is
 * fastest, and so that what NumPy calls read-only or unaligned is known. A producer's exception
 * becomes an ArrayTypeError with the exception as its cause.
 */
#include "py/py.h"

#include "base/memory.h"
#include "py/cuda_in.h"
#include "py/dlpack.h"
#include <string.h>

void kv_lease_drop(kv_lease_t *lease)
{
    if (lease->drop != NULL)
        lease->drop(lease->data);
    Py_XDECREF(lease->owner);
    *lease = (kv_lease_t){.owner = NULL};
}

/* ------------------------------------------------------------------------- buffer protocol */

static void drop_buffer(void *data)
{
    PyBuffer_Release(data);
    kv_free(data);
}

/* The letter tells the kind, the size is taken from the buffer: ctypes says '<l' for eight bytes
 * where the struct module would mean four. */
static kv_dtype_t dtype_of(const Py_buffer *buffer)
{
    const char *format = buffer->format != NULL ? buffer->format : "B";
    const uint16_t one = 1;
    char native = *(const char *)&one == 1 ? '<' : '>';
    if (*format == '@' || *format == '=' || *format == native)
        format++;
    else if ((*format == '<' || *format == '>' || *format == '!') && buffer->itemsize == 1)
        format++;
    if (format[0] == '\0' || format[1] != '\0')
        return KV_DTYPE_NONE;
    unsigned bits = (unsigned)buffer->itemsize * 8;
    if (strchr("efd", *format) != NULL)
        return kv_dtype_from_dlpack(KV_DL_FLOAT, bits, 1);
    if (strchr("bhilqn", *format) != NULL)
        return kv_dtype_from_dlpack(KV_DL_INT, bits, 1);
    if (strchr("BHILQN", *format) != NULL)
        return kv_dtype_from_dlpack(KV_DL_UINT, bits, 1);
    return KV_DTYPE_NONE;
}

/* 1: filled; 0: the object has no buffer; -1 with an exception. */
static int buffer_in(kv_state_t *state, PyObject *object, kv_view_t *view, kv_lease_t *lease)
{
    static_assert(sizeof(Py_ssize_t) == sizeof(int64_t), "extents are used in place");
    if (!PyObject_CheckBuffer(object))
        return 0;
    /* Its shape may point into itself, so it stays where it was filled. */
    Py_buffer *buffer = kv_alloc(sizeof *buffer);
    if (buffer == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (PyObject_GetBuffer(object, buffer, PyBUF_RECORDS_RO) < 0) {
        kv_free(buffer);
        return -1;
    }
    kv_dtype_t dtype = dtype_of(buffer);
    const int64_t *shape = (const int64_t *)buffer->shape;
    const int64_t *strides = (const int64_t *)buffer->strides;
    size_t item = kv_dtype_bytes(dtype), bytes;
    *view = (kv_view_t){
        .data = buffer->buf,
        .shape = shape,
        .ndim = buffer->ndim,
        .dtype = (uint8_t)dtype,
        .flags = buffer->readonly ? KV_VIEW_READONLY : 0,
        .owner = object,
        .type_name = dtype == KV_DTYPE_NONE ? buffer->format : NULL,
    };
    kv_status_t status = kv_shape_size(dtype, buffer->ndim, shape, &view->count, &bytes);
    if (status != KV_OK) {
        kv_py_raise(state, status);
        drop_buffer(buffer);
        return -1;
    }
    if (item > 0 && (!kv_strides_contiguous(item, view->ndim, shape, strides) ||
                     (uintptr_t)view->data % item != 0))
        view->strides = strides;
    *lease = (kv_lease_t){.owner = Py_NewRef(object), .data = buffer, .drop = drop_buffer};
    return 1;
}

/* -------------------------------------------------------------------------------- refusals */

static void refuse(kv_state_t *state, PyObject *object)
{
    const char *type = Py_TYPE(object)->tp_name;
    if (object == Py_None)
        kv_py_fail(state, KV_BAD_TYPE,
                   "None is not an array: pass a NumPy array, a DLPack tensor or a "
                   "kvstore.NDArray");
    else if (PyList_Check(object) || PyTuple_Check(object) || PyLong_Check(object) ||
             PyFloat_Check(object) || PyComplex_Check(object))
        kv_py_fail(state, KV_BAD_TYPE,
                   "a value of type '%.100s' is not an array: numpy.asarray makes one of it", type);
    else
        kv_py_fail(state, KV_BAD_TYPE,
                   "a value of type '%.100s' is not an array: pass a NumPy array, a DLPack tensor, "
                   "something with the buffer protocol, or a kvstore.NDArray",
                   type);
}

/* Puts an ArrayTypeError before what a producer raised. Our own sentences stay as they are, and so
 * does what is nobody's complaint about an array: no memory, Ctrl-C. */
static void blame(kv_state_t *state, PyObject *object)
{
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError) ||
        PyErr_ExceptionMatches(state->errors[KV_BAD_TYPE]) ||
        PyErr_ExceptionMatches(state->errors[KV_INVALID]))
        return;
    PyObject *cause = kv_py_take_exception();
    kv_py_fail(state, KV_BAD_TYPE,
               "a value of type '%.100s' did not give its memory: it raised %.100s",
               Py_TYPE(object)->tp_name, Py_TYPE(cause)->tp_name);
    PyObject *error = kv_py_take_exception();
    PyException_SetContext(error, Py_NewRef(cause));
    PyException_SetCause(error, cause);
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
}

bool kv_py_array_in(kv_state_t *state, PyObject *object, bool for_out, kv_view_t *view,
                    kv_lease_t *lease)
{
    if (Py_TYPE(object) == state->ndarray_type) {
        kv_view_of_array(kv_ndarray_array(state, object), view);
        view->owner = object;
        *lease = (kv_lease_t){.owner = Py_NewRef(object)};
        return true;
    }
    int known = kv_numpy_array_in(state, object, view, lease);
    if (KV_LIKELY(known > 0))
        return true;
    if (kv_rowsparse_check(state, object)) {
        kv_view_of_sparse(kv_rowsparse_array(object), view);
        view->owner = object;
        *lease = (kv_lease_t){.owner = Py_NewRef(object)};
        return true;
    }
    if (known == 0)
        known = kv_dlpack_array_in(state, object, for_out, view, lease);
    if (known == 0)
        known = buffer_in(state, object, view, lease);
    if (known == 0)
        known = kv_cuda_array_in(state, object, view, lease);
    if (known > 0)
        return true;
    *lease = (kv_lease_t){.owner = NULL};
    if (known == 0)
        refuse(state, object);
    else
        blame(state, object);
    return false;
}
