/* kvstore_producer: an array library made for tests, which gives its memory by DLPack in every way
 * that there is, also in wrong ones.
 *
 * `Tensor` has __dlpack__ only. A test that wants the exchange table puts one of the module's
 * capsules on a subclass: `class T(Tensor): __dlpack_c_exchange_api__ = exchange_api`. Every tensor
 * given out is remembered with how often its deleter was called; `counts()` tells.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "py/dlpack.h"
#include <stdbool.h>
#include <string.h>

enum { MAX_DIMS = 80 };

typedef struct tensor_object {
    PyObject_HEAD
    Py_buffer memory;
    PyObject *error; /* raised instead of giving anything, or NULL */
    int64_t shape[MAX_DIMS], strides[MAX_DIMS];
    int ndim, device_type, device_id, code, bits, lanes, major;
    bool has_strides, readonly, copied, legacy, keywords, null, no_shape;
    unsigned long long byte_offset;
} tensor_object_t;

/* A tensor given out. It stays in the list when it has been deleted, so that a second call of its
 * deleter is seen and not undefined. */
typedef struct given {
    struct given *next;
    PyObject *owner;
    int64_t shape[MAX_DIMS], strides[MAX_DIMS];
    int deletes;
    union {
        kv_dl_versioned_t versioned;
        kv_dl_managed_t legacy;
    } as;
} given_t;

static given_t *all_given; /* under the GIL */

/* -------------------------------------------------------------------------------- giving out */

static void delete_given(given_t *given)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    given->deletes++;
    Py_CLEAR(given->owner);
    PyGILState_Release(gil);
}

static void delete_versioned(kv_dl_versioned_t *self)
{
    delete_given(self->context);
}

static void delete_legacy(kv_dl_managed_t *self)
{
    delete_given(self->context);
}

static void describe(tensor_object_t *self, int64_t *shape, int64_t *strides, kv_dl_tensor_t *out)
{
    *out = (kv_dl_tensor_t){
        .data = self->null ? NULL : self->memory.buf,
        .device = {.type = self->device_type, .id = self->device_id},
        .ndim = self->ndim,
        .dtype = {.code = (uint8_t)self->code,
                  .bits = (uint8_t)self->bits,
                  .lanes = (uint16_t)self->lanes},
        .shape = self->no_shape ? NULL : shape,
        .strides = self->has_strides ? strides : NULL,
        .byte_offset = self->byte_offset,
    };
}

static given_t *give(tensor_object_t *self, bool legacy)
{
    if (self->error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(self->error), self->error);
        return NULL;
    }
    given_t *given = PyMem_RawCalloc(1, sizeof *given);
    if (given == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    memcpy(given->shape, self->shape, sizeof given->shape);
    memcpy(given->strides, self->strides, sizeof given->strides);
    given->owner = Py_NewRef((PyObject *)self);
    if (legacy) {
        given->as.legacy.context = given;
        given->as.legacy.deleter = delete_legacy;
        describe(self, given->shape, given->strides, &given->as.legacy.tensor);
    } else {
        kv_dl_versioned_t *versioned = &given->as.versioned;
        versioned->version = (kv_dl_version_t){(uint32_t)self->major, 0};
        versioned->context = given;
        versioned->deleter = delete_versioned;
        versioned->flags =
            (self->readonly ? KV_DL_READ_ONLY : 0) | (self->copied ? KV_DL_IS_COPIED : 0);
        describe(self, given->shape, given->strides, &versioned->tensor);
    }
    given->next = all_given;
    all_given = given;
    return given;
}

static void capsule_free(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, KV_DL_CAPSULE_VERSIONED))
        delete_versioned(PyCapsule_GetPointer(capsule, KV_DL_CAPSULE_VERSIONED));
    else if (PyCapsule_IsValid(capsule, KV_DL_CAPSULE))
        delete_legacy(PyCapsule_GetPointer(capsule, KV_DL_CAPSULE));
}

