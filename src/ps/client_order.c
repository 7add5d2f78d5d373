/* The order of calls on a key: which wait, and which go to the endpoint.
 *
 * Messages may arrive in another order than they were sent. To a server a push of a later round is
 * one, and a pull waits for the rounds before it; but a pull that comes late finds a value that is
 * too new. So a push waits here for the pulls before it, besides when its key would be too many
 * rounds ahead. A call that waits does so with all of its keys, in the list `held`, and so does
 * every younger call on one of them. With every end of a call the list is gone through from the
 * oldest on. As long as all workers make their calls in the same order, the oldest call that has
 * not ended everywhere waits nowhere.
 */
#include "ps/client_internal.h"

/* Adds `sign` calls that are under way to the keys' counts. */
static void count_started_locked(const kv_client_work_t *work, int32_t sign)
{
    const kv_client_call_t *call = work->call;
    for (int64_t i = 0; call->verb != KV_CLIENT_DECLARE && i < work->num_remotes; i++) {
        *(kv_part_pushes(call, i) ? &work->remotes[i]->pushing : &work->remotes[i]->pulling) +=
            sign;
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
        if (kv_part_pushes(call, i) && (remote->pushing >= KV_CLIENT_ROUNDS || remote->pulling > 0))
            return true;
        if (call->verb == KV_CLIENT_DELETE && remote->pushing + remote->pulling > 0)
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
    kv_work_write_locked(work);
    for (int64_t i = 0; i < work->num_remotes; i++)
        work->remotes[i]->pushes += kv_part_pushes(work->call, i);
    count_started_locked(work, 1);
    for (uint32_t i = 0; i < work->num_messages && client->status == KV_OK; i++)
        if (work->messages[i].there == work->messages[i].count)
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

/* What waits behind a call that has ended and cannot go any more: pushes behind one that failed
 * because a worker is late would be further ahead of it still; a delete has left nothing. */
static void withdraw_behind_locked(kv_client_t *client, const kv_client_work_t *ended)
    KV_REQUIRES(client->lock)
{
    bool deleted = ended->call->verb == KV_CLIENT_DELETE;
    client->walk++;
    for (int64_t i = 0; i < ended->num_remotes; i++)
        if (deleted || kv_part_pushes(ended->call, i))
            ended->remotes[i]->mark = client->walk;
    kv_client_work_t **link = &client->held;
    while (*link != NULL) {
        kv_client_work_t *work = *link;
        const kv_remote_t *behind = NULL;
        for (int64_t i = 0; i < work->num_remotes && behind == NULL; i++)
            if ((deleted || kv_part_pushes(work->call, i)) &&
                work->remotes[i]->mark == client->walk)
                behind = work->remotes[i];
        if (behind == NULL) {
            link = &work->next_held;
            continue;
        }
        *link = work->next_held;
        char name[64];
        if (deleted)
            kv_fail(KV_NO_KEY, "key %s was deleted before this call came to its turn",
                    kv_name_format(&behind->name, name, sizeof name));
        else
            kv_fail(KV_TIMEOUT, "%s; a later push was not sent", ended->error.message);
        kv_sentence_save(&work->error);
        work->call->unsent = true;
        kv_work_fail_locked(work);
    }
    client->held_end = link;
}

void kv_client_unqueue_locked(kv_client_t *client, kv_client_work_t *work)
{
    if (work->started)
        count_started_locked(work, -1);
    else
        count_held_locked(work, -1);
    if (client->status != KV_OK)
        return;
    if (work->started && ((work->error.code == KV_TIMEOUT && work->call->verb == KV_CLIENT_MOVE) ||
                          (work->error.code == KV_OK && work->call->verb == KV_CLIENT_DELETE)))
        withdraw_behind_locked(client, work);
    release_held_locked(client);
}
