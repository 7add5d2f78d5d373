/* See device_view.h. */
#include "py/device_view.h"
#include "py/cuda_in.h"
#include "py/dlpack.h"

typedef struct device_view {
    PyObject_HEAD
    kv_state_t *state;
    kv_array_t *array;
    kv_lane_t ready, taken; /* the store's lane; the library's, the same until it has named one */
} device_view_t;

static kv_dl_device_t device_of(const device_view_t *self)
{
    return (kv_dl_device_t){.type = KV_DL_CUDA, .id = self->ready.device};
}

PyObject *kv_device_view_new(kv_state_t *state, kv_array_t *array, kv_lane_t lane)
{
    PyTypeObject *type = state->device_view_type;
    device_view_t *self = (device_view_t *)type->tp_alloc(type, 0);
    if (self == NULL) {
        kv_array_retire(array);
        return NULL;
    }
    self->array = array;
    self->state = state;
    self->ready = self->taken = lane;
    return (PyObject *)self;
}

kv_lane_t kv_device_view_lane(PyObject *view)
{
    return ((device_view_t *)view)->taken;
}

/* Frees memory that the store has left to a user, once the work that his library has put on it by
 * now is done. While the store has a share, the store sees to that. */
static void free_behind(kv_buffer_t *buffer, kv_lane_t lane)
{
    kv_mark_t *mark;
    if (atomic_load(&buffer->refs) != 1 || kv_mark_new(lane, &mark) != KV_OK)
        return;
    kv_mark_keep(mark, kv_buffer_drop, kv_buffer_hold(buffer));
    kv_mark_rele(mark);
}

static void device_view_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    kv_array_t *array = ((device_view_t *)object)->array;
    if (array->generation == kv_fork_generation()) {
        free_behind(array->buffer, ((device_view_t *)object)->taken);
        kv_array_retire(array);
    }
    type->tp_free(object);
    Py_DECREF(type);
}

/* Without a name it is the legacy default stream; -1: the library wants no order. */
static bool order(device_view_t *self, PyObject *stream)
{
    void *given = stream != NULL ? PyLong_AsVoidPtr(stream) : NULL;
    if (PyErr_Occurred())
        return false;
    if (given == (void *)-1)
        return true;
    kv_lane_t lane = {.device = self->ready.device, .stream = kv_cuda_stream(given)};
    kv_status_t status = kv_lane_join(self->ready, lane);
    if (status == KV_OK)
        self->taken = lane;
    else
        kv_py_raise(self->state, status);
    return status == KV_OK;
}

static PyObject *to_dlpack(PyObject *object, PyObject *const *args, Py_ssize_t num_args,
                           PyObject *names)
{
    device_view_t *self = (device_view_t *)object;
    kv_dlpack_asked_t asked;
    if (!kv_dlpack_parse(device_of(self), args, num_args, names, &asked))
        return NULL;
    if (asked.copy) {
        PyErr_SetString(PyExc_BufferError, "an updater's memory is handed out without a copy");
        return NULL;
    }
    if (!order(self, asked.stream))
        return NULL;
    return kv_dlpack_export(self->array, object, device_of(self), asked.versioned);
}

static PyObject *to_device(PyObject *object, PyObject *ignored)
{
    const kv_dl_device_t device = device_of((device_view_t *)object);
    (void)ignored;
    return Py_BuildValue("(ii)", (int)device.type, (int)device.id);
}

static PyMethodDef device_view_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))to_dlpack, METH_FASTCALL | METH_KEYWORDS,
     "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n"
     "A capsule with the memory."},
    {"__dlpack_device__", to_device, METH_NOARGS,
     "__dlpack_device__($self, /)\n--\n\nKind and number of the device."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot device_view_slots[] = {
    {Py_tp_doc, (void *)"Memory of a store on a device, for from_dlpack."},
    {Py_tp_dealloc, (void *)device_view_dealloc},
    {Py_tp_methods, device_view_methods},
    {0, NULL},
};

static PyType_Spec device_view_spec = {
    .name = "kvstore._core.DeviceView",
    .basicsize = sizeof(device_view_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = device_view_slots,
};

int kv_device_view_setup(PyObject *module, kv_state_t *state)
{
    state->device_view_type =
        (PyTypeObject *)PyType_FromModuleAndSpec(module, &device_view_spec, NULL);
    return state->device_view_type != NULL ? 0 : -1;
}
