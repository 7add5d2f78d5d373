/* The team, and the sums that run on it: every chunk once, never a wait for somebody else's job, no
 * helper after stop or when none can be started, and sums that no cut changes. */
#include "test.h"

#include "comm/host.h"
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_CHUNKS = 1000 };

typedef struct marks {
    atomic_int done[MAX_CHUNKS];
    atomic_int threads; /* how many took part, seen by their first chunk */
} marks_t;

static _Thread_local const marks_t *last_job;

static void mark(void *context, int64_t chunk)
{
    marks_t *marks = context;
    if (last_job != marks) {
        last_job = marks;
        atomic_fetch_add(&marks->threads, 1);
    }
    atomic_fetch_add(&marks->done[chunk], 1);
}

static bool each_once(const marks_t *marks, int64_t count)
{
    bool once = true;
    for (int64_t i = 0; i < MAX_CHUNKS; i++)
        once = once && atomic_load(&marks->done[i]) == (i < count);
    return once;
}

/* Runs `count` chunks; true if each ran once. */
static bool runs_all(kv_team_t *team, int num_threads, int64_t count, int *threads)
{
    static marks_t marks;
    memset(&marks, 0, sizeof marks);
    last_job = NULL;
    kv_team_run(team, num_threads, count, mark, &marks);
    *threads = atomic_load(&marks.threads);
    return each_once(&marks, count);
}

static kv_team_t *team_new(int max_threads)
{
    kv_team_t *team = NULL;
    CHECK_STATUS(kv_team_new(max_threads, &team), KV_OK);
    return team;
}

static void team_end(kv_team_t *team)
{
    kv_team_stop(team);
    kv_team_free(team);
}

/* Chunks that wait for each other: passes only if two threads are inside at once. */
static void meet(void *context, int64_t chunk)
{
    (void)chunk;
    atomic_int *inside = context;
    int64_t end = kv_clock_ns() + 30 * INT64_C(1000000000);
    atomic_fetch_add(inside, 1);
    while (atomic_load(inside) < 2 && kv_clock_ns() < end)
        ;
}

static void every_chunk_runs_once_whatever_the_threads(void)
{
    for (int max_threads = 1; max_threads <= 4; max_threads++) {
        kv_team_t *team = team_new(max_threads);
        for (int num_threads = 1; num_threads <= 6; num_threads++)
            for (int64_t count = 0; count < 40; count++) {
                int threads;
                CHECK(runs_all(team, num_threads, count, &threads));
                CHECK(threads <= num_threads && threads <= max_threads && threads <= count);
            }
        int threads;
        for (int round = 0; round < 200; round++)
            CHECK(runs_all(team, max_threads, MAX_CHUNKS, &threads));
        team_end(team);
    }
}

static void helper_works_beside_the_caller(void)
{
    kv_team_t *team = team_new(3);
    for (int round = 0; round < 100; round++) {
        atomic_int inside = 0;
        kv_team_run(team, 2, 2, meet, &inside);
        CHECK_EQ(atomic_load(&inside), 2);
    }
    team_end(team);
}

/* The job of the one thread holds the team until the other thread's job has ended. */
typedef struct pair {
    kv_team_t *team;
    atomic_bool held, stopping, ended;
    marks_t marks;
} pair_t;

static void hold(void *context, int64_t chunk)
{
    pair_t *pair = context;
    (void)chunk;
    int64_t end = kv_clock_ns() + 30 * INT64_C(1000000000);
    atomic_store(&pair->held, true);
    while (!atomic_load(&pair->ended) && kv_clock_ns() < end)
        ;
}

static void *holder(void *context)
{
    pair_t *pair = context;
    kv_team_run(pair->team, 2, 2, hold, pair);
    return NULL;
}

