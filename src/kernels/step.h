/* What an optimizer does to one element: one inline function each, for float and for double, that
 * compiles as C, as C++ and as CUDA. The loops over memory are in kernels/step.inc; which numbers
 * go in is decided in optim/pass.inc.
 *
 * Order and rounding are part of the contract: products and sums are taken from left to right as
 * written, each rounded by itself (no fused multiply-add: -ffp-contract=off here, --fmad=false for
 * CUDA). Whatever does not depend on the element was computed before. `clip` is a constant wherever
 * these functions are used.
 */
#ifndef KV_KERNELS_STEP_H
#define KV_KERNELS_STEP_H

#ifdef __cplusplus
#include <cmath>
#include <cstdint>
#else
#include <math.h>
#include <stdint.h>
#endif

#if defined(__CUDACC__)
#define KV_ELEMENT static __host__ __device__ __forceinline__
#else
#define KV_ELEMENT static inline __attribute__((always_inline))
#endif

/* The loops: X(function, states). A state is an array beside the weight. */
#define KV_STEP_LIST(X)                                                                            \
    X(test, 1)                                                                                     \
    X(sgd, 0)                                                                                      \
    X(sgd_momentum, 1)                                                                             \
    X(shrink, 0)                                                                                   \
    X(gather, 1)                                                                                   \
    X(large_batch, 1)                                                                              \
    X(large_batch_momentum, 2)                                                                     \
    X(nag, 1)                                                                                      \
    X(nag_old_weight, 1)                                                                           \
    X(sign, 0)                                                                                     \
    X(signum, 1)                                                                                   \
    X(adam, 2)                                                                                     \
    X(adam_squares, 2)                                                                             \
    X(adamw, 2)                                                                                    \
    X(adagrad, 1)                                                                                  \
    X(adagrad_rows, 1)                                                                             \
    X(group_adagrad, 0)                                                                            \
    X(rmsprop, 1)                                                                                  \
    X(rmsprop_centered, 3)                                                                         \
    X(adadelta, 2)                                                                                 \
    X(ftrl, 2)                                                                                     \
    X(adamax, 2)                                                                                   \
    X(nadam, 2)                                                                                    \
    X(ftml, 3)                                                                                     \
    X(lamb_moments, 3)                                                                             \
    X(lamb, 2)                                                                                     \
    X(dcasgd, 1)                                                                                   \
    X(dcasgd_momentum, 2)                                                                          \
    X(sgld, 0)

typedef enum kv_step_kind {
#define KV_STEP_ENUM(function, states) KV_STEP_##function,
    KV_STEP_LIST(KV_STEP_ENUM)
#undef KV_STEP_ENUM
        KV_STEP_COUNT
} kv_step_kind_t;

/* Four random words from a counter and a key: Philox 4x32-10 (Salmon et al., 2011). */
KV_ELEMENT void kv_philox(uint64_t counter, uint64_t stream, uint64_t key, uint32_t out[4])
{
    uint32_t a = (uint32_t)counter, b = (uint32_t)(counter >> 32);
    uint32_t c = (uint32_t)stream, d = (uint32_t)(stream >> 32);
    uint32_t k = (uint32_t)key, l = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t left = (uint64_t)a * 0xd2511f53u;
        uint64_t right = (uint64_t)c * 0xcd9e8d57u;
        a = (uint32_t)(right >> 32) ^ b ^ k;
        b = (uint32_t)right;
        c = (uint32_t)(left >> 32) ^ d ^ l;
        d = (uint32_t)left;
        k += 0x9e3779b9u;
        l += 0xbb67ae85u;
    }
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
}

/* A normal number for element `index` of draw `draw`: the two words beside each other make one by
 * Box and Muller, in double, so that the whole range of the tails is there. */
KV_ELEMENT double kv_normal(uint64_t seed, uint64_t draw, int64_t index)
{
    uint32_t words[4];
    kv_philox((uint64_t)index, draw, seed, words);
    uint64_t first = ((uint64_t)words[0] << 32) | words[1];
    uint64_t second = ((uint64_t)words[2] << 32) | words[3];
    double radius = ((double)(first >> 11) + 0.5) * 0x1p-53; /* within (0, 1) */
    double turn = (double)(second >> 11) * 0x1p-53;
    return sqrt(-2.0 * log(radius)) * cos(6.283185307179586 * turn);
}

#define KV_REAL float
#define KV_OF(name) kv_##name##_float
#define KV_SQRT(x) sqrtf(x)
#include "kernels/element.inc"
#undef KV_REAL
#undef KV_OF
#undef KV_SQRT

#define KV_REAL double
#define KV_OF(name) kv_##name##_double
#define KV_SQRT(x) sqrt(x)
#include "kernels/element.inc"
#undef KV_REAL
#undef KV_OF
#undef KV_SQRT

#endif
