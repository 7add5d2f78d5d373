/* The binding: Python objects in, core calls, exceptions out; nothing else.
 *
 * Everything here is called with the GIL unless it says otherwise. No global PyObject: what the
 * module needs stands in its state, and each of our objects keeps a pointer to it (its heap type
 * keeps the module alive).
 */
#ifndef KV_PY_PY_H
#define KV_PY_PY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kv.h"
#include <stdbool.h>
#include <stdint.h>

typedef struct kv_state {
    PyObject *errors[KV_STATUS_COUNT]; /* exception classes by code, NULL where none belongs */
    PyTypeObject *store_type, *ndarray_type, *handle_type, *rowsparse_type, *node_type, *ranks_type;
    PyTypeObject *device_view_type;
    PyObject *numpy_bfloat16; /* ml_dtypes' dtype object, NULL until first needed */
    int numpy_bfloat16_num;   /* its NumPy type number, -1 until known */
    PyObject *exchange_cache; /* dict: type -> what dlpack.c knows of it */
    PyObject *str_dlpack, *str_dlpack_device, *str_exchange_api; /* interned */
    PyObject *str_max_version, *str_stream;
    kv_runtime_t *runtime; /* NULL until first needed */
    bool closed;           /* the interpreter is going: new work is refused */
} kv_state_t;

kv_state_t *kv_py_state(PyObject *module);

/* The process's runtime, made at first use and anew in a forked child. NULL with an exception. */
kv_runtime_t *kv_py_runtime(kv_state_t *state);

/* ------------------------------------------------------------------------ error.c: errors */

/* Sets the exception for a failed status with this thread's sentence; always returns NULL.
 * KV_INTERRUPTED and KV_CALLBACK: the exception is there already. */
PyObject *kv_py_raise(kv_state_t *state, kv_status_t status);
/* The same with a sentence of one's own. */
PyObject *kv_py_fail(kv_state_t *state, kv_status_t status, const char *format, ...)
    KV_PRINTF(3, 4);

/* The core's view of this thread: drops the GIL while the core waits or works long, looks for
 * signals in waits. */
typedef struct kv_py_caller {
    kv_caller_t base;
    PyThreadState *thread;
} kv_py_caller_t;

void kv_py_caller_init(kv_py_caller_t *caller, int64_t timeout_ns);

/* A timeout argument in seconds: None gives `fallback_ns`. False with InvalidArgumentError (NaN,
 * not above 0) or ArrayTypeError (no number). */
bool kv_py_timeout(kv_state_t *state, PyObject *value, int64_t fallback_ns, int64_t *out);

/* The `timeout` of waits that belong to no store: 300 s. */
#define KV_PY_DEFAULT_TIMEOUT_NS (300 * INT64_C(1000000000))

/* ----------------------------------------------------------------- args.c: parsing of calls */

/* One parameter of a call: its name, and whether it must be given. All may be given by position or
 * by name, except those after `keyword_only`. */
typedef struct kv_param {
    const char *name;
    bool required;
} kv_param_t;

typedef struct kv_signature {
    const char *function; /* for messages: "push" */
    int num_params;
    int num_positional;
    const kv_param_t *params;
} kv_signature_t;

/* Fills values[num_params] with borrowed references, NULL where absent. TypeErrors as Python's. */
bool kv_py_parse(const kv_signature_t *signature, PyObject *const *args, Py_ssize_t num_args,
                 PyObject *keyword_names, PyObject **values);

/* ------------------------------------------------------- release.c: references from elsewhere */

/* Something to be freed with the GIL. Embedded in what it frees. */
typedef struct kv_release kv_release_t;
struct kv_release {
    kv_release_t *next;
    void (*free)(kv_release_t *release); /* called once, with the GIL */
};

/* Any thread, with or without the GIL, locks held or not. After the interpreter's exit hook it
 * leaks on purpose. */
void kv_py_release_later(kv_release_t *release);
/* Frees what has gathered, and what devices are done with. Cheap when there is nothing. Every call
 * of the module starts with it. */
void kv_py_release_now(void);
/* The exit hook's bar: from now on nothing is freed. Returns how much was left. */
int64_t kv_py_release_bar(void);

/* ------------------------------------------------------------ array_in.c: arrays from objects */

