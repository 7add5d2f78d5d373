/* Keys of a server: the directory of declared keys (server 0 has it), and deletes.
 *
 * The directory keeps what rank 0 has declared of a key as it came over the wire. A name that
 * another worker asks for before has an entry too, with those who wait for it. A DECLARE is
 * answered when all its keys are settled; until then its payload is kept, and keys are decoded from
 * there again when they are needed.
 */
#include "ps/server_internal.h"
#include <inttypes.h>
#include <string.h>

typedef struct kv_declare_wait wait_t;

struct kv_declared_key {
    kv_index_node_t node; /* first; hash of the name, 0 */
    int32_t refs;         /* the directory, and answers that need it */
    bool listed;          /* in the directory */
    bool declared;        /* by rank 0 */
    wait_t *waits;        /* for that */
    size_t bytes;
    unsigned char encoded[]; /* kv_wire_put_key */
};

/* One key of a DECLARE. */
struct kv_declare_wait {
    kv_declare_t *declare;
    size_t offset;            /* in its payload */
    kv_declared_key_t *entry; /* one share */
    kv_error_t *error;
    bool waiting;
    wait_t *prev, *next; /* of those that wait for the same name */
};

struct kv_declare {
    kv_request_t *request;
    uint32_t count, num_waiting;
    kv_declare_t *next_settled; /* of those that a declaration by rank 0 has settled */
    wait_t waits[];
};

/* ------------------------------------------------------------------------------------- keys */

kv_server_key_t *kv_server_key_locked(kv_server_t *server, uint64_t number)
{
    kv_server_key_t *key = (kv_server_key_t *)kv_index_find(&server->keys, number, 0);
    if (key != NULL)
        return key;
    key = kv_calloc(1, sizeof *key);
    if (key == NULL)
        return NULL;
    key->node.number = number;
    kv_index_add(&server->keys, &key->node);
    return key;
}

void kv_server_key_tidy_locked(kv_server_t *server, kv_server_key_t *key)
{
    if (key->slices != NULL || key->votes != NULL || key->declared != NULL || key->norms != NULL)
        return;
    kv_index_remove(&server->keys, &key->node);
    kv_free(key);
}

static void entry_rele(kv_declared_key_t *entry)
{
    if (entry != NULL && --entry->refs == 0)
        kv_free(entry);
}

static void entry_unlist_locked(kv_server_t *server, kv_declared_key_t *entry)
    KV_REQUIRES(server->mutex)
{
    entry->listed = false;
    kv_index_remove(&server->names, &entry->node);
    entry_rele(entry);
}

void kv_server_key_free_locked(kv_server_t *server, kv_server_key_t *key, kv_error_t *error)
{
    kv_request_t *vote;
    if (key->num_initialised > 0)
        server->counters.keys--;
    while (key->slices != NULL) {
        kv_slice_t *slice = key->slices;
        key->slices = slice->sibling;
        kv_slice_free_locked(server, slice, error);
    }
    while ((vote = key->votes) != NULL) {
        key->votes = vote->next;
        kv_answer_error_locked(server, vote, error);
    }
    if (key->declared != NULL) {
        if (key->declared->listed)
            entry_unlist_locked(server, key->declared);
        entry_rele(key->declared);
        key->declared = NULL;
    }
    kv_norms_free(key->norms);
    key->norms = NULL;
    kv_server_key_tidy_locked(server, key);
}

/* ---------------------------------------------------------------------------------- deletes */

/* A vote counts only while its worker waits. So a delete happens on a server for all workers or for
 * none, and whoever was told that it has failed may try again. */
void kv_drop_withdraw_locked(kv_server_t *server, kv_request_t *vote)
{
    kv_server_key_t *key = vote->key;
    kv_request_t **link = &key->votes;
    while (*link != vote)
        link = &(*link)->next;
    *link = vote->next;
    key->num_votes--;
    kv_server_key_tidy_locked(server, key);
}