static void caller_of_a_busy_team_works_alone(void)
{
    static pair_t pair;
    pair.team = team_new(2);
    kv_thread_t thread;
    if (!CHECK_STATUS(kv_thread_start(&thread, "holder", holder, &pair), KV_OK))
        return;
    while (!atomic_load(&pair.held))
        ;
    kv_team_run(pair.team, 2, 100, mark, &pair.marks);
    CHECK(each_once(&pair.marks, 100));
    CHECK_EQ(atomic_load(&pair.marks.threads), 1);
    atomic_store(&pair.ended, true);
    kv_thread_join(thread);
    team_end(pair.team);
}

static _Thread_local bool is_caller;

/* The helper leaves when the caller is here, who goes on for some time after stop was called. */
static void linger(void *context, int64_t chunk)
{
    pair_t *pair = context;
    (void)chunk;
    if (!is_caller) {
        while (!atomic_load(&pair->held))
            ;
        return;
    }
    atomic_store(&pair->held, true);
    while (!atomic_load(&pair->stopping))
        ;
    int64_t end = kv_clock_ns() + 20 * INT64_C(1000000);
    while (kv_clock_ns() < end)
        ;
    atomic_store(&pair->ended, true);
}

static void *lingerer(void *context)
{
    pair_t *pair = context;
    is_caller = true;
    kv_team_run(pair->team, 2, 2, linger, pair);
    return NULL;
}

static void stop_waits_for_the_running_job(void)
{
    static pair_t pair;
    pair.team = team_new(2);
    kv_thread_t thread;
    if (!CHECK_STATUS(kv_thread_start(&thread, "lingerer", lingerer, &pair), KV_OK))
        return;
    while (!atomic_load(&pair.held))
        ;
    atomic_store(&pair.stopping, true);
    kv_team_stop(pair.team);
    CHECK(atomic_load(&pair.ended));
    kv_thread_join(thread);
    kv_team_free(pair.team);
}

static void team_without_threads_works_alone(void)
{
    int threads;
    kv_team_t *team = team_new(3);
    kv_fault_set("thread.start", 1);
    CHECK(runs_all(team, 2, 50, &threads));
    CHECK_EQ(threads, 1);
    kv_fault_set("thread.start", 2); /* the second of two helpers */
    CHECK(runs_all(team, 3, 50, &threads));
    CHECK(threads <= 2);
    CHECK_EQ(kv_fault_set("thread.start", 0), 2);
    kv_team_stop(team);
    CHECK(runs_all(team, 3, 50, &threads));
    CHECK_EQ(threads, 1);
    kv_team_stop(team);
    kv_team_free(team);

    kv_fault_set("alloc", 1);
    team = NULL;
    CHECK_STATUS(kv_team_new(4, &team), KV_NO_MEMORY);
    CHECK(team == NULL);
    kv_fault_set("alloc", 0);
    kv_team_free(NULL);
}

static void child_of_a_fork_works_alone(void)
{
    kv_team_t *team = team_new(2);
    atomic_int inside = 0;
    kv_team_run(team, 2, 2, meet, &inside); /* the helper runs, and soon sleeps */
    pid_t child = fork();
    if (child == 0) {
        int threads = 0;
        alarm(60);
        bool good = runs_all(team, 2, 50, &threads) && threads == 1;
        team_end(team);
        _exit(good ? 0 : 1);
    }
    int state = -1;
    CHECK(waitpid(child, &state, 0) == child);
    CHECK_EQ(state, 0);
    team_end(team);
}

/* -------------------------------------------------------------------------------- sums */

typedef struct crowd {
    kv_host_t host;
    int64_t count;
    const float *src[2];
} crowd_t;

static void *crowd_member(void *context)
{
    crowd_t *crowd = context;
    float *dst = malloc((size_t)crowd->count * sizeof *dst);
    for (int round = 0; CHECK(dst != NULL) && round < 10; round++) {
        memset(dst, 0, (size_t)crowd->count * sizeof *dst);
        kv_host_sum(&crowd->host, KV_FLOAT32, crowd->count, 2, (const void *const *)crowd->src, 1,
                    (void *const *)&dst);
        bool right = true;
        for (int64_t i = 0; i < crowd->count; i++)
            right = right && dst[i] == crowd->src[0][i] + crowd->src[1][i];
        CHECK(right);
    }
    free(dst);
    return NULL;
}

