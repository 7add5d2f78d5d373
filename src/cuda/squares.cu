/* Norms: sums of squares, in two launches. The first leaves the sum of every KV_DEVICE_SQUARES
 * elements in the job's room, the second adds these up. */
#include "cuda/tree.h"

namespace
{

struct squares_record {
    int64_t count;
    uint64_t waiting, room, out;
    double batch;
    int16_t num_src, aligned, rounded;
};

/* The squares of 64 elements. */
template <typename T> struct squares_leaf {
    const squares_record &job;
    const uint64_t *src;

    __device__ double operator()(int64_t leaf) const
    {
        typedef typename T::wide real;
        enum { N = kv_tile<real>::COUNT };
        const int64_t begin = leaf * KV_LEAF;
        const int64_t end = job.count - begin < KV_LEAF ? job.count : begin + KV_LEAF;
        real sum = 0;
        for (int64_t i = begin; i < end; i += N) {
            real x[N], waiting[N];
            kv_load_sum<T, N>(job.aligned, job.num_src, src, i, job.count, x);
            if (job.waiting != 0) {
                kv_load<typename T::wide_type, N>(job.aligned, (const char *)job.waiting, i,
                                                  job.count, waiting);
                KV_UNROLL
                for (int k = 0; k < N; k++)
                    x[k] = (waiting[k] + x[k]) / (real)job.batch;
            }
            KV_UNROLL
            for (int k = 0; k < N; k++) {
                if (i + k >= end)
                    continue;
                real square = x[k] * x[k];
                sum += job.rounded ? T::widen(T::narrow(square)) : square;
            }
        }
        return (double)sum;
    }
};

template <typename T> __global__ void squares_kernel(const __grid_constant__ kv_batch batch)
{
    const kv_place place = kv_find_place(batch);
    const squares_record job = kv_record_of<squares_record>(place.record);
    const squares_leaf<T> leaf = {job, place.record + kv_words_of<squares_record>::COUNT};
    const int64_t leaves = (job.count + KV_LEAF - 1) / KV_LEAF;
    for (int64_t part = place.block; part * KV_THREADS < leaves; part += place.blocks) {
        const int64_t first = part * KV_THREADS, left = leaves - first;
        double sum = kv_tree(leaf, first, left < KV_THREADS ? left : (int64_t)KV_THREADS);
        if (threadIdx.x == 0)
            ((double *)job.room)[part] = sum;
    }
}

struct parts_leaf {
    const double *parts;

    __device__ double operator()(int64_t leaf) const
    {
        return parts[leaf];
    }
};

__global__ void parts_kernel(const __grid_constant__ kv_batch batch)
{
    const kv_place place = kv_find_place(batch);
    const squares_record job = kv_record_of<squares_record>(place.record);
    const parts_leaf leaf = {(const double *)job.room};
    double sum = 0;
    if (job.count > 0)
        sum = kv_tree(leaf, 0, (job.count + KV_DEVICE_SQUARES - 1) / KV_DEVICE_SQUARES);
    if (threadIdx.x == 0)
        *(double *)job.out = sum;
}

template <typename T> void launch(cudaStream_t stream, unsigned blocks, const kv_batch &batch)
{
    KV_LAUNCH((squares_kernel<T>), blocks, KV_THREADS, stream, batch);
}

void launch_parts(cudaStream_t stream, unsigned blocks, const kv_batch &batch)
{
    KV_LAUNCH((parts_kernel), blocks, KV_THREADS, stream, batch);
}

kv_device_code_t add(kv_packer *packer, kv_dtype_t dtype, const kv_device_squares_t *job,
                     int64_t blocks, bool with_src)
{
    int num_src = with_src ? job->num_src : 0, n = kv_tile_of(dtype);
    kv_aligned_t aligned =
        kv_aligned_for(KV_ALIGNED_TILES, num_src, job->src, kv_bytes_of(dtype), n);
    aligned = kv_aligned_for(aligned, 1, &job->waiting, kv_wide_bytes_of(dtype), n);
    squares_record record = {
        job->count,          (uint64_t)job->waiting,
        (uint64_t)job->room, (uint64_t)job->out,
        job->batch,          (int16_t)num_src,
        (int16_t)aligned,    (int16_t)(job->rounded && kv_dtype_is_narrow(dtype))};
    const int head = kv_words_of<squares_record>::COUNT;
    uint64_t *words;
    KV_DEVICE_TRY(kv_packer_add(packer, blocks, head + num_src, &words));
    memcpy(words, &record, sizeof record);
    memcpy(words + head, job->src, (size_t)num_src * 8);
    return KV_DEVICE_OK;
}

} // namespace

kv_device_code_t kv_cuda_squares(int device, void *stream, kv_dtype_t dtype, int num_jobs,
                                 const kv_device_squares_t *jobs, char *sentence)
{
    kv_launch_t *first = KV_LAUNCH_FOR(dtype, launch);
    if (first == NULL)
        return kv_device_refuse(sentence, "there are no norms of type %d", (int)dtype);
    for (int i = 0; i < num_jobs; i++)
        KV_DEVICE_TRY(
            kv_check_job("squares", i, jobs[i].count, jobs[i].num_src, 1, 1, 1, sentence));
    kv_packer packer;
    KV_DEVICE_TRY(kv_packer_start(&packer, device, stream, first, sentence));
    for (int i = 0; i < num_jobs; i++)
        if (jobs[i].count > 0)
            KV_DEVICE_TRY(add(&packer, dtype, jobs + i, kv_device_room(jobs[i].count), true));
    KV_DEVICE_TRY(kv_packer_end(&packer));
    packer.launch = launch_parts;
    for (int i = 0; i < num_jobs; i++)
        KV_DEVICE_TRY(add(&packer, dtype, jobs + i, 1, false));
    return kv_packer_end(&packer);
}