/* What keeps one borrowed view valid. */
typedef struct kv_lease {
    PyObject *owner;          /* strong reference to the user's object */
    void *data;               /* a held buffer or tensor, copied extents, a type's name; or NULL */
    void (*drop)(void *data); /* NULL when there is no data */
} kv_lease_t;

void kv_lease_drop(kv_lease_t *lease);

/* Fills a view and its lease from any array: our own type, exact NumPy arrays, the DLPack exchange
 * table, __dlpack__, the buffer protocol, __cuda_array_interface__, in this order. An element type
 * that the store cannot hold is no error here: view->dtype is KV_DTYPE_NONE and type_name says what
 * it is; nor is memory of a device, whatever is there to use it. False with
 * ArrayTypeError for what is no array, naming `what` ("value of key 'w'" is formatted by the
 * caller); the cause is kept when a producer raised.
 * `for_out`: the view will be written. */
bool kv_py_array_in(kv_state_t *state, PyObject *object, bool for_out, kv_view_t *view,
                    kv_lease_t *lease);

/* numpy.c. True if the object is exactly a NumPy array (or a subclass other than a masked one) and
 * the view is filled; the lease gets `data` only when the array is strided or its type is foreign.
 * -1 with an exception, 0 when it is no NumPy array. */
int kv_numpy_array_in(kv_state_t *state, PyObject *object, kv_view_t *view, kv_lease_t *lease);

/* The quick way for an exact NumPy array, contiguous and, for an out, writable: fills all of the
 * view but count and type_name, and holds nothing. False for everything else. */
bool kv_numpy_borrow(kv_state_t *state, PyObject *object, bool for_out, kv_view_t *view);

/* A NumPy array over memory of ours; `base` (stolen also on failure) keeps the memory. For bfloat16
 * the array is of ml_dtypes' type, NotBuiltError without that package. */
PyObject *kv_numpy_view(kv_state_t *state, kv_dtype_t dtype, int ndim, const int64_t *shape,
                        void *data, PyObject *base);
/* The same over a buffer, of which the array has a share. */
PyObject *kv_numpy_buffer(kv_state_t *state, kv_dtype_t dtype, int ndim, const int64_t *shape,
                          kv_buffer_t *buffer);
/* A new NumPy array, contents unspecified, and its memory. */
PyObject *kv_numpy_empty(kv_state_t *state, kv_dtype_t dtype, int ndim, const int64_t *shape,
                         void **data);
/* Whether `array` is still the NumPy array that kv_numpy_view made over this memory and nobody else
 * has a reference to it. */
bool kv_numpy_view_intact(PyObject *array, kv_dtype_t dtype, int ndim, const int64_t *shape,
                          const void *data);
/* The element type that a dtype-like object (name, NumPy dtype, scalar type) names; KV_DTYPE_NONE
 * with ArrayTypeError. */
kv_dtype_t kv_numpy_dtype(kv_state_t *state, PyObject *like);
/* The NumPy dtype object of an element type. */
PyObject *kv_numpy_dtype_object(kv_state_t *state, kv_dtype_t dtype);
bool kv_numpy_import(void);
/* The oldest NumPy C API that the module runs on. */
const char *kv_numpy_target(void);

/* dlpack.c. 1: filled; 0: the object does not speak it; -1 with an exception. */
int kv_dlpack_array_in(kv_state_t *state, PyObject *object, bool for_out, kv_view_t *view,
                       kv_lease_t *lease);

/* The exception that is set, taken away: a new reference to the instance. */
static inline PyObject *kv_py_take_exception(void)
{
#if PY_VERSION_HEX >= 0x030c0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(value, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return value;
#endif
}

/* ------------------------------------------------------------ ndarray.c, export.c, create.c */

typedef struct kv_py_ndarray {
    PyObject_HEAD
    kv_state_t *state;
    kv_array_t *array; /* never NULL */
    PyObject *weakrefs;
    PyObject *dropped; /* what the buffer protocol raised last, see export.c */
    unsigned long dropped_thread;
} kv_py_ndarray_t;

/* A tuple of extents. */
PyObject *kv_py_shape(int ndim, const int64_t *shape);

