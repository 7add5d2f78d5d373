/* Buffers and arrays: who holds the memory, and when it goes. */
#include "array/array.h"
#include <inttypes.h>
#include <string.h>

/* --------------------------------------------------------------------------------- buffers */

static void release_own(kv_buffer_t *buffer)
{
    kv_count(KV_COUNT_BUFFERS, -1);
    kv_count(KV_COUNT_VALUE_BYTES, -(int64_t)buffer->bytes);
    kv_free(buffer->data);
    kv_free(buffer);
}

kv_status_t kv_buffer_new(size_t bytes, kv_buffer_t **out)
{
    kv_buffer_t *buffer = kv_alloc(sizeof *buffer);
    KV_TRY_ALLOC(buffer, "an array");
    void *data = kv_alloc_elements(bytes);
    if (data == NULL) {
        kv_free(buffer);
        return kv_fail(KV_NO_MEMORY, "no memory for an array of %zu bytes", bytes);
    }
    atomic_init(&buffer->refs, 1);
    buffer->data = data;
    buffer->bytes = bytes;
    buffer->release = release_own;
    kv_count(KV_COUNT_BUFFERS, 1);
    kv_count(KV_COUNT_VALUE_BYTES, (int64_t)bytes);
    *out = buffer;
    return KV_OK;
}

kv_status_t kv_buffer_new_zero(size_t bytes, kv_buffer_t **out)
{
    KV_TRY(kv_buffer_new(bytes, out));
    memset((*out)->data, 0, bytes);
    return KV_OK;
}

kv_buffer_t *kv_buffer_hold(kv_buffer_t *buffer)
{
    atomic_fetch_add(&buffer->refs, 1);
    return buffer;
}

void kv_buffer_rele(kv_buffer_t *buffer)
{
    if (buffer != NULL && atomic_fetch_sub(&buffer->refs, 1) == 1)
        buffer->release(buffer);
}

/* ---------------------------------------------------------------------------------- arrays */

kv_status_t kv_shape_size(kv_dtype_t dtype, int ndim, const int64_t *shape, int64_t *count,
                          size_t *bytes)
{
    if (ndim < 0 || ndim > KV_MAX_DIMS)
        return kv_fail(KV_INVALID, "an array has %d dimensions, at most %d are possible", ndim,
                       KV_MAX_DIMS);
    /* An extent of 0 must not hide the size of the others: strides are made of their product. */
    int64_t size = (int64_t)kv_dtype_bytes(dtype);
    bool empty = false;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0)
            return kv_fail(KV_INVALID, "dimension %d of a shape is negative (%" PRId64 ")", i,
                           shape[i]);
        if (shape[i] == 0)
            empty = true;
        else if (__builtin_mul_overflow(size, shape[i], &size))
            return kv_fail(KV_INVALID, "an array of this shape is larger than the address space");
    }
    size_t item = kv_dtype_bytes(dtype);
    *bytes = empty ? 0 : (size_t)size;
    *count = item > 0 ? (int64_t)(*bytes / item) : 0;
    return KV_OK;
}

static void free_array(void *context)
{
    kv_array_t *array = context;
    kv_buffer_rele(array->buffer);
    kv_free(array);
    kv_count(KV_COUNT_ARRAYS, -1);
}

kv_status_t kv_array_from_buffer(kv_dtype_t dtype, int ndim, const int64_t *shape,
                                 kv_buffer_t *buffer, kv_array_t **out)
{
    int64_t count;
    size_t bytes;
    KV_TRY(kv_shape_size(dtype, ndim, shape, &count, &bytes));
    size_t shape_bytes = (size_t)ndim * sizeof shape[0];
    kv_array_t *array = kv_alloc(sizeof *array + shape_bytes);
    KV_TRY_ALLOC(array, "an array");
    kv_var_init(&array->var, true, free_array, array);
    array->buffer = kv_buffer_hold(buffer);
    array->dtype = dtype;
    array->ndim = ndim;
    array->count = count;
    array->bytes = bytes;
    atomic_init(&array->exports, 0);
    array->generation = kv_fork_generation();
    if (ndim > 0)
        memcpy(array->shape, shape, shape_bytes);
    kv_count(KV_COUNT_ARRAYS, 1);
    *out = array;
    return KV_OK;
}

kv_status_t kv_array_new(kv_dtype_t dtype, int ndim, const int64_t *shape, kv_array_t **out)
{
    int64_t count = 0;
    size_t bytes = 0;
    kv_buffer_t *buffer;
    KV_TRY(kv_shape_size(dtype, ndim, shape, &count, &bytes));
    KV_TRY(kv_buffer_new(bytes, &buffer));
    kv_status_t status = kv_array_from_buffer(dtype, ndim, shape, buffer, out);
    kv_buffer_rele(buffer);
    return status;
}

void kv_array_retire(kv_array_t *array)
{
    if (array != NULL)
        kv_var_retire(&array->var);
}
