/* Sums of arrays, and casts, which are sums of one array with a result of another type. */
#include "cuda/batch.h"

namespace
{

struct sum_record {
    int64_t count;
    int16_t num_src, num_dst, aligned;
};

/* Elements of a tile: KV_TILE_BYTES of the larger of the two types. */
template <typename FROM, typename TO> struct sum_tile {
    enum {
        COUNT = KV_TILE_BYTES / (sizeof(typename FROM::store) > sizeof(typename TO::store)
                                     ? sizeof(typename FROM::store)
                                     : sizeof(typename TO::store))
    };
};

/* What one thread does for one tile reads everything before it writes, so a destination may be a
 * source. */
template <typename FROM, typename TO>
__global__ void sum_kernel(const __grid_constant__ kv_batch batch)
{
    typedef typename TO::store store_t;
    enum { N = sum_tile<FROM, TO>::COUNT };
    const kv_place place = kv_find_place(batch);
    const sum_record job = kv_record_of<sum_record>(place.record);
    const uint64_t *src = place.record + kv_words_of<sum_record>::COUNT;
    const uint64_t *dst = src + job.num_src;
    const int64_t step = place.blocks * KV_THREADS * N;
    for (int64_t i = (place.block * KV_THREADS + threadIdx.x) * N; i < job.count; i += step) {
        store_t result[N];
        if (kv_is_same<FROM, TO>::YES && job.num_src == 1) {
            kv_load_raw<store_t, N>(job.aligned, (const char *)src[0], i, job.count, result);
        } else {
            typename FROM::wide sum[N];
            kv_load_sum<FROM, N>(job.aligned, job.num_src, src, i, job.count, sum);
            KV_UNROLL
            for (int k = 0; k < N; k++)
                result[k] = TO::narrow(sum[k]);
        }
        for (int j = 0; j < job.num_dst; j++)
            kv_store_raw<store_t, N>(job.aligned, (char *)dst[j], i, job.count, result);
    }
}

template <typename FROM, typename TO>
void launch(cudaStream_t stream, unsigned blocks, const kv_batch &batch)
{
    KV_LAUNCH((sum_kernel<FROM, TO>), blocks, KV_THREADS, stream, batch);
}

kv_launch_t *launch_of(kv_dtype_t from, kv_dtype_t to)
{
    static const struct {
        kv_dtype_t from, to;
        kv_launch_t *launch;
    } launches[] = {
        {KV_FLOAT64, KV_FLOAT64, launch<kv_float64, kv_float64>},
        {KV_FLOAT32, KV_FLOAT32, launch<kv_float32, kv_float32>},
        {KV_FLOAT16, KV_FLOAT16, launch<kv_float16, kv_float16>},
        {KV_BFLOAT16, KV_BFLOAT16, launch<kv_bfloat16, kv_bfloat16>},
        {KV_INT8, KV_INT8, launch<kv_uint8, kv_uint8>},
        {KV_UINT8, KV_UINT8, launch<kv_uint8, kv_uint8>},
        {KV_INT32, KV_INT32, launch<kv_uint32, kv_uint32>},
        {KV_INT64, KV_INT64, launch<kv_uint64, kv_uint64>},
        {KV_FLOAT16, KV_FLOAT32, launch<kv_float16, kv_float32>},
        {KV_BFLOAT16, KV_FLOAT32, launch<kv_bfloat16, kv_float32>},
        {KV_FLOAT32, KV_FLOAT16, launch<kv_float32, kv_float16>},
        {KV_FLOAT32, KV_BFLOAT16, launch<kv_float32, kv_bfloat16>},
    };
    for (const auto &each : launches)
        if (each.from == from && each.to == to)
            return each.launch;
    return NULL;
}

} // namespace

kv_device_code_t kv_cuda_sum(int device, void *stream, kv_dtype_t from, kv_dtype_t to, int num_jobs,
                             const kv_device_sum_t *jobs, char *sentence)
{
    kv_launch_t *launch = launch_of(from, to);
    if (launch == NULL)
        return kv_device_refuse(sentence, "there are no sums from type %d to type %d", (int)from,
                                (int)to);
    for (int i = 0; i < num_jobs; i++)
        KV_DEVICE_TRY(kv_check_job("sum", i, jobs[i].count, jobs[i].num_src, 1, jobs[i].num_dst, 1,
                                   sentence));
    const int from_bytes = kv_bytes_of(from), to_bytes = kv_bytes_of(to);
    const int n = KV_TILE_BYTES / (from_bytes > to_bytes ? from_bytes : to_bytes);
    kv_packer packer;
    KV_DEVICE_TRY(kv_packer_start(&packer, device, stream, launch, sentence));
    for (int i = 0; i < num_jobs; i++) {
        const kv_device_sum_t *job = jobs + i;
        if (job->count == 0)
            continue;
        kv_aligned_t aligned =
            kv_aligned_for(KV_ALIGNED_TILES, job->num_src, job->src, from_bytes, n);
        aligned = kv_aligned_for(aligned, job->num_dst, job->dst, to_bytes, n);
        sum_record record = {job->count, (int16_t)job->num_src, (int16_t)job->num_dst,
                             (int16_t)aligned};
        const int head = kv_words_of<sum_record>::COUNT;
        uint64_t *words;
        KV_DEVICE_TRY(kv_packer_add(&packer, kv_blocks_for(job->count, n),
                                    head + job->num_src + job->num_dst, &words));
        memcpy(words, &record, sizeof record);
        memcpy(words + head, job->src, (size_t)job->num_src * 8);
        memcpy(words + head + job->num_src, job->dst, (size_t)job->num_dst * 8);
    }
    return kv_packer_end(&packer);
}
