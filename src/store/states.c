/* Saving and restoring what training has left: the optimizer's counts and state, and the residuals
 * of compression.
 *
 * An export looks at one key after the other, each between two of its operations. An import makes
 * everything that it needs, checks it against the keys, enters all keys at once and only then
 * changes something.
 */
#include "base/memory.h"
#include "comm/device_work.h"
#include "ps/wire.h"
#include "store/internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 96, SHAPE_BYTES = 160 };

void kv_states_fini(kv_states_t *states)
{
    for (int64_t k = 0; k < states->num_keys; k++) {
        for (int i = 0; i < states->keys[k].num_parts; i++)
            kv_buffer_rele(states->keys[k].parts[i].data);
        kv_free(states->keys[k].parts);
    }
    kv_free(states->keys);
    *states = (kv_states_t){0};
}

/* All entries, in the order of init, pinned. */
static kv_status_t pin_entries(kv_store_t *store, kv_entry_t ***out, int64_t *count)
{
    kv_mutex_lock(&store->lock);
    int64_t n = 0;
    kv_entry_t **entries = kv_alloc((size_t)store->table.num_entries * sizeof *entries);
    for (kv_entry_t *entry = store->table.first; entries != NULL && entry; entry = entry->next) {
        kv_var_pin(&entry->var);
        entries[n++] = entry;
    }
    kv_mutex_unlock(&store->lock);
    KV_TRY_ALLOC(entries, "the list of keys");
    *out = entries;
    *count = n;
    return KV_OK;
}

static void unpin_entries(kv_entry_t **entries, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        kv_var_unpin(&entries[i]->var);
    kv_free(entries);
}

/* ---------------------------------------------------------------------------------- export */

/* A copy of one buffer, with its full shape if the key is row-sparse. */
static kv_status_t copy_part(const kv_entry_t *entry, const kv_slots_t *slots,
                             const kv_buffer_t *buffer, bool per_row, kv_state_part_t *part,
                             kv_caller_t *caller)
{
    kv_state_layout_t layout = kv_state_layout(entry, per_row);
    int64_t full = entry->ndim > 0 ? entry->shape[0] : 1;
    part->dtype = kv_dtype_wide(entry->dtype);
    part->ndim = layout.ndim;
    part->shape = entry->shape;
    if (!entry->sparse) {
        KV_TRY(kv_buffer_new((size_t)full * layout.row_bytes, &part->data));
        if (kv_buffer_place(buffer) != NULL)
            return kv_buffer_fetch(buffer, part->data->data, caller);
        memcpy(part->data->data, buffer->data, (size_t)full * layout.row_bytes);
        return KV_OK;
    }
    KV_TRY(kv_buffer_new_zero((size_t)full * layout.row_bytes, &part->data));
    const int64_t *ids = slots->num_rows > 0 ? slots->indices->data : NULL;
    for (int64_t i = 0; i < slots->num_rows; i++)
        memcpy((char *)part->data->data + (size_t)ids[i] * layout.row_bytes,
               (const char *)buffer->data + (size_t)i * layout.row_bytes, layout.row_bytes);
    return KV_OK;
}

static kv_status_t add_part(const kv_entry_t *entry, const kv_slots_t *slots,
                            const kv_buffer_t *buffer, bool per_row, const char *slot,
                            kv_key_state_t *state, kv_caller_t *caller)
{
    kv_state_part_t *part = &state->parts[state->num_parts];
    if (buffer == NULL)
        return KV_OK;
    snprintf(part->slot, sizeof part->slot, "%s", slot);
    state->num_parts++; /* its buffer goes with it, filled or not */
    return copy_part(entry, slots, buffer, per_row, part, caller);
}

static kv_status_t make_parts(kv_key_state_t *state, int32_t num_residuals)
{
    size_t most = (size_t)KV_MAX_SLOTS + 1 + (size_t)num_residuals;
    state->parts = kv_calloc(most, sizeof *state->parts);
    KV_TRY_ALLOC(state->parts, "the state of a key");
    return KV_OK;
}

