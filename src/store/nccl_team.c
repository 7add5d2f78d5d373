/* Who adds up together: the devices of one process or of several, their groups, and the end of
 * these when a device, a process or the user's patience is lost.
 */
#include "base/memory.h"
#include "base/thread.h"
#include "store/internal.h"
#include "store/nccl.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

enum { LEFT = 1, LOST = 2 }; /* kv_nccl_team.missing */

/* NCCL may find a peer gone before this process is told who it is. */
#define TOLD_NS (2 * INT64_C(1000000000))
#define LOOK_NS (10 * INT64_C(1000000))

/* The ends of the newest work that uses NCCL, by device, whichever store's it is. */
static struct {
    kv_mutex_t lock;
    kv_mark_t *newest[KV_NCCL_DEVICES];
} order = {.lock = KV_MUTEX_INIT(KV_RANK_LEAF)};

static kv_mark_t *newest_on(int device)
{
    kv_mutex_lock(&order.lock);
    kv_mark_t *mark = order.newest[device];
    mark = mark != NULL ? kv_mark_hold(mark) : NULL;
    kv_mutex_unlock(&order.lock);
    return mark;
}

void kv_nccl_set_newest(int device, kv_mark_t *mark)
{
    kv_mutex_lock(&order.lock);
    kv_mark_t *before = order.newest[device];
    order.newest[device] = kv_mark_hold(mark);
    kv_mutex_unlock(&order.lock);
    kv_mark_rele(before);
}

kv_status_t kv_nccl_come_after(kv_lane_t lane)
{
    kv_mark_t *mark = newest_on(lane.device);
    kv_status_t status = mark != NULL ? kv_mark_before(mark, lane) : KV_OK;
    kv_mark_rele(mark);
    return status;
}

/* --------------------------------------------------------------------------- making, ending */

kv_status_t kv_nccl_team_new(const kv_nccl_peers_t *peers, kv_nccl_team_t **out)
{
    const kv_device_api_t *api;
    const char *file;
    int version;
    kv_status_t status = kv_device_load(&api);
    if (status == KV_OK)
        status = kv_nccl_load(NULL, &file, &version);
    if (status != KV_OK)
        return kv_fail(status,
                       "a store of kind 'nccl' cannot be had here: %s; one of kind 'device' "
                       "needs no NCCL, and for arrays in host memory no CUDA",
                       kv_status_message(status));
    kv_nccl_team_t *team = kv_calloc(1, sizeof *team);
    KV_TRY_ALLOC(team, "a store");
    atomic_init(&team->refs, 1);
    kv_mutex_init(&team->lock, KV_RANK_LEAF);
    if (peers != NULL)
        team->peers = *peers;
    *out = team;
    return KV_OK;
}

kv_nccl_team_t *kv_nccl_team_hold(kv_nccl_team_t *team)
{
    if (team != NULL)
        atomic_fetch_add(&team->refs, 1);
    return team;
}

kv_nccl_peers_t *kv_nccl_team_peers(kv_nccl_team_t *team)
{
    return kv_nccl_team_many(team) ? &team->peers : NULL;
}

/* The groups that are there, each once; gives how many. */
static int groups_of(kv_nccl_team_t *team, kv_nccl_t **groups)
{
    int count = 0;
    kv_nccl_t *pushing = atomic_load(&team->pushing.group);
    kv_nccl_t *early = atomic_load(&team->early.group);
    if (pushing != NULL)
        groups[count++] = pushing;
    if (early != NULL && early != pushing)
        groups[count++] = early;
    return count;
}

void kv_nccl_team_rele(kv_nccl_team_t *team)
{
    kv_nccl_t *groups[2];
    if (team == NULL || atomic_fetch_sub(&team->refs, 1) != 1)
        return;
    for (int i = groups_of(team, groups) - 1; i >= 0; i--) {
        kv_status_t status = kv_nccl_free(groups[i], NULL);
        (void)status; /* what was not done in time is aborted */
    }
    kv_mutex_fini(&team->lock);
    kv_free(team);
}

static void abort_all(kv_nccl_team_t *team, const char *why)
{
    kv_nccl_t *groups[2];
    for (int i = groups_of(team, groups) - 1; i >= 0; i--)
        kv_nccl_abort(groups[i], why);
}

void kv_nccl_team_end(kv_nccl_team_t *team, bool together)
{
    kv_nccl_t *groups[2];
    if (!together)
        abort_all(team, "its store is closed");
    /* In one order everywhere. */
    for (int i = 0, count = groups_of(team, groups); together && i < count; i++) {
        kv_status_t status = kv_nccl_end(groups[i], NULL);
        (void)status; /* what was not done in time is aborted */
    }
}

/* ------------------------------------------------------------------------------ who is there */

