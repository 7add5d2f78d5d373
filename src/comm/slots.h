/* Training state of one value: what an optimizer keeps with it, wherever the value lives. */
#ifndef KV_COMM_SLOTS_H
#define KV_COMM_SLOTS_H

#include "array/array.h"
#include "comm/update.h"

/* Shared by counting: the owner of the value has one share, every push under way another. The
 * buffers belong to whoever may write the value; they are made by the push that first needs them
 * and hold the wide type.
 *
 * Of a row-sparse value the buffers have the rows `indices`, a share of the value's own when they
 * were made. A push that was counted before its optimizer was replaced may change the value's rows
 * behind the slots that it has now: who uses them gives them the value's rows first. */
typedef struct kv_slots {
    _Atomic int64_t refs;
    const kv_optim_class_t *optim;
    kv_buffer_t *master; /* float32, of a 16-bit weight under multi_precision */
    kv_buffer_t *slot[KV_MAX_SLOTS];
    /* What each of them is: the numbers of an optimizer decide which it keeps, and in what order.
     */
    kv_slot_t kept[KV_MAX_SLOTS];
    int64_t num_rows;     /* row-sparse … */
    kv_buffer_t *indices; /* … NULL: as yet no rows */
} kv_slots_t;

/* One share of a state without buffers; NULL without memory. */
kv_slots_t *kv_slots_new(const kv_optim_class_t *optim);
void kv_slots_rele(kv_slots_t *slots); /* NULL is allowed */

/* How one buffer is told where optimizers are known by their numbers: its place among those that
 * the class describes, or one of these. */
enum {
    KV_SLOT_MASTER = KV_MAX_SLOTS,
    KV_SLOT_NONE,  /* no buffer: the step alone */
    KV_SLOT_OBJECT /* of an optimizer in Python: all that it keeps, packed into one */
};

/* Where the buffer of this name is or comes. */
int kv_slots_place(const kv_slots_t *slots, const char *name);

/* Elements of a slot's buffer. */
static inline int64_t kv_slot_count(const kv_slot_t *slot, int64_t num_rows, int64_t row_count)
{
    return slot->per_row ? num_rows : num_rows * row_count;
}

/* Gives one buffer of `count` elements of the wide type of `dtype`: zeros, or a copy of `weight`,
 * which is of `dtype`. */
KV_MUST_CHECK kv_status_t kv_slot_make(const kv_host_t *host, kv_dtype_t dtype, int64_t count,
                                       const void *weight, kv_buffer_t **out);

/* Where the buffers of slots are made: *buffer is NULL, and gets `count` elements of the wide type
 * of `dtype` as from kv_slot_make; or it is there, and is to be where it can be used. */
typedef struct kv_slot_maker kv_slot_maker_t;
struct kv_slot_maker {
    kv_status_t (*make)(kv_slot_maker_t *maker, kv_dtype_t dtype, int64_t count, const void *weight,
                        kv_buffer_t **buffer);
};

/* The value at `data`, num_rows rows of row_count elements, as a weight for this step, whose class
 * is that of `slots`: makes the buffers that the step needs and `slots` has not, and drops a master
 * that is no longer wanted. The caller may write value and slots, and the buffers that are there
 * have the value's rows. *out borrows data and buffers. KV_NO_MEMORY leaves what was made; the next
 * call goes on from there. */
KV_MUST_CHECK kv_status_t kv_slots_weight(kv_slots_t *slots, const kv_host_t *host,
                                          const kv_step_t *step, kv_dtype_t dtype, int64_t num_rows,
                                          int64_t row_count, void *data, kv_weight_t *out);

/* The same with buffers that the maker makes. */
KV_MUST_CHECK kv_status_t kv_slots_weight_by(kv_slots_t *slots, kv_slot_maker_t *maker,
                                             const kv_step_t *step, kv_dtype_t dtype,
                                             int64_t num_rows, int64_t row_count, void *data,
                                             kv_weight_t *out);

/* Gives the state of a row-sparse value the rows that the value has: those that are in it keep what
 * they have, the others begin. KV_NO_MEMORY changes nothing. */
KV_MUST_CHECK kv_status_t kv_slots_fit(const kv_host_t *host, kv_slots_t *slots, kv_dtype_t dtype,
                                       int64_t row_count, const kv_rowset_t *rows);

/* A step on a row-sparse value with the sum of its gradients; rows that it has not yet begin as
 * zeros. The caller may write rows and slots. On an error the elements are as they were. */
KV_MUST_CHECK kv_status_t kv_rows_step(const kv_host_t *host, const kv_step_t *step,
                                       kv_slots_t *slots, const kv_row_sum_t *sum,
                                       kv_rowset_t *rows);
/* The part of it that can fail: makes room for all rows of the sum, and gives the value as a weight
 * and where in it they stand, which the caller frees. */
KV_MUST_CHECK kv_status_t kv_rows_begin(const kv_host_t *host, const kv_step_t *step,
                                        kv_slots_t *slots, const kv_row_sum_t *sum,
                                        kv_rowset_t *rows, kv_weight_t *weight, int64_t **where);

#endif
