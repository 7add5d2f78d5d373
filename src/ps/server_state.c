/* What an optimizer keeps with a slice, read and replaced for files of training states.
 *
 * Both happen between two rounds, so nobody else uses the state. It is changed where it lies by the
 * next round; what is sent out is therefore a copy. What an optimizer in Python keeps is packed for
 * that by the thread that serves (server_update.c).
 */
#include "ps/server_internal.h"
#include <inttypes.h>
#include <string.h>

/* Elements of the buffer. KV_INVALID when the optimizer keeps none of that number with the slice.
 * *what: its description, without a name for a master. */
static kv_status_t measure(const kv_slice_t *slice, const kv_known_optimizer_t *known,
                           unsigned number, kv_slot_t *what, int64_t *count)
{
    kv_slot_t described[KV_MAX_SLOTS];
    int num_slots = known->optim->slots(&known->numbers, described);
    int64_t wide = (int64_t)kv_dtype_bytes(kv_dtype_wide(slice->dtype));
    int64_t elements = (int64_t)(slice->bytes / kv_dtype_bytes(slice->dtype));
    if (slice->sparse && slice->row_count > 0 &&
        slice->num_rows > KV_WIRE_ROWS_BYTES / wide / slice->row_count)
        return kv_fail(KV_INVALID, "%" PRId64 " rows of state do not fit into a message",
                       slice->num_rows);
    if (slice->sparse)
        elements = slice->num_rows * slice->row_count;
    bool doubled = kv_dtype_is_narrow(slice->dtype) && known->numbers.multi_precision;
    if (number >= (unsigned)num_slots && !(number == KV_SLOT_MASTER && doubled))
        return kv_fail(KV_INVALID, "the optimizer %s keeps no state of number %u with %s",
                       known->optim->title, number, kv_dtype_name(slice->dtype));
    *what = number < (unsigned)num_slots ? described[number] : (kv_slot_t){.name = NULL};
    *count = elements;
    if (!what->per_row || elements == 0)
        return KV_OK;
    if (slice->row_count <= 0 || elements % slice->row_count != 0)
        return kv_fail(KV_NOT_BUILT,
                       "the optimizer %s keeps a number for each row, and rows of this value are "
                       "cut into slices: not in servers of this version",
                       known->optim->title);
    *count = elements / slice->row_count;
    return KV_OK;
}

static kv_buffer_t **place_of(kv_slots_t *slots, const kv_slot_t *what)
{
    return what->name != NULL ? &slots->slot[kv_slots_place(slots, what->name)] : &slots->master;
}

/* Bytes that a buffer has for each row. */
static size_t row_bytes_of(const kv_slice_t *slice, const kv_slot_t *what)
{
    return (size_t)kv_slot_count(what, 1, slice->row_count) *
           kv_dtype_bytes(kv_dtype_wide(slice->dtype));
}

/* All rows of a slice from those for which there is state. */
static void spread(const kv_slice_t *slice, const kv_slot_t *what, const kv_buffer_t *kept,
                   size_t bytes, char *out)
{
    size_t row_bytes = row_bytes_of(slice, what);
    const int64_t *ids = slice->slots->num_rows > 0 ? slice->slots->indices->data : NULL;
    memset(out, 0, bytes);
    for (int64_t i = 0; i < slice->slots->num_rows; i++)
        memcpy(out + (size_t)ids[i] * row_bytes, (char *)kept->data + (size_t)i * row_bytes,
               row_bytes);
}

/* From all rows those that are stored; the others are zero. */
static kv_status_t gather(const kv_slice_t *slice, const kv_slot_t *what, const char *data,
                          kv_buffer_t **out)
{
    size_t row_bytes = row_bytes_of(slice, what);
    const int64_t *ids = kv_rowset_ids(&slice->rows);
    int64_t i = 0, stored = slice->rows.num_rows;
    KV_TRY(kv_buffer_new((size_t)stored * row_bytes, out));
    for (int64_t row = 0; row < slice->num_rows; row++, data += row_bytes) {
        bool zero = true;
        if (i < stored && ids[i] == row) {
            memcpy((char *)(*out)->data + (size_t)i++ * row_bytes, data, row_bytes);
            continue;
        }
        for (size_t at = 0; at < row_bytes; at++)
            zero = zero && data[at] == 0;
        if (!zero) {
            kv_buffer_rele(*out);
            return kv_fail(KV_INVALID, "the state holds a row that the key's value has not");
        }
    }
    return KV_OK;
}

