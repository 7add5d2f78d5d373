/* Groups of communicators, made not to block: each call of NCCL returns at once, and is waited for
 * by asking for the communicators' state.
 *
 * NCCL wants one thread at a time with a communicator, and none when it is aborted. So one thread
 * at a time is inside a group (`is_entered`, no lock: it may wait and run a caller's poll), and
 * whoever wants its end only says so (`stop`) when another is inside: that one brings it about.
 */
#include "comm/nccl.h"

#include "base/memory.h"
#include "base/thread.h"
#include "comm/nccl_load.h"
#include <stdio.h>
#include <string.h>
#include <time.h>

enum {
    SPIN_NS = 20 * 1000,        /* a wait that is over by then does not sleep */
    SLEEP_NS = 50 * 1000,       /* at first, then longer each time … */
    LONGEST_SLEEP_NS = 1000000, /* … up to this */
    NAMES_BYTES = 96,           /* "devices 0, 1 and 2" */
};

#define FREE_NS (10 * INT64_C(1000000000))

typedef struct member {
    int device;
    kv_nccl_comm_t comm; /* NULL: none yet, or not any more */
} member_t;

struct kv_nccl {
    kv_mutex_t lock;
    bool is_entered, is_lost;   /* lock */
    char why[KV_MESSAGE_BYTES]; /* it is lost, or will be; "" until then. lock */
    atomic_bool stop;           /* set under the lock */
    pthread_t inside;           /* who has entered; lock */
    const kv_nccl_library_t *library;
    uint64_t generation; /* of forks */
    int num_ranks, first_rank, num_members;
    member_t members[];
};

/* ----------------------------------------------------------------------------------- words */

static const char *names_of(const kv_nccl_t *nccl, char *out)
{
    int used = snprintf(out, NAMES_BYTES, "device%s", nccl->num_members == 1 ? "" : "s");
    for (int i = 0; i < nccl->num_members && used < NAMES_BYTES; i++) {
        const char *between = i == 0 ? " " : i + 1 == nccl->num_members ? " and " : ", ";
        used += snprintf(out + used, (size_t)(NAMES_BYTES - used), "%s%d", between,
                         nccl->members[i].device);
    }
    return out;
}

static bool is_fine(int result)
{
    return result == KV_NCCL_SUCCESS || result == KV_NCCL_IN_PROGRESS;
}

/* `doing`: "sum" */
static kv_status_t failed(const kv_nccl_t *nccl, int result, const char *doing)
{
    char names[NAMES_BYTES];
    const char *what = nccl->library->ncclGetErrorString(result);
    const char *last = nccl->library->ncclGetLastError(NULL);
    last = last != NULL ? last : "";
    return kv_fail(KV_DEVICE, "NCCL could not %s on %s: %s%s%.*s", doing, names_of(nccl, names),
                   what != NULL ? what : "an unknown error", last[0] != '\0' ? ": " : "",
                   (int)strcspn(last, "\n"), last);
}

static kv_status_t refuse(kv_nccl_t *nccl)
{
    char names[NAMES_BYTES], why[KV_MESSAGE_BYTES];
    kv_mutex_lock(&nccl->lock);
    memcpy(why, nccl->why, sizeof why);
    kv_mutex_unlock(&nccl->lock);
    return kv_fail(KV_DEVICE, "NCCL on %s is lost to this store, make a new one: %.360s",
                   names_of(nccl, names), why);
}

/* The first reason stays. */
static void remember(kv_nccl_t *nccl, const char *why)
{
    kv_mutex_lock(&nccl->lock);
    if (nccl->why[0] == '\0')
        snprintf(nccl->why, sizeof nccl->why, "%s", why);
    kv_mutex_unlock(&nccl->lock);
}

/* --------------------------------------------------------------------------------- waiting */

typedef struct patience {
    kv_caller_t *caller;
    bool was_attached;
    int64_t start, deadline, next_poll, sleep_ns;
} patience_t;

