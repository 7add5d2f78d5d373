/* Sums of host memory: alone or with the team, through the caches or past them. */
#include "comm/host.h"

/* Below this much memory traffic, waking a helper costs more than it brings. */
#define ALONE_BYTES (INT64_C(1) << 20)

/* The traffic of one chunk. */
#define CHUNK_BYTES (INT64_C(1) << 20)

/* Destinations of so many bytes would push everything else out of the caches and be pushed out
 * themselves before anybody reads them. */
#define STREAM_BYTES (INT64_C(8) << 20)

typedef struct sum_job {
    const kv_host_t *host;
    kv_dtype_t dtype;
    int64_t count;
    int64_t chunk; /* elements of a chunk */
    int num_src;
    int num_dst;
    const void *const *src;
    void *const *dst;
    bool stream;
} sum_job_t;

static void sum_chunk(void *context, int64_t chunk)
{
    const sum_job_t *job = context;
    int64_t begin = chunk * job->chunk;
    int64_t end = job->count - begin < job->chunk ? job->count : begin + job->chunk;
    job->host->kernels->sum[job->dtype](begin, end, job->num_src, job->src, job->num_dst, job->dst,
                                        job->stream);
}

void kv_host_sum(const kv_host_t *host, kv_dtype_t dtype, int64_t count, int num_src,
                 const void *const *src, int num_dst, void *const *dst)
{
    int64_t element = (int64_t)kv_dtype_bytes(dtype);
    int64_t traffic = count * element * (num_src + num_dst);
    bool stream = count * element * num_dst >= STREAM_BYTES;
    if (traffic < ALONE_BYTES) {
        host->kernels->sum[dtype](0, count, num_src, src, num_dst, dst, stream);
        return;
    }
    int64_t chunk = CHUNK_BYTES / (num_src + num_dst) / element;
    chunk = chunk < 4096 ? 4096 : chunk / 4096 * 4096;
    sum_job_t job = {host, dtype, count, chunk, num_src, num_dst, src, dst, stream};
    kv_team_run(host->team, host->num_threads, (count + chunk - 1) / chunk, sum_chunk, &job);
}