/* With the key held, in one process. */
static kv_status_t export_key(const kv_entry_t *entry, const kv_slots_t *slots,
                              const kv_optim_numbers_t *numbers, uint64_t epoch,
                              kv_key_state_t *state, kv_caller_t *caller)
{
    const kv_residuals_t *residuals = &entry->residuals;
    int32_t num_residuals = residuals->epoch == epoch ? residuals->count : 0;
    KV_TRY(make_parts(state, num_residuals));
    if (slots != NULL) {
        kv_slot_t described[KV_MAX_SLOTS];
        int num_slots = slots->optim->slots(numbers, described);
        for (int i = 0; i < num_slots; i++)
            KV_TRY(add_part(entry, slots, slots->slot[kv_slots_place(slots, described[i].name)],
                            described[i].per_row, described[i].name, state, caller));
        KV_TRY(add_part(entry, slots, slots->master, false, "master", state, caller));
    }
    for (int32_t i = 0; i < num_residuals; i++) {
        char slot[32];
        snprintf(slot, sizeof slot, "residual.%" PRId32, i);
        KV_TRY(add_part(entry, slots, residuals->buffers[i], false, slot, state, caller));
    }
    return KV_OK;
}

static kv_status_t export_one(kv_store_t *store, kv_entry_t *entry, uint64_t epoch,
                              kv_states_share_t share, kv_key_state_t *state, kv_caller_t *caller)
{
    kv_dep_t dep = {.var = &entry->var, .access = KV_READ};
    kv_op_t op;
    kv_op_init(&op, &dep, 1, 0);
    KV_TRY(kv_engine_enter(store->runtime->engine, &op, caller));
    kv_mutex_lock(&store->lock);
    kv_optimizer_t *optimizer = store->optimizer;
    kv_slots_t *slots = optimizer != NULL ? entry->slots : NULL;
    if (optimizer != NULL)
        atomic_fetch_add(&optimizer->refs, 1);
    if (slots != NULL)
        atomic_fetch_add(&slots->refs, 1);
    state->name = entry->name;
    state->count = optimizer != NULL ? entry->updates : -1;
    kv_mutex_unlock(&store->lock);
    kv_status_t status;
    if (store->client == NULL) {
        status = export_key(entry, slots, optimizer != NULL ? &optimizer->numbers : NULL, epoch,
                            state, caller);
    } else {
        status = make_parts(state, 0);
        if (status == KV_OK && optimizer != NULL)
            status = kv_dist_get_state(store, entry, optimizer, share, state, caller);
    }
    kv_engine_leave(store->runtime->engine, &op);
    kv_slots_rele(slots);
    kv_optimizer_rele(optimizer);
    return status;
}

/* The shapes and names in the result would die with their keys: copies stand behind the keys. */
static kv_status_t make_keys(kv_entry_t **entries, int64_t count, kv_states_t *out)
{
    size_t bytes = (size_t)count * sizeof(kv_key_state_t);
    for (int64_t k = 0; k < count; k++)
        bytes += (size_t)entries[k]->ndim * sizeof(int64_t);
    for (int64_t k = 0; k < count; k++)
        bytes += entries[k]->name.text != NULL ? entries[k]->name.bytes : 0;
    out->keys = kv_calloc(1, bytes);
    KV_TRY_ALLOC(out->keys, "the states of all keys");
    out->num_keys = count;
    return KV_OK;
}

static void own_names(kv_entry_t **entries, kv_states_t *states)
{
    int64_t *shape = (int64_t *)(states->keys + states->num_keys);
    for (int64_t k = 0; k < states->num_keys; k++) {
        kv_key_state_t *key = &states->keys[k];
        if (entries[k]->ndim > 0)
            memcpy(shape, entries[k]->shape, (size_t)entries[k]->ndim * sizeof *shape);
        for (int i = 0; i < key->num_parts; i++)
            if (key->parts[i].shape != &key->parts[i].bytes)
                key->parts[i].shape = shape;
        shape += entries[k]->ndim;
    }
    char *text = (char *)shape;
    for (int64_t k = 0; k < states->num_keys; k++) {
        kv_name_t *name = &states->keys[k].name;
        if (name->text != NULL) {
            memcpy(text, name->text, name->bytes);
            name->text = text;
            text += name->bytes;
        }
    }
}