static PyObject *tensor_dlpack(PyObject *object, PyObject *args, PyObject *keywords)
{
    tensor_object_t *self = (tensor_object_t *)object;
    static const char *const names[] = {"stream", "max_version", NULL};
    PyObject *stream = Py_None, *version = Py_None;
    if (!self->keywords && keywords != NULL && PyDict_GET_SIZE(keywords) > 0)
        return PyErr_Format(PyExc_TypeError, "__dlpack__() takes no keyword arguments");
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$OO", (char **)names, &stream, &version))
        return NULL;
    bool legacy = self->legacy || version == Py_None;
    given_t *given = give(self, legacy);
    if (given == NULL)
        return NULL;
    return PyCapsule_New(&given->as, legacy ? KV_DL_CAPSULE : KV_DL_CAPSULE_VERSIONED,
                         capsule_free);
}

static int from_object(void *object, kv_dl_versioned_t **out)
{
    given_t *given = give(object, false);
    if (given == NULL)
        return -1;
    *out = &given->as.versioned;
    return 0;
}

static int borrow(void *object, kv_dl_tensor_t *out)
{
    tensor_object_t *self = object;
    describe(self, self->shape, self->strides, out);
    return 0;
}

static int current_stream(int32_t device_type, int32_t device_id, void **out)
{
    (void)device_type, (void)device_id;
    *out = NULL;
    return 0;
}

static int refuse_allocate(kv_dl_tensor_t *prototype, kv_dl_versioned_t **out, void *error_context,
                           void (*fail)(void *context, const char *kind, const char *message))
{
    (void)prototype, (void)out;
    fail(error_context, "BufferError", "this library makes no tensors for others");
    return -1;
}

static int refuse_to_object(kv_dl_versioned_t *tensor, void **out)
{
    (void)tensor, (void)out;
    PyErr_SetString(PyExc_BufferError, "this library takes no tensors from others");
    return -1;
}

static kv_dl_exchange_t exchange = {
    .header = {.version = {1, 3}},
    .allocate = refuse_allocate,
    .from_object = from_object,
    .to_object = refuse_to_object,
    .borrow = borrow,
    .current_stream = current_stream,
};
/* Of another major version only the header may be read: nothing else is there. */
static kv_dl_exchange_header_t newer = {.version = {2, 0}, .previous = &exchange.header};
static kv_dl_exchange_header_t newest = {.version = {3, 0}, .previous = &newer};
static kv_dl_exchange_header_t future = {.version = {2, 0}};

/* ---------------------------------------------------------------------------------- the type */

static int read_extents(PyObject *tuple, int64_t *out, int *count)
{
    Py_ssize_t size = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : MAX_DIMS + 1;
    if (size > MAX_DIMS) {
        PyErr_SetString(PyExc_ValueError, "shape and strides are tuples");
        return -1;
    }
    for (Py_ssize_t i = 0; i < size; i++) {
        out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
        if (out[i] == -1 && PyErr_Occurred())
            return -1;
    }
    *count = (int)size;
    return 0;
}

/* Everything in the struct can be set, and none of it is checked. Without `shape` it is one
 * dimension over all of `memory`; `ndim` goes before the length of `shape`. */