static void miss(kv_nccl_team_t *team, int missing, const char *why)
{
    kv_mutex_lock(&team->lock);
    if (atomic_load(&team->missing) < missing) {
        snprintf(team->why, sizeof team->why, "%s", why);
        atomic_store(&team->missing, missing);
    }
    kv_mutex_unlock(&team->lock);
}

void kv_nccl_team_lose(kv_nccl_team_t *team, const char *why)
{
    miss(team, LOST, why);
    abort_all(team, why);
}

void kv_nccl_team_depart(kv_nccl_team_t *team, const char *why)
{
    miss(team, LEFT, why);
}

kv_status_t kv_nccl_team_whole(kv_nccl_team_t *team, bool for_all)
{
    char why[KV_MESSAGE_BYTES];
    if (team == NULL || KV_LIKELY(atomic_load(&team->missing) < (for_all ? LEFT : LOST)))
        return KV_OK;
    kv_mutex_lock(&team->lock);
    memcpy(why, team->why, sizeof why);
    kv_mutex_unlock(&team->lock);
    return kv_fail(KV_PEER_LOST, "%s", why);
}

/* ------------------------------------------------------------------------------------ devices */

/* KV_DEVICE: one is lost. *idle: none has work that uses NCCL. */
static kv_status_t look_at_devices(const kv_nccl_crew_t *crew, bool *idle)
{
    kv_status_t status = KV_OK;
    *idle = true;
    for (int k = 0; k < crew->count && status == KV_OK; k++) {
        bool passed = true;
        kv_mark_t *mark = newest_on(crew->devices[k]);
        if (mark != NULL)
            status = kv_mark_passed(mark, &passed);
        kv_mark_rele(mark);
        *idle = *idle && passed;
    }
    return status;
}

/* The crew that works, NULL if there is none yet. */
static kv_nccl_crew_t *crew_of(kv_nccl_team_t *team)
{
    if (team == NULL)
        return NULL;
    return atomic_load(&team->pushing.group) != NULL ? &team->pushing
           : atomic_load(&team->early.group) != NULL ? &team->early
                                                     : NULL;
}

bool kv_nccl_team_works(kv_nccl_team_t *team)
{
    return crew_of(team) != NULL;
}

kv_status_t kv_nccl_team_check(kv_nccl_team_t *team)
{
    bool idle;
    kv_nccl_crew_t *crew = crew_of(team);
    if (KV_LIKELY(crew == NULL))
        return kv_nccl_team_whole(team, false);
    kv_status_t status = look_at_devices(crew, &idle);
    if (status != KV_OK)
        abort_all(team, kv_status_message(status));
    status = kv_nccl_check(atomic_load(&crew->group));
    kv_status_t whole = kv_nccl_team_whole(team, false);
    return whole != KV_OK || status == KV_OK ? whole : status;
}

static kv_status_t gave_up(kv_nccl_team_t *team)
{
    bool idle = true;
    kv_nccl_crew_t *crew = crew_of(team);
    if (crew == NULL)
        return KV_TIMEOUT;
    char why[KV_MESSAGE_BYTES];
    snprintf(why, sizeof why, "%s", kv_status_message(KV_TIMEOUT));
    KV_TRY(look_at_devices(crew, &idle));
    if (!idle)
        abort_all(team, why);
    return kv_fail(KV_TIMEOUT, "%s", why);
}

/* Waits until a number is zero, or is not, or the time is over. */
static kv_status_t await(atomic_int *number, bool zero, int64_t end, kv_caller_t *caller)
{
    kv_status_t status = KV_OK;
    bool was_attached = !caller->detached;
    kv_caller_detach(caller);
    while (status == KV_OK && (atomic_load(number) == 0) != zero && kv_clock_ns() < end) {
        nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL);
        status = caller->poll(caller);
    }
    if (was_attached)
        kv_caller_attach(caller);
    return status;
}

kv_status_t kv_nccl_team_failed(kv_nccl_team_t *team, kv_status_t status, kv_caller_t *caller)
{
    char why[KV_MESSAGE_BYTES];
    bool many = kv_nccl_team_many(team);
    if (many && (status == KV_DEVICE || status == KV_TIMEOUT)) {
        snprintf(why, sizeof why, "%s", kv_status_message(status));
        if (status == KV_DEVICE && !atomic_exchange(&team->awaited, true))
            KV_TRY(await(&team->missing, false, kv_clock_ns() + TOLD_NS, caller));
        KV_TRY(kv_nccl_team_whole(team, true));
        (void)kv_fail(status, "%s", why);
    }
    return status == KV_TIMEOUT ? gave_up(team) : status;
}