static patience_t patience(kv_caller_t *caller, int64_t otherwise_ns)
{
    int64_t now = kv_clock_ns();
    return (patience_t){
        .caller = caller,
        .was_attached = caller != NULL && !caller->detached,
        .start = now,
        .deadline = caller != NULL ? kv_caller_deadline(caller) : now + otherwise_ns,
        .next_poll = now + KV_POLL_NS,
        .sleep_ns = SLEEP_NS,
    };
}

static void patience_end(const patience_t *patience)
{
    if (patience->was_attached)
        kv_caller_attach(patience->caller);
}

static kv_status_t pass_time(const kv_nccl_t *nccl, patience_t *patience, const char *doing)
{
    char names[NAMES_BYTES];
    int64_t now = kv_clock_ns();
    if (now - patience->start < SPIN_NS)
        return KV_OK;
    if (now >= patience->deadline)
        return kv_fail(KV_TIMEOUT, "NCCL could not %s on %s within %.3g s%s", doing,
                       names_of(nccl, names), (double)(now - patience->start) * 1e-9,
                       nccl->num_ranks > nccl->num_members ? ": are all ranks there?" : "");
    if (patience->caller != NULL)
        kv_caller_detach(patience->caller);
    if (patience->caller != NULL && now >= patience->next_poll) {
        KV_TRY(patience->caller->poll(patience->caller));
        patience->next_poll = kv_clock_ns() + KV_POLL_NS;
    }
    nanosleep(&(struct timespec){.tv_nsec = patience->sleep_ns}, NULL);
    patience->sleep_ns =
        patience->sleep_ns * 2 < LONGEST_SLEEP_NS ? patience->sleep_ns * 2 : LONGEST_SLEEP_NS;
    return KV_OK;
}

/* What the communicators say: the first error, else whether one is still at work. */
static int state_of(const kv_nccl_t *nccl)
{
    int all = KV_NCCL_SUCCESS;
    for (int i = 0; i < nccl->num_members; i++) {
        int own = KV_NCCL_SUCCESS;
        int asked = nccl->library->ncclCommGetAsyncError(nccl->members[i].comm, &own);
        own = is_fine(asked) ? own : asked;
        if (!is_fine(own))
            return own;
        all = own == KV_NCCL_IN_PROGRESS ? own : all;
    }
    return all;
}

/* Waits for what was begun with `result`. */
static kv_status_t await(kv_nccl_t *nccl, int result, patience_t *patience, const char *doing)
{
    if (!is_fine(result))
        return failed(nccl, result, doing);
    for (;;) {
        int state = state_of(nccl);
        if (!is_fine(state))
            return failed(nccl, state, doing);
        if (state == KV_NCCL_SUCCESS)
            return KV_OK;
        if (atomic_load(&nccl->stop))
            return refuse(nccl);
        KV_TRY(pass_time(nccl, patience, doing));
    }
}

/* ---------------------------------------------------------------------------- who is inside */

/* False: somebody else is inside, unless *status says why nobody can be. */
static bool try_enter(kv_nccl_t *nccl, kv_status_t *status)
{
    if (nccl->generation != kv_fork_generation()) {
        *status = kv_fail(KV_DEVICE, "NCCL does not work in a process forked from one that has "
                                     "used it: start that process anew (spawn)");
        return false;
    }
    kv_mutex_lock(&nccl->lock);
    bool is_over = nccl->is_lost || atomic_load(&nccl->stop);
    bool is_entered = !is_over && !nccl->is_entered;
    bool is_mine = !is_over && nccl->is_entered && pthread_equal(nccl->inside, pthread_self());
    if (is_entered) {
        nccl->is_entered = true;
        nccl->inside = pthread_self();
    }
    kv_mutex_unlock(&nccl->lock);
    if (is_over)
        *status = refuse(nccl);
    else if (is_mine)
        *status = kv_fail(KV_INVALID, "this call would wait for the one that the signal handler it "
                                      "is made from has interrupted");
    return is_entered;
}

