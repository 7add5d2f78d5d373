/* A Python function as the store's updater: fn(key, recv, stored).
 *
 * The arrays that the function gets are views of the store's memory, of the library that the pushed
 * value is of. Those of NumPy are kept with the key and used again at its next push, as long as the
 * function did not keep or reshape them.
 */
#include "py/updater.h"
#include "py/call.h"
#include "py/cuda_in.h"
#include "py/device_view.h"

typedef struct py_updater {
    kv_updater_t base;
    kv_release_t release;
    kv_state_t *state;
    PyObject *function;
} py_updater_t;

/* What is kept with a key. */
typedef struct arguments {
    kv_release_t release;
    PyObject *key, *recv, *stored; /* recv and stored may be NULL */
    PyTypeObject *pushed;          /* the type of the value they were made for, NULL at first */
    bool numpy;
} arguments_t;

static void release_arguments(kv_release_t *release)
{
    arguments_t *arguments = (arguments_t *)release;
    Py_XDECREF(arguments->key);
    Py_XDECREF(arguments->recv);
    Py_XDECREF(arguments->stored);
    Py_XDECREF(arguments->pushed);
    kv_free(arguments);
    kv_count(KV_COUNT_CACHES, -1);
}

static void drop_arguments(void *data)
{
    kv_py_release_later(&((arguments_t *)data)->release);
}