void kv_drop_locked(kv_server_t *server, kv_request_t *request)
{
    kv_server_key_t *key = kv_server_key_locked(server, request->header.record.key);
    if (key == NULL) {
        kv_answer_status_locked(server, request, kv_fail(KV_NO_MEMORY, "no memory for a delete"));
        return;
    }
    kv_status_t status = kv_drop_check_left_locked(server);
    if (status != KV_OK) {
        kv_server_key_tidy_locked(server, key);
        kv_answer_status_locked(server, request, status);
        return;
    }
    const kv_request_t *earlier = key->votes;
    while (earlier != NULL && earlier->worker != request->worker)
        earlier = earlier->next;
    if (earlier != NULL) {
        kv_answer_status_locked(
            server, request,
            kv_fail(KV_INVALID, "worker %" PRId32 " is deleting it already", request->worker));
        return;
    }
    request->key = key;
    request->next = key->votes;
    key->votes = request;
    key->num_votes++;
    kv_request_wait_locked(server, request);
    kv_drop_if_due_locked(server, key);
}

/* Whether all pushes that will be applied are: a vote says how many its worker has made, and rounds
 * that all have begun come first. */
static bool is_through(const kv_server_key_t *key, const kv_slice_t *slice)
{
    bool async = slice->server->async, all = true, one = false;
    for (const kv_request_t *vote = key->votes; vote != NULL; vote = vote->next) {
        uint64_t pushes = vote->header.record.round;
        bool reached = (async ? slice->workers[vote->worker].applied : slice->version) >= pushes;
        all = all && reached;
        one = one || reached;
    }
    return async ? all : one;
}

bool kv_drop_if_due_locked(kv_server_t *server, kv_server_key_t *key)
{
    if (key->num_votes < server->num_workers || key->num_busy > 0)
        return false;
    for (const kv_slice_t *slice = key->slices; slice != NULL; slice = slice->sibling) {
        if (slice->stored != NULL && !is_through(key, slice))
            return false;
    }
    for (kv_request_t *vote; (vote = key->votes) != NULL;) {
        key->votes = vote->next;
        kv_answer_locked(server, vote, NULL, 0);
    }
    kv_error_t *error = kv_error_capture(kv_fail(KV_NO_KEY, "the key was deleted"));
    kv_server_key_free_locked(server, key, error);
    kv_error_rele(error);
    return true;
}

kv_status_t kv_drop_check_left_locked(kv_server_t *server)
{
    for (int32_t i = 0; i < server->num_workers; i++) {
        if (server->presence[i] == KV_ABSENT)
            return kv_fail(KV_LEFT,
                           "worker %" PRId32 " has left the cluster, and a delete takes all "
                           "workers",
                           i);
    }
    return KV_OK;
}

kv_status_t kv_drop_missing_locked(kv_server_t *server, const kv_request_t *request)
{
    for (int32_t i = 0; i < server->num_workers; i++) {
        const kv_request_t *vote = request->key->votes;
        while (vote != NULL && vote->worker != i)
            vote = vote->next;
        if (vote == NULL)
            return kv_fail(KV_TIMEOUT, "worker %" PRId32 " has not deleted it", i);
    }
    return kv_fail(KV_TIMEOUT, "pushes from before are not finished");
}

/* -------------------------------------------------------------------------------- directory */

static kv_wire_key_t decoded(const void *data, size_t bytes, size_t offset)
{
    kv_wire_key_t key = {.dtype = 0};
    kv_status_t status = kv_wire_get_key(data, bytes, &offset, &key);
    (void)status; /* it was read before */
    return key;
}

static kv_wire_key_t key_of_entry(const kv_declared_key_t *entry)
{
    return decoded(entry->encoded, entry->bytes, 0);
}

static kv_wire_key_t key_of_wait(const wait_t *wait)
{
    const kv_buffer_t *payload = wait->declare->request->buffer;
    return decoded(payload->data, payload->bytes, wait->offset);
}

static kv_declared_key_t *find_locked(kv_server_t *server, const kv_name_t *name)
    KV_REQUIRES(server->mutex)
{
    uint64_t hash = kv_name_hash(name);
    kv_index_node_t *node = kv_index_find(&server->names, hash, 0);
    for (; node != NULL; node = node->next) {
        if (node->number != hash)
            continue;
        kv_wire_key_t key = key_of_entry((kv_declared_key_t *)node);
        if (kv_name_equal(&key.name, name))
            return (kv_declared_key_t *)node;
    }
    return NULL;
}