static int tensor_init(PyObject *object, PyObject *args, PyObject *keywords)
{
    static const char *const names[] = {
        "memory", "shape",    "strides", "dtype",  "device",   "byte_offset", "major",    "ndim",
        "error",  "readonly", "copied",  "legacy", "keywords", "null",        "no_shape", NULL};
    tensor_object_t *self = (tensor_object_t *)object;
    PyObject *memory, *shape = Py_None, *strides = Py_None, *error = Py_None;
    int ndim = INT32_MAX, num_strides, readonly = 0, copied = 0, legacy = 0, with_keywords = 1;
    int null = 0, no_shape = 0;
    if (self->memory.obj != NULL) {
        PyErr_SetString(PyExc_TypeError, "a tensor is made once");
        return -1;
    }
    self->code = KV_DL_FLOAT;
    self->bits = 32;
    self->lanes = 1;
    self->device_type = KV_DL_CPU;
    self->major = KV_DLPACK_MAJOR;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|$OO(iii)(ii)KiiOpppppp", (char **)names,
                                     &memory, &shape, &strides, &self->code, &self->bits,
                                     &self->lanes, &self->device_type, &self->device_id,
                                     &self->byte_offset, &self->major, &ndim, &error, &readonly,
                                     &copied, &legacy, &with_keywords, &null, &no_shape) ||
        PyObject_GetBuffer(memory, &self->memory, PyBUF_SIMPLE) < 0)
        return -1;
    self->readonly = readonly;
    self->copied = copied;
    self->legacy = legacy;
    self->keywords = with_keywords;
    self->null = null;
    self->no_shape = no_shape;
    self->error = error != Py_None ? Py_NewRef(error) : NULL;
    self->ndim = 1;
    self->shape[0] = (int64_t)self->memory.len * 8 / (self->bits > 0 ? self->bits : 8);
    if (shape != Py_None && read_extents(shape, self->shape, &self->ndim) < 0)
        return -1;
    self->has_strides = strides != Py_None;
    if (self->has_strides && read_extents(strides, self->strides, &num_strides) < 0)
        return -1;
    if (ndim != INT32_MAX)
        self->ndim = ndim;
    return 0;
}

static int tensor_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((tensor_object_t *)object)->error);
    Py_VISIT(((tensor_object_t *)object)->memory.obj);
    return 0;
}

static int tensor_clear(PyObject *object)
{
    Py_CLEAR(((tensor_object_t *)object)->error);
    return 0;
}

