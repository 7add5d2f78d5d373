/* DLPack, the consumer's side: tensors of other libraries as views.
 *
 * A type with an exchange table is asked through it, any other object by __dlpack__. Both ways the
 * tensor is owned until the lease is dropped, not borrowed: a borrowed one would lose its memory
 * when another thread gives the object new storage (PyTorch's t.data = ...) during a call.
 *
 * PyTorch's table hands out tensors that are to be negated when read (x.conj().imag is one) without
 * a word. Types that have is_neg() are asked for that first. is_conj() needs no question: only
 * complex tensors can have it, and those are refused for their type.
 *
 * A tensor of a CUDA device is ready in the order of some stream: that which the table or the
 * library calls current, else the store's own, for which __dlpack__ is asked once more. The first
 * time it is asked without a stream, so that tensors in host memory cost nothing.
 */
#include "py/dlpack.h"
#include "py/cuda_in.h"

#include "base/memory.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* ---------------------------------------------------------------------------- what a type has */

/* So many types are remembered, then all are forgotten: classes made in a loop do not pile up. */
enum { MAX_TYPES = 64 };

/* Borrowed from a tuple that the caller holds. */
typedef struct traits {
    const kv_dl_exchange_t *exchange; /* NULL: no table */
    PyObject *is_neg;                 /* NULL: no such method */
} traits_t;