static kv_status_t find_optimizer_locked(const kv_server_t *server, const kv_request_t *request,
                                         const kv_known_optimizer_t **out)
    KV_REQUIRES(server->mutex)
{
    *out = kv_known_optimizer_locked(server, request->header.record.optimizer);
    return *out != NULL ? KV_OK
                        : kv_fail(KV_INVALID,
                                  "worker %" PRId32 " asks for the state of an optimizer that "
                                  "server %" PRId32 " has not got",
                                  request->worker, server->index);
}

/* An optimizer in Python keeps nothing but an object, and the others keep none. */
static kv_status_t check_object(const kv_known_optimizer_t *known, bool object)
{
    if (object == (known->optim == kv_optim_python()))
        return KV_OK;
    return kv_fail(KV_INVALID, "the state of the optimizer %s is %s", known->optim->title,
                   object ? "no object" : "an object");
}

/* A copy of the buffer, NULL if there is none. */
static kv_status_t read_locked(kv_server_t *server, const kv_slice_t *slice, kv_request_t *request,
                               kv_buffer_t **copy, size_t *bytes) KV_REQUIRES(server->mutex)
{
    kv_wire_record_t *record = &request->header.record;
    const kv_known_optimizer_t *known;
    kv_slot_t what;
    int64_t count;
    KV_TRY(find_optimizer_locked(server, request, &known));
    record->t = 0;
    if (!kv_slice_goes_on(slice, known))
        return KV_OK;
    if (record->slot != KV_SLOT_NONE) {
        KV_TRY(measure(slice, known, record->slot, &what, &count));
        const kv_buffer_t *kept = *place_of(slice->slots, &what);
        *bytes = (size_t)count * kv_dtype_bytes(kv_dtype_wide(slice->dtype));
        if (kept != NULL && *bytes > 0) {
            KV_TRY(kv_pool_get(server->pool, *bytes, copy));
            if (slice->sparse)
                spread(slice, &what, kept, *bytes, (*copy)->data);
            else
                memcpy((*copy)->data, kept->data, *bytes);
        }
    }
    record->t = (uint64_t)slice->step.t;
    return KV_OK;
}

/* What an optimizer in Python keeps, or none. *later: it has to be packed first. */
static kv_status_t read_object_locked(kv_server_t *server, const kv_slice_t *slice,
                                      kv_request_t *request, kv_buffer_t **copy, size_t *bytes,
                                      bool *later) KV_REQUIRES(server->mutex)
{
    kv_wire_record_t *record = &request->header.record;
    const kv_known_optimizer_t *known;
    KV_TRY(find_optimizer_locked(server, request, &known));
    KV_TRY(check_object(known, true));
    record->t = 0;
    record->flags = KV_WIRE_WHOLE;
    if (!kv_slice_goes_on(slice, known))
        return KV_OK;
    if (slice->failure != NULL)
        return kv_fail(slice->failure->status, "%s", slice->failure->message);
    kv_buffer_t *packed = slice->loaded != NULL ? slice->loaded : slice->packed;
    record->t = (uint64_t)slice->step.t;
    *later = packed == NULL && slice->kept != NULL;
    if (packed != NULL) {
        *copy = kv_buffer_hold(packed);
        *bytes = packed->bytes;
    }
    return KV_OK;
}

/* State of another class goes, and buffers that the optimizer does not keep with its numbers. */
static kv_status_t adopt(kv_slice_t *slice, const kv_known_optimizer_t *known)
{
    kv_slot_t described[KV_MAX_SLOTS];
    int num_slots = known->optim->slots(&known->numbers, described);
    KV_TRY(kv_slice_take_slots(slice, known));
    for (int place = 0; place < KV_MAX_SLOTS; place++) {
        const char *name = slice->slots->kept[place].name;
        bool wanted = false;
        for (int i = 0; name != NULL && i < num_slots; i++)
            wanted = wanted || strcmp(described[i].name, name) == 0;
        if (wanted)
            continue;
        kv_buffer_rele(slice->slots->slot[place]);
        slice->slots->slot[place] = NULL;
    }
    return KV_OK;
}