static kv_status_t enter(kv_nccl_t *nccl, patience_t *patience, const char *doing)
{
    kv_status_t status = KV_OK;
    while (!try_enter(nccl, &status) && status == KV_OK)
        status = pass_time(nccl, patience, doing);
    return status;
}

static void abort_all(kv_nccl_t *nccl)
{
    /* In a group: none may wait for the end of another before that is told. */
    (void)nccl->library->ncclGroupStart();
    for (int i = 0; i < nccl->num_members; i++) {
        if (nccl->members[i].comm != NULL)
            (void)nccl->library->ncclCommAbort(nccl->members[i].comm);
        nccl->members[i].comm = NULL;
    }
    (void)nccl->library->ncclGroupEnd();
}

/* `status`: how it went inside. Gives that, or that the group is lost. */
static kv_status_t leave(kv_nccl_t *nccl, kv_status_t status)
{
    if (status != KV_OK)
        remember(nccl, kv_status_message(status));
    kv_mutex_lock(&nccl->lock);
    bool is_over = status != KV_OK || atomic_load(&nccl->stop);
    nccl->is_entered = is_over;
    kv_mutex_unlock(&nccl->lock);
    if (!is_over)
        return KV_OK;
    abort_all(nccl);
    kv_mutex_lock(&nccl->lock);
    nccl->is_lost = true;
    nccl->is_entered = false;
    kv_mutex_unlock(&nccl->lock);
    return status != KV_OK ? status : refuse(nccl);
}

/* --------------------------------------------------------------------------- making, ending */

static kv_status_t check_devices(int num_devices, const int *devices, const kv_device_api_t *api)
{
    char sentence[KV_DEVICE_SENTENCE];
    if (num_devices < 1)
        return kv_fail(KV_INVALID, "NCCL needs a device");
    for (int i = 0; i < num_devices; i++) {
        KV_TRY(kv_device_check(api->make_current(devices[i], sentence), sentence));
        for (int j = 0; j < i; j++)
            if (devices[i] == devices[j])
                return kv_fail(KV_INVALID,
                               "device %d is named twice: NCCL works between different "
                               "ones",
                               devices[i]);
    }
    return KV_OK;
}

/* Begins with all communicators; their state tells of the end. */
static int begin(kv_nccl_t *nccl, const kv_nccl_id_t *id, const kv_device_api_t *api)
{
    char sentence[KV_DEVICE_SENTENCE];
    int result = nccl->library->ncclGroupStart();
    if (!is_fine(result))
        return result;
    for (int i = 0; i < nccl->num_members && is_fine(result); i++) {
        member_t *member = &nccl->members[i];
        kv_nccl_config_t config = {
            .bytes = sizeof config,
            .magic = KV_NCCL_MAGIC,
            .version = KV_NCCL_OLDEST,
            .blocking = 0,
            .cluster_size = KV_NCCL_UNSET,
            .min_blocks = KV_NCCL_UNSET,
            .max_blocks = KV_NCCL_UNSET,
            .split_share = KV_NCCL_UNSET,
            .unused = KV_NCCL_UNSET,
        };
        (void)api->make_current(member->device, sentence); /* it could be before */
        result = nccl->library->ncclCommInitRankConfig(&member->comm, nccl->num_ranks, *id,
                                                       nccl->first_rank + i, &config);
    }
    int ended = nccl->library->ncclGroupEnd();
    return is_fine(result) ? ended : result;
}

static kv_status_t join(kv_nccl_t *nccl, const kv_nccl_id_t *id, const int *devices,
                        kv_caller_t *caller)
{
    const kv_device_api_t *api;
    KV_TRY(kv_nccl_library(&nccl->library));
    KV_TRY(kv_device_enter(&api));
    kv_status_t status = check_devices(nccl->num_members, devices, api);
    int result = status == KV_OK ? begin(nccl, id, api) : KV_NCCL_SUCCESS;
    kv_device_leave();
    KV_TRY(status);
    patience_t patience_ = patience(caller, KV_DEVICE_WAIT_NS);
    nccl->is_entered = true;
    status = leave(nccl, await(nccl, result, &patience_, "begin"));
    patience_end(&patience_);
    return status;
}

