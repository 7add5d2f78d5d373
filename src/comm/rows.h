/* Row-sparse values inside one process: the union of several row sets as the description of a sum,
 * and the passes over memory that read or write whole rows. Work is split over the team when it is
 * large; results do not depend on how.
 */
#ifndef KV_COMM_ROWS_H
#define KV_COMM_ROWS_H

#include "array/sparse.h"
#include "comm/host.h"

/* The sum of one or more row sets: which rows it has and which memory adds up to each. Points into
 * the sets, which must stay. */
typedef struct kv_row_sum {
    kv_dtype_t dtype;
    int64_t row_count; /* elements of a row */
    size_t row_bytes;
    int64_t num_rows;   /* of the union */
    const int64_t *ids; /* [num_rows], strictly increasing */
    const char *data;   /* of a single set: its rows; else NULL */
    const void **parts; /* of several: the rows that add up, row after row, in the sets' order … */
    int64_t *starts;    /* [num_rows + 1]: … where those of each row begin */
    void *block;        /* what the sum owns */
} kv_row_sum_t;

/* The union of `num_sets` >= 1 sets in one pass. A single set is described in place, without
 * allocation. Only KV_NO_MEMORY. */
KV_MUST_CHECK kv_status_t kv_row_sum_init(const kv_host_t *host, kv_dtype_t dtype,
                                          int64_t row_count, int num_sets,
                                          const kv_rowset_t *const *sets, kv_row_sum_t *out);
void kv_row_sum_fini(kv_row_sum_t *sum);

/* The memory that adds up to row i: returns how many parts, at least 1; *parts points to them.
 * `single` is the caller's room for one pointer. */
static inline int kv_row_sum_parts(const kv_row_sum_t *sum, int64_t i, const void **single,
                                   const void *const **parts)
{
    if (sum->data != NULL) {
        *single = sum->data + (size_t)i * sum->row_bytes;
        *parts = single;
        return 1;
    }
    *parts = sum->parts + sum->starts[i];
    return (int)(sum->starts[i + 1] - sum->starts[i]);
}

/* The sums of all rows, one after the other, into `data`; their ids into `ids` (may be NULL). One
 * rounding for 16-bit types, as kv_host_sum. */
void kv_rows_write(const kv_host_t *host, const kv_row_sum_t *sum, int64_t *ids, void *data);

/* Every dense array of `num_rows` rows becomes the sum, absent rows zero. A destination may not
 * overlap a part. num_dst >= 1. */
void kv_rows_to_dense(const kv_host_t *host, const kv_row_sum_t *sum, int64_t num_rows, int num_dst,
                      void *const *dst);

/* out row i = dense row ids[i]. */
void kv_rows_gather(const kv_host_t *host, size_t row_bytes, int64_t num_ids, const int64_t *ids,
                    const void *dense, void *out);

/* out row i = the row of the set with id ids[i], zeros where there is none. `ids` increase. */
void kv_rows_select(const kv_host_t *host, size_t row_bytes, const kv_rowset_t *set,
                    int64_t num_ids, const int64_t *ids, void *out);

/* where[i] = place of ids[i] in the set, -1 if it is not there; returns how many are not there.
 * Both increase. */
int64_t kv_rows_locate(const kv_rowset_t *set, int64_t num_ids, const int64_t *ids, int64_t *where);

/* ids[] (at least num_rows) = the rows of a dense array in which some element is not zero (a NaN is
 * not, -0.0 is); returns how many. */
int64_t kv_rows_nonzero(const kv_host_t *host, kv_dtype_t dtype, int64_t num_rows,
                        int64_t row_count, const void *dense, int64_t *ids);

/* Sorts ids in place and drops repetitions; returns how many are left. Any int64, in any order;
 * negative ones come first. `scratch` has room for as many. Not a comparison sort when there are
 * many. */
int64_t kv_row_ids_unique(const kv_host_t *host, int64_t num_ids, int64_t *ids, int64_t *scratch);

#endif