kv_status_t kv_store_export_states(kv_store_t *store, kv_states_share_t share, kv_states_t *out,
                                   kv_caller_t *caller)
{
    kv_entry_t **entries = NULL;
    int64_t count = 0;
    KV_TRY(kv_store_check_open(store));
    if (share != KV_STATES_COUNTS)
        KV_TRY(pin_entries(store, &entries, &count));
    kv_states_t states = {0};
    kv_status_t status = make_keys(entries, count, &states);
    /* The codec may be changed meanwhile: the residuals shall be those of the codec that is told.
     */
    kv_mutex_lock(&store->lock);
    if (store->client == NULL)
        states.codec = store->codec;
    uint64_t epoch = store->codec.type != KV_CODEC_NONE ? store->codec_epoch : UINT64_MAX;
    kv_mutex_unlock(&store->lock);
    kv_caller_detach(caller);
    for (int64_t k = 0; k < count && status == KV_OK; k++)
        status = export_one(store, entries[k], epoch, share, &states.keys[k], caller);
    kv_caller_attach(caller);
    if (status == KV_OK) {
        own_names(entries, &states);
        kv_mutex_lock(&store->lock);
        states.whole = store->state;
        states.counted = store->counted;
        for (const kv_entry_t *entry = store->table.first; entry != NULL; entry = entry->next)
            states.total += entry->updates > 0 ? entry->updates : 0;
        kv_mutex_unlock(&store->lock);
        *out = states;
    } else {
        kv_states_fini(&states);
    }
    unpin_entries(entries, count);
    return status;
}

/* ---------------------------------------------------------------------------------- import */

static kv_status_t refuse(const kv_entry_t *entry, const kv_state_part_t *part, const char *why)
{
    char name[NAME_BYTES], shape[SHAPE_BYTES];
    kv_name_format(&entry->name, name, sizeof name);
    kv_shape_format(part->ndim, part->shape, shape, sizeof shape);
    return kv_fail(KV_INVALID, "state '%s' of key %s (%s %s) %s", part->slot, name,
                   kv_dtype_name(part->dtype), shape, why);
}

static kv_status_t check_part(const kv_entry_t *entry, const kv_state_part_t *part, bool per_row)
{
    kv_state_layout_t layout = kv_state_layout(entry, per_row);
    if (part->dtype != kv_dtype_wide(entry->dtype))
        return refuse(entry, part, "has another element type than the optimizer keeps");
    bool same = part->ndim == layout.ndim;
    for (int i = 0; same && i < part->ndim; i++)
        same = part->shape[i] == entry->shape[i];
    return same ? KV_OK : refuse(entry, part, "has another shape than the key");
}

static bool keeps_object(const kv_entry_t *entry, const kv_optimizer_t *optimizer)
{
    return entry->remote != NULL && optimizer != NULL && optimizer->optim == kv_optim_python();
}

/* What an optimizer in Python keeps with a key on a server. */
static kv_status_t check_packed(const kv_entry_t *entry, const kv_state_part_t *part)
{
    const char *why = NULL;
    char name[NAME_BYTES];
    if (part->dtype != KV_UINT8 || part->ndim != 1)
        return refuse(entry, part, "is not packed");
    if (!kv_dtype_is_floating(entry->dtype))
        why = "which updates floating types only";
    else if (kv_remote_num_slices(entry->remote) > 1)
        why = "which needs the key whole on one server: set it, or load its file, before init "
              "(above 1 GiB a key is always cut)";
    else if (part->shape[0] > KV_WIRE_ROWS_BYTES)
        why = "and has more than the 1 GiB that goes to a server at once";
    if (why == NULL)
        return KV_OK;
    return kv_fail(KV_INVALID, "the state of key %s is of an optimizer in Python, %s",
                   kv_name_format(&entry->name, name, sizeof name), why);
}