kv_status_t kv_nccl_join(const kv_nccl_id_t *id, int num_ranks, int first_rank, int num_devices,
                         const int *devices, kv_caller_t *caller, kv_nccl_t **out)
{
    if (num_devices < 1 || first_rank < 0 || first_rank > num_ranks - num_devices)
        return kv_fail(
            KV_INVALID,
            "%d devices cannot be the ranks from %d on of %d: there must be one or more, "
            "and room for them",
            num_devices, first_rank, num_ranks);
    kv_nccl_t *nccl = kv_calloc(1, sizeof *nccl + (size_t)num_devices * sizeof(member_t));
    KV_TRY_ALLOC(nccl, "a group of devices");
    kv_mutex_init(&nccl->lock, KV_RANK_LEAF);
    nccl->generation = kv_fork_generation();
    nccl->num_ranks = num_ranks;
    nccl->first_rank = first_rank;
    nccl->num_members = num_devices;
    for (int i = 0; i < num_devices; i++)
        nccl->members[i].device = devices[i];
    kv_status_t status = join(nccl, id, devices, caller);
    if (status != KV_OK) {
        kv_mutex_fini(&nccl->lock);
        kv_free(nccl);
        return status;
    }
    kv_count(KV_COUNT_NCCL_GROUPS, 1);
    *out = nccl;
    return KV_OK;
}

kv_status_t kv_nccl_id(kv_nccl_id_t *out)
{
    const kv_nccl_library_t *library;
    kv_nccl_id_t id;
    KV_TRY(kv_nccl_library(&library));
    int result = library->ncclGetUniqueId(&id);
    if (result != KV_NCCL_SUCCESS)
        return kv_fail(KV_DEVICE, "NCCL could not begin: %s", library->ncclGetErrorString(result));
    *out = id;
    return KV_OK;
}

kv_status_t kv_nccl_new(int num_devices, const int *devices, kv_caller_t *caller, kv_nccl_t **out)
{
    kv_nccl_id_t id;
    KV_TRY(kv_nccl_id(&id));
    return kv_nccl_join(&id, num_devices, 0, num_devices, devices, caller, out);
}

/* Waits for the devices' work, in which communicators end together. */
static kv_status_t finish(kv_nccl_t *nccl, patience_t *patience)
{
    int result = KV_NCCL_SUCCESS;
    for (int i = 0; i < nccl->num_members && is_fine(result); i++)
        result = nccl->library->ncclCommFinalize(nccl->members[i].comm);
    KV_TRY(await(nccl, result, patience, "end"));
    for (int i = 0; i < nccl->num_members; i++) {
        (void)nccl->library->ncclCommDestroy(nccl->members[i].comm);
        nccl->members[i].comm = NULL;
    }
    return KV_OK;
}

kv_status_t kv_nccl_end(kv_nccl_t *nccl, kv_caller_t *caller)
{
    patience_t patience_ = patience(caller, FREE_NS);
    kv_status_t status = KV_OK;
    bool is_inside = false;
    while (!(is_inside = try_enter(nccl, &status)) && status == KV_OK)
        status = pass_time(nccl, &patience_, "end");
    if (is_inside) {
        status = finish(nccl, &patience_);
        remember(nccl, "it was ended");
        atomic_store(&nccl->stop, true);
        (void)leave(nccl, status);
    } else if (status == KV_TIMEOUT || status == KV_INTERRUPTED || status == KV_CALLBACK) {
        kv_nccl_abort(nccl, "somebody was inside when it was ended");
    } else {
        status = KV_OK; /* it is lost, or the parent's of this process */
    }
    patience_end(&patience_);
    return status;
}

