/* Rounds whose step takes norms of the whole value, of values that lie in several slices.
 *
 * Such a round has two halves. When a slice has its pushes it takes the sums of squares of weight
 * and gradient, which changes nothing, and tells them to the slices beside it and to the other
 * servers. When those of all slices are there, each takes the step with their total, added up in
 * the order of the slices, so with the same factors everywhere. A slice that cannot take the step
 * tells that instead: then the round fails on all slices, with its reason. Every slice tells one or
 * the other in every round, and none ends a round before all have; so no two of them are ever more
 * than one round apart, and two tables are enough. They are made when the value comes, so that
 * nothing that is told finds no memory.
 *
 * All sums go to all servers. Who has no slice of the key drops them.
 *
 * An asynchronous server may find the pushes of several workers, and slices that choose different
 * ones would wait for each other. So slice 0 chooses: what it tells names the push and the step's
 * count, and the other slices take that one next. It may come before the value does.
 */
#include "ps/client.h"
#include "ps/server_internal.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* What slices have told in a round. */
typedef struct norm_round {
    uint32_t num_told;
    kv_error_t *error;    /* of the first that has failed */
    kv_slice_t *waiting;  /* those of this server that have told */
    kv_norm_sums_t *sums; /* [num_slices] … */
    uint8_t *told;        /* … and whether they are there */
    /* Asynchronous: the push that slice 0 has taken. */
    bool has_turn;
    int32_t worker;
    uint64_t push;
    int64_t t;
} norm_round_t;

struct kv_key_norms {
    uint32_t num_slices;
    uint64_t done;          /* rounds that are over */
    norm_round_t rounds[2]; /* `done` and the next one, by their lowest bit */
    uint16_t *servers;      /* [num_slices]: 1 + who has it, 0: not known yet */
    kv_norm_sums_t sums[];
};

/* Of a value that no cluster has memory for. */
enum { MOST_SLICES = 1 << 22 };

/* A message to another server. */
typedef struct note {
    kv_net_message_t message; /* first */
    kv_error_t *error;        /* has the payload */
} note_t;

/* ----------------------------------------------------------------------------------- tables */

static norm_round_t *round_of(kv_key_norms_t *norms, uint64_t number)
{
    return &norms->rounds[number & 1];
}

static kv_status_t norms_new(uint32_t num_slices, kv_key_norms_t **out)
{
    size_t count = num_slices;
    kv_key_norms_t *norms =
        kv_calloc(1, sizeof *norms + 2 * count * (sizeof norms->sums[0] + sizeof(uint8_t)) +
                         count * sizeof norms->servers[0]);
    KV_TRY_ALLOC(norms, "the norms of a key");
    norms->num_slices = num_slices;
    norms->servers = (uint16_t *)&norms->sums[2 * count];
    for (size_t i = 0; i < 2; i++) {
        norms->rounds[i].sums = norms->sums + i * count;
        norms->rounds[i].told = (uint8_t *)(norms->servers + count) + i * count;
    }
    *out = norms;
    return KV_OK;
}

uint32_t kv_norms_num_slices(const kv_key_norms_t *norms)
{
    return norms->num_slices;
}

void kv_norms_free(kv_key_norms_t *norms)
{
    if (norms == NULL)
        return;
    kv_error_rele(norms->rounds[0].error);
    kv_error_rele(norms->rounds[1].error);
    kv_free(norms);
}

kv_status_t kv_norms_init_locked(kv_server_t *server, kv_server_key_t *key, uint64_t num_slices,
                                 uint32_t slice)
{
    if (num_slices <= 1)
        return KV_OK;
    if (num_slices > MOST_SLICES || slice >= num_slices ||
        (key->norms != NULL && key->norms->num_slices != num_slices))
        return kv_fail(KV_INVALID, "slice %" PRIu32 " is not one of %" PRIu64 " slices", slice,
                       num_slices);
    if (key->norms == NULL)
        KV_TRY(norms_new((uint32_t)num_slices, &key->norms));
    key->norms->servers[slice] = (uint16_t)(server->index + 1);
    return KV_OK;
}

/* -------------------------------------------------------------------------------- who goes on */

static void list_locked(kv_server_t *server, kv_slice_t *slice) KV_REQUIRES(server->mutex)
{
    if (slice->listed)
        return;
    slice->listed = true;
    slice->next_listed = server->listed;
    server->listed = slice;
}

kv_slice_t *kv_norms_next_locked(kv_server_t *server)
{
    kv_slice_t *slice = server->listed;
    if (slice != NULL) {
        server->listed = slice->next_listed;
        slice->listed = false;
    }
    return slice;
}

void kv_norms_unlist_locked(kv_server_t *server, kv_slice_t *slice)
{
    if (!slice->listed)
        return;
    kv_slice_t **link = &server->listed;
    while (*link != slice)
        link = &(*link)->next_listed;
    *link = slice->next_listed;
    slice->listed = false;
}