/* Gives an entry with the directory's share; NULL without memory. */
static kv_declared_key_t *entry_new_locked(kv_server_t *server, const kv_wire_key_t *key,
                                           bool declared) KV_REQUIRES(server->mutex)
{
    size_t bytes = kv_wire_key_bytes(key);
    kv_declared_key_t *entry = kv_alloc(sizeof *entry + bytes);
    if (entry == NULL)
        return NULL;
    *entry = (kv_declared_key_t){.node.number = kv_name_hash(&key->name),
                                 .refs = 1,
                                 .listed = true,
                                 .declared = declared,
                                 .bytes = bytes};
    kv_wire_put_key(key, entry->encoded);
    kv_index_add(&server->names, &entry->node);
    return entry;
}

static const char *form(const kv_wire_key_t *key)
{
    return key->sparse ? "row-sparse" : "dense";
}

/* Whether what a worker has is what rank 0 has declared. */
static kv_status_t compare(const kv_wire_key_t *ours, const kv_wire_key_t *theirs)
{
    char a[200], b[200];
    if (ours->dtype != theirs->dtype)
        return kv_fail(KV_BAD_TYPE, "is %s on worker 0, %s here",
                       kv_dtype_name((kv_dtype_t)ours->dtype),
                       kv_dtype_name((kv_dtype_t)theirs->dtype));
    if (ours->sparse != theirs->sparse)
        return kv_fail(KV_BAD_TYPE, "is %s on worker 0, %s here", form(ours), form(theirs));
    if (ours->ndim != theirs->ndim ||
        memcmp(ours->shape, theirs->shape, (size_t)ours->ndim * sizeof ours->shape[0]) != 0)
        return kv_fail(KV_INVALID, "has shape %s on worker 0, %s here",
                       kv_shape_format(ours->ndim, ours->shape, a, sizeof a),
                       kv_shape_format(theirs->ndim, theirs->shape, b, sizeof b));
    return KV_OK;
}

static kv_status_t check_declared(const kv_server_t *server, const kv_wire_key_t *key)
{
    int64_t count;
    size_t bytes;
    KV_TRY(kv_shape_size((kv_dtype_t)key->dtype, key->ndim, key->shape, &count, &bytes));
    if (key->sparse && key->ndim == 0)
        return kv_fail(KV_INVALID, "a row-sparse key has at least one dimension");
    if (!key->placed)
        return kv_fail(KV_INVALID, "worker 0 has declared it without a place");
    uint64_t slices = 1, all = key->sparse ? (uint64_t)key->shape[0] : bytes;
    if (all > 0 && key->slice_bytes > 0)
        slices = (all - 1) / key->slice_bytes + 1;
    uint64_t most = key->num_slices == 1 ? KV_WIRE_ROWS_BYTES : KV_WIRE_SLICE_BYTES;
    if ((key->slice_bytes > most && !key->sparse) || (all > 0 && key->slice_bytes == 0) ||
        key->num_slices != slices)
        return kv_fail(KV_INVALID,
                       "%" PRIu64 " %s in slices of %" PRIu64 " are not %" PRIu32 " slices", all,
                       key->sparse ? "rows" : "bytes", key->slice_bytes, key->num_slices);
    for (uint32_t i = 0; i < key->num_slices; i++) {
        if (kv_wire_server_of(key, i) >= server->num_servers)
            return kv_fail(KV_INVALID, "slice %" PRIu32 " has server %" PRId32 " of %" PRId32, i,
                           kv_wire_server_of(key, i), server->num_servers);
    }
    return KV_OK;
}

static void settle(wait_t *wait, kv_error_t *error)
{
    wait->error = error;
    if (wait->waiting) {
        wait->waiting = false;
        wait->declare->num_waiting--;
    }
}

static void compare_and_settle(wait_t *wait, kv_declared_key_t *entry)
{
    kv_wire_key_t ours = key_of_entry(entry), theirs = key_of_wait(wait);
    entry->refs++;
    entry_rele(wait->entry);
    wait->entry = entry;
    kv_status_t status = compare(&ours, &theirs);
    settle(wait, status != KV_OK ? kv_error_capture(status) : NULL);
}