/* The place of a part: a slot of the optimizer, KV_MAX_SLOTS for the master, or
 * KV_MAX_SLOTS + 1 + position for a residual; -1 if there is none. *what tells of a slot. */
static int64_t place_of(const kv_entry_t *entry, const kv_optimizer_t *optimizer,
                        const kv_slots_t *slots, const kv_state_part_t *part, kv_slot_t *what)
{
    kv_slot_t described[KV_MAX_SLOTS];
    int num_slots = optimizer != NULL ? optimizer->optim->slots(&optimizer->numbers, described) : 0;
    if (keeps_object(entry, optimizer)) {
        *what = (kv_slot_t){.name = KV_STATE_PACKED};
        return strcmp(part->slot, KV_STATE_PACKED) == 0 ? kv_slots_place(slots, what->name) : -1;
    }
    for (int i = 0; i < num_slots; i++) {
        if (strcmp(part->slot, described[i].name) == 0) {
            *what = described[i];
            return kv_slots_place(slots, described[i].name);
        }
    }
    *what = (kv_slot_t){0};
    bool narrow = kv_dtype_is_narrow(entry->dtype);
    if (strcmp(part->slot, "master") == 0)
        return narrow && optimizer != NULL && optimizer->numbers.multi_precision ? KV_MAX_SLOTS
                                                                                 : -1;
    char *end = NULL;
    if (strncmp(part->slot, "residual.", 9) == 0 && part->slot[9] >= '0' && part->slot[9] <= '9') {
        long position = strtol(part->slot + 9, &end, 10);
        if (*end == '\0' && position < INT16_MAX && !entry->sparse)
            return KV_MAX_SLOTS + 1 + position;
    }
    return -1;
}

/* Of a part with the full shape, the rows that a row-sparse key stores; all others are zero. */
static kv_status_t take_rows(const kv_entry_t *entry, const kv_state_part_t *part, size_t row_bytes,
                             kv_buffer_t **out)
{
    static const char zeros[64];
    const int64_t *ids = kv_rowset_ids(&entry->rows);
    int64_t stored = entry->rows.num_rows;
    const char *data = part->data->data;
    KV_TRY(kv_buffer_new((size_t)stored * row_bytes, out));
    if (row_bytes == 0)
        return KV_OK; /* there can be any number of such rows */
    for (int64_t row = 0, i = 0; row < entry->shape[0]; row++) {
        const char *from = data + (size_t)row * row_bytes;
        if (i < stored && ids[i] == row) {
            memcpy((char *)(*out)->data + (size_t)i++ * row_bytes, from, row_bytes);
            continue;
        }
        for (size_t at = 0; at < row_bytes; at += sizeof zeros) {
            size_t length = row_bytes - at < sizeof zeros ? row_bytes - at : sizeof zeros;
            if (memcmp(from + at, zeros, length) != 0)
                return refuse(entry, part, "holds a row that the key's value has not");
        }
    }
    return KV_OK;
}

/* With the key held. */
static kv_status_t prepare_part(const kv_optimizer_t *optimizer, const kv_state_part_t *part,
                                kv_arrival_t *arrival)
{
    const kv_entry_t *entry = arrival->entry;
    kv_slot_t what;
    int64_t place = place_of(entry, optimizer, arrival->slots, part, &what);
    if (place < 0)
        return refuse(entry, part, "is none that the optimizer keeps for such a key");
    KV_TRY(keeps_object(entry, optimizer) ? check_packed(entry, part)
                                          : check_part(entry, part, what.per_row));
    kv_buffer_t **target, *buffer = NULL;
    if (place <= KV_MAX_SLOTS) {
        target = place < KV_MAX_SLOTS ? &arrival->slots->slot[place] : &arrival->slots->master;
    } else {
        int64_t position = place - KV_MAX_SLOTS - 1;
        KV_TRY(kv_residuals_grow(&arrival->residuals, (int32_t)position + 1));
        target = &arrival->residuals.buffers[position];
    }
    if (*target != NULL)
        return refuse(entry, part, "stands there twice");
    if (entry->sparse && entry->remote == NULL) {
        kv_status_t status =
            take_rows(entry, part, kv_state_layout(entry, what.per_row).row_bytes, &buffer);
        if (status != KV_OK) {
            kv_buffer_rele(buffer);
            return status;
        }
    } else {
        KV_TRY(kv_buffer_new(part->data->bytes, &buffer));
        memcpy(buffer->data, part->data->data, part->data->bytes);
    }
    *target = buffer;
    if (place < KV_MAX_SLOTS)
        arrival->slots->kept[place] = what;
    return KV_OK;
}

