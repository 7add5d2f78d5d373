/* What this machine can do at best: the memory traffic of the store's jobs, in plain C without the
 * store:
 *
 *     cc -std=c17 -O3 -march=native -pthread limit.c -o limit
 *     ./limit [--job NAME] [--reps N] [--threads N]
 *
 * One JSON line a job: its name, the median seconds of one call and what was done. Small jobs are
 * repeated inside a measurement until it lasts milliseconds. Large jobs are tried in several
 * ways (ordinary stores and stores past the caches, one piece a thread and many), and the way with
 * the fastest median counts.
 */
#include "limit.h"

/* ------------------------------------------------------------------------------ small jobs */

typedef void (*copy_function)(void *to, void *also, const void *from, size_t bytes);

static __attribute__((noinline)) void copy_once(void *to, void *also, const void *from,
                                                size_t bytes)
{
    (void)also;
    memcpy(to, from, bytes);
}

static __attribute__((noinline)) void copy_twice(void *to, void *also, const void *from,
                                                 size_t bytes)
{
    const char *in = from;
    char *out = to, *second = also;
    for (size_t at = 0; at + WIDTH <= bytes; at += WIDTH) {
        words value;
        memcpy(&value, in + at, WIDTH);
        memcpy(out + at, &value, WIDTH);
        memcpy(second + at, &value, WIDTH);
    }
}

static copy_function volatile copy_once_pointer = copy_once;
static copy_function volatile copy_twice_pointer = copy_twice;

static double push_pull_1kib(void)
{
    static char value[1024], stored[1024], out[1024];
    enum { CALLS = 20000 };
    double *times = malloc(sizeof *times * (size_t)num_reps);
    for (int rep = 0; rep < num_reps; rep++) {
        double start = now();
        for (int call = 0; call < CALLS; call++) {
            copy_once_pointer(stored, NULL, value, sizeof stored);
            copy_once_pointer(out, NULL, stored, sizeof out);
        }
        times[rep] = (now() - start) / CALLS;
    }
    double result = median(times, num_reps);
    free(times);
    return result;
}

static double pushpull_1kib(void)
{
    static char value[1024], stored[1024], out[1024];
    enum { CALLS = 40000 };
    double *times = malloc(sizeof *times * (size_t)num_reps);
    for (int rep = 0; rep < num_reps; rep++) {
        double start = now();
        for (int call = 0; call < CALLS; call++)
            copy_twice_pointer(stored, out, value, sizeof stored);
        times[rep] = (now() - start) / CALLS;
    }
    double result = median(times, num_reps);
    free(times);
    return result;
}

/* Seconds a key: each key's value, stored value and out are blocks of their own. */
static double list_1000x4kib(void)
{
    enum { KEYS = 1000, BYTES = 4096 };
    char *blocks[3][KEYS];
    for (int i = 0; i < 3; i++)
        for (int key = 0; key < KEYS; key++) {
            blocks[i][key] = malloc(BYTES);
            memset(blocks[i][key], 1, BYTES);
        }
    double *times = malloc(sizeof *times * (size_t)num_reps);
    for (int rep = 0; rep < num_reps; rep++) {
        double start = now();
        for (int key = 0; key < KEYS; key++)
            copy_once_pointer(blocks[1][key], NULL, blocks[0][key], BYTES);
        for (int key = 0; key < KEYS; key++)
            copy_once_pointer(blocks[2][key], NULL, blocks[1][key], BYTES);
        times[rep] = (now() - start) / KEYS;
    }
    for (int i = 0; i < 3; i++)
        for (int key = 0; key < KEYS; key++)
            free(blocks[i][key]);
    double result = median(times, num_reps);
    free(times);
    return result;
}

/* ------------------------------------------------------------------------------ large jobs */

typedef struct large_job {
    int num_src, num_dst;
    char *src[4], *dst[2];
    size_t bytes;  /* of one array */
    bool integers; /* add words instead of floats */
    bool stream;   /* store past the caches */
    size_t piece;  /* bytes that a thread takes at a time; pieces go round the threads */
} large_job;