/* Takes the key out of the list of those that wait for its name. An entry that nobody waits for any
 * more goes; the wait keeps its share. */
static void unlink_wait_locked(kv_server_t *server, wait_t *wait) KV_REQUIRES(server->mutex)
{
    if (wait->prev != NULL)
        wait->prev->next = wait->next;
    else
        wait->entry->waits = wait->next;
    if (wait->next != NULL)
        wait->next->prev = wait->prev;
    if (wait->entry->waits == NULL)
        entry_unlist_locked(server, wait->entry);
}

static void declare_free_locked(kv_server_t *server, kv_declare_t *declare)
    KV_REQUIRES(server->mutex)
{
    (void)server;
    for (uint32_t i = 0; i < declare->count; i++) {
        entry_rele(declare->waits[i].entry);
        kv_error_rele(declare->waits[i].error);
    }
    kv_free(declare);
}

static kv_status_t write_answer(const kv_declare_t *declare, kv_pool_t *pool, kv_buffer_t **out)
{
    size_t bytes = 0;
    unsigned char *end = NULL;
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t i = 0; i < declare->count; i++) {
            const wait_t *wait = &declare->waits[i];
            kv_wire_key_t key = wait->error != NULL ? key_of_wait(wait) : key_of_entry(wait->entry);
            if (wait->error != NULL) {
                key.placed = 0;
                key.status = (uint8_t)wait->error->status;
                key.sentence = wait->error->message;
                key.sentence_bytes = (uint32_t)strlen(wait->error->message);
            }
            bytes += kv_wire_key_bytes(&key);
            if (end != NULL)
                end = kv_wire_put_key(&key, end);
        }
        if (pass == 0)
            KV_TRY(kv_pool_get(pool, bytes, out));
        end = (*out)->data;
    }
    return KV_OK;
}

/* Answers if all keys are settled. */
static void answer_if_settled_locked(kv_server_t *server, kv_declare_t *declare)
    KV_REQUIRES(server->mutex)
{
    kv_request_t *request = declare->request;
    kv_buffer_t *payload = NULL;
    if (declare->num_waiting > 0)
        return;
    kv_status_t status = write_answer(declare, server->pool, &payload);
    declare_free_locked(server, declare);
    request->declare = NULL;
    if (status == KV_OK) {
        kv_answer_locked(server, request, payload, payload->bytes);
        kv_buffer_rele(payload);
    } else {
        request->header.record.action = KV_WIRE_INIT; /* an answer of records has one */
        kv_answer_status_locked(server, request, status);
    }
}

kv_status_t kv_declare_check_left_locked(kv_server_t *server)
{
    if (server->presence[0] != KV_ABSENT)
        return KV_OK;
    return kv_fail(KV_LEFT, "worker 0 has left the cluster without initialising it");
}

void kv_declare_end_locked(kv_server_t *server, kv_request_t *request, kv_error_t *error)
{
    kv_declare_t *declare = request->declare;
    for (uint32_t i = 0; i < declare->count; i++) {
        wait_t *wait = &declare->waits[i];
        if (!wait->waiting)
            continue;
        unlink_wait_locked(server, wait);
        settle(wait, kv_error_hold(error));
    }
    answer_if_settled_locked(server, declare);
}

/* Those who wait for a name get what rank 0 has declared; DECLAREs that are settled with that are
 * noted for later. */
static void settle_waits_locked(kv_server_t *server, kv_declared_key_t *asked,
                                kv_declared_key_t *entry, kv_declare_t *by)
    KV_REQUIRES(server->mutex)
{
    asked->refs++;
    while (asked->waits != NULL) {
        wait_t *wait = asked->waits;
        unlink_wait_locked(server, wait);
        compare_and_settle(wait, entry);
        if (wait->declare->num_waiting == 0) {
            wait->declare->next_settled = by->next_settled;
            by->next_settled = wait->declare;
        }
    }
    entry_rele(asked);
}

