/* Whom a request on a slice waits for, and who will not come any more. */
#include "ps/server_internal.h"
#include <inttypes.h>

kv_status_t kv_slice_check_left_locked(kv_server_t *server, const kv_slice_t *slice,
                                       const kv_request_t *request)
{
    const kv_wire_record_t *record = &request->header.record;
    uint64_t begin = slice->version + slice->busy; /* the first round that is not under way */
    bool pushes = record->action == KV_WIRE_PUSH || record->action == KV_WIRE_PUSHPULL;
    uint64_t end = record->round + pushes; /* behind the last one needed */
    if (!kv_slice_has_value(slice) && server->presence[0] == KV_ABSENT)
        return kv_fail(KV_LEFT, "worker 0 has left the cluster without initialising it");
    for (int32_t i = 0; i < server->num_workers && !server->async; i++) {
        uint64_t round = begin;
        const kv_request_t *push = slice->workers[i].pushes;
        for (; push != NULL && push->header.record.round == round; push = push->next)
            round++;
        if (round < end && server->presence[i] == KV_ABSENT)
            return kv_fail(KV_LEFT,
                           "worker %" PRId32 " has left the cluster after %" PRIu64 " pushes, and "
                           "round %" PRIu64 " takes one of every worker",
                           i, round, round);
    }
    return KV_OK;
}

/* Asynchronous: some push waits until slice 0 has chosen it. */
static bool waits_for_turn(const kv_slice_t *slice)
{
    for (int32_t i = 0; i < slice->server->num_workers && !slice->busy; i++) {
        const kv_request_t *push = slice->workers[i].pushes;
        if (push != NULL && !kv_norms_may_begin(slice, push))
            return true;
    }
    return false;
}

kv_status_t kv_slice_missing_locked(kv_server_t *server, const kv_slice_t *slice)
{
    if (!kv_slice_has_value(slice))
        return kv_fail(KV_TIMEOUT, "worker 0 has not initialised the key");
    if (slice->phase == KV_PHASE_MEASURES || waits_for_turn(slice))
        return kv_norms_missing_locked(server, slice);
    if (slice->reading)
        return kv_fail(KV_TIMEOUT, "what an optimizer in Python keeps with it is not packed yet");
    if (slice->phase == KV_PHASE_SUMS)
        return kv_fail(KV_TIMEOUT, "the optimizer in Python has not ended round %" PRIu64,
                       slice->version);
    for (int32_t i = 0; i < server->num_workers && !slice->busy && !server->async; i++) {
        const kv_request_t *push = slice->workers[i].pushes;
        if (push == NULL || push->header.record.round != slice->version)
            return kv_fail(KV_TIMEOUT, "worker %" PRId32 " has not pushed round %" PRIu64, i,
                           slice->version);
    }
    return kv_fail(KV_TIMEOUT, "round %" PRIu64 " is not finished", slice->version);
}
