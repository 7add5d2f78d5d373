/* The order of calls on a key: which wait, and which go to the endpoint.
 *
 * A call waits in the list `held` when one of its keys would be too many rounds ahead, or when an
 * older call on one of its keys waits. With every end of a call the list is gone through from the
 * oldest on.
 */
#include "ps/client_internal.h"

/* Adds `sign` calls that are under way to the keys' counts. */
static void count_started_locked(const kv_client_work_t *work, int32_t sign)
{
    const kv_client_call_t *call = work->call;
    for (int64_t i = 0; call->verb != KV_CLIENT_DECLARE && i < work->num_remotes; i++) {
        work->remotes[i]->started += sign;
        work->remotes[i]->pushing += kv_part_pushes(call, i) ? sign : 0;
    }
}

static void count_held_locked(const kv_client_work_t *work, int32_t sign)
{
    for (int64_t i = 0; i < work->num_remotes; i++)
        work->remotes[i]->held += sign;
}

/* Whether one of the keys does not let this call go, whatever waits before it. */
static bool is_early_locked(const kv_client_work_t *work)
{
    const kv_client_call_t *call = work->call;
    for (int64_t i = 0; call->verb != KV_CLIENT_DECLARE && i < work->num_remotes; i++) {
        const kv_remote_t *remote = work->remotes[i];
        if (kv_part_pushes(call, i) && remote->pushing >= KV_CLIENT_ROUNDS)
            return true;
        if (call->verb == KV_CLIENT_DELETE && remote->started > 0)
            return true;
    }
    return false;
}

static bool is_behind_locked(const kv_client_work_t *work)
{
    bool behind = false;
    for (int64_t i = 0; work->call->verb != KV_CLIENT_DECLARE && i < work->num_remotes; i++)
        behind = behind || work->remotes[i]->held > 0;
    return behind;
}

void kv_client_send_locked(kv_client_t *client, kv_outgoing_t *message)
{
    message->state = KV_OUT_QUEUED;
    kv_status_t status = kv_net_send(client->net, &message->net);
    if (status == KV_OK)
        return;
    message->state = KV_OUT_WAITS;
    kv_client_peer_lost_locked(client, message->net.peer, status);
}

static void launch_locked(kv_client_t *client, kv_client_work_t *work) KV_REQUIRES(client->lock)
{
    work->started = true;
    count_started_locked(work, 1);
    for (uint32_t i = 0; i < work->num_messages && client->status == KV_OK; i++)
        kv_client_send_locked(client, &work->messages[i]);
}

/* Lets those go that may: no key of theirs is too far ahead or belongs to one that stays here. */
static void release_held_locked(kv_client_t *client) KV_REQUIRES(client->lock)
{
    client->walk++;
    kv_client_work_t **link = &client->held;
    while (*link != NULL) {
        kv_client_work_t *work = *link;
        bool stays = is_early_locked(work);
        for (int64_t i = 0; i < work->num_remotes; i++)
            stays = stays || work->remotes[i]->mark == client->walk;
        if (stays) {
            for (int64_t i = 0; i < work->num_remotes; i++)
                work->remotes[i]->mark = client->walk;
            link = &work->next_held;
            continue;
        }
        *link = work->next_held;
        if (*link == NULL)
            client->held_end = link;
        count_held_locked(work, -1);
        launch_locked(client, work);
        if (client->status != KV_OK)
            return; /* the list is empty now */
    }
}

int32_t kv_work_priority_locked(const kv_client_work_t *work)
{
    const kv_client_call_t *call = work->call;
    int32_t lowest = call->priority;
    int64_t count = call->verb == KV_CLIENT_DECLARE ? 0 : work->num_remotes;
    for (int64_t i = 0; i < count; i++) {
        const kv_remote_t *remote = work->remotes[i];
        if (remote->started + remote->held > 0 && remote->lowest < lowest)
            lowest = remote->lowest;
    }
    for (int64_t i = 0; i < count; i++)
        work->remotes[i]->lowest = lowest;
    return lowest;
}

void kv_client_queue_locked(kv_client_t *client, kv_client_work_t *work)
{
    if (!is_behind_locked(work) && !is_early_locked(work)) {
        launch_locked(client, work);
        return;
    }
    count_held_locked(work, 1);
    work->next_held = NULL;
    *client->held_end = work;
    client->held_end = &work->next_held;
}

void kv_client_unqueue_locked(kv_client_t *client, kv_client_work_t *work)
{
    if (!work->started) { /* the cluster was lost, the list given up */
        count_held_locked(work, -1);
        return;
    }
    count_started_locked(work, -1);
    release_held_locked(client);
}