kv_status_t kv_nccl_team_drain(kv_nccl_team_t *team, kv_caller_t *caller)
{
    KV_TRY(await(&team->inside, true, kv_caller_deadline(caller), caller));
    if (atomic_load(&team->inside) != 0)
        return kv_fail(KV_TIMEOUT, "a call has not come to the end of its work with NCCL");
    kv_nccl_crew_t *crew = crew_of(team);
    kv_status_t status = KV_OK;
    for (int k = 0; crew != NULL && k < crew->count && status == KV_OK; k++) {
        kv_mark_t *mark = newest_on(crew->devices[k]);
        if (mark != NULL)
            status = kv_mark_wait(mark, caller);
        kv_mark_rele(mark);
    }
    kv_status_t whole = kv_nccl_team_whole(team, false);
    return whole != KV_OK ? whole : status;
}

/* ----------------------------------------------------------------------------------- meetings */

/* A caller that hears of a loss too: until a group is made nobody can abort it. */
typedef struct watching {
    kv_caller_t base;
    kv_caller_t *caller;
    kv_nccl_team_t *team;
} watching_t;

static void detach(kv_caller_t *base)
{
    kv_caller_detach(((watching_t *)base)->caller);
}

static void attach(kv_caller_t *base)
{
    kv_caller_attach(((watching_t *)base)->caller);
}

static kv_status_t poll(kv_caller_t *base)
{
    watching_t *watching = (watching_t *)base;
    KV_TRY(kv_nccl_team_whole(watching->team, true));
    return watching->caller->poll(watching->caller);
}

static kv_status_t join_others(kv_nccl_team_t *team, const kv_meeting_t *meeting,
                               const int *devices, kv_caller_t *caller, kv_nccl_t **out)
{
    watching_t watching = {.base = {.detach = detach,
                                    .attach = attach,
                                    .poll = poll,
                                    .timeout_ns = caller->timeout_ns,
                                    .deadline_ns = kv_caller_deadline(caller),
                                    .detached = caller->detached},
                           .caller = caller,
                           .team = team};
    return kv_nccl_join(&meeting->id, meeting->num_ranks, meeting->first_rank, meeting->num_devices,
                        devices, &watching.base, out);
}

static kv_status_t meet(kv_nccl_team_t *team, kv_meeting_t *meeting, kv_caller_t *caller)
{
    bool was_attached = !caller->detached;
    KV_TRY(kv_nccl_team_whole(team, true));
    kv_caller_attach(caller);
    kv_status_t status = team->peers.meet(team->peers.context, meeting, caller);
    if (!was_attached)
        kv_caller_detach(caller);
    return status;
}

/* One who loses the others between the making of a group and its being known has not aborted it. */
static kv_status_t publish(kv_nccl_team_t *team, kv_nccl_crew_t *crew, kv_nccl_t *group)
{
    atomic_store(&crew->group, group);
    kv_status_t status = kv_nccl_team_whole(team, false);
    if (status != KV_OK)
        abort_all(team, kv_status_message(status));
    return status;
}

kv_status_t kv_nccl_team_join(kv_nccl_team_t *team, bool early, int count, const int *devices,
                              const char *call, kv_caller_t *caller)
{
    kv_nccl_crew_t *crew = early ? &team->early : &team->pushing;
    kv_nccl_t *made = atomic_load(&crew->group);
    bool is_there = made != NULL;
    if (!is_there && count == 1 && team->early.devices[0] == devices[0])
        made = atomic_load(&team->early.group);
    if (!kv_nccl_team_many(team)) {
        KV_TRY(kv_nccl_new(count, devices, caller, &made));
    } else {
        kv_meeting_t meeting = {.call = call, .num_devices = count, .fits = made != NULL};
        KV_TRY(meet(team, &meeting, caller));
        if (is_there && !meeting.all_fit)
            return kv_fail(KV_DEVICE, "another worker has not got the group that this one has: "
                                      "close the stores and make new ones");
        if (!meeting.all_fit)
            KV_TRY(join_others(team, &meeting, devices, caller, &made));
    }
    if (is_there)
        return KV_OK;
    crew->count = count;
    memcpy(crew->devices, devices, (size_t)count * sizeof *devices);
    return publish(team, crew, made);
}

const char *kv_plan_tell(const char *verb, const kv_plan_t *plan, char *out, size_t bytes)
{
    char name[96];
    uint64_t digest = 0;
    for (int64_t g = 0; g < plan->num_groups; g++) {
        const kv_entry_t *entry = plan->groups[g].entry;
        digest = (digest ^ entry->hash) * 0x100000001b3u + (uint64_t)entry->dtype;
        for (int i = 0; i < entry->ndim; i++)
            digest = (digest ^ (uint64_t)entry->shape[i]) * 0x100000001b3u + 1;
    }
    const kv_entry_t *first = plan->groups[0].entry;
    snprintf(out, bytes, "%s of key %s and %lld more, %lld elements of type %s (%016llx)", verb,
             kv_name_format(&first->name, name, sizeof name), (long long)plan->num_groups - 1,
             (long long)first->count, kv_dtype_name(first->dtype), (unsigned long long)digest);
    return out;
}
