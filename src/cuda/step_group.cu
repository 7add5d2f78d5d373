/* GroupAdaGrad: a block of threads takes a row, first for the mean of its squares, then for the
 * step. A row begins anywhere, so tiles are taken element by element. */
#include "cuda/step.h"
#include "cuda/tree.h"

#include <math.h>

namespace
{

__device__ float scaled(const kv_factors_t_float *factors, float x)
{
    return kv_scaled_float(factors, factors->clip, x);
}

__device__ double scaled(const kv_factors_t_double *factors, double x)
{
    return kv_scaled_double(factors, factors->clip, x);
}

__device__ float root_of(float x)
{
    return sqrtf(x);
}

__device__ double root_of(double x)
{
    return sqrt(x);
}

__device__ void apply(const kv_factors_t_float *factors, int64_t i, float gradient, float *weight)
{
    kv_group_adagrad_float(factors, factors->clip, i, gradient, weight);
}

__device__ void apply(const kv_factors_t_double *factors, int64_t i, double gradient,
                      double *weight)
{
    kv_group_adagrad_double(factors, factors->clip, i, gradient, weight);
}

/* The squares of 64 elements of a row. */
template <typename T> struct row_leaf {
    const kv_step_record &job;
    const typename T::factors &factors;
    const uint64_t *src;
    int64_t begin;
    int aligned;

    __device__ double operator()(int64_t leaf) const
    {
        typedef typename T::wide real;
        const int64_t first = begin + leaf * KV_LEAF, row_end = begin + job.row_count;
        const int64_t end = row_end - first < KV_LEAF ? row_end : first + KV_LEAF;
        real sum = 0;
        for (int64_t i = first; i < end; i++) {
            real x;
            kv_load_gradient<T, 1>(job, src, aligned, i, end, &x);
            x = scaled(&factors, x);
            sum += x * x;
        }
        return (double)sum;
    }
};

template <typename T> __global__ void group_kernel(const __grid_constant__ kv_batch batch)
{
    typedef typename T::wide real;
    typedef typename T::factors factors_t;
    __shared__ real root;
    const kv_place place = kv_find_place(batch);
    const kv_step_record job = kv_record_of<kv_step_record>(place.record);
    const uint64_t *behind = place.record + kv_words_of<kv_step_record>::COUNT;
    factors_t factors = kv_record_of<factors_t>(behind);
    const uint64_t *src = behind + kv_words_of<factors_t>::COUNT, *dst = src + job.num_src;
    const int aligned = job.aligned == KV_ALIGNED_NOT ? KV_ALIGNED_NOT : KV_ALIGNED_ELEMENTS;
    for (int64_t row = place.block; row < job.count / job.row_count; row += place.blocks) {
        const int64_t begin = row * job.row_count, end = begin + job.row_count;
        const row_leaf<T> leaf = {job, factors, src, begin, aligned};
        real *history = (real *)job.states[0] + row;
        double sum = kv_tree(leaf, 0, (job.row_count + KV_LEAF - 1) / KV_LEAF);
        /* Nobody reads the root of the row before any more: all have left it for kv_tree. */
        if (threadIdx.x == 0) {
            *history += (real)(sum / (double)job.row_count);
            root = root_of(*history + factors.eps);
        }
        __syncthreads();
        factors.p = root;
        for (int64_t i = begin + threadIdx.x; i < end; i += KV_THREADS) {
            real gradient, weight;
            kv_load_gradient<T, 1>(job, src, aligned, i, end, &gradient);
            kv_load_weight<T, 1>(job, aligned, i, &weight);
            apply(&factors, i, gradient, &weight);
            kv_store_weight<T, 1>(job, dst, aligned, i, &weight);
        }
    }
}

template <typename T> void launch(cudaStream_t stream, unsigned blocks, const kv_batch &batch)
{
    KV_LAUNCH((group_kernel<T>), blocks, KV_THREADS, stream, batch);
}

} // namespace

kv_launch_t *kv_steps_of_group(kv_step_kind_t kind, kv_dtype_t dtype)
{
    return kind == KV_STEP_group_adagrad ? KV_LAUNCH_FOR(dtype, launch) : NULL;
}