/* All slices have told. */
static void complete_locked(kv_server_t *server, kv_key_norms_t *norms) KV_REQUIRES(server->mutex)
{
    norm_round_t *round = round_of(norms, norms->done);
    kv_norm_sums_t total = {.weight = 0};
    kv_slice_t *next;
    for (uint32_t i = 0; i < norms->num_slices; i++)
        kv_norm_sums_add(&total, &round->sums[i]);
    for (kv_slice_t *slice = round->waiting; slice != NULL; slice = next) {
        next = slice->next_waiting;
        slice->phase = KV_PHASE_ENDS;
        slice->sums = total;
        slice->failure = round->error != NULL ? kv_error_hold(round->error) : NULL;
        list_locked(server, slice);
    }
    kv_error_rele(round->error);
    memset(round->told, 0, norms->num_slices);
    *round = (norm_round_t){.sums = round->sums, .told = round->told};
    norms->done++;
}

/* What a slice has told, the error taken. */
static void note_locked(kv_server_t *server, kv_key_norms_t *norms, norm_round_t *round,
                        uint32_t slice, const kv_norm_sums_t *sums, kv_error_t *error)
    KV_REQUIRES(server->mutex)
{
    round->sums[slice] = *sums;
    round->num_told += !round->told[slice];
    round->told[slice] = 1;
    if (round->error == NULL)
        round->error = error;
    else
        kv_error_rele(error);
    if (round->num_told == norms->num_slices && round == round_of(norms, norms->done))
        complete_locked(server, norms);
}

/* ------------------------------------------------------------------------------ asynchronous */

bool kv_norms_may_begin(const kv_slice_t *slice, const kv_request_t *push)
{
    kv_key_norms_t *norms = slice->key->norms;
    if (!slice->server->async || slice->node.part == 0 || norms == NULL ||
        (push->header.record.flags & KV_WIRE_SHARES_NORMS) == 0)
        return true;
    const norm_round_t *round = round_of(norms, norms->done);
    return round->has_turn && round->worker == push->worker &&
           round->push == push->header.record.round;
}

void kv_norms_take_turn(const kv_slice_t *slice, kv_step_t *step)
{
    kv_key_norms_t *norms = slice->key->norms;
    const norm_round_t *round = round_of(norms, norms->done);
    if (round->has_turn)
        step->t = round->t;
}

static void set_turn_locked(kv_server_t *server, const kv_server_key_t *key, norm_round_t *round,
                            const kv_wire_record_t *record) KV_REQUIRES(server->mutex)
{
    if (!server->async || record->slice != 0)
        return;
    round->has_turn = true;
    round->worker = (int32_t)record->tag;
    round->push = record->request;
    round->t = (int64_t)record->optimizer;
    for (kv_slice_t *slice = key->slices; slice != NULL; slice = slice->sibling) {
        if (!slice->busy)
            list_locked(server, slice);
    }
}

/* ---------------------------------------------------------------------------------- messages */

static void sent(kv_net_message_t *message, kv_status_t status)
{
    (void)status; /* who did not get it is gone, and the control plane says so */
    note_t *note = (note_t *)message;
    kv_error_rele(note->error);
    kv_free(note);
}

static kv_status_t send_locked(kv_server_t *server, int32_t to, const kv_wire_header_t *header,
                               kv_error_t *error) KV_REQUIRES(server->mutex)
{
    note_t *note = kv_alloc(sizeof *note);
    KV_TRY_ALLOC(note, "the norms of a key");
    note->error = error != NULL ? kv_error_hold(error) : NULL;
    note->message =
        (kv_net_message_t){.peer = kv_node_of_server(server->num_workers, to),
                           .priority = INT32_MAX,
                           .header_bytes = KV_WIRE_HEADER_BYTES,
                           .payload = error != NULL ? error->message : NULL,
                           .payload_bytes = error != NULL ? (size_t)header->record.bytes : 0,
                           .done = sent};
    kv_wire_put_header(header, note->message.header);
    kv_status_t status = kv_net_send(server->net, &note->message);
    if (status != KV_OK)
        sent(&note->message, status);
    return status;
}

void kv_norms_tell_locked(kv_server_t *server, kv_slice_t *slice, kv_error_t *error)
{
    kv_server_key_t *key = slice->key;
    kv_key_norms_t *norms = key->norms;
    norm_round_t *round = round_of(norms, norms->done);
    const kv_request_t *push = kv_round_first(slice);
    kv_wire_header_t header = {.version = KV_WIRE_VERSION,
                               .kind = KV_WIRE_NORMS,
                               .count = norms->num_slices,
                               .record = {.key = slice->node.number,
                                          .slice = slice->node.part,
                                          .round = norms->done,
                                          .action = KV_WIRE_SQUARES,
                                          .request = push->header.record.round,
                                          .tag = (uint32_t)push->worker,
                                          .optimizer = (uint64_t)slice->step.t,
                                          .status = error != NULL ? (uint8_t)error->status : 0,
                                          .bytes = error != NULL ? strlen(error->message) : 0}};
    kv_wire_put_sums(&header.record, &slice->sums);
    for (int32_t to = 0; to < server->num_servers; to++) {
        if (to != server->index && server->net != NULL &&
            send_locked(server, to, &header, error) == KV_NO_MEMORY)
            kv_server_lose_locked(server, "a server has no memory for the norms of a key");
    }
    slice->next_waiting = round->waiting;
    round->waiting = slice;
    set_turn_locked(server, key, round, &header.record);
    note_locked(server, norms, round, slice->node.part, &slice->sums, error);
}

