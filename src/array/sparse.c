/* Row sets and row-sparse arrays: who holds the memory, and when it goes. */
#include "array/sparse.h"
#include <inttypes.h>
#include <string.h>

/* Buffers that are so many times larger than needed are given back. */
enum { SLACK = 4, SLACK_BYTES = 64 * 1024 };

static bool reusable(const kv_buffer_t *buffer, size_t bytes)
{
    return buffer != NULL && atomic_load(&buffer->refs) == 1 && buffer->bytes >= bytes &&
           buffer->bytes <= bytes * SLACK + SLACK_BYTES;
}

kv_status_t kv_rowset_make(kv_rowset_t *rows, int64_t num_rows, size_t row_bytes)
{
    size_t id_bytes = (size_t)num_rows * sizeof(int64_t), data_bytes = (size_t)num_rows * row_bytes;
    kv_buffer_t *indices = NULL, *data = NULL;
    if (!reusable(rows->indices, id_bytes))
        KV_TRY(kv_buffer_new(id_bytes, &indices));
    if (!reusable(rows->data, data_bytes)) {
        kv_status_t status = kv_buffer_new(data_bytes, &data);
        if (status != KV_OK) {
            kv_buffer_rele(indices);
            return status;
        }
    }
    if (indices != NULL) {
        kv_buffer_rele(rows->indices);
        rows->indices = indices;
    }
    if (data != NULL) {
        kv_buffer_rele(rows->data);
        rows->data = data;
    }
    rows->num_rows = num_rows;
    return KV_OK;
}

void kv_rowset_fini(kv_rowset_t *rows)
{
    kv_buffer_rele(rows->indices);
    kv_buffer_rele(rows->data);
    *rows = (kv_rowset_t){0};
}

static void free_sparse(void *context)
{
    kv_sparse_t *sparse = context;
    kv_rowset_fini(&sparse->rows);
    kv_free(sparse);
    kv_count(KV_COUNT_ARRAYS, -1);
}

kv_status_t kv_sparse_new(kv_dtype_t dtype, int ndim, const int64_t *shape, kv_sparse_t **out)
{
    int64_t count;
    size_t bytes;
    if (ndim < 1)
        return kv_fail(KV_INVALID, "a row-sparse array has at least one dimension, that of its "
                                   "rows; the shape is ()");
    KV_TRY(kv_shape_size(dtype, ndim, shape, &count, &bytes));
    KV_TRY(kv_shape_size(dtype, ndim - 1, shape + 1, &count, &bytes));
    size_t shape_bytes = (size_t)ndim * sizeof shape[0];
    kv_sparse_t *sparse = kv_calloc(1, sizeof *sparse + shape_bytes);
    KV_TRY_ALLOC(sparse, "a row-sparse array");
    kv_var_init(&sparse->var, true, free_sparse, sparse);
    sparse->dtype = dtype;
    sparse->ndim = ndim;
    sparse->row_count = count;
    sparse->row_bytes = bytes;
    sparse->generation = kv_fork_generation();
    memcpy(sparse->shape, shape, shape_bytes);
    kv_count(KV_COUNT_ARRAYS, 1);
    *out = sparse;
    return KV_OK;
}

void kv_sparse_retire(kv_sparse_t *sparse)
{
    if (sparse != NULL)
        kv_var_retire(&sparse->var);
}

void kv_view_of_sparse(kv_sparse_t *sparse, kv_view_t *out)
{
    *out = (kv_view_t){
        .data = sparse,
        .shape = sparse->shape,
        .count = 1, /* so that an overlap of the same array with itself is seen */
        .ndim = sparse->ndim,
        .dtype = (uint8_t)sparse->dtype,
        .sparse = sparse,
    };
}

kv_status_t kv_row_ids_check(int64_t count, const int64_t *ids, int64_t limit)
{
    for (int64_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= limit)
            return kv_fail(KV_INVALID,
                           "row id %" PRId64 " at position %" PRId64 " is outside the %" PRId64
                           " rows of the shape",
                           ids[i], i, limit);
        if (i > 0 && ids[i] <= ids[i - 1])
            return kv_fail(KV_INVALID,
                           "row ids must increase strictly, but id %" PRId64 " at position %" PRId64
                           " follows %" PRId64,
                           ids[i], i, ids[i - 1]);
    }
    return KV_OK;
}