/* Sets a new reference, or NULL when there is no such attribute; false with an exception. */
static bool find_attribute(PyObject *object, PyObject *name, PyObject **out)
{
#if PY_VERSION_HEX >= 0x030d0000
    return PyObject_GetOptionalAttr(object, name, out) >= 0;
#else
    *out = PyObject_GetAttr(object, name);
    if (*out == NULL && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Clear();
    return *out != NULL || !PyErr_Occurred();
#endif
}

static bool find_named(PyObject *object, const char *name, PyObject **out)
{
    PyObject *text = PyUnicode_InternFromString(name);
    bool done = text != NULL && find_attribute(object, text, out);
    Py_XDECREF(text);
    return done;
}

/* The newest table in the chain that we can read, NULL if there is none. */
static kv_dl_exchange_t *usable(PyObject *capsule)
{
    if (!PyCapsule_IsValid(capsule, KV_DL_CAPSULE_EXCHANGE))
        return NULL;
    kv_dl_exchange_header_t *header = PyCapsule_GetPointer(capsule, KV_DL_CAPSULE_EXCHANGE);
    while (header != NULL && header->version.major != KV_DLPACK_MAJOR)
        header = header->previous;
    kv_dl_exchange_t *exchange = (kv_dl_exchange_t *)header;
    return exchange != NULL && exchange->from_object != NULL ? exchange : NULL;
}

/* A new tuple for the cache: capsule of the table or None, the type's is_neg or None. */
static PyObject *inspect_type(kv_state_t *state, PyObject *type)
{
    PyObject *given = NULL, *table = NULL, *is_neg = NULL, *row = NULL;
    if (!find_attribute(type, state->str_exchange_api, &given) ||
        !find_named(type, "is_neg", &is_neg))
        goto end;
    kv_dl_exchange_t *exchange = given != NULL ? usable(given) : NULL;
    table = exchange != NULL ? PyCapsule_New(exchange, KV_DL_CAPSULE_EXCHANGE, NULL)
                             : Py_NewRef(Py_None);
    if (table != NULL)
        row = PyTuple_Pack(2, table, is_neg != NULL ? is_neg : Py_None);
end:
    Py_XDECREF(given);
    Py_XDECREF(is_neg);
    Py_XDECREF(table);
    return row;
}

/* A new reference to the tuple. The cache holds the types too, so that none can be mistaken for an
 * older one at its address. */
static PyObject *traits_of(kv_state_t *state, PyTypeObject *type, traits_t *out)
{
    PyObject *key = (PyObject *)type;
    PyObject *row = Py_XNewRef(PyDict_GetItemWithError(state->exchange_cache, key));
    if (KV_UNLIKELY(row == NULL)) {
        PyErr_Clear(); /* a metaclass without a hash: not cached */
        row = inspect_type(state, key);
        if (row == NULL)
            return NULL;
        if (PyDict_GET_SIZE(state->exchange_cache) >= MAX_TYPES)
            PyDict_Clear(state->exchange_cache);
        if (PyDict_SetItem(state->exchange_cache, key, row) < 0)
            PyErr_Clear();
    }
    PyObject *table = PyTuple_GET_ITEM(row, 0), *is_neg = PyTuple_GET_ITEM(row, 1);
    out->exchange = table != Py_None ? PyCapsule_GetPointer(table, KV_DL_CAPSULE_EXCHANGE) : NULL;
    out->is_neg = is_neg != Py_None ? is_neg : NULL;
    return row;
}

/* ------------------------------------------------------------------------------ tensor to view */

/* A tensor that we own. */
typedef struct owned {
    const kv_dl_tensor_t *tensor;
    uint64_t flags;
    void *managed;
    void (*drop)(void *managed);
} owned_t;

/* Deleters may run Python, and leases are dropped while exceptions are on their way. */
#define KEEP_EXCEPTION(action)                                                                     \
    do {                                                                                           \
        PyObject *type, *value, *trace;                                                            \
        PyErr_Fetch(&type, &value, &trace);                                                        \
        action;                                                                                    \
        PyErr_Restore(type, value, trace);                                                         \
    } while (0)

static void drop_versioned(void *data)
{
    kv_dl_versioned_t *managed = data;
    if (managed->deleter != NULL)
        KEEP_EXCEPTION(managed->deleter(managed));
}

static void drop_legacy(void *data)
{
    kv_dl_managed_t *managed = data;
    if (managed->deleter != NULL)
        KEEP_EXCEPTION(managed->deleter(managed));
}

/* A tensor with what the view needs besides: strides in bytes, or the name of its type. */
typedef struct block {
    void *managed;
    void (*drop)(void *managed);
    union {
        char type_name[8];
        int64_t strides[1];
    } more; /* as long as needed */
} block_t;

static void drop_block(void *data)
{
    block_t *block = data;
    block->drop(block->managed);
    kv_free(block);
}

static void *make_block(const owned_t *owned, size_t bytes, kv_lease_t *lease)
{
    block_t *block = kv_alloc(offsetof(block_t, more) + bytes);
    if (block == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    block->managed = owned->managed;
    block->drop = owned->drop;
    lease->data = block;
    lease->drop = drop_block;
    return &block->more;
}

/* "complex64", "float8_e4m3fn", "float32 x 4": DLPack has no spelling of its own. */
static void format_type(kv_dl_type_t type, char *text, size_t bytes)
{
    static const char *const names[] = {"int",
                                        "uint",
                                        "float",
                                        "opaque handle",
                                        "bfloat",
                                        "complex",
                                        "bool",
                                        "float8_e3m4",
                                        "float8_e4m3",
                                        "float8_e4m3b11fnuz",
                                        "float8_e4m3fn",
                                        "float8_e4m3fnuz",
                                        "float8_e5m2",
                                        "float8_e5m2fnuz",
                                        "float8_e8m0fnu",
                                        "float6_e2m3fn",
                                        "float6_e3m2fn",
                                        "float4_e2m1fn"};
    char lanes[16] = "";
    if (type.lanes != 1)
        snprintf(lanes, sizeof lanes, " x %u", (unsigned)type.lanes);
    if (type.code >= sizeof names / sizeof names[0])
        snprintf(text, bytes, "DLPack type %u of %u bits%s", (unsigned)type.code,
                 (unsigned)type.bits, lanes);
    else if (type.code < 6 && type.code != 3)
        snprintf(text, bytes, "%s%u%s", names[type.code], (unsigned)type.bits, lanes);
    else
        snprintf(text, bytes, "%s%s", names[type.code], lanes);
}

static bool is_host(kv_dl_device_t device)
{
    return device.type == KV_DL_CPU || device.type == KV_DL_CUDA_HOST ||
           device.type == KV_DL_ROCM_HOST;
}

static bool is_cuda(kv_dl_device_t device)
{
    return device.type == KV_DL_CUDA || device.type == KV_DL_CUDA_MANAGED;
}

/* The strides in bytes as a part of the lease. */
static bool keep_strides(kv_state_t *state, const owned_t *owned, size_t item, kv_view_t *view,
                         kv_lease_t *lease)
{
    const kv_dl_tensor_t *tensor = owned->tensor;
    int64_t *strides = make_block(owned, (size_t)tensor->ndim * sizeof *strides, lease);
    if (strides == NULL)
        return false;
    int64_t next = (int64_t)item;
    for (int i = tensor->ndim - 1; i >= 0; i--) {
        if (tensor->strides == NULL) {
            strides[i] = next;
            next *= tensor->shape[i]; /* the array has elements: the product is their bytes */
        } else if (__builtin_mul_overflow(tensor->strides[i], (int64_t)item, &strides[i])) {
            kv_py_fail(state, KV_BAD_TYPE, "stride %" PRId64 " of a tensor is beyond all memory",
                       tensor->strides[i]);
            return false;
        }
    }
    view->strides = strides;
    return true;
}

/* Fills view and lease. On success the lease owns the tensor; on failure it is still the caller's,
 * and the lease holds nothing. */
static bool fill(kv_state_t *state, PyObject *object, const owned_t *owned, bool for_out,
                 kv_view_t *view, kv_lease_t *lease)
{
    const kv_dl_tensor_t *tensor = owned->tensor;
    kv_dtype_t dtype =
        kv_dtype_from_dlpack(tensor->dtype.code, tensor->dtype.bits, tensor->dtype.lanes);
    size_t item = kv_dtype_bytes(dtype), bytes;
    int64_t count;
    bool host = is_host(tensor->device);
    if (tensor->ndim > 0 && tensor->shape == NULL) {
        kv_py_fail(state, KV_BAD_TYPE, "a tensor of %d dimensions came without a shape",
                   (int)tensor->ndim);
        return false;
    }
    if (is_cuda(tensor->device) && (tensor->device.id < 0 || tensor->device.id > INT16_MAX)) {
        kv_py_fail(state, KV_BAD_TYPE, "a tensor names CUDA device %d, which cannot be",
                   (int)tensor->device.id);
        return false;
    }
    kv_status_t status = kv_shape_size(dtype, tensor->ndim, tensor->shape, &count, &bytes);
    if (status != KV_OK) {
        kv_py_raise(state, status);
        return false;
    }
    if (count > 0 && tensor->data == NULL) {
        kv_py_fail(state, KV_BAD_TYPE, "a tensor of %" PRId64 " elements came without memory",
                   count);
        return false;
    }
    if (for_out && (owned->flags & KV_DL_IS_COPIED)) {
        kv_py_fail(
            state, KV_BAD_TYPE,
            "a value of type '%.100s' gave a copy of its memory: nothing can be written to it",
            Py_TYPE(object)->tp_name);
        return false;
    }
    *view = (kv_view_t){
        .data = tensor->data != NULL ? (char *)tensor->data + tensor->byte_offset : NULL,
        .shape = tensor->shape,
        .count = count,
        .ndim = tensor->ndim,
        .dtype = (uint8_t)dtype,
        .flags =
            (uint8_t)((owned->flags & KV_DL_READ_ONLY ? KV_VIEW_READONLY : 0) |
                      (host ? 0 : KV_VIEW_DEVICE) | (is_cuda(tensor->device) ? KV_VIEW_CUDA : 0)),
        .device = (int16_t)tensor->device.id,
        .owner = object,
    };
    *lease = (kv_lease_t){.data = owned->managed, .drop = owned->drop};
    if (dtype == KV_DTYPE_NONE) {
        enum { NAME_BYTES = 64 };
        char *name = make_block(owned, NAME_BYTES, lease);
        if (name == NULL)
            goto error;
        format_type(tensor->dtype, name, NAME_BYTES);
        view->type_name = name;
    } else if (count > 0 &&
               (!kv_strides_contiguous(1, tensor->ndim, tensor->shape, tensor->strides) ||
                (host && (uintptr_t)view->data % item != 0))) {
        /* Kernels read whole elements: what is not aligned goes the way of strided arrays. */
        if (!keep_strides(state, owned, item, view, lease))
            goto error;
    }
    lease->owner = Py_NewRef(object);
    return true;
error:
    if (lease->drop == drop_block)
        kv_free(lease->data);
    *lease = (kv_lease_t){.owner = NULL};
    return false;
}

/* ------------------------------------------------------------------------------- two ways to ask
 */

static bool check_version(kv_state_t *state, kv_dl_version_t version)
{
    if (version.major == KV_DLPACK_MAJOR)
        return true;
    kv_py_fail(state, KV_BAD_TYPE, "a tensor came in DLPack version %u.%u, understood is %d",
               (unsigned)version.major, (unsigned)version.minor, KV_DLPACK_MAJOR);
    return false;
}

/* 0 also for a tensor of a device whose stream the table cannot tell. */
static int ask_table(kv_state_t *state, const kv_dl_exchange_t *exchange, PyObject *object,
                     bool for_out, kv_view_t *view, kv_lease_t *lease)
{
    kv_dl_versioned_t *managed = NULL;
    void *stream;
    if (exchange->from_object(object, &managed) != 0)
        managed = NULL;
    if (managed == NULL)
        goto error;
    owned_t owned = {.managed = managed, .drop = drop_versioned};
    if (!check_version(state, managed->version))
        goto error;
    owned.tensor = &managed->tensor;
    owned.flags = managed->flags;
    bool cuda = is_cuda(owned.tensor->device);
    if (cuda && exchange->current_stream == NULL) {
        drop_versioned(managed);
        return 0;
    }
    if (cuda && exchange->current_stream(KV_DL_CUDA, owned.tensor->device.id, &stream) != 0)
        goto error;
    if (!fill(state, object, &owned, for_out, view, lease))
        goto error;
    if (cuda)
        kv_cuda_follow(view, stream);
    return 1;
error:
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_BufferError, "no tensor and no reason");
    if (managed != NULL)
        drop_versioned(managed);
    return -1;
}

/* `stream` NULL: not mentioned. */
static PyObject *call_dlpack(kv_state_t *state, PyObject *method, PyObject *stream)
{
    PyObject *names = NULL, *capsule = NULL;
    PyObject *version = Py_BuildValue("(ii)", KV_DLPACK_MAJOR, KV_DLPACK_MINOR);
    PyObject *given[] = {stream, version};
    if (version == NULL)
        return NULL;
    names = stream != NULL ? PyTuple_Pack(2, state->str_stream, state->str_max_version)
                           : PyTuple_Pack(1, state->str_max_version);
    if (names != NULL)
        capsule = PyObject_Vectorcall(method, stream != NULL ? given : &version, 0, names);
    Py_XDECREF(names);
    Py_DECREF(version);
    /* Producers older than the keyword. */
    if (capsule != NULL || !PyErr_ExceptionMatches(PyExc_TypeError))
        return capsule;
    PyErr_Clear();
    names = stream != NULL ? PyTuple_Pack(1, state->str_stream) : NULL;
    if (stream == NULL || names != NULL)
        capsule = PyObject_Vectorcall(method, &stream, 0, names);
    Py_XDECREF(names);
    return capsule;
}

/* A tensor that takes part in autograd refuses __dlpack__; what is read or written here is no step
 * of a computation, so it is asked again as detached. Leaves the exception if that is no help. */
static PyObject *call_detached(kv_state_t *state, PyObject *object, PyObject *stream)
{
    PyObject *type, *value, *trace;
    PyObject *requires = NULL, *detached = NULL, *method = NULL, *capsule = NULL;
    PyErr_Fetch(&type, &value, &trace);
    if (find_named(object, "requires_grad", &requires) && requires == Py_True &&
        (detached = PyObject_CallMethod(object, "detach", NULL)) != NULL &&
        find_attribute(detached, state->str_dlpack, &method) && method != NULL)
        capsule = call_dlpack(state, method, stream);
    Py_XDECREF(method);
    Py_XDECREF(detached);
    Py_XDECREF(requires);
    if (capsule != NULL) {
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(trace);
    } else {
        PyErr_Restore(type, value, trace);
    }
    return capsule;
}

/* What __dlpack__ gave. A capsule that is not renamed deletes its tensor itself. */
typedef struct answer {
    PyObject *capsule;
    const char *name, *used; /* the capsule's, and once the tensor has been taken */
    owned_t owned;
} answer_t;

/* Its destructor may run Python too. */
static void drop_capsule(PyObject *capsule)
{
    KEEP_EXCEPTION(Py_XDECREF(capsule));
}

static bool ask(kv_state_t *state, PyObject *object, PyObject *method, PyObject *stream,
                answer_t *answer)
{
    Py_CLEAR(answer->capsule);
    PyObject *capsule = call_dlpack(state, method, stream);
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_Exception))
        capsule = call_detached(state, object, stream);
    answer->capsule = capsule;
    if (capsule == NULL)
        return false;
    if (PyCapsule_IsValid(capsule, KV_DL_CAPSULE_VERSIONED)) {
        kv_dl_versioned_t *managed = PyCapsule_GetPointer(capsule, KV_DL_CAPSULE_VERSIONED);
        if (!check_version(state, managed->version))
            return false;
        answer->owned = (owned_t){&managed->tensor, managed->flags, managed, drop_versioned};
        answer->name = KV_DL_CAPSULE_VERSIONED;
        answer->used = KV_DL_CAPSULE_VERSIONED_USED;
        return true;
    }
    if (PyCapsule_IsValid(capsule, KV_DL_CAPSULE)) {
        kv_dl_managed_t *managed = PyCapsule_GetPointer(capsule, KV_DL_CAPSULE);
        answer->owned = (owned_t){&managed->tensor, 0, managed, drop_legacy};
        answer->name = KV_DL_CAPSULE;
        answer->used = KV_DL_CAPSULE_USED;
        return true;
    }
    kv_py_fail(state, KV_BAD_TYPE,
               "__dlpack__ of a value of type '%.100s' gave no capsule with a tensor",
               Py_TYPE(object)->tp_name);
    return false;
}