/* The tables for what another server tells of a key; NULL: it is not for this one. */
static kv_status_t find_norms_locked(kv_server_t *server, const kv_wire_header_t *header,
                                     kv_server_key_t **out) KV_REQUIRES(server->mutex)
{
    const kv_wire_record_t *record = &header->record;
    kv_server_key_t *key = (kv_server_key_t *)kv_index_find(&server->keys, record->key, 0);
    *out = NULL;
    if (key == NULL || key->num_initialised == 0) {
        /* Of a key of this server no round is over before it has told something. */
        if (!server->async || record->round > 0 || header->count <= 1 ||
            header->count > MOST_SLICES)
            return KV_OK;
        key = kv_server_key_locked(server, record->key);
        KV_TRY_ALLOC(key, "a key");
        kv_status_t status = key->norms == NULL ? norms_new(header->count, &key->norms) : KV_OK;
        if (status != KV_OK)
            kv_server_key_tidy_locked(server, key);
        KV_TRY(status);
    }
    *out = key;
    return KV_OK;
}

static kv_status_t check_told(const kv_server_t *server, int32_t from, const kv_key_norms_t *norms,
                              const kv_wire_header_t *header)
{
    const kv_wire_record_t *record = &header->record;
    if (norms == NULL || header->count != norms->num_slices || record->slice >= norms->num_slices)
        return kv_fail(KV_INVALID,
                       "server %" PRId32 " has told of slice %" PRIu32 " of %" PRIu32
                       " of a key, which is not so",
                       from, record->slice, header->count);
    if (record->round - norms->done > 1 ||
        norms->rounds[record->round & 1].told[record->slice] != 0)
        return kv_fail(KV_INVALID,
                       "server %" PRId32 " has told of round %" PRIu64 " of slice %" PRIu32
                       ", which is not due",
                       from, record->round, record->slice);
    uint16_t holder = norms->servers[record->slice];
    if (holder != 0 && holder != from + 1)
        return kv_fail(KV_INVALID,
                       "server %" PRId32 " has told of slice %" PRIu32 ", which server %d has",
                       from, record->slice, holder - 1);
    if (server->async && record->slice == 0 && record->tag >= (uint32_t)server->num_workers)
        return kv_fail(KV_INVALID, "server %" PRId32 " names worker %" PRIu32 " of %" PRId32, from,
                       record->tag, server->num_workers);
    return KV_OK;
}

kv_status_t kv_norms_told_locked(kv_server_t *server, int32_t from, const kv_wire_header_t *header,
                                 kv_error_t *error)
{
    const kv_wire_record_t *record = &header->record;
    kv_server_key_t *key;
    kv_status_t status = find_norms_locked(server, header, &key);
    if (status == KV_OK && key != NULL)
        status = check_told(server, from, key->norms, header);
    if (status != KV_OK || key == NULL) {
        kv_error_rele(error);
        return status;
    }
    norm_round_t *round = round_of(key->norms, record->round);
    kv_norm_sums_t sums;
    kv_wire_get_sums(record, &sums);
    key->norms->servers[record->slice] = (uint16_t)(from + 1);
    set_turn_locked(server, key, round, record);
    note_locked(server, key->norms, round, record->slice, &sums, error);
    if (key->num_initialised == 0 && key->norms->done > 0) {
        kv_norms_free(key->norms); /* it has gone all its way without this server */
        key->norms = NULL;
        kv_server_key_tidy_locked(server, key);
    }
    return KV_OK;
}

/* --------------------------------------------------------------------------------- who is late */

static void name_others(const kv_server_t *server, char *out, size_t bytes)
{
    enum { MOST_NAMED = 8 };
    size_t used = 0;
    int named = 0;
    for (int32_t i = 0; i < server->num_servers && named < MOST_NAMED && used < bytes; i++) {
        if (i != server->index)
            used += (size_t)snprintf(out + used, bytes - used, "%sserver %" PRId32,
                                     named++ > 0 ? " or " : "", i);
    }
}

kv_status_t kv_norms_missing_locked(kv_server_t *server, const kv_slice_t *slice)
{
    const kv_key_norms_t *norms = slice->key->norms;
    const norm_round_t *round = &norms->rounds[norms->done & 1];
    uint32_t part = 0;
    while (part + 1 < norms->num_slices && round->told[part] != 0)
        part++;
    const kv_slice_t *other =
        (const kv_slice_t *)kv_index_find(&server->slices, slice->node.number, part);
    if (other != NULL && other != slice && kv_slice_has_value(other) && !other->busy)
        return kv_slice_missing_locked(server, other);
    char names[256];
    if (norms->servers[part] != 0)
        snprintf(names, sizeof names, "server %d", norms->servers[part] - 1);
    else
        name_others(server, names, sizeof names);
    return kv_fail(KV_TIMEOUT, "%s has not sent the norms of slice %" PRIu32 " for round %" PRIu64,
                   names, part, slice->version);
}
