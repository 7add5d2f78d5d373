/* Batches on the host: records are put one behind the other until one of the three arrays is full.
 */
#include "cuda/batch.h"

/* Enough blocks on each multiprocessor to keep its memory busy; the rest is a loop. */
enum { BLOCKS_PER_PROCESSOR = 16 };

kv_device_code_t kv_packer_start(kv_packer *packer, int device, void *stream, kv_launch_t *launch,
                                 char *sentence)
{
    KV_DEVICE_TRY(kv_device_enter(device, sentence));
    packer->device = device;
    packer->stream = (cudaStream_t)stream;
    packer->launch = launch;
    packer->sentence = sentence;
    packer->most_blocks = (int64_t)BLOCKS_PER_PROCESSOR * kv_device_processors(device);
    packer->num_words = 0;
    packer->batch.num_jobs = 0;
    packer->batch.first[0] = 0;
    return KV_DEVICE_OK;
}

kv_device_code_t kv_packer_end(kv_packer *packer)
{
    kv_batch *batch = &packer->batch;
    if (batch->num_jobs == 0)
        return KV_DEVICE_OK;
    (void)cudaGetLastError(); /* what others in this thread have left is not this launch's */
    packer->launch(packer->stream, batch->first[batch->num_jobs], *batch);
    batch->num_jobs = 0;
    packer->num_words = 0;
    KV_CUDA_TRY(packer->device, cudaGetLastError(), "start a kernel", packer->sentence);
    return KV_DEVICE_OK;
}

kv_device_code_t kv_packer_add(kv_packer *packer, int64_t blocks, int num_words, uint64_t **words)
{
    kv_batch *batch = &packer->batch;
    if (batch->num_jobs == KV_BATCH_JOBS || packer->num_words + num_words > KV_BATCH_WORDS)
        KV_DEVICE_TRY(kv_packer_end(packer));
    int job = batch->num_jobs++;
    batch->at[job] = (uint16_t)packer->num_words;
    batch->first[job + 1] =
        batch->first[job] + (uint32_t)(blocks < packer->most_blocks ? blocks : packer->most_blocks);
    *words = batch->words + packer->num_words;
    packer->num_words += num_words;
    return KV_DEVICE_OK;
}

kv_aligned_t kv_aligned_for(kv_aligned_t aligned, int num, const void *const *arrays, int bytes,
                            int n)
{
    uintptr_t all = 0;
    for (int i = 0; i < num; i++)
        all |= (uintptr_t)arrays[i];
    kv_aligned_t here = all % (uintptr_t)bytes != 0         ? KV_ALIGNED_NOT
                        : all % (uintptr_t)(bytes * n) != 0 ? KV_ALIGNED_ELEMENTS
                                                            : KV_ALIGNED_TILES;
    return here < aligned ? here : aligned;
}

kv_device_code_t kv_check_job(const char *what, int job, int64_t count, int num_src, int least_src,
                              int num_dst, int least_dst, char *sentence)
{
    if (count < 0)
        return kv_device_refuse(sentence, "%s, job %d: the count is %lld", what, job,
                                (long long)count);
    if (num_src < least_src || num_src > KV_DEVICE_SOURCES)
        return kv_device_refuse(sentence, "%s, job %d: %d to %d sources are possible, not %d", what,
                                job, least_src, (int)KV_DEVICE_SOURCES, num_src);
    if (num_dst < least_dst || num_dst > KV_DEVICE_OUTPUTS)
        return kv_device_refuse(sentence, "%s, job %d: %d to %d results are possible, not %d", what,
                                job, least_dst, (int)KV_DEVICE_OUTPUTS, num_dst);
    return KV_DEVICE_OK;
}
