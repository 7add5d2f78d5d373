/* What the limit programs share: vectors of this machine's width, clock, memory, threads that
 * wait for work, and the command line.
 *
 * The threads wait by looking again and again, because waking a sleeping one costs as much as the
 * smaller jobs.
 */
#ifndef LIMIT_H
#define LIMIT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
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

/* Of every byte. As float32 it is 0.747: numbers too small to be normal would cost more. */
#define FILL 0x3f

#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(WIDTH)));
typedef uint32_t words __attribute__((vector_size(WIDTH)));

static int num_threads;
static int num_reps = 21;

static inline double now(void)
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

static inline double median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, compare);
    return values[count / 2];
}

static inline void fail(const char *why)
{
    fprintf(stderr, "limit: %s\n", why);
    exit(1);
}

static inline void *memory(size_t bytes)
{
    void *block = aligned_alloc(2 * MIB, (bytes + 2 * MIB - 1) / (2 * MIB) * (2 * MIB));
    if (block == NULL)
        fail("out of memory");
#ifdef MADV_HUGEPAGE
    madvise(block, bytes, MADV_HUGEPAGE);
#endif
    memset(block, FILL, bytes);
    return block;
}

/* Past the caches, where the processor can. */
ALWAYS_INLINE void store(void *to, words value, bool stream)
{
#if defined(__x86_64__)
    if (stream) {
#if WIDTH == 64
        _mm512_stream_si512(to, (__m512i)value);
#elif WIDTH == 32
        _mm256_stream_si256(to, (__m256i)value);
#else
        _mm_stream_si128(to, (__m128i)value);
#endif
        return;
    }
#endif
    (void)stream;
    memcpy(to, &value, WIDTH);
}

/* ------------------------------------------------------------------------------ threads */

typedef void (*work_function)(const void *job, int thread);

static work_function shared_work;
static const void *shared_job;
static atomic_int turn, finished;

static inline void relax(int spins)
{
    if (spins > 10000)
        sched_yield(); /* more threads than processors */
#if defined(__x86_64__)
    _mm_pause();
#endif
}

static inline void *thread_main(void *argument)
{
    int thread = (int)(intptr_t)argument;
    for (int seen = 0;; seen++) {
        for (int spins = 0; atomic_load(&turn) == seen; spins++)
            relax(spins);
        shared_work(shared_job, thread);
        atomic_fetch_add(&finished, 1);
    }
    return NULL;
}

/* Every thread does its part, this one that of thread 0. The others start at the first call. */
static inline void run_on_all(work_function work, const void *job)
{
    static bool started;
    if (!started)
        for (int i = 1; i < num_threads; i++) {
            pthread_t thread;
            if (pthread_create(&thread, NULL, thread_main, (void *)(intptr_t)i) != 0)
                fail("no thread");
            pthread_detach(thread);
        }
    started = true;
    shared_work = work;
    shared_job = job;
    atomic_store(&finished, 0);
    atomic_fetch_add(&turn, 1);
    work(job, 0);
    for (int spins = 0; atomic_load(&finished) < num_threads - 1; spins++)
        relax(spins);
}

/* ------------------------------------------------------------------------------ command line */

typedef struct named_job {
    const char *name;
    double (*run)(void); /* median seconds of one call */
    const char *what;
} named_job;

static inline int run_jobs(int argc, char **argv, const named_job *jobs, size_t num_jobs)
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
        fprintf(stderr, "usage: %s [--job NAME] [--reps N] [--threads N]\n", argv[0]);
        return 2;
    }
    bool found = false;
    for (size_t i = 0; i < num_jobs; i++)
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

#endif