/* Rank 0 declares a key. Those who wait for it are settled, but not yet answered. */
static kv_status_t record_locked(kv_server_t *server, wait_t *wait, const kv_wire_key_t *key)
    KV_REQUIRES(server->mutex)
{
    kv_declared_key_t *earlier = find_locked(server, &key->name);
    if (earlier != NULL && earlier->declared)
        return kv_fail(KV_INVALID, "is initialised already");
    KV_TRY(check_declared(server, key));
    kv_server_key_t *number = kv_server_key_locked(server, key->number);
    KV_TRY_ALLOC(number, "a key");
    if (number->declared != NULL)
        return kv_fail(KV_INVALID, "has the number of another key, %" PRIu64, key->number);
    kv_declared_key_t *entry = entry_new_locked(server, key, true);
    if (entry == NULL)
        kv_server_key_tidy_locked(server, number);
    KV_TRY_ALLOC(entry, "a key");
    number->declared = wait->entry = entry;
    entry->refs += 2;
    if (earlier != NULL)
        settle_waits_locked(server, earlier, entry, wait->declare);
    return KV_OK;
}

/* Another worker asks for a key. */
static kv_status_t ask_locked(kv_server_t *server, wait_t *wait, const kv_wire_key_t *key)
    KV_REQUIRES(server->mutex)
{
    kv_declared_key_t *entry = find_locked(server, &key->name);
    if (entry != NULL && entry->declared) {
        compare_and_settle(wait, entry);
        return KV_OK;
    }
    KV_TRY(kv_declare_check_left_locked(server));
    if (entry == NULL)
        entry = entry_new_locked(server, key, false);
    KV_TRY_ALLOC(entry, "a key");
    entry->refs++;
    wait->entry = entry;
    wait->waiting = true;
    wait->declare->num_waiting++;
    wait->next = entry->waits;
    if (wait->next != NULL)
        wait->next->prev = wait;
    entry->waits = wait;
    return KV_OK;
}

/* Reads all keys before anything is done with one. */
static kv_status_t find_keys(const kv_request_t *request, kv_declare_t *declare)
{
    const kv_buffer_t *payload = request->buffer;
    size_t offset = 0;
    for (uint32_t i = 0; i < declare->count; i++) {
        kv_wire_key_t key;
        declare->waits[i].declare = declare;
        declare->waits[i].offset = offset;
        KV_TRY(kv_wire_get_key(payload->data, payload->bytes, &offset, &key));
    }
    return KV_OK;
}

kv_status_t kv_declare_locked(kv_server_t *server, kv_request_t *request)
{
    const uint32_t count = request->header.count;
    const kv_wire_key_t least = {.ndim = 0};
    if (server->index != 0)
        return kv_fail(KV_INVALID,
                       "worker %" PRId32 " declares keys at server %" PRId32
                       ", which has no directory",
                       request->worker, server->index);
    if (count > request->buffer->bytes / kv_wire_key_bytes(&least))
        return kv_fail(KV_INVALID, "a message of %zu bytes cannot declare %" PRIu32 " keys",
                       request->buffer->bytes, count);
    kv_declare_t *declare = kv_calloc(1, sizeof *declare + count * sizeof declare->waits[0]);
    KV_TRY_ALLOC(declare, "the declaration of keys");
    declare->request = request;
    declare->count = count;
    kv_status_t status = find_keys(request, declare);
    if (status != KV_OK) {
        kv_free(declare);
        return status;
    }
    request->declare = declare;
    for (uint32_t i = 0; i < count; i++) {
        wait_t *wait = &declare->waits[i];
        kv_wire_key_t key = key_of_wait(wait);
        if (server->lost != NULL) {
            settle(wait, kv_error_hold(server->lost));
            continue;
        }
        status = request->worker == 0 ? record_locked(server, wait, &key)
                                      : ask_locked(server, wait, &key);
        if (status != KV_OK)
            settle(wait, kv_error_capture(status));
    }
    while (declare->next_settled != NULL) {
        kv_declare_t *settled = declare->next_settled;
        declare->next_settled = settled->next_settled;
        answer_if_settled_locked(server, settled);
    }
    if (declare->num_waiting > 0)
        kv_request_wait_locked(server, request);
    else
        answer_if_settled_locked(server, declare);
    return KV_OK;
}
