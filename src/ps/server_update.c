/* Rounds of optimizers in Python.
 *
 * Such a round has two halves, too. When a slice has its pushes, they are summed into memory of
 * their own, and the value is copied. Then the slice waits, in the order of these sums, for the
 * thread that serves, which runs the class on sum and copy without any lock of ours; after that the
 * copy is the next version, or the round has failed and the value is as it was. Pulls of the
 * version before are answered all the time.
 *
 * What the class gets may be kept by it for ever, so none of it is the pool's.
 *
 * The same thread packs what is kept with a slice, for files, between two rounds. What a file had
 * is given to the next round as it came.
 */
#include "ps/server_internal.h"
#include <inttypes.h>
#include <string.h>

/* ------------------------------------------------------------------------- keys by their names */

/* Whether the key is one that this slice, with its value, can be all of. */
static bool fits(const kv_slice_t *slice, const kv_wire_key_t *key)
{
    int64_t count;
    size_t bytes;
    if (kv_shape_size((kv_dtype_t)key->dtype, key->ndim, key->shape, &count, &bytes) != KV_OK ||
        key->dtype != slice->dtype || key->sparse != slice->sparse)
        return false;
    if (!slice->sparse)
        return bytes == slice->bytes;
    return key->ndim > 0 && key->shape[0] == slice->num_rows &&
           count == slice->num_rows * slice->row_count;
}

kv_status_t kv_slice_name(kv_slice_t *slice, const void *data, size_t bytes)
{
    kv_wire_key_t key;
    size_t end = 0;
    if (bytes == 0)
        return KV_OK;
    KV_TRY(kv_wire_get_key(data, bytes, &end, &key));
    if (end != bytes || slice->node.part != 0 || !fits(slice, &key))
        return kv_fail(KV_INVALID, "a first value comes with another key");
    kv_buffer_t *encoded;
    KV_TRY(kv_buffer_new(bytes, &encoded));
    memcpy(encoded->data, data, bytes);
    slice->encoded = encoded;
    return KV_OK;
}

kv_status_t kv_update_check(const kv_slice_t *slice)
{
    uint32_t num_slices = slice->key->norms != NULL ? kv_norms_num_slices(slice->key->norms) : 1;
    if (num_slices > 1)
        return kv_fail(KV_INVALID,
                       "it is cut into %" PRIu32 " slices, and an optimizer in Python needs it "
                       "whole on one server; call set_optimizer before init (above 1 GiB it is "
                       "always cut)",
                       num_slices);
    if (slice->encoded == NULL)
        return kv_fail(KV_INVALID,
                       "its name is longer than %d bytes, and an optimizer in Python is not told "
                       "such a one",
                       (int)KV_WIRE_KEY_BYTES);
    return KV_OK;
}

/* ----------------------------------------------------------------------------------- the halves */

static kv_status_t copy_rows(const kv_rowset_t *rows, size_t row_bytes, kv_rowset_t *out)
{
    KV_TRY(kv_rowset_make(out, rows->num_rows, row_bytes));
    if (rows->num_rows == 0)
        return KV_OK;
    memcpy(out->indices->data, rows->indices->data, (size_t)rows->num_rows * sizeof(int64_t));
    memcpy(out->data->data, rows->data->data, (size_t)rows->num_rows * row_bytes);
    return KV_OK;
}

kv_status_t kv_update_room(kv_slice_t *slice)
{
    if (!slice->by_rows)
        KV_TRY(kv_buffer_new(slice->bytes, &slice->recv));
    if (slice->sparse) /* which row-sparse pushes alone change */
        return copy_rows(&slice->rows, (size_t)slice->row_count * kv_dtype_bytes(slice->dtype),
                         &slice->made_rows);
    memcpy(slice->made->data, slice->stored->data, slice->bytes);
    return KV_OK;
}

void kv_update_forget(kv_slice_t *slice)
{
    kv_buffer_rele(slice->recv);
    slice->recv = NULL;
    kv_rowset_fini(&slice->recv_rows);
}

void kv_slice_keep(kv_slice_t *slice, kv_server_kept_t *kept, kv_buffer_t *loaded)
{
    if (slice->kept != NULL)
        slice->kept->drop(slice->kept);
    kv_buffer_rele(slice->loaded);
    slice->kept = kept;
    slice->loaded = loaded;
}

void kv_update_enlist_locked(kv_server_t *server, kv_slice_t *slice)
{
    kv_slice_t **link = &server->updates;
    while (*link != NULL)
        link = &(*link)->next_update;
    slice->next_update = NULL;
    *link = slice;
    kv_cond_broadcast(&server->wake);
}

/* --------------------------------------------------------------------------- who runs the class */

static void hold_rows(const kv_rowset_t *rows, kv_rowset_t *out)
{
    if (rows->num_rows > 0)
        *out = (kv_rowset_t){rows->num_rows, kv_buffer_hold(rows->indices),
                             kv_buffer_hold(rows->data)};
}

