/* Sums of host memory: alone or with the team, through the caches or past them. */
#include "comm/host.h"

/* Memory traffic below which waking a helper costs more than it brings. */
#define ALONE_BYTES (INT64_C(2) << 20)

/* Traffic that would push everything else out of the caches, so that ordinary stores read each line
 * of a destination from memory before they write it. */
#define STREAM_BYTES (INT64_C(32) << 20)

/* Traffic of one chunk. Threads of unequal speed want small ones, memory wants large ones. */
#define CHUNK_BYTES_MIN (INT64_C(256) << 10)
#define CHUNK_BYTES_MAX (INT64_C(4) << 20)
#define CHUNKS_PER_THREAD 4

/* Elements of a chunk are a multiple of this: chunks begin at the same place in a line. */
#define CHUNK_UNIT 4096

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
    if (traffic < ALONE_BYTES) {
        host->kernels->sum[dtype](0, count, num_src, src, num_dst, dst, false);
        return;
    }
    int64_t chunk_bytes = traffic / ((int64_t)host->num_threads * CHUNKS_PER_THREAD);
    if (chunk_bytes < CHUNK_BYTES_MIN)
        chunk_bytes = CHUNK_BYTES_MIN;
    if (chunk_bytes > CHUNK_BYTES_MAX)
        chunk_bytes = CHUNK_BYTES_MAX;
    int64_t chunk = (chunk_bytes / (traffic / count) / CHUNK_UNIT + 1) * CHUNK_UNIT;
    sum_job_t job = {.host = host,
                     .dtype = dtype,
                     .count = count,
                     .chunk = chunk,
                     .num_src = num_src,
                     .num_dst = num_dst,
                     .src = src,
                     .dst = dst,
                     .stream = traffic >= STREAM_BYTES};
    kv_team_run(host->team, host->num_threads, (count + chunk - 1) / chunk, sum_chunk, &job);
}
