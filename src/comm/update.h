/* An optimizer's step on one value, fused with the sum of its gradients: one pass over weight,
 * state and gradients, by the calling thread alone when it is small and with the team when it is
 * large. Nothing here allocates or fails.
 *
 * The arithmetic is in the wide type of the weight: float64 for float64, float32 for the rest; a
 * 16-bit weight is read, or taken from its float32 master, and rounded once. State is in the wide
 * type.
 */
#ifndef KV_COMM_UPDATE_H
#define KV_COMM_UPDATE_H

#include "comm/host.h"
#include "comm/rows.h"
#include "compress/codec.h"
#include "optim/optim.h"

/* A weight and its state: `count` elements in rows of `row_count` (a value without dimensions is
 * one row of one). */
typedef struct kv_weight {
    kv_dtype_t dtype;
    int64_t count, row_count;
    void *data;
    float *master; /* of a 16-bit weight under multi_precision, else NULL */
    void *slots[KV_MAX_SLOTS];
} kv_weight_t;

/* Dense gradients to be summed: of the weight's type. With a codec each passes through it with a
 * residual of its own. With `coded` src[i] is the codes of a gradient that coded[i] has encoded
 * elsewhere, or a plain gradient where its type is KV_CODEC_NONE; `codec` is none then. */
typedef struct kv_gradients {
    int num_src;
    const void *const *src;
    kv_codec_t codec;
    void *const *residuals;  /* [num_src], NULL with KV_CODEC_NONE */
    const kv_codec_t *coded; /* [num_src], or NULL */
} kv_gradients_t;

/* weight = step(weight, sum of the gradients), then every dst = weight. Returns how many residuals
 * are not finite (0 without a codec). `dst` may be a source that is not codes. */
int64_t kv_host_update(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                       const kv_gradients_t *gradients, int num_dst, void *const *dst);

/* The sums of squares whose roots are the norms that layer-wise optimizers take: of the weight, and
 * of the gradient or, LAMB, the direction. Those of a 16-bit weight with a master add up squares
 * rounded to 16 bits; `exact_…`, not rounded, count where those are not finite. */
typedef struct kv_norm_sums {
    double weight, other;
    double exact_weight, exact_other;
} kv_norm_sums_t;

/* kv_host_update for a value that lies in slices, when kv_step_needs_norms: first the sums of each
 * slice; weight, state and residuals stay as they are. Then, with the sums of all slices added up,
 * the step on each. */
void kv_host_measure(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                     const kv_gradients_t *gradients, kv_norm_sums_t *out);
void kv_norm_sums_add(kv_norm_sums_t *to, const kv_norm_sums_t *more);
int64_t kv_host_update_part(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                            const kv_gradients_t *gradients, const kv_norm_sums_t *sums);

/* kv_host_update with a row-sparse sum of gradients. Lazy: the rows of the sum only, row i of it
 * being row where[i] of the weight (`where` NULL: row ids[i]). Not lazy: all rows of the weight,
 * with gradient 0 for those that the sum has not. `where` increases; it is NULL for a dense weight
 * and never for a row-sparse one, since some formulas tell them apart. */
void kv_host_update_rows(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                         const kv_row_sum_t *sum, const int64_t *where, bool lazy);

/* The same for a weight that lies in slices: see kv_host_measure. */
void kv_host_measure_rows(const kv_host_t *host, const kv_step_t *step, const kv_weight_t *weight,
                          const kv_row_sum_t *sum, const int64_t *where, bool lazy,
                          kv_norm_sums_t *out);
void kv_host_update_rows_part(const kv_host_t *host, const kv_step_t *step,
                              const kv_weight_t *weight, const kv_row_sum_t *sum,
                              const int64_t *where, bool lazy, const kv_norm_sums_t *sums);

/* Without an optimizer: every dst = the sum of the gradients, which have passed through the codec
 * or are decoded, rounded once. Returns how many residuals are not finite. `dst` may be a source
 * that is not codes. Where all are plain kv_host_sum does the same faster. */
int64_t kv_host_sum_gradients(const kv_host_t *host, kv_dtype_t dtype, int64_t count,
                              const kv_gradients_t *gradients, int num_dst, void *const *dst);

/* `to` becomes the float32 of a 16-bit array: a master's first value. */
void kv_host_widen(const kv_host_t *host, kv_dtype_t dtype, int64_t count, const void *from,
                   float *to);

#endif