static void sums_of_several_threads_do_not_mix(void)
{
    enum { MEMBERS = 4, COUNT = 300000 };
    static float src[MEMBERS + 1][COUNT];
    static crowd_t crowd[MEMBERS];
    kv_thread_t threads[MEMBERS];
    kv_team_t *team = team_new(3);
    int started = 0;
    for (int m = 0; m <= MEMBERS; m++)
        for (int i = 0; i < COUNT; i++)
            src[m][i] = (float)(i * (m + 1));
    for (int m = 0; m < MEMBERS; m++) {
        crowd[m] = (crowd_t){
            .host = {kv_kernels_at(0), team, 3}, .count = COUNT, .src = {src[m], src[m + 1]}};
        if (CHECK_STATUS(kv_thread_start(&threads[m], "crowd", crowd_member, &crowd[m]), KV_OK))
            started++;
    }
    for (int m = 0; m < started; m++)
        kv_thread_join(threads[m]);
    team_end(team);
}

/* Sizes on both sides of every border: alone, with the team, past the caches. Destinations and
 * sources off their alignment, and a destination that is a source. */
static void cutting_a_sum_does_not_change_it(void)
{
    enum { MAX = 3000017, SRC = 4 };
    static const int64_t counts[] = {0, 1, 1000, 65536, 131071, 262143, 500001, 1700001, MAX};
    int16_t *src[SRC], *dst[2], *due = malloc(MAX * sizeof *due);
    uint64_t state = 5;
    bool all = due != NULL;
    for (int k = 0; k < SRC; k++)
        all = (src[k] = malloc((MAX + 8) * sizeof(int16_t))) != NULL && all;
    for (int j = 0; j < 2; j++)
        all = (dst[j] = malloc((MAX + 8) * sizeof(int16_t))) != NULL && all;
    kv_team_t *team = team_new(3);
    for (size_t c = 0; CHECK(all) && c < sizeof counts / sizeof counts[0]; c++)
        for (int way = 0; way < 8; way++) {
            int64_t count = counts[c];
            int num_src = way % 4 + 1;
            kv_host_t host = {kv_kernels_at(way % 2), team, way % 3 + 1};
            if (host.kernels == NULL)
                host.kernels = kv_kernels_at(0);
            const void *from[SRC];
            void *to[2] = {way < 4 ? dst[0] + 3 : src[0] + 1, dst[1]};
            for (int k = 0; k < SRC; k++) {
                from[k] = src[k] + 1 + k % 2 * 4;
                for (int64_t i = 0; i < count; i++)
                    ((int16_t *)from[k])[i] = (int16_t)(0x3000 + test_random(&state) % 0x0fff);
            }
            memset(due, 0, MAX * sizeof *due);
            void *due_at = due;
            kv_kernels_at(0)->sum[KV_BFLOAT16](0, count, num_src, from, 1, &due_at, false);
            dst[0][3 + count] = dst[1][count] = 99;
            kv_host_sum(&host, KV_BFLOAT16, count, num_src, from, 2, to);
            CHECK(memcmp(to[0], due, (size_t)count * sizeof *due) == 0);
            CHECK(memcmp(to[1], due, (size_t)count * sizeof *due) == 0);
            CHECK_EQ(dst[0][3 + count], 99);
            CHECK_EQ(dst[1][count], 99);
        }
    for (int k = 0; k < SRC; k++)
        free(src[k]);
    free(dst[0]);
    free(dst[1]);
    free(due);
    team_end(team);
}

static const test_t tests[] = {
    TEST(every_chunk_runs_once_whatever_the_threads), TEST(helper_works_beside_the_caller),
    TEST(caller_of_a_busy_team_works_alone),          TEST(stop_waits_for_the_running_job),
    TEST(team_without_threads_works_alone),           TEST(child_of_a_fork_works_alone),
    TEST(sums_of_several_threads_do_not_mix),         TEST(cutting_a_sum_does_not_change_it),
};
TEST_MAIN(tests)
