/* CUDA arrays of others: the stream in whose order their elements are ready, and arrays that speak
 * __cuda_array_interface__ alone.
 */
#include "py/cuda_in.h"

#include "base/memory.h"
#include "comm/device.h"
#include <string.h>

/* ------------------------------------------------------------------------------- libraries */

PyObject *kv_py_library_of(PyObject *object)
{
    PyObject *module = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__module__");
    PyObject *root = NULL, *library = NULL;
    if (module != NULL && PyUnicode_Check(module)) {
        Py_ssize_t length = PyUnicode_GET_LENGTH(module);
        Py_ssize_t dot = PyUnicode_FindChar(module, '.', 0, length, 1);
        root = PyUnicode_Substring(module, 0, dot >= 0 ? dot : length);
        library = root != NULL ? PyImport_GetModule(root) : NULL;
    }
    Py_XDECREF(root);
    Py_XDECREF(module);
    PyErr_Clear();
    return library;
}

bool kv_py_is_library(PyObject *library, const char *name)
{
    const char *own = library != NULL && PyModule_Check(library) ? PyModule_GetName(library) : NULL;
    PyErr_Clear();
    return own != NULL && strcmp(own, name) == 0;
}

/* --------------------------------------------------------------------------------- streams */

void kv_cuda_follow(kv_view_t *view, void *stream)
{
    view->stream = kv_cuda_stream(stream);
    view->flags |= KV_VIEW_FOLLOWS;
}

int kv_cuda_library_stream(PyObject *object, int device, void **stream)
{
    static const char *const WAYS[][3] = {{"torch", "current_stream", "cuda_stream"},
                                          {"cupy", "get_current_stream", "ptr"}};
    PyObject *library = kv_py_library_of(object), *cuda = NULL, *current = NULL, *number = NULL;
    int result = 0;
    for (int i = 0; i < 2 && result == 0; i++) {
        if (!kv_py_is_library(library, WAYS[i][0]))
            continue;
        result = -1;
        cuda = PyObject_GetAttrString(library, "cuda");
        current = cuda != NULL ? PyObject_CallMethod(cuda, WAYS[i][1], "i", device) : NULL;
        number = current != NULL ? PyObject_GetAttrString(current, WAYS[i][2]) : NULL;
        if (number == NULL)
            break;
        *stream = PyLong_AsVoidPtr(number);
        if (!PyErr_Occurred())
            result = 1;
    }
    Py_XDECREF(number);
    Py_XDECREF(current);
    Py_XDECREF(cuda);
    Py_XDECREF(library);
    return result;
}

int kv_cuda_own_stream(kv_state_t *state, int device, void **stream)
{
    const kv_device_api_t *api;
    kv_lane_t lane = {.stream = NULL};
    kv_status_t status = KV_OK;
    bool there;
    /* The first time the driver starts. */
    Py_BEGIN_ALLOW_THREADS;
    there = kv_device_load(&api) == KV_OK && device >= 0 && device < api->num_devices;
    if (there)
        status = kv_lane_own(device, &lane);
    Py_END_ALLOW_THREADS;
    if (status != KV_OK) {
        kv_py_raise(state, status);
        return -1;
    }
    *stream = lane.stream;
    return there;
}

/* ------------------------------------------------------------------ __cuda_array_interface__ */

/* What the interface says under a name: a new reference, NULL for None and, where it may, for
 * nothing. False with an exception. */
static bool find(PyObject *interface, const char *name, bool required, PyObject **out)
{
    *out = PyMapping_GetItemString(interface, name);
    if (*out == NULL && !required && PyErr_ExceptionMatches(PyExc_KeyError))
        PyErr_Clear();
    if (*out == Py_None && !required)
        Py_CLEAR(*out);
    return *out != NULL || !PyErr_Occurred();
}

typedef struct interface {
    PyObject *shape, *type, *data, *version, *strides, *mask, *stream;
} interface_t;

static bool read_interface(PyObject *given, interface_t *out)
{
    return find(given, "shape", true, &out->shape) && find(given, "typestr", true, &out->type) &&
           find(given, "data", true, &out->data) && find(given, "version", true, &out->version) &&
           find(given, "strides", false, &out->strides) && find(given, "mask", false, &out->mask) &&
           find(given, "stream", false, &out->stream);
}

static void interface_fini(interface_t *interface)
{
    Py_XDECREF(interface->shape);
    Py_XDECREF(interface->type);
    Py_XDECREF(interface->data);
    Py_XDECREF(interface->version);
    Py_XDECREF(interface->strides);
    Py_XDECREF(interface->mask);
    Py_XDECREF(interface->stream);
}

/* What we do not understand must not be taken for what we do. */
static bool check_interface(kv_state_t *state, const interface_t *interface)
{
    long version = PyLong_AsLong(interface->version);
    if (version == -1 && PyErr_Occurred())
        return false;
    if (version != 2 && version != 3)
        kv_py_fail(state, KV_BAD_TYPE,
                   "an array came with version %ld of __cuda_array_interface__, understood are 2 "
                   "and 3",
                   version);
    else if (interface->mask != NULL)
        kv_py_fail(state, KV_BAD_TYPE, "a CUDA array with a mask cannot be stored");
    else if (!PyTuple_Check(interface->data) || PyTuple_GET_SIZE(interface->data) != 2)
        kv_py_fail(state, KV_BAD_TYPE,
                   "the data of a __cuda_array_interface__ is a pointer and whether it is "
                   "read-only");
    else
        return true;
    return false;
}