kv_status_t kv_nccl_free(kv_nccl_t *nccl, kv_caller_t *caller)
{
    if (nccl == NULL)
        return KV_OK;
    kv_status_t status = kv_nccl_end(nccl, caller);
    kv_mutex_fini(&nccl->lock);
    kv_free(nccl);
    kv_count(KV_COUNT_NCCL_GROUPS, -1);
    return status;
}

kv_status_t kv_nccl_check(kv_nccl_t *nccl)
{
    kv_status_t status = KV_OK;
    if (!try_enter(nccl, &status))
        return status; /* who is inside looks himself */
    int state = state_of(nccl);
    return leave(nccl, is_fine(state) ? KV_OK : failed(nccl, state, "go on"));
}

void kv_nccl_abort(kv_nccl_t *nccl, const char *why)
{
    remember(nccl, why);
    kv_mutex_lock(&nccl->lock);
    bool is_mine = !nccl->is_entered && !nccl->is_lost;
    atomic_store(&nccl->stop, true);
    if (is_mine) {
        nccl->is_entered = true;
        nccl->inside = pthread_self();
    }
    kv_mutex_unlock(&nccl->lock);
    if (is_mine)
        (void)leave(nccl, KV_OK);
}

/* ------------------------------------------------------------------------------------ work */

enum { EVERYBODY = -1 }; /* the root of a sum */

static int put_one(const kv_nccl_t *nccl, int member, kv_lane_t lane, int root,
                   const kv_nccl_job_t *job)
{
    const kv_nccl_library_t *library = nccl->library;
    kv_nccl_comm_t comm = nccl->members[member].comm;
    size_t count = (size_t)job->count;
    int dtype = kv_nccl_dtype(job->dtype);
    void *dst = job->dst[member];
    if (root == EVERYBODY)
        return library->ncclAllReduce(job->src[member], dst, count, dtype, KV_NCCL_SUM, comm,
                                      lane.stream);
    const void *src = nccl->first_rank + member == root ? job->src[member] : dst;
    return library->ncclBroadcast(src, dst, count, dtype, root, comm, lane.stream);
}

/* All jobs of all devices in one group, or they would wait for each other. */
static int put(const kv_nccl_t *nccl, const kv_lane_t *lanes, int root, int num_jobs,
               const kv_nccl_job_t *jobs)
{
    int result = nccl->library->ncclGroupStart();
    if (!is_fine(result))
        return result;
    for (int i = 0; i < num_jobs; i++)
        for (int member = 0; member < nccl->num_members && is_fine(result); member++)
            if (jobs[i].count > 0)
                result = put_one(nccl, member, lanes[member], root, &jobs[i]);
    int ended = nccl->library->ncclGroupEnd();
    return is_fine(result) ? ended : result;
}

static kv_status_t run(kv_nccl_t *nccl, const kv_lane_t *lanes, int root, int num_jobs,
                       const kv_nccl_job_t *jobs, kv_caller_t *caller, const char *doing)
{
    patience_t patience_ = patience(caller, KV_DEVICE_WAIT_NS);
    kv_status_t status = enter(nccl, &patience_, doing);
    if (status == KV_OK)
        status =
            leave(nccl, await(nccl, put(nccl, lanes, root, num_jobs, jobs), &patience_, doing));
    patience_end(&patience_);
    return status;
}

kv_status_t kv_nccl_sum(kv_nccl_t *nccl, const kv_lane_t *lanes, int num_jobs,
                        const kv_nccl_job_t *jobs, kv_caller_t *caller)
{
    return run(nccl, lanes, EVERYBODY, num_jobs, jobs, caller, "sum");
}

kv_status_t kv_nccl_broadcast(kv_nccl_t *nccl, const kv_lane_t *lanes, int root, int num_jobs,
                              const kv_nccl_job_t *jobs, kv_caller_t *caller)
{
    if (root < 0 || root >= nccl->num_ranks)
        return kv_fail(KV_INVALID, "there is no rank %d to broadcast from: there are %d", root,
                       nccl->num_ranks);
    return run(nccl, lanes, root, num_jobs, jobs, caller, "broadcast");
}