static arguments_t *arguments_of(const kv_update_t *update)
{
    if (KV_LIKELY(update->cache->data != NULL))
        return update->cache->data;
    arguments_t *arguments = kv_calloc(1, sizeof *arguments);
    if (arguments == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    arguments->key = kv_py_name_object(update->name);
    if (arguments->key == NULL) {
        kv_free(arguments);
        return NULL;
    }
    arguments->release.free = release_arguments;
    update->cache->data = arguments;
    update->cache->drop = drop_arguments;
    kv_count(KV_COUNT_CACHES, 1);
    return arguments;
}

/* --------------------------------------------------------------------------------- views */

PyObject *kv_py_update_view(kv_state_t *state, const kv_update_t *update, kv_buffer_t *buffer)
{
    return kv_numpy_buffer(state, update->dtype, update->ndim, update->shape, buffer);
}

static kv_lane_t lane_of(const kv_update_t *update)
{
    return (kv_lane_t){.device = update->device, .stream = update->stream};
}

/* The library's from_dlpack over the buffer; tells where its work on a device's goes. */
static PyObject *library_view(kv_state_t *state, const kv_update_t *update, kv_buffer_t *buffer,
                              PyObject *library, kv_lane_t *lane)
{
    kv_array_t *array;
    kv_status_t status =
        kv_array_from_buffer(update->dtype, update->ndim, update->shape, buffer, &array);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    PyObject *view = NULL;
    PyObject *owner = update->device < 0 ? kv_ndarray_wrap(state, array)
                                         : kv_device_view_new(state, array, lane_of(update));
    if (owner != NULL)
        view = PyObject_CallMethod(library, "from_dlpack", "O", owner);
    if (view != NULL && update->device >= 0)
        *lane = kv_device_view_lane(owner);
    Py_XDECREF(owner);
    return view;
}

/* Sets the module (a new reference) whose arrays the function shall get, NULL for NumPy: that of
 * the pushed value if it can take in DLPack tensors that are where the buffers are. Of host memory
 * PyTorch makes tensors; others copy it, or think that an array is never changed. False with
 * ArrayTypeError. */
static bool find_library(kv_state_t *state, const kv_update_t *update, PyObject **out)
{
    PyObject *value = update->first->owner;
    bool foreign = update->first->array == NULL && update->first->sparse == NULL;
    *out = foreign ? kv_py_library_of(value) : NULL;
    bool torch = kv_py_is_library(*out, "torch");
    if (update->device < 0 && !torch)
        Py_CLEAR(*out);
    if (update->device < 0 || torch)
        return true;
    if ((update->first->flags & KV_VIEW_CUDA) && *out != NULL &&
        PyObject_HasAttrString(*out, "from_dlpack"))
        return true;
    Py_CLEAR(*out);
    kv_py_fail(state, KV_BAD_TYPE,
               "the updater needs CUDA arrays, since the value is in memory of CUDA device %d, and "
               "the library of the pushed '%.100s' has no from_dlpack to make them: push arrays of "
               "PyTorch or CuPy",
               update->device, Py_TYPE(value)->tp_name);
    return false;
}

/* Forgets the views if the pushed value is of another type than those before. */
static bool look_at_type(kv_state_t *state, const kv_update_t *update, arguments_t *arguments,
                         PyObject **library)
{
    PyTypeObject *pushed = Py_TYPE((PyObject *)update->first->owner);
    *library = NULL;
    if (KV_LIKELY(pushed == arguments->pushed && arguments->numpy && update->device < 0))
        return true;
    if (!find_library(state, update, library))
        return false;
    if (arguments->numpy != (*library == NULL)) {
        Py_CLEAR(arguments->recv);
        Py_CLEAR(arguments->stored);
    }
    arguments->numpy = *library == NULL;
    Py_XSETREF(arguments->pushed, (PyTypeObject *)Py_NewRef((PyObject *)pushed));
    return true;
}

PyObject *kv_py_update_rows(kv_state_t *state, const kv_update_t *update, const kv_rowset_t *rows)
{
    kv_sparse_t *sparse;
    kv_status_t status = kv_sparse_new(update->dtype, update->ndim, update->shape, &sparse);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    if (rows->num_rows > 0)
        sparse->rows = (kv_rowset_t){rows->num_rows, kv_buffer_hold(rows->indices),
                                     kv_buffer_hold(rows->data)};
    return kv_rowsparse_wrap(state, sparse);
}

/* Fills in the views that are not there yet. `lanes`: of recv and stored. */
static bool make_views(kv_state_t *state, const kv_update_t *update, arguments_t *arguments,
                       kv_lane_t *lanes)
{
    PyObject *library;
    if (!look_at_type(state, update, arguments, &library))
        return false;
    if (update->recv_rows != NULL) /* one that is kept was of a dense push */
        Py_XSETREF(arguments->recv, kv_py_update_rows(state, update, update->recv_rows));
    else if (arguments->recv == NULL)
        arguments->recv = library == NULL
                              ? kv_py_update_view(state, update, update->recv)
                              : library_view(state, update, update->recv, library, &lanes[0]);
    if (arguments->recv != NULL && arguments->stored == NULL && update->stored_rows != NULL)
        arguments->stored = kv_py_update_rows(state, update, update->stored_rows);
    else if (arguments->recv != NULL && arguments->stored == NULL)
        arguments->stored = library == NULL
                                ? kv_py_update_view(state, update, update->stored)
                                : library_view(state, update, update->stored, library, &lanes[1]);
    Py_XDECREF(library);
    return arguments->recv != NULL && arguments->stored != NULL;
}

kv_status_t kv_py_update_take(kv_state_t *state, const kv_update_t *update, PyObject *view)
{
    kv_sparse_t *sparse = kv_rowsparse_array(view);
    kv_dep_t dep = {.var = &sparse->var, .access = KV_READ};
    if (!kv_engine_try_enter_one(state->runtime->engine, &dep))
        return kv_fail(KV_INVALID, "the updater left its `stored` to another call, which has not "
                                   "come to an end");
    kv_rowset_t before = *update->stored_rows, after = {0};
    if (sparse->rows.num_rows > 0)
        after = (kv_rowset_t){sparse->rows.num_rows, kv_buffer_hold(sparse->rows.indices),
                              kv_buffer_hold(sparse->rows.data)};
    kv_engine_leave_one(state->runtime->engine, &dep);
    *update->stored_rows = after;
    kv_rowset_fini(&before);
    return KV_OK;
}

static bool reusable(const kv_update_t *update, const arguments_t *arguments, PyObject *view,
                     const kv_buffer_t *buffer)
{
    return view != NULL && buffer != NULL && arguments->numpy &&
           kv_numpy_view_intact(view, update->dtype, update->ndim, update->shape, buffer->data);
}

/* Also after a failure: what a failing updater has written stays. */
static kv_status_t keep_rows(kv_state_t *state, const kv_update_t *update, PyObject *view,
                             kv_status_t status)
{
    PyObject *exception = status == KV_OK ? NULL : kv_py_take_exception();
    kv_status_t taken = kv_py_update_take(state, update, view);
    if (exception == NULL)
        return taken;
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_DECREF(exception);
    return status;
}

/* What the store does next comes after the function's work, failed or not. */
static kv_status_t come_behind(const kv_update_t *update, const kv_lane_t *lanes,
                               kv_status_t status)
{
    for (int i = 0; i < 2; i++) {
        kv_status_t joined = kv_lane_join(lanes[i], lane_of(update));
        if (joined != KV_OK && status == KV_OK)
            status = joined;
    }
    return status;
}

/* ------------------------------------------------------------------------------- updater */

static kv_status_t run(kv_updater_t *base, const kv_update_t *update, kv_caller_t *caller)
{
    (void)caller;
    py_updater_t *updater = (py_updater_t *)base;
    arguments_t *arguments = arguments_of(update);
    if (arguments == NULL)
        return KV_CALLBACK;
    kv_status_t status = KV_CALLBACK;
    kv_lane_t lanes[2] = {lane_of(update), lane_of(update)};
    if (make_views(updater->state, update, arguments, lanes)) {
        PyObject *given[] = {arguments->key, arguments->recv, arguments->stored};
        PyObject *result = PyObject_Vectorcall(updater->function, given, 3, NULL);
        if (result != NULL)
            status = KV_OK;
        Py_XDECREF(result);
        if (update->stored_rows != NULL)
            status = keep_rows(updater->state, update, arguments->stored, status);
    }
    if (update->device >= 0)
        status = come_behind(update, lanes, status);
    /* Row sets are other ones with each push. */
    if (!reusable(update, arguments, arguments->recv, update->recv))
        Py_CLEAR(arguments->recv);
    if (!reusable(update, arguments, arguments->stored, update->stored))
        Py_CLEAR(arguments->stored);
    return status;
}

static void release_updater(kv_release_t *release)
{
    py_updater_t *updater = (py_updater_t *)((char *)release - offsetof(py_updater_t, release));
    Py_XDECREF(updater->function);
    kv_free(updater);
    kv_count(KV_COUNT_HOLDS, -1);
}

static void free_updater(kv_updater_t *base)
{
    kv_py_release_later(&((py_updater_t *)base)->release);
}

kv_updater_t *kv_py_updater_new(kv_state_t *state, PyObject *function)
{
    py_updater_t *updater = kv_calloc(1, sizeof *updater);
    if (updater == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    updater->base.refs = 1;
    updater->base.run = run;
    updater->base.free = free_updater;
    updater->release.free = release_updater;
    updater->state = state;
    updater->function = Py_NewRef(function);
    kv_count(KV_COUNT_HOLDS, 1);
    return &updater->base;
}

PyObject *kv_py_updater_function(const kv_updater_t *updater)
{
    return ((const py_updater_t *)updater)->function;
}