static void describe(kv_slice_t *slice, kv_server_update_t *out)
{
    kv_wire_key_t key = {.ndim = 0};
    size_t end = 0;
    kv_status_t status = kv_wire_get_key(slice->encoded->data, slice->encoded->bytes, &end, &key);
    (void)status; /* it was read before */
    *out = (kv_server_update_t){.reads = slice->reading,
                                .optimizer = slice->optimizer,
                                .name = key.name,
                                .key = kv_buffer_hold(slice->encoded),
                                .dtype = slice->dtype,
                                .ndim = key.ndim,
                                .rows = slice->by_rows,
                                .sparse = slice->sparse,
                                .rate = slice->step.lr,
                                .t = slice->step.t,
                                .num_update = (int64_t)slice->step.draw,
                                .kept = slice->kept,
                                .loaded = slice->loaded};
    slice->kept = NULL;
    slice->loaded = NULL;
    memcpy(out->shape, key.shape, sizeof key.shape);
    if (out->reads)
        return;
    if (slice->by_rows)
        hold_rows(&slice->recv_rows, &out->recv_rows);
    else
        out->recv = kv_buffer_hold(slice->recv);
    if (slice->sparse)
        hold_rows(&slice->made_rows, &out->stored_rows);
    else
        out->stored = kv_buffer_hold(slice->made);
}

kv_status_t kv_server_next_update(kv_server_t *server, kv_caller_t *caller, kv_server_update_t *out,
                                  bool *found)
{
    int64_t until = kv_caller_deadline(caller);
    kv_status_t status = KV_OK;
    *found = false;
    kv_caller_detach(caller);
    kv_mutex_lock(&server->mutex);
    if (server->updating != NULL)
        status = kv_fail(KV_INVALID, "an update is under way");
    while (status == KV_OK && server->updates == NULL && !server->woken && !server->stopped) {
        int64_t now = kv_clock_ns(), look = now + KV_POLL_NS;
        if (now >= until)
            break;
        kv_cond_wait_until(&server->wake, &server->mutex, look < until ? look : until);
        if (kv_clock_ns() < look)
            continue;
        kv_mutex_unlock(&server->mutex);
        status = caller->poll(caller);
        kv_mutex_lock(&server->mutex);
    }
    server->woken = false;
    if (status == KV_OK && server->updates != NULL && !server->stopped) {
        server->updating = server->updates;
        server->updates = server->updating->next_update;
        describe(server->updating, out);
        *found = true;
    }
    kv_mutex_unlock(&server->mutex);
    kv_caller_attach(caller);
    return status;
}

/* What is kept was packed, or could not be: whoever waits for that gets it. */
static void give_locked(kv_server_t *server, kv_slice_t *slice, kv_server_update_t *update,
                        kv_error_t *error) KV_REQUIRES(server->mutex)
{
    slice->reading = false;
    slice->key->num_busy--;
    slice->packed = update->packed;
    slice->failure = error;
    kv_slice_answer_locked(server, slice);
    slice->packed = NULL;
    slice->failure = NULL;
    kv_buffer_rele(update->packed);
    kv_error_rele(error);
    kv_slice_advance_locked(server, slice);
}

static void end_locked(kv_server_t *server, kv_slice_t *slice, kv_server_update_t *update,
                       kv_error_t *error) KV_REQUIRES(server->mutex)
{
    kv_slice_keep(slice, update->kept, update->loaded);
    if (update->reads) {
        give_locked(server, slice, update, error);
        return;
    }
    if (slice->sparse) {
        kv_rowset_fini(&slice->made_rows);
        slice->made_rows = update->stored_rows;
    }
    kv_slice_updated_locked(server, slice, error);
}

/* The server has stopped meanwhile. */
static void forget(kv_server_update_t *update, kv_error_t *error)
{
    kv_error_rele(error);
    kv_rowset_fini(&update->stored_rows);
    if (update->kept != NULL)
        update->kept->drop(update->kept);
    kv_buffer_rele(update->loaded);
    kv_buffer_rele(update->packed);
}

void kv_server_end_update(kv_server_t *server, kv_server_update_t *update, kv_error_t *error)
{
    kv_buffer_rele(update->key);
    kv_buffer_rele(update->recv);
    kv_buffer_rele(update->stored);
    kv_rowset_fini(&update->recv_rows);
    kv_mutex_lock(&server->mutex);
    kv_slice_t *slice = server->updating;
    server->updating = NULL;
    if (slice != NULL) {
        end_locked(server, slice, update, error);
        kv_flush_locked(server);
    } else {
        forget(update, error);
    }
    kv_mutex_unlock(&server->mutex);
}

void kv_server_wake(kv_server_t *server)
{
    kv_mutex_lock(&server->mutex);
    server->woken = true;
    kv_cond_broadcast(&server->wake);
    kv_mutex_unlock(&server->mutex);
}