/* The state of a key as yet without buffers. */
static kv_status_t prepare_slots(const kv_optimizer_t *optimizer, const kv_key_state_t *state,
                                 kv_arrival_t *arrival)
{
    arrival->count = state->count;
    arrival->slots = kv_calloc(1, sizeof *arrival->slots);
    KV_TRY_ALLOC(arrival->slots, "the state of a key");
    arrival->slots->refs = 1;
    arrival->slots->optim = optimizer != NULL ? optimizer->optim : NULL;
    const kv_rowset_t *rows = &arrival->entry->rows;
    arrival->slots->num_rows = rows->num_rows;
    arrival->slots->indices = rows->indices != NULL ? kv_buffer_hold(rows->indices) : NULL;
    return KV_OK;
}

static kv_status_t prepare(const kv_optimizer_t *optimizer, const kv_key_state_t *state,
                           kv_arrival_t *arrival)
{
    KV_TRY(prepare_slots(optimizer, state, arrival));
    for (int i = 0; i < state->num_parts; i++)
        KV_TRY(prepare_part(optimizer, &state->parts[i], arrival));
    return KV_OK;
}

/* Everything is there: the keys get it. */
static void arrive_locked(kv_store_t *store, const kv_states_t *states, bool keep_whole,
                          kv_arrival_t *arrivals) KV_REQUIRES(&store->lock)
{
    for (int64_t k = 0; k < states->num_keys; k++) {
        kv_entry_t *entry = arrivals[k].entry;
        kv_slots_t *slots = entry->slots;
        kv_residuals_t residuals = entry->residuals;
        entry->updates = states->keys[k].count;
        entry->slots = entry->updates >= 0 ? arrivals[k].slots : NULL;
        arrivals[k].slots = entry->slots != NULL ? slots : arrivals[k].slots;
        if (entry->slots == NULL)
            kv_slots_rele(slots);
        if (store->client != NULL)
            continue; /* residuals belong to the worker */
        arrivals[k].residuals.epoch = store->codec_epoch;
        entry->residuals = arrivals[k].residuals;
        arrivals[k].residuals = residuals;
    }
    if (!keep_whole)
        store->state = states->whole;
    store->counted++;
}

/* The servers have the buffers of the states: they are not kept here. */
static kv_status_t give_servers(kv_store_t *store, const kv_optimizer_t *optimizer,
                                const kv_states_t *states, bool keep_whole, kv_arrival_t *arrivals,
                                kv_caller_t *caller)
{
    kv_optim_state_t whole = states->whole;
    if (keep_whole) {
        kv_mutex_lock(&store->lock);
        whole = store->state;
        kv_mutex_unlock(&store->lock);
    }
    KV_TRY(kv_dist_set_states(store, arrivals, states->num_keys, optimizer, &whole, caller));
    for (int64_t k = 0; k < states->num_keys; k++) {
        kv_slots_rele(arrivals[k].slots);
        arrivals[k].slots = NULL;
        KV_TRY(prepare_slots(optimizer, &states->keys[k], &arrivals[k]));
    }
    return KV_OK;
}