static void tensor_dealloc(PyObject *object)
{
    tensor_object_t *self = (tensor_object_t *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    PyBuffer_Release(&self->memory);
    Py_CLEAR(self->error);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyMethodDef tensor_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot tensor_slots[] = {
    {Py_tp_init, (void *)tensor_init},         {Py_tp_dealloc, (void *)tensor_dealloc},
    {Py_tp_traverse, (void *)tensor_traverse}, {Py_tp_clear, (void *)tensor_clear},
    {Py_tp_methods, tensor_methods},           {0, NULL},
};

static PyType_Spec tensor_spec = {
    .name = "kvstore_producer.Tensor",
    .basicsize = sizeof(tensor_object_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = tensor_slots,
};

/* --------------------------------------------------------------------------------- the module */

/* (given out, of these deleted exactly once, deleted more than once) since the last reset. */
static PyObject *counts(PyObject *module, PyObject *ignored)
{
    (void)module, (void)ignored;
    int made = 0, once = 0, more = 0;
    for (given_t *given = all_given; given != NULL; given = given->next) {
        made++;
        once += given->deletes == 1;
        more += given->deletes > 1;
    }
    return Py_BuildValue("(iii)", made, once, more);
}

/* Forgets the tensors that were deleted. */
static PyObject *reset(PyObject *module, PyObject *ignored)
{
    (void)module, (void)ignored;
    given_t **link = &all_given;
    while (*link != NULL) {
        given_t *given = *link;
        if (given->deletes > 0) {
            *link = given->next;
            PyMem_RawFree(given);
        } else {
            link = &given->next;
        }
    }
    Py_RETURN_NONE;
}

/* Takes the tensor from a capsule, as a consumer does, and lets go of it without the GIL. */
static PyObject *release_detached(PyObject *module, PyObject *capsule)
{
    (void)module;
    if (PyCapsule_IsValid(capsule, KV_DL_CAPSULE_VERSIONED)) {
        kv_dl_versioned_t *tensor = PyCapsule_GetPointer(capsule, KV_DL_CAPSULE_VERSIONED);
        PyCapsule_SetName(capsule, KV_DL_CAPSULE_VERSIONED_USED);
        Py_BEGIN_ALLOW_THREADS tensor->deleter(tensor);
        Py_END_ALLOW_THREADS
    } else if (PyCapsule_IsValid(capsule, KV_DL_CAPSULE)) {
        kv_dl_managed_t *tensor = PyCapsule_GetPointer(capsule, KV_DL_CAPSULE);
        PyCapsule_SetName(capsule, KV_DL_CAPSULE_USED);
        Py_BEGIN_ALLOW_THREADS tensor->deleter(tensor);
        Py_END_ALLOW_THREADS
    } else {
        PyErr_SetString(PyExc_TypeError, "not a capsule with a tensor");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *extents_tuple(const int64_t *extents, int ndim)
{
    if (extents == NULL)
        Py_RETURN_NONE;
    PyObject *tuple = PyTuple_New(ndim);
    for (int i = 0; tuple != NULL && i < ndim; i++) {
        PyObject *extent = PyLong_FromLongLong(extents[i]);
        if (extent == NULL)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, extent);
    }
    return tuple;
}

/* What stands in the struct of a capsule that nobody has consumed. */
static PyObject *inspect(PyObject *module, PyObject *capsule)
{
    (void)module;
    kv_dl_tensor_t *tensor;
    PyObject *version;
    unsigned long long flags = 0;
    if (PyCapsule_IsValid(capsule, KV_DL_CAPSULE_VERSIONED)) {
        kv_dl_versioned_t *versioned = PyCapsule_GetPointer(capsule, KV_DL_CAPSULE_VERSIONED);
        tensor = &versioned->tensor;
        flags = versioned->flags;
        version = Py_BuildValue("(II)", versioned->version.major, versioned->version.minor);
    } else {
        kv_dl_managed_t *managed = PyCapsule_GetPointer(capsule, KV_DL_CAPSULE);
        if (managed == NULL)
            return NULL;
        tensor = &managed->tensor;
        version = Py_NewRef(Py_None);
    }
    return Py_BuildValue("{sNsKsNsNs(ii)s(iii)sKsN}", "version", version, "flags", flags, "shape",
                         extents_tuple(tensor->shape, tensor->ndim), "strides",
                         extents_tuple(tensor->strides, tensor->ndim), "device",
                         (int)tensor->device.type, (int)tensor->device.id, "dtype",
                         (int)tensor->dtype.code, (int)tensor->dtype.bits, (int)tensor->dtype.lanes,
                         "byte_offset", (unsigned long long)tensor->byte_offset, "data",
                         PyLong_FromVoidPtr(tensor->data));
}

static PyMethodDef functions[] = {
    {"counts", counts, METH_NOARGS, NULL},
    {"reset", reset, METH_NOARGS, NULL},
    {"inspect", inspect, METH_O, NULL},
    {"release_detached", release_detached, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static int add_table(PyObject *module, const char *name, void *table)
{
    PyObject *capsule = PyCapsule_New(table, KV_DL_CAPSULE_EXCHANGE, NULL);
    int status = capsule != NULL ? PyModule_AddObjectRef(module, name, capsule) : -1;
    Py_XDECREF(capsule);
    return status;
}

static int execute(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &tensor_spec, NULL);
    int status = type != NULL ? PyModule_AddObjectRef(module, "Tensor", type) : -1;
    Py_XDECREF(type);
    if (status < 0 || add_table(module, "exchange_api", &exchange) < 0 ||
        add_table(module, "exchange_api_behind_newer", &newest) < 0 ||
        add_table(module, "exchange_api_too_new", &future) < 0)
        return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)execute}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kvstore_producer",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit_kvstore_producer(void);

PyMODINIT_FUNC PyInit_kvstore_producer(void)
{
    return PyModuleDef_Init(&definition);
}