/* Asks for a tensor of a device once more, now for work on the store's own stream. With no such
 * device the answer stays as it is. */
static bool ask_for_own(kv_state_t *state, PyObject *object, PyObject *method,
                        kv_dl_device_t device, answer_t *answer, void **stream)
{
    int there = kv_cuda_own_stream(state, device.id, stream);
    if (there <= 0)
        return there == 0;
    PyObject *number = PyLong_FromVoidPtr(*stream);
    bool asked = number != NULL && ask(state, object, method, number, answer);
    Py_XDECREF(number);
    if (!asked)
        return false;
    kv_dl_device_t now = answer->owned.tensor->device;
    if (now.type == device.type && now.id == device.id)
        return true;
    kv_py_fail(state, KV_BAD_TYPE,
               "__dlpack__ of a value of type '%.100s' gave a tensor on CUDA device %d, and then "
               "one that is somewhere else",
               Py_TYPE(object)->tp_name, (int)device.id);
    return false;
}

static int ask_method(kv_state_t *state, PyObject *object, bool for_out, kv_view_t *view,
                      kv_lease_t *lease)
{
    PyObject *method = NULL;
    answer_t answer = {.capsule = NULL};
    kv_dl_device_t device;
    int result = -1, follows = 0;
    void *stream = NULL;
    if (!find_attribute(object, state->str_dlpack, &method))
        goto end;
    /* A class is no array, though its instances may be. */
    if (method == NULL || PyType_Check(object)) {
        result = 0;
        goto end;
    }
    if (!ask(state, object, method, NULL, &answer))
        goto end;
    device = answer.owned.tensor->device;
    if (is_cuda(device)) {
        follows = kv_cuda_library_stream(object, device.id, &stream);
        if (follows < 0 ||
            (follows == 0 && !ask_for_own(state, object, method, device, &answer, &stream)))
            goto end;
    }
    /* Python has run since, and others may have the same capsule. */
    if (!PyCapsule_IsValid(answer.capsule, answer.name)) {
        kv_py_fail(state, KV_BAD_TYPE,
                   "__dlpack__ of a value of type '%.100s' gave a capsule whose tensor somebody "
                   "else has taken",
                   Py_TYPE(object)->tp_name);
        goto end;
    }
    if (fill(state, object, &answer.owned, for_out, view, lease)) {
        (void)PyCapsule_SetName(answer.capsule, answer.used); /* fails for what is none only */
        if (follows)
            kv_cuda_follow(view, stream);
        else
            view->stream = stream;
        result = 1;
    }
end:
    drop_capsule(answer.capsule);
    Py_XDECREF(method);
    return result;
}

