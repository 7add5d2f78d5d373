/* The devices of a store of kind `nccl`, of one process or of several, and the groups that they
 * make.
 *
 * In one process the first push that NCCL can take tells the devices. Of several processes each
 * tells its own by its first push; before that, the first `init` makes a group with one device of
 * each, by which new keys get worker 0's values. A group is made by a meeting: all processes come
 * to the same call, tell how many devices they bring, and get ranks and an id. If every process
 * then has the one device that it had before, the first group is the second as well.
 */
#ifndef KV_STORE_NCCL_H
#define KV_STORE_NCCL_H

#include "comm/nccl.h"
#include "kv.h"

enum { KV_NCCL_DEVICES = 64 };

/* What processes tell each other when they meet. */
typedef struct kv_meeting {
    const char *call; /* the same words everywhere, or they do different things */
    int num_devices;  /* of this process */
    bool fits;        /* they have a group already */
    /* Out: that of every process, or ranks in a new one, made with the id. */
    bool all_fit;
    int num_ranks, first_rank;
    kv_nccl_id_t id;
} kv_meeting_t;

/* Where a process stands among several. */
typedef struct kv_nccl_peers {
    int32_t rank, num_workers;
    void *context;
    /* Waits for all processes, in the caller's time. Called attached, by one thread at a time, with
     * keys held. KV_CALLBACK: the caller's exception is set. */
    kv_status_t (*meet)(void *context, kv_meeting_t *meeting, kv_caller_t *caller);
} kv_nccl_peers_t;

/* Gives the devices of a store, not known yet, shared by counting. `peers` NULL: in one process.
 * KV_NOT_BUILT, KV_DEVICE if there is no NCCL or no device. */
KV_MUST_CHECK kv_status_t kv_nccl_team_new(const kv_nccl_peers_t *peers, kv_nccl_team_t **out);
kv_nccl_team_t *kv_nccl_team_hold(kv_nccl_team_t *team); /* NULL is allowed, here and below */
/* The last one waits for what NCCL still does, ten seconds at most. */
void kv_nccl_team_rele(kv_nccl_team_t *team);
/* Of several processes; NULL: of one. May be changed until the team is used. */
kv_nccl_peers_t *kv_nccl_team_peers(kv_nccl_team_t *team);

/* KV_DEVICE if NCCL or one of its devices has failed, KV_PEER_LOST if a process is gone: no value
 * can be relied on then, be it on another device. */
KV_MUST_CHECK kv_status_t kv_nccl_team_check(kv_nccl_team_t *team);
/* Whether there are devices that NCCL has worked for. */
bool kv_nccl_team_works(kv_nccl_team_t *team);
/* A call has ended with this status. After KV_TIMEOUT what devices still do for NCCL is ended.
 * Gives the call's status: KV_PEER_LOST if a process is gone (after KV_DEVICE that is waited for a
 * moment), KV_DEVICE if a device is lost, so that it was waited for in vain, else the same. */
KV_MUST_CHECK kv_status_t kv_nccl_team_failed(kv_nccl_team_t *team, kv_status_t status,
                                              kv_caller_t *caller);

/* Of several processes, any thread: from now on every call fails with KV_PEER_LOST and this
 * sentence, and what NCCL does is ended. The first reason stays. */
void kv_nccl_team_lose(kv_nccl_team_t *team, const char *why);
/* The same for calls that take all processes; others go on. */
void kv_nccl_team_depart(kv_nccl_team_t *team, const char *why);
/* KV_OK, or KV_PEER_LOST: for any call, or for one that takes all processes. */
KV_MUST_CHECK kv_status_t kv_nccl_team_whole(kv_nccl_team_t *team, bool for_all);
/* Waits for calls that use NCCL, and for the devices' work for it. */
KV_MUST_CHECK kv_status_t kv_nccl_team_drain(kv_nccl_team_t *team, kv_caller_t *caller);
/* Ends the groups: `together` with those of all other processes, or at once. */
void kv_nccl_team_end(kv_nccl_team_t *team, bool together);

/* ------------------------------------------------------------------------------- for nccl.c */

/* Devices that have a group. */
typedef struct kv_nccl_crew {
    kv_nccl_t *_Atomic group; /* NULL: not yet. Set last, nothing changes then */
    int count;
    int devices[KV_NCCL_DEVICES];
} kv_nccl_crew_t;

/* What is not atomic belongs to the call that holds the runtime's variable. */
struct kv_nccl_team {
    _Atomic int64_t refs;
    kv_nccl_peers_t peers;         /* num_workers is 0 in one process */
    kv_nccl_crew_t pushing, early; /* `early` until the first push; they may have one group */
    atomic_int missing;            /* 0: nobody, 1: one has left, 2: one is lost */
    atomic_int inside;             /* calls between their first step and their last mark */
    atomic_bool awaited;           /* news of one that is lost; they did not come */
    kv_mutex_t lock;
    char why[KV_MESSAGE_BYTES]; /* lock */
};

static inline bool kv_nccl_team_many(const kv_nccl_team_t *team)
{
    return team != NULL && team->peers.num_workers > 0;
}

/* With the runtime's variable held: gives the team the group of these devices for pushes, or with
 * `early` the one for new keys. `call`: for the meeting. */
KV_MUST_CHECK kv_status_t kv_nccl_team_join(kv_nccl_team_t *team, bool early, int count,
                                            const int *devices, const char *call,
                                            kv_caller_t *caller);

/* Work of several groups on one device comes in the same order everywhere, or devices would wait
 * for each other: what is put on the lane comes after the newest work that uses NCCL there,
 * whichever store's, and its own end is the newest then. */
KV_MUST_CHECK kv_status_t kv_nccl_come_after(kv_lane_t lane);
void kv_nccl_set_newest(int device, kv_mark_t *mark);

typedef struct kv_work kv_work_t; /* store/internal.h */
typedef struct kv_plan kv_plan_t;
/* The key of the work comes to the first device, and its twins to the others. */
KV_MUST_CHECK kv_status_t kv_nccl_settle(const kv_nccl_crew_t *crew, const kv_work_t *model);
/* The words by which processes know that they do the same: the first key, and a digest of all. */
const char *kv_plan_tell(const char *verb, const kv_plan_t *plan, char *out, size_t bytes);

#endif