static bool read_numbers(kv_state_t *state, PyObject *tuple, const char *what, Py_ssize_t count,
                         int64_t *out)
{
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != count) {
        kv_py_fail(state, KV_BAD_TYPE, "the %s of an array is no tuple of %zd numbers", what,
                   count);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
        if (out[i] == -1 && PyErr_Occurred())
            return false;
    }
    return true;
}

/* Finds out whose memory it is; an array without elements is the current device's. Without a
 * plug-in the device stays unknown, and the store tells why. */
static bool find_device(kv_state_t *state, kv_view_t *view)
{
    char sentence[KV_DEVICE_SENTENCE] = "";
    const kv_device_api_t *api;
    kv_status_t status, asked = KV_OK;
    int device = -1;
    Py_BEGIN_ALLOW_THREADS;
    status = kv_device_enter(&api);
    if (status == KV_OK) {
        kv_device_code_t code = view->count > 0 ? api->owner(view->data, &device, sentence)
                                                : api->current(&device, sentence);
        asked = kv_device_check(code, sentence);
        kv_device_leave();
    }
    Py_END_ALLOW_THREADS;
    if (asked != KV_OK) {
        kv_py_raise(state, asked);
        return false;
    }
    if (status == KV_OK && device < 0) {
        kv_py_fail(state, KV_BAD_TYPE,
                   "__cuda_array_interface__ tells of memory at %p, which is on no CUDA device",
                   view->data);
        return false;
    }
    view->device = (int16_t)device;
    return true;
}

/* Without a stream the elements are ready, on any. So are none at all, whose stream may be another
 * device's than the current one. */
static bool find_stream(kv_state_t *state, PyObject *given, kv_view_t *view)
{
    if (given == NULL)
        return kv_cuda_own_stream(state, view->device, &view->stream) >= 0;
    void *stream = PyLong_AsVoidPtr(given);
    if (PyErr_Occurred())
        return false;
    if (stream == NULL) {
        kv_py_fail(state, KV_BAD_TYPE,
                   "the stream of a __cuda_array_interface__ must not be 0, which may mean two "
                   "streams: 1 is the legacy default one, 2 the thread's");
        return false;
    }
    if (view->count == 0)
        return kv_cuda_own_stream(state, view->device, &view->stream) >= 0;
    kv_cuda_follow(view, stream);
    return true;
}

/* Fills the view; `extents` has room for shape and strides. */
static bool fill(kv_state_t *state, PyObject *object, const interface_t *interface, int ndim,
                 int64_t *extents, kv_view_t *view)
{
    int64_t *strides = interface->strides != NULL ? extents + ndim : NULL;
    size_t bytes;
    if (!read_numbers(state, interface->shape, "shape", ndim, extents) ||
        (strides != NULL && !read_numbers(state, interface->strides, "strides", ndim, strides)))
        return false;
    kv_dtype_t dtype = kv_numpy_dtype(state, interface->type);
    if (dtype == KV_DTYPE_NONE)
        return false;
    void *data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(interface->data, 0));
    int readonly = PyErr_Occurred() ? -1 : PyObject_IsTrue(PyTuple_GET_ITEM(interface->data, 1));
    if (readonly < 0)
        return false;
    *view = (kv_view_t){
        .data = data,
        .shape = extents,
        .ndim = ndim,
        .dtype = (uint8_t)dtype,
        .flags = (uint8_t)(KV_VIEW_DEVICE | KV_VIEW_CUDA | (readonly ? KV_VIEW_READONLY : 0)),
        .owner = object,
    };
    kv_status_t status = kv_shape_size(dtype, ndim, extents, &view->count, &bytes);
    if (status != KV_OK) {
        kv_py_raise(state, status);
        return false;
    }
    if (view->count > 0 && data == NULL) {
        kv_py_fail(state, KV_BAD_TYPE, "a CUDA array of %lld elements came without memory",
                   (long long)view->count);
        return false;
    }
    if (view->count > 0 && !kv_strides_contiguous(kv_dtype_bytes(dtype), ndim, extents, strides))
        view->strides = strides;
    return find_device(state, view) && find_stream(state, interface->stream, view);
}

int kv_cuda_array_in(kv_state_t *state, PyObject *object, kv_view_t *view, kv_lease_t *lease)
{
    interface_t interface = {.shape = NULL};
    PyObject *given = NULL;
    int64_t *extents = NULL;
    int result = -1;
    /* A class is no array, though its instances may be. */
    given =
        PyType_Check(object) ? NULL : PyObject_GetAttrString(object, "__cuda_array_interface__");
    if (given == NULL) {
        if (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_AttributeError)) {
            PyErr_Clear();
            result = 0;
        }
        goto end;
    }
    if (!read_interface(given, &interface) || !check_interface(state, &interface))
        goto end;
    Py_ssize_t ndim = PyTuple_Check(interface.shape) ? PyTuple_GET_SIZE(interface.shape) : -1;
    if (ndim < 0 || ndim > KV_MAX_DIMS) {
        kv_py_fail(state, KV_BAD_TYPE, "the shape of an array is no tuple of at most %d numbers",
                   KV_MAX_DIMS);
        goto end;
    }
    extents = kv_alloc(2 * (size_t)ndim * sizeof *extents);
    if (extents == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    if (!fill(state, object, &interface, (int)ndim, extents, view))
        goto end;
    *lease = (kv_lease_t){.owner = Py_NewRef(object), .data = extents, .drop = kv_free};
    extents = NULL;
    result = 1;
end:
    kv_free(extents);
    interface_fini(&interface);
    Py_XDECREF(given);
    return result;
}