int kv_ndarray_setup(PyObject *module, kv_state_t *state); /* makes the type and its functions */
int kv_create_setup(PyObject *module);                     /* array, zeros, ones, empty, full */
/* Takes the array, also on failure. */
PyObject *kv_ndarray_wrap(kv_state_t *state, kv_array_t *array);
/* Our NDArray's array, NULL for another object. */
kv_array_t *kv_ndarray_array(kv_state_t *state, PyObject *object);

/* Copies the elements to `data` once all writes before are done; `dtype` is the array's own, or
 * float32. False with an exception. */
bool kv_array_copy_out(kv_state_t *state, kv_array_t *array, kv_dtype_t dtype, void *data);
/* The same into a new NumPy array. */
PyObject *kv_array_numpy(kv_state_t *state, kv_array_t *array, kv_dtype_t dtype);
/* The elements of a dense view, one after the other: of host memory, or of a CUDA array that is
 * contiguous, which it waits for. False with an exception. */
bool kv_view_copy_out(kv_state_t *state, const kv_view_t *view, void *data);
/* Whether they are there already, at view->data, for as long as the view is. */
static inline bool kv_view_in_place(const kv_view_t *view)
{
    return view->array == NULL && view->strides == NULL && !(view->flags & KV_VIEW_DEVICE);
}
/* Whether they are in memory of a device that they cannot be copied from. */
static inline bool kv_view_beyond(const kv_view_t *view)
{
    return (view->flags & (KV_VIEW_DEVICE | KV_VIEW_CUDA)) == KV_VIEW_DEVICE;
}
/* numpy.<function>, a new reference. */
PyObject *kv_numpy_function(const char *function);
/* numpy.<function>(value), with our exceptions for what NumPy says about the value. */
PyObject *kv_numpy_call(kv_state_t *state, const char *function, PyObject *value);
/* An extent or a sequence of at most KV_MAX_DIMS: fills `shape` and gives the number of dimensions,
 * -1 with an exception. */
int kv_py_extents(kv_state_t *state, PyObject *object, int64_t *shape);

/* ------------------------------------------------------- rowsparse.c, rowsparse_make.c: RowSparse
 */

int kv_rowsparse_setup(PyObject *module, kv_state_t *state);
/* Takes the array, also on failure. */
PyObject *kv_rowsparse_wrap(kv_state_t *state, kv_sparse_t *sparse);
bool kv_rowsparse_check(kv_state_t *state, PyObject *object);
/* Of a RowSparse. */
kv_sparse_t *kv_rowsparse_array(PyObject *object);
/* A new dense NumPy array, once all writes before are done. */
PyObject *kv_sparse_numpy(kv_state_t *state, kv_sparse_t *sparse);

/* ------------------------------------------------------------------------------- row_ids.c */

/* Gives the integers of an array of any integer type and shape, or of a list, one after the other
 * as int64 in a new buffer. `what` is for messages. False with ArrayTypeError for what are no
 * integers, InvalidArgumentError for one above 2^63-1. Waits for pending writes. `ndim` may be
 * NULL. */
bool kv_py_integers(kv_state_t *state, PyObject *object, const char *what, kv_buffer_t **out,
                    int64_t *count, int *ndim);
/* The same for the argument `row_ids`, sorted and without repetitions. */
bool kv_py_row_ids(kv_state_t *state, PyObject *object, kv_buffer_t **ids, int64_t *count);

/* ---------------------------------------------------------------------------- compression.c */

PyObject *kv_py_compression_check(PyObject *module, PyObject *args);
PyObject *kv_py_compression_encode(PyObject *module, PyObject *args);
PyObject *kv_py_compression_decode(PyObject *module, PyObject *args);

/* --------------------------------------------------------------------------------- handle.c */

int kv_handle_setup(PyObject *module, kv_state_t *state);
/* Takes one share of `handle`, also on failure. `timeout_ns`: of wait(None). */
PyObject *kv_handle_wrap(kv_state_t *state, kv_handle_t *handle, int64_t timeout_ns);
/* A finished handle; `exception` (stolen, may be NULL) is what it raises. */
PyObject *kv_handle_finished(kv_state_t *state, PyObject *exception);

/* ---------------------------------------------------------------------------------- store.c */

int kv_store_setup(PyObject *module, kv_state_t *state);

#endif