ALWAYS_INLINE void part(const large_job *job, size_t begin, size_t end, int num_src, int num_dst,
                        bool integers, bool stream)
{
    const char *a = job->src[0], *b = job->src[1], *c = job->src[2], *d = job->src[3];
    char *x = job->dst[0], *y = job->dst[1];
    for (size_t at = begin; at < end; at += WIDTH) {
        words sum;
        memcpy(&sum, a + at, WIDTH);
        if (num_src == 4) {
            words more[3];
            memcpy(&more[0], b + at, WIDTH);
            memcpy(&more[1], c + at, WIDTH);
            memcpy(&more[2], d + at, WIDTH);
            for (int i = 0; i < 3; i++)
                sum = integers ? sum + more[i] : (words)((floats)sum + (floats)more[i]);
        }
        store(x + at, sum, stream);
        if (num_dst == 2)
            store(y + at, sum, stream);
    }
}

static void share(const void *argument, int thread)
{
    const large_job *job = argument;
    size_t round = job->piece * (size_t)num_threads;
    for (size_t begin = job->piece * (size_t)thread; begin < job->bytes; begin += round) {
        size_t end = begin + job->piece < job->bytes ? begin + job->piece : job->bytes;
#define CASE(num_src_, num_dst_, integers_)                                                        \
    if (job->num_src == num_src_ && job->num_dst == num_dst_ && job->integers == integers_) {      \
        if (job->stream)                                                                           \
            part(job, begin, end, num_src_, num_dst_, integers_, true);                            \
        else                                                                                       \
            part(job, begin, end, num_src_, num_dst_, integers_, false);                           \
    }
        CASE(1, 1, true)
        CASE(4, 1, true)
        CASE(4, 1, false)
        CASE(4, 2, false)
#undef CASE
    }
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

static double large(int num_src, int num_dst, size_t bytes, bool integers)
{
    large_job job = {.num_src = num_src, .num_dst = num_dst, .bytes = bytes, .integers = integers};
    for (int i = 0; i < num_src; i++)
        job.src[i] = memory(bytes);
    for (int i = 0; i < num_dst; i++)
        job.dst[i] = memory(bytes);

    size_t equal = (bytes / (size_t)num_threads + 4095) / 4096 * 4096;
    const struct {
        bool stream;
        size_t piece;
    } ways[] = {{false, equal}, {true, equal}, {false, MIB}, {true, MIB}};
    enum { WAYS = sizeof ways / sizeof ways[0] };
    double *times = malloc(sizeof *times * WAYS * (size_t)num_reps);
    for (int rep = 0; rep < num_reps; rep++)
        for (int way = 0; way < WAYS; way++) {
            job.stream = ways[way].stream;
            job.piece = ways[way].piece;
            double start = now();
            run_on_all(share, &job);
            times[way * num_reps + rep] = now() - start;
        }
    double best = 1e9;
    for (int way = 0; way < WAYS; way++) {
        double seconds = median(times + way * num_reps, num_reps);
        if (seconds < best)
            best = seconds;
    }

    for (int i = 0; i < num_src; i++)
        free(job.src[i]);
    for (int i = 0; i < num_dst; i++)
        free(job.dst[i]);
    free(times);
    return best;
}

static double sum_4x64mib(void)
{
    return large(4, 1, 64 * MIB, false);
}

static double sum_4x64mib_2dst(void)
{
    return large(4, 2, 64 * MIB, false);
}

static double sum_fp16_4x32mib(void)
{
    return large(4, 1, 32 * MIB, true);
}

static double copy_64mib(void)
{
    return large(1, 1, 64 * MIB, true);
}

static const named_job jobs[] = {
    {"push_pull_1KiB", push_pull_1kib, "two calls through a pointer, each a memcpy of 1 KiB"},
    {"pushpull_1KiB", pushpull_1kib, "one call, one pass: 1 KiB read once and written twice"},
    {"list_1000x4KiB", list_1000x4kib,
     "1000 memcpys of 4 KiB and 1000 of their results; seconds of one key"},
    {"sum_4x64MiB", sum_4x64mib, "float32, all threads: four arrays read, one written"},
    {"sum_4x64MiB_2dst", sum_4x64mib_2dst, "float32, all threads: four arrays read, two written"},
    {"sum_fp16_4x32MiB", sum_fp16_4x32mib,
     "memory traffic only, all threads: four arrays read, added as 32-bit integers, one written"},
    {"copy_64MiB", copy_64mib, "all threads: one array read, one written"},
};

int main(int argc, char **argv)
{
    return run_jobs(argc, argv, jobs, sizeof jobs / sizeof jobs[0]);
}
