/* The steps of the optimizers, fused with the sum of the gradients: one kernel for each kind and
 * type. The element's arithmetic is in kernels/element.inc. To be included by files that make the
 * kernels of some kinds each, so that they are compiled side by side:
 *
 *   #define KV_STEP_FAMILY(X) X(adam, 2) …      as in KV_STEP_LIST
 *   KV_STEP_DEFINE(kv_steps_of_adam, KV_STEP_FAMILY)
 */
#ifndef KV_CUDA_STEP_H
#define KV_CUDA_STEP_H

#include "cuda/batch.h"

struct kv_step_record {
    int64_t count, row_count;
    uint64_t weight, master, states[KV_DEVICE_STATES];
    int16_t num_src, num_dst, aligned, wide;
};
/* Behind it the factors, then the sources, then the destinations. */

/* The launch of a kind for a type of weights, NULL if the family has it not. */
typedef kv_launch_t *kv_step_family_t(kv_step_kind_t kind, kv_dtype_t dtype);
kv_step_family_t kv_steps_of_sgd, kv_steps_of_adam, kv_steps_of_squares, kv_steps_of_group;

/* The sum of the gradients in the wide type. */
template <typename T, int N>
KV_INSIDE void kv_load_gradient(const kv_step_record &job, const uint64_t *src, int aligned,
                                int64_t i, int64_t count, typename T::wide *gradient)
{
    if (job.wide)
        kv_load_sum<typename T::wide_type, N>(aligned, job.num_src, src, i, count, gradient);
    else
        kv_load_sum<T, N>(aligned, job.num_src, src, i, count, gradient);
}

/* The weight, or its master. */
template <typename T, int N>
KV_INSIDE void kv_load_weight(const kv_step_record &job, int aligned, int64_t i,
                              typename T::wide *weight)
{
    if (job.master != 0)
        kv_load<typename T::wide_type, N>(aligned, (const char *)job.master, i, job.count, weight);
    else
        kv_load<T, N>(aligned, (const char *)job.weight, i, job.count, weight);
}

/* The changed weight into master, weight and destinations. */
template <typename T, int N>
KV_INSIDE void kv_store_weight(const kv_step_record &job, const uint64_t *dst, int aligned,
                               int64_t i, const typename T::wide *weight)
{
    typename T::store result[N];
    if (job.master != 0)
        kv_store<typename T::wide_type, N>(aligned, (char *)job.master, i, job.count, weight);
    KV_UNROLL
    for (int k = 0; k < N; k++)
        result[k] = T::narrow(weight[k]);
    kv_store_raw<typename T::store, N>(aligned, (char *)job.weight, i, job.count, result);
    for (int j = 0; j < job.num_dst; j++)
        kv_store_raw<typename T::store, N>(aligned, (char *)dst[j], i, job.count, result);
}

template <typename STEP, typename T>
__global__ void kv_step_kernel(const __grid_constant__ kv_batch batch)
{
    typedef typename T::wide real;
    typedef typename T::factors factors_t;
    enum { N = kv_tile<real>::COUNT, ROOM = STEP::STATES > 0 ? STEP::STATES : 1 };
    const kv_place place = kv_find_place(batch);
    const kv_step_record job = kv_record_of<kv_step_record>(place.record);
    const uint64_t *behind = place.record + kv_words_of<kv_step_record>::COUNT;
    const factors_t factors = kv_record_of<factors_t>(behind);
    const uint64_t *src = behind + kv_words_of<factors_t>::COUNT, *dst = src + job.num_src;
    const int64_t step = place.blocks * KV_THREADS * N;
    for (int64_t i = (place.block * KV_THREADS + threadIdx.x) * N; i < job.count; i += step) {
        real gradient[N], weight[N], states[ROOM][N];
        kv_load_gradient<T, N>(job, src, job.aligned, i, job.count, gradient);
        kv_load_weight<T, N>(job, job.aligned, i, weight);
        KV_UNROLL
        for (int s = 0; s < STEP::STATES; s++)
            kv_load<typename T::wide_type, N>(job.aligned, (const char *)job.states[s], i,
                                              job.count, states[s]);
        KV_UNROLL
        for (int k = 0; k < N; k++)
            STEP::apply(&factors, i + k, gradient[k], weight + k, states, k);
        KV_UNROLL
        for (int s = 0; s < STEP::STATES; s++)
            kv_store<typename T::wide_type, N>(job.aligned, (char *)job.states[s], i, job.count,
                                               states[s]);
        if (STEP::WRITES)
            kv_store_weight<T, N>(job, dst, job.aligned, i, weight);
    }
}

template <typename STEP> struct kv_step_launch {
    template <typename T>
    static void launch(cudaStream_t stream, unsigned blocks, const kv_batch &batch)
    {
        KV_LAUNCH((kv_step_kernel<STEP, T>), blocks, KV_THREADS, stream, batch);
    }
};

#define KV_STEP_PLACES_0
#define KV_STEP_PLACES_1 , states[0] + k
#define KV_STEP_PLACES_2 , states[0] + k, states[1] + k
#define KV_STEP_PLACES_3 , states[0] + k, states[1] + k, states[2] + k

#define KV_STEP_APPLY(name, num, real)                                                             \
    template <int N>                                                                               \
    KV_INSIDE void apply(const kv_factors_t_##real *factors, int64_t i, real gradient,             \
                         real *weight, real(*states)[N], int k)                                    \
    {                                                                                              \
        (void)states, (void)k;                                                                     \
        kv_##name##_##real(factors, factors->clip, i, gradient, weight KV_STEP_PLACES_##num);      \
    }

/* A kind as a type: how many states it has, whether the weight changes, and its function for float
 * and for double. */
#define KV_STEP_TYPE(name, num)                                                                    \
    struct kv_step_of_##name {                                                                     \
        enum { STATES = num, WRITES = KV_STEP_##name != KV_STEP_lamb_moments };                    \
        KV_STEP_APPLY(name, num, float)                                                            \
        KV_STEP_APPLY(name, num, double)                                                           \
    };

#define KV_STEP_CASE(name, num)                                                                    \
    case KV_STEP_##name:                                                                           \
        return KV_LAUNCH_FOR(dtype, kv_step_launch<kv_step_of_##name>::launch);

#define KV_STEP_DEFINE(function, FAMILY)                                                           \
    FAMILY(KV_STEP_TYPE)                                                                           \
    kv_launch_t *function(kv_step_kind_t kind, kv_dtype_t dtype)                                   \
    {                                                                                              \
        switch (kind) {                                                                            \
            FAMILY(KV_STEP_CASE)                                                                   \
        default:                                                                                   \
            return NULL;                                                                           \
        }                                                                                          \
    }

#endif
