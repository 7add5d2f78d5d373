/* Row-sparse arrays: of a shape, only the rows that are there. An absent row is zeros.
 *
 * kv_rowset_t the rows themselves: row ids, strictly increasing, and a row of elements for each.
 * kv_sparse_t a row-sparse array that the engine knows: a row set, a shape, a type and a variable.
 *             Shape and type never change; who has entered the variable may read, or replace, the
 *             row set. Whoever made it retires it (engine.h).
 */
#ifndef KV_ARRAY_SPARSE_H
#define KV_ARRAY_SPARSE_H

#include "array/array.h"

/* Rows and their memory; shares of two buffers, each large enough. With num_rows == 0 both may be
 * NULL. */
typedef struct kv_rowset {
    int64_t num_rows;
    kv_buffer_t *indices; /* int64[num_rows], strictly increasing, within [0, shape[0]) */
    kv_buffer_t *data;    /* num_rows rows */
} kv_rowset_t;

struct kv_sparse {
    kv_var_t var;
    kv_rowset_t rows; /* guarded by var */
    kv_dtype_t dtype;
    int ndim;          /* >= 1 */
    int64_t row_count; /* elements of one row */
    size_t row_bytes;
    /* How many views of the memory are alive outside the engine, one more when the memory is the
     * user's own: while there are any, operations on the array are synchronous. */
    _Atomic int32_t exports;
    uint64_t generation; /* kv_fork_generation of its birth */
    int64_t shape[];     /* [ndim] */
};

static inline const int64_t *kv_rowset_ids(const kv_rowset_t *rows)
{
    return rows->num_rows > 0 ? rows->indices->data : NULL;
}

static inline char *kv_rowset_data(const kv_rowset_t *rows)
{
    return rows->num_rows > 0 ? rows->data->data : NULL;
}

/* Room for `num_rows` rows in a row set that is about to be overwritten: its own buffers if they
 * are large enough, not too large and nobody else's, else new ones. Contents are unspecified and
 * num_rows is set. On failure nothing has changed. */
KV_MUST_CHECK kv_status_t kv_rowset_make(kv_rowset_t *rows, int64_t num_rows, size_t row_bytes);
void kv_rowset_fini(kv_rowset_t *rows); /* gives the shares back, leaves an empty set */

/* Gives an array without rows. KV_INVALID for a shape without dimensions. */
KV_MUST_CHECK kv_status_t kv_sparse_new(kv_dtype_t dtype, int ndim, const int64_t *shape,
                                        kv_sparse_t **out);
/* The owner's last word. Never blocks. NULL is allowed. */
void kv_sparse_retire(kv_sparse_t *sparse);

void kv_view_of_sparse(kv_sparse_t *sparse, kv_view_t *out);

/* KV_INVALID unless the ids increase strictly within [0, num_rows_of_shape): names the first that
 * does not. */
KV_MUST_CHECK kv_status_t kv_row_ids_check(int64_t count, const int64_t *ids, int64_t limit);

#endif
