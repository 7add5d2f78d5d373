/* DLPack, the producer's side: memory of ours as tensors of other libraries.
 *
 * The struct, its shape and strides are one block. Consumers let go from any thread, without the
 * GIL; our reference is then dropped by way of the release list.
 */
#include "py/dlpack.h"

#include "base/memory.h"

typedef struct export
{
    kv_release_t release;
    PyObject *owner;
    union {
        kv_dl_versioned_t versioned;
        kv_dl_managed_t legacy;
    } as;
    int64_t extents[]; /* shape, strides */
}
export_t;

static void free_export(kv_release_t *release)
{
    export_t *export = (export_t *)release;
    Py_DECREF(export->owner);
    kv_free(export);
}

static void delete_versioned(kv_dl_versioned_t *self)
{
    export_t *export = self->context;
    kv_py_release_later(&export->release);
}

static void delete_legacy(kv_dl_managed_t *self)
{
    export_t *export = self->context;
    kv_py_release_later(&export->release);
}

/* Of a capsule that nobody took the tensor from. */
static void capsule_free(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, KV_DL_CAPSULE_VERSIONED))
        delete_versioned(PyCapsule_GetPointer(capsule, KV_DL_CAPSULE_VERSIONED));
    else if (PyCapsule_IsValid(capsule, KV_DL_CAPSULE))
        delete_legacy(PyCapsule_GetPointer(capsule, KV_DL_CAPSULE));
}

PyObject *kv_dlpack_export(const kv_array_t *array, PyObject *owner, kv_dl_device_t device,
                           bool versioned)
{
    const int64_t *shape = array->shape;
    int ndim = array->ndim;
    export_t *export = kv_alloc(sizeof *export + 2 * (size_t)ndim * sizeof(int64_t));
    if (export == NULL)
        return PyErr_NoMemory();
    int64_t *strides = export->extents + ndim, next = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        export->extents[i] = shape[i];
        strides[i] = next;
        next *= shape[i] > 0 ? shape[i] : 1;
    }
    unsigned code, bits;
    kv_dtype_to_dlpack(array->dtype, &code, &bits);
    kv_dl_tensor_t tensor = {
        .data = array->count > 0 ? array->buffer->data : NULL,
        .device = device,
        .ndim = ndim,
        .dtype = {.code = (uint8_t)code, .bits = (uint8_t)bits, .lanes = 1},
        .shape = export->extents,
        .strides = strides,
    };
    export->release.free = free_export;
    export->owner = owner;
    if (versioned)
        export->as.versioned = (kv_dl_versioned_t){
            .version = {KV_DLPACK_MAJOR, KV_DLPACK_MINOR},
            .context = export,
            .deleter = delete_versioned,
            .tensor = tensor,
        };
    else
        export->as.legacy =
            (kv_dl_managed_t){.tensor = tensor, .context = export, .deleter = delete_legacy};
    PyObject *capsule = PyCapsule_New(
        &export->as, versioned ? KV_DL_CAPSULE_VERSIONED : KV_DL_CAPSULE, capsule_free);
    if (capsule == NULL) {
        kv_free(export);
        return NULL;
    }
    Py_INCREF(owner);
    return capsule;
}

/* ------------------------------------------------------------------------------- arguments */

/* Whether `asked` names the device where the array is. */
static bool check_device(kv_dl_device_t device, PyObject *asked)
{
    if (asked == NULL || asked == Py_None)
        return true;
    int type, id;
    if (!PyTuple_Check(asked) || !PyArg_ParseTuple(asked, "ii", &type, &id)) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "dl_device is a pair of integers, not %R", asked);
        return false;
    }
    if (type != device.type || id != device.id) {
        PyErr_Format(PyExc_BufferError, "the array is on device (%d, %d), not %R", (int)device.type,
                     (int)device.id, asked);
        return false;
    }
    return true;
}

/* The major version that the consumer can read; -1 with an exception. */
static long major_version(PyObject *version)
{
    if (version == NULL || version == Py_None)
        return 0;
    if (!PyTuple_Check(version) || PyTuple_GET_SIZE(version) != 2) {
        PyErr_Format(PyExc_TypeError, "max_version is a pair of integers, not %R", version);
        return -1;
    }
    long major = PyLong_AsLong(PyTuple_GET_ITEM(version, 0));
    if (major < 0 && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "max_version is not negative: %R", version);
    return major < 0 ? -1 : major;
}

bool kv_dlpack_parse(kv_dl_device_t device, PyObject *const *args, Py_ssize_t num_args,
                     PyObject *names, kv_dlpack_asked_t *out)
{
    static const kv_param_t params[] = {
        {"stream", false}, {"max_version", false}, {"dl_device", false}, {"copy", false}};
    static const kv_signature_t signature = {"__dlpack__", 4, 0, params};
    PyObject *values[4];
    if (!kv_py_parse(&signature, args, num_args, names, values))
        return false;
    long major = major_version(values[1]);
    if (major < 0 || !check_device(device, values[2]))
        return false;
    int copy = values[3] != NULL ? PyObject_IsTrue(values[3]) : 0;
    *out = (kv_dlpack_asked_t){.stream = values[0] != Py_None ? values[0] : NULL,
                               .versioned = major >= 1,
                               .copy = copy > 0};
    return copy >= 0;
}
