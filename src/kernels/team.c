/* The helpers of the kernels. `busy` says that a job runs, and is taken without a lock; everything
 * else of a job is published under the mutex. A job offers seats: a helper takes one, works until
 * the chunks are handed out and leaves. The caller works as well, then withdraws the seats that
 * nobody took, so that a helper which wakes late costs nothing, and waits for those who did.
 */
#include "kernels/team.h"

#include "base/memory.h"
#include "base/thread.h"
#include <stdatomic.h>

/* Before a thread sleeps it looks this often whether what it waits for has come: some 25 us. Waking
 * a sleeper takes as long, so jobs that follow each other closely, and the two ends of one job,
 * meet here. With one processor nobody spins. */
#define SPINS 1000

struct kv_team {
    int max_helpers;
    int spins;
    uint64_t generation; /* threads do not survive a fork */
    atomic_bool busy;
    atomic_llong next; /* chunk to hand out */

    kv_mutex_t mutex; /* guards what follows; the job itself is constant while a seat is taken */
    kv_cond_t offered;
    kv_cond_t ended;
    bool stopping;
    int num_helpers;
    atomic_int seats; /* changed under the mutex, watched without it, as is `taken` */
    atomic_int taken; /* helpers at work */
    int64_t num_chunks;
    void (*body)(void *context, int64_t chunk);
    void *context;
    kv_thread_t helpers[];
};

kv_status_t kv_team_new(int max_threads, kv_team_t **out)
{
    size_t max_helpers = max_threads > 1 ? (size_t)max_threads - 1 : 0;
    kv_team_t *team = kv_calloc(1, sizeof *team + max_helpers * sizeof team->helpers[0]);
    KV_TRY_ALLOC(team, "the helper threads");
    team->max_helpers = (int)max_helpers;
    team->spins = kv_processor_count() > 1 ? SPINS : 0;
    team->generation = kv_fork_generation();
    kv_mutex_init(&team->mutex, KV_RANK_TEAM);
    kv_cond_init(&team->offered);
    kv_cond_init(&team->ended);
    *out = team;
    return KV_OK;
}

static void work(kv_team_t *team, int64_t num_chunks, void (*body)(void *context, int64_t chunk),
                 void *context)
{
    int64_t chunk;
    while ((chunk = atomic_fetch_add(&team->next, 1)) < num_chunks)
        body(context, chunk);
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void *helper(void *argument)
{
    kv_team_t *team = argument;
    for (;;) {
        for (int i = 0; i < team->spins && team->seats == 0; i++)
            relax();
        kv_mutex_lock(&team->mutex);
        while (team->seats == 0 && !team->stopping)
            kv_cond_wait(&team->offered, &team->mutex);
        if (team->seats == 0)
            break;
        team->seats--;
        team->taken++;
        kv_mutex_unlock(&team->mutex);
        work(team, team->num_chunks, team->body, team->context);
        kv_mutex_lock(&team->mutex);
        /* To all: the job's caller waits for it, and at the same time kv_team_stop may. */
        if (--team->taken == 0)
            kv_cond_broadcast(&team->ended);
        kv_mutex_unlock(&team->mutex);
    }
    kv_mutex_unlock(&team->mutex);
    return NULL;
}

/* Takes the team and offers seats; false if there is nobody to help. */
static bool open_job(kv_team_t *team, int num_helpers, int64_t num_chunks,
                     void (*body)(void *context, int64_t chunk), void *context)
{
    if (team->generation != kv_fork_generation() || atomic_exchange(&team->busy, true))
        return false;
    kv_mutex_lock(&team->mutex);
    while (!team->stopping && team->num_helpers < num_helpers &&
           kv_thread_start(&team->helpers[team->num_helpers], "kv-kernels", helper, team) == KV_OK)
        team->num_helpers++;
    if (num_helpers > team->num_helpers)
        num_helpers = team->num_helpers;
    if (team->stopping || num_helpers == 0) {
        atomic_store(&team->busy, false);
        kv_cond_broadcast(&team->ended);
        kv_mutex_unlock(&team->mutex);
        return false;
    }
    team->body = body;
    team->context = context;
    team->num_chunks = num_chunks;
    team->seats = num_helpers;
    atomic_store(&team->next, 0);
    kv_mutex_unlock(&team->mutex);
    for (int i = 0; i < num_helpers; i++)
        kv_cond_signal(&team->offered);
    return true;
}

static void close_job(kv_team_t *team)
{
    kv_mutex_lock(&team->mutex);
    team->seats = 0;
    kv_mutex_unlock(&team->mutex);
    for (int i = 0; i < team->spins && team->taken > 0; i++)
        relax();
    kv_mutex_lock(&team->mutex);
    while (team->taken > 0)
        kv_cond_wait(&team->ended, &team->mutex);
    atomic_store(&team->busy, false);
    if (team->stopping)
        kv_cond_broadcast(&team->ended);
    kv_mutex_unlock(&team->mutex);
}

void kv_team_run(kv_team_t *team, int num_threads, int64_t num_chunks,
                 void (*body)(void *context, int64_t chunk), void *context)
{
    int64_t num_helpers = num_threads < num_chunks ? num_threads - 1 : num_chunks - 1;
    if (num_helpers > team->max_helpers)
        num_helpers = team->max_helpers;
    if (num_helpers > 0 && open_job(team, (int)num_helpers, num_chunks, body, context)) {
        work(team, num_chunks, body, context);
        close_job(team);
    } else {
        for (int64_t chunk = 0; chunk < num_chunks; chunk++)
            body(context, chunk);
    }
}

void kv_team_stop(kv_team_t *team)
{
    if (team->generation != kv_fork_generation())
        return;
    kv_mutex_lock(&team->mutex);
    team->stopping = true;
    kv_cond_broadcast(&team->offered);
    while (atomic_load(&team->busy))
        kv_cond_wait(&team->ended, &team->mutex);
    int num_helpers = team->num_helpers;
    team->num_helpers = 0;
    kv_mutex_unlock(&team->mutex);
    for (int i = 0; i < num_helpers; i++)
        kv_thread_join(team->helpers[i]);
}

void kv_team_free(kv_team_t *team)
{
    if (team == NULL)
        return;
    /* In a forked child the helpers still count as waiting, and fini would wait for them. */
    if (team->generation == kv_fork_generation()) {
        kv_cond_fini(&team->offered);
        kv_cond_fini(&team->ended);
        kv_mutex_fini(&team->mutex);
    }
    kv_free(team);
}
