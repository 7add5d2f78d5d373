/* Many jobs in one launch: they are described in the kernel's own parameters, so that nothing has
 * to be copied to the device before. A job has blocks of its own; a block finds its job by the
 * first blocks of all. One large array and many small ones are the same to a kernel.
 *
 * What a job is, is a record of words: a structure that its kernel knows, then pointers.
 */
#ifndef KV_CUDA_BATCH_H
#define KV_CUDA_BATCH_H

#include "cuda/number.h"
#include "cuda/plugin.h"

enum {
    KV_THREADS = 256,
    KV_BATCH_JOBS = 88,
    KV_BATCH_WORDS = 444,
    KV_BATCH_BYTES = 4096, /* of parameters, the limit before CUDA 12.1 */
};

struct kv_batch {
    uint64_t words[KV_BATCH_WORDS];
    uint32_t first[KV_BATCH_JOBS + 1]; /* of the job's blocks; behind the last, their number */
    uint16_t at[KV_BATCH_JOBS];        /* where its record begins in `words` */
    uint16_t num_jobs;
};
static_assert(sizeof(kv_batch) <= KV_BATCH_BYTES, "a batch must fit into a kernel's parameters");

/* The job of this block: its record, and which of how many blocks of the job this is. */
struct kv_place {
    const uint64_t *record;
    int64_t block, blocks;
};

KV_INSIDE kv_place kv_find_place(const kv_batch &batch)
{
    int low = 0, high = batch.num_jobs;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (batch.first[middle] <= blockIdx.x)
            low = middle;
        else
            high = middle;
    }
    kv_place place;
    place.record = batch.words + batch.at[low];
    place.block = blockIdx.x - batch.first[low];
    place.blocks = batch.first[low + 1] - batch.first[low];
    return place;
}

template <typename RECORD> KV_INSIDE RECORD kv_record_of(const uint64_t *words)
{
    RECORD record;
    memcpy(&record, words, sizeof record);
    return record;
}

/* Words that a structure takes in a record. */
template <typename RECORD> struct kv_words_of {
    enum { COUNT = (sizeof(RECORD) + 7) / 8 };
};

/* ------------------------------------------------------------------------------ on the host */

typedef void kv_launch_t(cudaStream_t stream, unsigned blocks, const kv_batch &batch);

/* The launch for a floating type, NULL for another; `launch` is a template over the type. */
#define KV_LAUNCH_FOR(dtype, launch)                                                               \
    ((dtype) == KV_FLOAT64    ? launch<kv_float64>                                                 \
     : (dtype) == KV_FLOAT32  ? launch<kv_float32>                                                 \
     : (dtype) == KV_FLOAT16  ? launch<kv_float16>                                                 \
     : (dtype) == KV_BFLOAT16 ? launch<kv_bfloat16>                                                \
                              : (kv_launch_t *)NULL)

/* Bytes of an element, and of one of the type that a floating type is computed with. */
static inline int kv_bytes_of(kv_dtype_t dtype)
{
    static const int bytes[] = {
#define KV_BYTES(id, name, bytes, code, bits) bytes,
        KV_DTYPE_LIST(KV_BYTES)
#undef KV_BYTES
    };
    return bytes[dtype];
}

static inline int kv_wide_bytes_of(kv_dtype_t dtype)
{
    return kv_bytes_of(kv_dtype_wide(dtype));
}

/* Elements of a tile of a floating type. */
static inline int kv_tile_of(kv_dtype_t dtype)
{
    return KV_TILE_BYTES / kv_wide_bytes_of(dtype);
}

/* Fills batches and launches each when it is full. */
struct kv_packer {
    int device;
    cudaStream_t stream;
    kv_launch_t *launch;
    char *sentence;
    int64_t most_blocks; /* of one job */
    int num_words;
    kv_batch batch;
};

/* Prepares `packer` for jobs on this device and stream, and makes the device the current one. */
kv_device_code_t kv_packer_start(kv_packer *packer, int device, void *stream, kv_launch_t *launch,
                                 char *sentence);
/* Room for a job of so many blocks (cut to most_blocks) and words, which the caller fills in before
 * the next call. At most KV_BATCH_WORDS words. */
kv_device_code_t kv_packer_add(kv_packer *packer, int64_t blocks, int num_words, uint64_t **words);
/* Launches what waits. */
kv_device_code_t kv_packer_end(kv_packer *packer);

/* Blocks for a thread to each tile of N elements; count is not 0. */
static inline int64_t kv_blocks_for(int64_t count, int n)
{
    return (count - 1) / ((int64_t)n * KV_THREADS) + 1;
}

/* Whether a list of arrays of a type with so many bytes is aligned for tiles of N elements: no
 * better than `aligned`. */
kv_aligned_t kv_aligned_for(kv_aligned_t aligned, int num, const void *const *arrays, int bytes,
                            int n);

/* What every job must keep to. */
kv_device_code_t kv_check_job(const char *what, int job, int64_t count, int num_src, int least_src,
                              int num_dst, int least_dst, char *sentence);

/* The table's kernels. */
kv_device_code_t kv_cuda_sum(int device, void *stream, kv_dtype_t from, kv_dtype_t to, int num_jobs,
                             const kv_device_sum_t *jobs, char *sentence);
kv_device_code_t kv_cuda_step(int device, void *stream, kv_dtype_t dtype, kv_step_kind_t kind,
                              int num_jobs, const kv_device_step_t *jobs, char *sentence);
kv_device_code_t kv_cuda_squares(int device, void *stream, kv_dtype_t dtype, int num_jobs,
                                 const kv_device_squares_t *jobs, char *sentence);
kv_device_code_t kv_cuda_encode(int device, void *stream, kv_dtype_t dtype, int bits, int num_jobs,
                                const kv_device_encode_t *jobs, char *sentence);
kv_device_code_t kv_cuda_decode(int device, void *stream, kv_dtype_t dtype, kv_dtype_t to,
                                int num_jobs, const kv_device_decode_t *jobs, char *sentence);

#endif