static kv_status_t import_held(kv_store_t *store, const kv_optimizer_t *optimizer,
                               const kv_states_t *states, bool keep_whole, kv_states_share_t share,
                               kv_arrival_t *arrivals, kv_caller_t *caller)
{
    for (int64_t k = 0; k < states->num_keys && store->client != NULL; k++)
        KV_TRY(kv_dist_check_key(arrivals[k].entry));
    for (int64_t k = 0; k < states->num_keys; k++)
        KV_TRY(share == KV_STATES_COUNTS ? prepare_slots(optimizer, &states->keys[k], &arrivals[k])
                                         : prepare(optimizer, &states->keys[k], &arrivals[k]));
    if (share == KV_STATES_CHECK)
        return KV_OK;
    if (store->client != NULL && share == KV_STATES_ALL && states->num_keys > 0)
        KV_TRY(give_servers(store, optimizer, states, keep_whole, arrivals, caller));
    kv_mutex_lock(&store->lock);
    bool same = store->optimizer == optimizer;
    bool counted =
        share == KV_STATES_COUNTS && states->counted != 0 && store->counted != states->counted;
    if (same && !counted)
        arrive_locked(store, states, keep_whole, arrivals);
    kv_mutex_unlock(&store->lock);
    if (counted)
        return kv_fail(KV_INVALID, "the store has pushed");
    return same ? KV_OK
                : kv_fail(KV_INVALID, "the optimizer was replaced while states were loaded");
}

/* Finds and pins the entries. */
static kv_status_t find_entries(kv_store_t *store, const kv_states_t *states,
                                kv_arrival_t *arrivals, kv_optimizer_t **optimizer)
{
    kv_status_t status = KV_OK;
    kv_mutex_lock(&store->lock);
    for (int64_t k = 0; k < states->num_keys && status == KV_OK; k++) {
        if (states->keys[k].count >= 0 && store->optimizer == NULL)
            status = kv_fail(KV_INVALID, "the store has no built-in optimizer to keep states");
    }
    for (int64_t k = 0; k < states->num_keys && status == KV_OK; k++) {
        const kv_name_t *name = &states->keys[k].name;
        kv_entry_t *entry = kv_table_find(&store->table, name, kv_name_hash(name));
        char text[NAME_BYTES];
        if (entry == NULL) {
            status = kv_fail(KV_NO_KEY, "state of key %s, which was not initialised",
                             kv_name_format(name, text, sizeof text));
            break;
        }
        kv_var_pin(&entry->var);
        arrivals[k].entry = entry;
    }
    if (status == KV_OK && store->optimizer != NULL) {
        *optimizer = store->optimizer;
        atomic_fetch_add(&store->optimizer->refs, 1);
    }
    kv_mutex_unlock(&store->lock);
    return status;
}

kv_status_t kv_store_import_states(kv_store_t *store, const kv_states_t *states, bool keep_whole,
                                   kv_states_share_t share, kv_caller_t *caller)
{
    KV_TRY(kv_store_check_open(store));
    kv_optimizer_t *optimizer = NULL;
    size_t count = (size_t)states->num_keys;
    kv_arrival_t *arrivals = kv_calloc(count, sizeof *arrivals + sizeof(kv_dep_t));
    KV_TRY_ALLOC(arrivals, "the states of all keys");
    kv_dep_t *deps = (kv_dep_t *)(arrivals + count);
    kv_status_t status = find_entries(store, states, arrivals, &optimizer);
    if (status == KV_OK) {
        kv_op_t op;
        for (size_t k = 0; k < count; k++)
            deps[k] = (kv_dep_t){.var = &arrivals[k].entry->var, .access = KV_WRITE};
        kv_op_init(&op, deps, (int32_t)count, 0);
        kv_caller_detach(caller);
        bool enters = count > 0 && share != KV_STATES_COUNTS;
        if (enters)
            status = kv_engine_enter(store->runtime->engine, &op, caller);
        if (status == KV_OK) {
            status = import_held(store, optimizer, states, keep_whole, share, arrivals, caller);
            if (enters)
                kv_engine_leave(store->runtime->engine, &op);
        }
        kv_caller_attach(caller);
    }
    for (size_t k = 0; k < count; k++) {
        kv_slots_rele(arrivals[k].slots);
        kv_residuals_fini(&arrivals[k].residuals);
        if (arrivals[k].entry != NULL)
            kv_var_unpin(&arrivals[k].entry->var);
    }
    kv_free(arrivals);
    kv_optimizer_rele(optimizer);
    return status;
}
