/* A step in pieces, for comm/ alone: where the summed gradient comes from, and the passes that take
 * it from there. Dense gradients are one source, row-sparse ones another.
 */
#ifndef KV_COMM_UPDATE_INTERNAL_H
#define KV_COMM_UPDATE_INTERNAL_H

#include "comm/update.h"
#include "optim/pass.h"

/* Elements that are summed, updated and copied while they are in the first-level cache. A multiple
 * of KV_CODEC_UNIT and of KV_SQUARES_BLOCK. */
enum { KV_UPDATE_BLOCK = 1024 };

/* Traffic that one thread does alone, and the smallest chunks for a team. */
#define KV_UPDATE_ALONE_BYTES (INT64_C(2) << 20)
#define KV_UPDATE_CHUNK_BYTES_MIN (INT64_C(256) << 10)
#define KV_UPDATE_CHUNK_UNIT 4096

/* The sum of the gradients, by position in the weight. Embedded in what its function needs. */
typedef struct kv_source kv_source_t;
struct kv_source {
    /* The sum of elements [begin, end), at most KV_UPDATE_BLOCK of them, in the wide type: in
     * `block`, or where it lies already. The same elements may be asked for twice, for a norm
     * first; what a source changes (residuals) it changes when `last`, and adds to *unfinite how
     * many residuals are not finite then. Called by several threads for different elements. */
    const void *(*read)(const kv_source_t *source, int64_t begin, int64_t end, bool last,
                        void *block, int64_t *unfinite);
    int64_t bytes; /* of traffic for one element */
};

typedef struct kv_update {
    const kv_host_t *host;
    const kv_step_t *step;
    const kv_weight_t *weight;
    const kv_source_t *source;
    kv_step_kernel_t *kernel;
    kv_step_kernel_t *before; /* LAMB whose norms were given: makes the moments first, else NULL */
    const void *factors;      /* in `pass` */
    bool is_double;           /* the wide type is float64 */
    int64_t traffic;          /* bytes that one element moves, the destinations' not counted */
    int num_dst;
    void *const *dst;
    bool stream; /* destinations are written past the caches */
    kv_pass_t pass;
} kv_update_t;

/* Makes the factors of the pass, all but what norms are needed for. `how`: KV_PASS_…. */
void kv_update_prepare(kv_update_t *update, const kv_host_t *host, const kv_step_t *step,
                       const kv_weight_t *weight, const kv_source_t *source, unsigned how);

/* Of an update that is prepared and needs norms: reads weight and gradients for the sums
 * (row-sparse gradients too: absent rows are read as zeros); LAMB makes its moments for that. Not
 * for good if `apart`. */
void kv_update_measure(kv_update_t *update, bool apart, kv_norm_sums_t *out, int64_t *unfinite);
/* The same for any update that is prepared: zeros if it needs none. */
void kv_update_measure_apart(kv_update_t *update, kv_norm_sums_t *out);
/* Takes the norms. `kernel` is to be chosen anew then. */
void kv_update_set_sums(kv_update_t *update, const kv_norm_sums_t *sums);

/* Prepares an update, and gives it its norms: from these sums, or (NULL) its own. *unfinite begins
 * at 0. False if this push changes nothing; `dst` is written even so, by kv_update_all alone. */
bool kv_update_begin(kv_update_t *update, const kv_host_t *host, const kv_step_t *step,
                     const kv_weight_t *weight, const kv_source_t *source, unsigned how,
                     const kv_norm_sums_t *sums, int64_t *unfinite);

/* The step on elements [begin, end): reads the gradient, changes weight and state, writes the
 * destinations. Any elements; GroupAdaGrad: whole rows (weight->row_count). */
void kv_update_part(const kv_update_t *update, int64_t begin, int64_t end, int64_t *unfinite);

/* The step on all elements, alone or with the team. */
void kv_update_all(const kv_update_t *update, int64_t *unfinite);

/* Whether these elements want their step although no gradient came for them: LBSGD with gradients
 * that wait for their mean, on a push that takes it. For rows that a lazy push has not. */
bool kv_update_is_due(const kv_update_t *update, int64_t begin, int64_t end);

/* Memory traffic of the step for one element, source and destinations included. */
int64_t kv_update_traffic(const kv_update_t *update);

static inline int64_t kv_wide_bytes(bool is_double)
{
    return is_double ? 8 : 4;
}

static inline char *kv_at_element(void *array, int64_t i, int64_t bytes)
{
    return (char *)array + i * bytes;
}

/* The weight of [begin, end) in the wide type: where it lies, or widened into `block`. */
static inline void *kv_update_read_weight(const kv_update_t *update, int64_t begin, int64_t end,
                                          void *block)
{
    const kv_weight_t *weight = update->weight;
    if (!kv_dtype_is_narrow(weight->dtype))
        return kv_at_element(weight->data, begin, kv_wide_bytes(update->is_double));
    if (weight->master != NULL)
        return weight->master + begin;
    update->host->kernels->float32_from[weight->dtype](
        end - begin, kv_at_element(weight->data, begin, 2), block);
    return block;
}

static inline void kv_update_slots_at(const kv_update_t *update, int64_t begin, void **slots)
{
    int64_t bytes = kv_wide_bytes(update->is_double);
    for (int i = 0; i < KV_MAX_SLOTS; i++)
        slots[i] = update->weight->slots[i] == NULL
                       ? NULL
                       : kv_at_element(update->weight->slots[i], begin, bytes);
}

/* Sums of squares: the squares of 64 elements, which begin at a multiple of 64 in their array, are
 * added one after the other in the wide type, and the sums of such blocks pairwise in double, as
 * the leaves of a binary tree whose shape depends on their number alone. So parts may be summed
 * apart, if each but the last has the same power of two of blocks. */
enum { KV_SQUARES_BLOCK = 64 };

typedef struct kv_squares {
    int64_t leaves;
    double level[48];
} kv_squares_t;

static inline void kv_squares_start(kv_squares_t *squares)
{
    squares->leaves = 0;
}
void kv_squares_leaf(kv_squares_t *squares, double sum);
/* `count` elements, a multiple of the block except for the last of an array. `narrow`: a 16-bit
 * type to which every square is rounded, else KV_FLOAT32. */
void kv_squares_add(kv_squares_t *squares, const kv_kernels_t *kernels, bool is_double,
                    kv_dtype_t narrow, int64_t count, const void *values);
double kv_squares_sum(const kv_squares_t *squares);

#endif
