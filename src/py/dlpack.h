/* The binary interface of DLPack 1.x, as far as it is used here: how array libraries show each
 * other their memory. The layouts are fixed by the DLPack standard; the assertions pin them.
 *
 * `DLManagedTensor` is the struct of the time before versions, still handed out by older libraries.
 * Of a `DLManagedTensorVersioned` with another major version only `deleter` may be touched.
 */
#ifndef KV_PY_DLPACK_H
#define KV_PY_DLPACK_H

#include "py/py.h"

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

/* The version that we speak. Minor versions only add codes and table entries. */
enum { KV_DLPACK_MAJOR = 1, KV_DLPACK_MINOR = 3 };

typedef struct kv_dl_version {
    uint32_t major, minor;
} kv_dl_version_t;

typedef enum kv_dl_device_type {
    KV_DL_CPU = 1,
    KV_DL_CUDA = 2,
    KV_DL_CUDA_HOST = 3, /* page-locked host memory */
    KV_DL_ROCM_HOST = 11,
    KV_DL_CUDA_MANAGED = 13,
} kv_dl_device_type_t;

typedef struct kv_dl_device {
    int32_t type;
    int32_t id;
} kv_dl_device_t;

enum { KV_DL_INT = 0, KV_DL_UINT = 1, KV_DL_FLOAT = 2 };

typedef struct kv_dl_type {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} kv_dl_type_t;

typedef struct kv_dl_tensor {
    void *data;
    kv_dl_device_t device;
    int32_t ndim;
    kv_dl_type_t dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL when C-contiguous */
    uint64_t byte_offset;
} kv_dl_tensor_t;

typedef struct kv_dl_managed kv_dl_managed_t;
struct kv_dl_managed {
    kv_dl_tensor_t tensor;
    void *context;
    void (*deleter)(kv_dl_managed_t *self); /* may be NULL */
};

#define KV_DL_READ_ONLY (UINT64_C(1) << 0)
#define KV_DL_IS_COPIED (UINT64_C(1) << 1)

typedef struct kv_dl_versioned kv_dl_versioned_t;
struct kv_dl_versioned {
    kv_dl_version_t version;
    void *context;
    void (*deleter)(kv_dl_versioned_t *self); /* may be NULL */
    uint64_t flags;
    kv_dl_tensor_t tensor;
};

#define KV_DL_CAPSULE "dltensor"
#define KV_DL_CAPSULE_USED "used_dltensor"
#define KV_DL_CAPSULE_VERSIONED "dltensor_versioned"
#define KV_DL_CAPSULE_VERSIONED_USED "used_dltensor_versioned"

/* The table of C functions behind a type's `__dlpack_c_exchange_api__`, a capsule of this name.
 * Where the major version is too new, `previous` leads to older tables. All return 0, or -1 with a
 * Python exception (`allocate`: with `fail` called). */
#define KV_DL_CAPSULE_EXCHANGE "dlpack_exchange_api"

typedef struct kv_dl_exchange_header kv_dl_exchange_header_t;
struct kv_dl_exchange_header {
    kv_dl_version_t version;
    kv_dl_exchange_header_t *previous;
};

typedef struct kv_dl_exchange {
    kv_dl_exchange_header_t header;
    int (*allocate)(kv_dl_tensor_t *prototype, kv_dl_versioned_t **out, void *error_context,
                    void (*fail)(void *error_context, const char *kind, const char *message));
    int (*from_object)(void *object, kv_dl_versioned_t **out);
    int (*to_object)(kv_dl_versioned_t *tensor, void **out); /* takes the tensor */
    int (*borrow)(void *object, kv_dl_tensor_t *out);        /* may be NULL */
    int (*current_stream)(int32_t device_type, int32_t device_id, void **out);
} kv_dl_exchange_t;

/* ------------------------------------------------------------------------ dlpack_out.c: tensors
 * out
 */

/* What a __dlpack__ was asked for. */
typedef struct kv_dlpack_asked {
    PyObject *stream; /* borrowed; NULL: none */
    bool versioned, copy;
} kv_dlpack_asked_t;

/* Reads the arguments of a __dlpack__ of an array on `device`, the only place to hand out. False
 * with an exception: BufferError for another device. */
bool kv_dlpack_parse(kv_dl_device_t device, PyObject *const *args, Py_ssize_t num_args,
                     PyObject *names, kv_dlpack_asked_t *out);
/* A capsule with `array`, whose memory is of `device`, as a DLPack tensor. It holds `owner`, which
 * keeps the array alive, until the consumer has let go and the release list has been emptied. */
PyObject *kv_dlpack_export(const kv_array_t *array, PyObject *owner, kv_dl_device_t device,
                           bool versioned);

#define KV_DL_AT(type, member, offset)                                                             \
    static_assert(offsetof(type, member) == (offset), #type "." #member)

static_assert(sizeof(void *) == 8, "64-bit machines only");
static_assert(sizeof(kv_dl_version_t) == 8, "kv_dl_version_t");
static_assert(sizeof(kv_dl_device_t) == 8, "kv_dl_device_t");
static_assert(sizeof(kv_dl_type_t) == 4, "kv_dl_type_t");
KV_DL_AT(kv_dl_type_t, bits, 1);
KV_DL_AT(kv_dl_type_t, lanes, 2);
static_assert(sizeof(kv_dl_tensor_t) == 48, "kv_dl_tensor_t");
KV_DL_AT(kv_dl_tensor_t, device, 8);
KV_DL_AT(kv_dl_tensor_t, ndim, 16);
KV_DL_AT(kv_dl_tensor_t, dtype, 20);
KV_DL_AT(kv_dl_tensor_t, shape, 24);
KV_DL_AT(kv_dl_tensor_t, strides, 32);
KV_DL_AT(kv_dl_tensor_t, byte_offset, 40);
static_assert(sizeof(kv_dl_managed_t) == 64, "kv_dl_managed_t");
KV_DL_AT(kv_dl_managed_t, context, 48);
KV_DL_AT(kv_dl_managed_t, deleter, 56);
static_assert(sizeof(kv_dl_versioned_t) == 80, "kv_dl_versioned_t");
KV_DL_AT(kv_dl_versioned_t, context, 8);
KV_DL_AT(kv_dl_versioned_t, deleter, 16);
KV_DL_AT(kv_dl_versioned_t, flags, 24);
KV_DL_AT(kv_dl_versioned_t, tensor, 32);
static_assert(sizeof(kv_dl_exchange_t) == 56, "kv_dl_exchange_t");
KV_DL_AT(kv_dl_exchange_t, header.previous, 8);
KV_DL_AT(kv_dl_exchange_t, allocate, 16);
KV_DL_AT(kv_dl_exchange_t, from_object, 24);
KV_DL_AT(kv_dl_exchange_t, to_object, 32);
KV_DL_AT(kv_dl_exchange_t, borrow, 40);
KV_DL_AT(kv_dl_exchange_t, current_stream, 48);

#undef KV_DL_AT

#endif
