/* Arrays: memory with a shape and an element type.
 *
 * kv_view_t   somebody's dense array, borrowed for the length of a call.
 * kv_buffer_t memory with a count of its holders; what is behind it (malloc, a foreign tensor) is
 *             known only to its release function.
 * kv_array_t  an array that the engine knows: a buffer, a shape, a type and a variable. Whoever
 *             made it retires it; the last operation on its variable frees it (engine.h).
 */
#ifndef KV_ARRAY_ARRAY_H
#define KV_ARRAY_ARRAY_H

#include "array/dtype.h"
#include "base/status.h"
#include "engine/engine.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { KV_MAX_DIMS = 64 };

typedef struct kv_buffer kv_buffer_t;
struct kv_buffer {
    _Atomic int64_t refs;
    void *data;
    size_t bytes;
    void (*release)(kv_buffer_t *buffer); /* called once, by the thread that drops the last hold */
};

/* Gives a buffer of `bytes` with one hold, contents unspecified. */
KV_MUST_CHECK kv_status_t kv_buffer_new(size_t bytes, kv_buffer_t **out);
/* The same, all bytes zero. */
KV_MUST_CHECK kv_status_t kv_buffer_new_zero(size_t bytes, kv_buffer_t **out);
kv_buffer_t *kv_buffer_hold(kv_buffer_t *buffer);
void kv_buffer_rele(kv_buffer_t *buffer); /* NULL is allowed */

typedef struct kv_array {
    kv_var_t var;
    kv_buffer_t *buffer;
    kv_dtype_t dtype;
    int ndim;
    int64_t count; /* elements */
    size_t bytes;
    /* How many views of the memory are alive outside the engine (NumPy, DLPack): while there is
     * one, the memory counts as the user's own and operations on it are synchronous. */
    _Atomic int32_t exports;
    uint64_t generation; /* kv_fork_generation of its birth */
    int64_t shape[];     /* [ndim] */
} kv_array_t;

/* Number of elements and bytes of a shape; KV_INVALID when an extent is negative, there are more
 * than KV_MAX_DIMS, or the size is beyond 64 bits. */
KV_MUST_CHECK kv_status_t kv_shape_size(kv_dtype_t dtype, int ndim, const int64_t *shape,
                                        int64_t *count, size_t *bytes);

/* Gives an array with fresh memory of unspecified contents. */
KV_MUST_CHECK kv_status_t kv_array_new(kv_dtype_t dtype, int ndim, const int64_t *shape,
                                       kv_array_t **out);
/* The same over memory that is there: the array takes a share of `buffer`, which is large enough.
 */
KV_MUST_CHECK kv_status_t kv_array_from_buffer(kv_dtype_t dtype, int ndim, const int64_t *shape,
                                               kv_buffer_t *buffer, kv_array_t **out);
/* The owner's last word. Never blocks: pending operations keep the memory until they are done. */
void kv_array_retire(kv_array_t *array); /* NULL is allowed */

typedef struct kv_sparse kv_sparse_t; /* sparse.h */

enum {
    KV_VIEW_READONLY = 1,
    KV_VIEW_DEVICE = 2,  /* memory that the processor cannot read */
    KV_VIEW_CUDA = 4,    /* with KV_VIEW_DEVICE: a CUDA device's */
    KV_VIEW_FOLLOWS = 8, /* with KV_VIEW_CUDA: what its owner does later comes after what is put on
                            `stream` now; without, the caller must wait for the end of the use */
};

/* Where a call finds the elements. Nothing here is owned. `data` and `strides` stay valid for the
 * length of the call; so does `shape` if there are strides, else it is only good while the caller
 * is attached (another thread may reshape a foreign array). For an array of our own `array` is set;
 * then `data` and `shape` are its own and there are no strides. */
typedef struct kv_view {
    void *data;
    const int64_t *shape;   /* [ndim] */
    const int64_t *strides; /* [ndim] in bytes; NULL when C-contiguous */
    int64_t count;          /* elements */
    int32_t ndim;
    uint8_t dtype; /* kv_dtype_t; KV_DTYPE_NONE for one we cannot hold */
    uint8_t flags;
    int16_t device;      /* with KV_VIEW_CUDA: its number, -1 for unknown */
    void *stream;        /* with KV_VIEW_CUDA: of that device; what is put on it from now on finds
                            the elements as their owner has left them */
    kv_array_t *array;   /* NULL for foreign memory */
    kv_sparse_t *sparse; /* a row-sparse array, always one of ours; then `data` is the array itself
                            and only compared, `count` 1, `shape` its own; NULL: dense */
    void *owner;         /* the binding's object for this array, opaque to the core */
    const char
        *type_name; /* for messages, when dtype is KV_DTYPE_NONE: what its library calls it */
} kv_view_t;

void kv_view_of_array(kv_array_t *array, kv_view_t *out);

/* True when the view needs no staging copy: no strides, or strides of a C-contiguous array. */
bool kv_strides_contiguous(size_t item_bytes, int ndim, const int64_t *shape,
                           const int64_t *strides);

/* Copy between a strided view and contiguous memory of the same shape and type. */
void kv_view_gather(const kv_view_t *source, void *contiguous);
void kv_view_scatter(const kv_view_t *target, const void *contiguous);

/* Lowest and one past the highest byte of a view; both equal when it has no elements. */
void kv_view_extent(const kv_view_t *view, const char **low, const char **high);

/* KV_OK when no byte is written twice: neither inside one of the `outs`, nor by two of them.
 * KV_INVALID tells positions. Exact for strided views whose extents overlap. */
KV_MUST_CHECK kv_status_t kv_outs_check_disjoint(const kv_view_t *outs, int64_t count);

/* KV_INVALID when an `out` overlaps a value without being the same array (start, shape, strides).
 */
KV_MUST_CHECK kv_status_t kv_outs_check_values(const kv_view_t *outs, int64_t num_outs,
                                               const kv_view_t *values, int64_t num_values);

/* "float32 (3, 4)": for messages; returns `text`. */
const char *kv_view_describe(const kv_view_t *view, char *text, size_t bytes);
const char *kv_shape_format(int ndim, const int64_t *shape, char *text, size_t bytes);

#endif