int kv_dlpack_array_in(kv_state_t *state, PyObject *object, bool for_out, kv_view_t *view,
                       kv_lease_t *lease)
{
    PyObject *row = NULL, *answer = NULL, *resolved = NULL;
    traits_t traits;
    int result = -1;
    row = traits_of(state, Py_TYPE(object), &traits);
    if (row == NULL)
        goto end;
    if (traits.is_neg != NULL) {
        answer = PyObject_CallOneArg(traits.is_neg, object);
        int negative = answer != NULL ? PyObject_IsTrue(answer) : -1;
        if (negative < 0)
            goto end;
        if (negative && for_out) {
            kv_py_fail(state, KV_BAD_TYPE,
                       "a tensor with the negative bit set cannot be written: its memory holds the "
                       "negated values");
            goto end;
        }
        if (negative) {
            resolved = PyObject_CallMethod(object, "resolve_neg", NULL);
            if (resolved == NULL)
                goto end;
            if (Py_TYPE(resolved) != Py_TYPE(object)) {
                kv_py_fail(state, KV_BAD_TYPE, "resolve_neg of a '%.100s' gave a '%.100s'",
                           Py_TYPE(object)->tp_name, Py_TYPE(resolved)->tp_name);
                goto end;
            }
            object = resolved;
        }
    }
    result = traits.exchange != NULL
                 ? ask_table(state, traits.exchange, object, for_out, view, lease)
                 : 0;
    if (result == 0)
        result = ask_method(state, object, for_out, view, lease);
end:
    Py_XDECREF(resolved);
    Py_XDECREF(answer);
    Py_XDECREF(row);
    return result;
}
