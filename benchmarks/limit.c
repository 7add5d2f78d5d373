/* What this machine can do at best: the memory traffic of the store's jobs, in plain C without the
 * store. Stands alone:
 *
 *     cc -std=c17 -O3 -march=native -pthread limit.c -o limit
 *     ./limit [--job NAME] [--reps N] [--threads N]
 *
 * One JSON line a job: its name, the median seconds of one call and what was done. Small jobs are
 * repeated inside a measurement until it lasts milliseconds. Large jobs are tried in several
 * ways (ordinary stores and stores past the caches, one piece a thread and many), and the way with
 * the fastest median counts.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX2__)
#define WIDTH 32
#else
#define WIDTH 16
#endif

#define KIB ((size_t)1024)
#define MIB (1024 * KIB)

typedef float floats __attribute__((vector_size(WIDTH)));
typedef uint32_t words __attribute__((vector_size(WIDTH)));

static int num_threads;
static int num_reps = 21;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, compare);
    return values[count / 2];
}

static void *memory(size_t bytes)
{
    void *block = aligned_alloc(2 * MIB, (bytes + 2 * MIB - 1) / (2 * MIB) * (2 * MIB));
    if (block == NULL) {
        fprintf(stderr, "limit: out of memory\n");
        exit(1);
    }
#ifdef MADV_HUGEPAGE
    madvise(block, bytes, MADV_HUGEPAGE);
#endif
    memset(block, 1, bytes);
    return block;
}

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

static void store(char *to, words value, bool stream)
{
#if defined(__x86_64__)
    if (stream) {
#if WIDTH == 64
        _mm512_stream_si512((__m512i *)to, (__m512i)value);
#elif WIDTH == 32
        _mm256_stream_si256((__m256i *)to, (__m256i)value);
#else
        _mm_stream_si128((__m128i *)to, (__m128i)value);
#endif
        return;
    }
#endif
    (void)stream;
    memcpy(to, &value, WIDTH);
}

static inline __attribute__((always_inline)) void part(const large_job *job, size_t begin,
                                                       size_t end, int num_src, int num_dst,
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

static void share(const large_job *job, int thread)
{
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

static pthread_barrier_t barrier;
static const large_job *shared_job; /* NULL: the threads end */

static void *thread_main(void *argument)
{
    int thread = (int)(intptr_t)argument;
    for (;;) {
        pthread_barrier_wait(&barrier);
        if (shared_job == NULL)
            return NULL;
        share(shared_job, thread);
        pthread_barrier_wait(&barrier);
    }
}

static double large(int num_src, int num_dst, size_t bytes, bool integers)
{
    large_job job = {.num_src = num_src, .num_dst = num_dst, .bytes = bytes, .integers = integers};
    for (int i = 0; i < num_src; i++)
        job.src[i] = memory(bytes);
    for (int i = 0; i < num_dst; i++)
        job.dst[i] = memory(bytes);

    pthread_t threads[num_threads];
    pthread_barrier_init(&barrier, NULL, (unsigned)num_threads);
    for (int i = 1; i < num_threads; i++)
        if (pthread_create(&threads[i], NULL, thread_main, (void *)(intptr_t)i) != 0) {
            fprintf(stderr, "limit: no thread\n");
            exit(1);
        }

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
            shared_job = &job;
            double start = now();
            pthread_barrier_wait(&barrier);
            share(&job, 0);
            pthread_barrier_wait(&barrier);
            times[way * num_reps + rep] = now() - start;
        }
    double best = 1e9;
    for (int way = 0; way < WAYS; way++) {
        double seconds = median(times + way * num_reps, num_reps);
        if (seconds < best)
            best = seconds;
    }

    shared_job = NULL;
    pthread_barrier_wait(&barrier);
    for (int i = 1; i < num_threads; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&barrier);
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

static const struct {
    const char *name;
    double (*run)(void);
    const char *what;
} jobs[] = {
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
    const char *only = NULL;
    num_threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--job") == 0)
            only = argv[i + 1];
        else if (strcmp(argv[i], "--reps") == 0)
            num_reps = atoi(argv[i + 1]);
        else if (strcmp(argv[i], "--threads") == 0)
            num_threads = atoi(argv[i + 1]);
        else
            argc = 0;
    }
    if (argc % 2 == 0 || num_reps < 1 || num_threads < 1) {
        fprintf(stderr, "usage: limit [--job NAME] [--reps N] [--threads N]\n");
        return 2;
    }
    bool found = false;
    for (size_t i = 0; i < sizeof jobs / sizeof jobs[0]; i++)
        if (only == NULL || strcmp(only, jobs[i].name) == 0) {
            found = true;
            printf("{\"job\": \"%s\", \"seconds\": %.4g, \"threads\": %d, \"what\": \"%s\"}\n",
                   jobs[i].name, jobs[i].run(), num_threads, jobs[i].what);
            fflush(stdout);
        }
    if (!found) {
        fprintf(stderr, "limit: no job %s\n", only);
        return 2;
    }
    return 0;
}
