/* The numbers on the CPU: one table of functions, filled for the best instruction set at start.
 *
 * A kernel works on contiguous memory, in the calling thread, cannot fail and takes no lock. All
 * instruction sets give the same bits (NaN payloads excepted). Arithmetic of the contract:
 * sums run left to right, 16-bit floats are summed in float32 and rounded once (to nearest even),
 * integers wrap.
 *
 * One pass over memory does the whole job: the sums of a few vectors stay in registers while all
 * sources pass and then go to every destination, through the caches or, by way of a small block,
 * past them (non-temporal) where the caller asks for it.
 */
#ifndef KV_KERNELS_KERNELS_H
#define KV_KERNELS_KERNELS_H

#include "array/dtype.h"
#include "base/status.h"
#include "kernels/step.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A codec of gradient compression (compress/codec.h) on elements from a byte of codes on; for
 * floating types only. Pointers are aligned for their types; nothing overlaps. `encode` and `apply`
 * return how many residuals are not finite; codes are filled up with zeros to four bytes. */
typedef struct kv_codec_kernels {
    int64_t (*encode[KV_DTYPE_COUNT])(int64_t count, double threshold, const void *gradient,
                                      void *residual, uint8_t *codes);
    void (*decode[KV_DTYPE_COUNT])(int64_t count, double threshold, const uint8_t *codes,
                                   bool first, void *block);
    int64_t (*apply[KV_DTYPE_COUNT])(int64_t count, double threshold, const void *gradient,
                                     void *residual, bool first, void *block);
} kv_codec_kernels_t;

typedef void kv_step_kernel_t(int64_t first, int64_t count, const void *factors,
                              const void *gradient, void *weight, void *const *states);

typedef struct kv_kernels {
    const char *name; /* baseline, avx2, avx512 */

    /* dst[0..num_dst)[i] = src[0][i] + src[1][i] + …, for i in [begin, end). Destinations do not
     * overlap each other; a destination may be the same memory as a source, at the same start.
     * num_src >= 1, num_dst >= 1; pointers need no alignment. `stream`: write past the caches. */
    void (*sum[KV_DTYPE_COUNT])(int64_t begin, int64_t end, int num_src, const void *const *src,
                                int num_dst, void *const *dst, bool stream);

    /* block[i - begin] = src[0][i] + src[1][i] + … in the wide type, not rounded; for floating
     * types only. The wide type of float64 is float64, that of the others float32. */
    void (*sum_wide[KV_DTYPE_COUNT])(int64_t begin, int64_t end, int num_src,
                                     const void *const *src, void *block);

    /* to[i] = from[i] in the other type, rounded to nearest even; for float16 and bfloat16 only.
     * `from` and `to` do not overlap. */
    void (*float32_from[KV_DTYPE_COUNT])(int64_t count, const void *from, float *to);
    void (*float32_to[KV_DTYPE_COUNT])(int64_t count, const float *from, void *to);

    /* What an optimizer (kv_step_kind_t) does to `count` elements, the first of which is number
     * `first` of its array: `weight` and `states` change in place. `factors` is of the type that
     * belongs to float or to double; the arrays are aligned and do not overlap. */
    kv_step_kernel_t *step_float[KV_STEP_COUNT], *step_double[KV_STEP_COUNT];

    kv_codec_kernels_t codec_2bit, codec_1bit;
} kv_kernels_t;

/* The table for KVSTORE_ISA, chosen once. KV_INVALID for a name that does not exist or that this
 * processor cannot run; the message lists those it can. */
KV_MUST_CHECK kv_status_t kv_kernels_get(const kv_kernels_t **out);

/* The i-th table that this processor can run, slowest first; NULL past the last. For tests. */
const kv_kernels_t *kv_kernels_at(int i);

#endif