static kv_status_t replace_locked(kv_server_t *server, kv_slice_t *slice,
                                  const kv_request_t *request) KV_REQUIRES(server->mutex)
{
    const kv_wire_record_t *record = &request->header.record;
    const kv_known_optimizer_t *known;
    kv_slot_t what = {.name = NULL};
    int64_t count = 0;
    kv_buffer_t *fresh = NULL;
    bool alone = record->slot == KV_SLOT_NONE, object = record->slot == KV_SLOT_OBJECT;
    if (record->t > INT64_MAX)
        return kv_fail(KV_INVALID, "worker %" PRId32 " sets the state of push %" PRIu64,
                       request->worker, record->t);
    if (record->dtype != slice->dtype || record->codec != KV_CODEC_NONE)
        return kv_fail(KV_BAD_TYPE, "the value is %s, worker %" PRId32 " sets the state of %s",
                       kv_dtype_name(slice->dtype), request->worker,
                       kv_dtype_name((kv_dtype_t)record->dtype));
    if (record->optimizer == 0 && alone && record->bytes == 0) {
        kv_slots_rele(slice->slots);
        slice->slots = NULL;
        kv_slice_keep(slice, NULL, NULL);
        return KV_OK;
    }
    KV_TRY(find_optimizer_locked(server, request, &known));
    if (!kv_dtype_is_floating(slice->dtype))
        return kv_fail(KV_BAD_TYPE, "the value is %s: the optimizer %s updates floating types only",
                       kv_dtype_name(slice->dtype), known->optim->title);
    KV_TRY(check_object(known, object));
    if (object)
        KV_TRY(kv_update_check(slice));
    else if (!alone)
        KV_TRY(measure(slice, known, record->slot, &what, &count));
    size_t bytes = object ? (size_t)record->bytes
                          : (size_t)count * kv_dtype_bytes(kv_dtype_wide(slice->dtype));
    if (record->bytes != 0 && record->bytes != bytes)
        return kv_fail(KV_INVALID,
                       "a state of slice %" PRIu32 " has %zu bytes, worker %" PRId32
                       " sets %" PRIu64,
                       record->slice, bytes, request->worker, record->bytes);
    if (record->bytes != 0 && slice->sparse && !object) {
        KV_TRY(gather(slice, &what, request->data, &fresh));
    } else if (record->bytes != 0) {
        KV_TRY(kv_buffer_new(bytes, &fresh));
        memcpy(fresh->data, request->data, bytes);
    }
    kv_status_t status = adopt(slice, known);
    if (status == KV_OK && slice->sparse && !object)
        status =
            kv_slots_fit(&server->host, slice->slots, slice->dtype, slice->row_count, &slice->rows);
    if (status != KV_OK) {
        kv_buffer_rele(fresh);
        return status;
    }
    kv_wire_get_step(record, known->optim, &known->numbers, &slice->step);
    if (object)
        kv_slice_keep(slice, NULL, fresh);
    if (alone || object)
        return KV_OK;
    kv_buffer_t **place = place_of(slice->slots, &what);
    kv_buffer_rele(*place);
    *place = fresh;
    if (what.name != NULL)
        slice->slots->kept[place - slice->slots->slot] = what;
    return KV_OK;
}

bool kv_slice_state_locked(kv_server_t *server, kv_slice_t *slice, kv_request_t *request)
{
    const kv_wire_record_t *record = &request->header.record;
    kv_buffer_t *copy = NULL;
    size_t bytes = 0;
    bool later = false;
    kv_status_t status = record->action == KV_WIRE_SET_STATE
                             ? replace_locked(server, slice, request)
                         : record->slot == KV_SLOT_OBJECT
                             ? read_object_locked(server, slice, request, &copy, &bytes, &later)
                             : read_locked(server, slice, request, &copy, &bytes);
    if (later) {
        slice->reading = true;
        slice->key->num_busy++;
        kv_update_enlist_locked(server, slice);
        return false;
    }
    if (status == KV_OK)
        kv_answer_locked(server, request, copy, copy != NULL ? bytes : 0);
    else
        kv_answer_status_locked(server, request, status);
    kv_buffer_rele(copy);
    return true;
}
