/* States of training on servers, read for a file and replaced from one.
 *
 * A key is read slot by slot in one call, which counts as a pull: what this worker has pushed
 * before is in it. In a synchronous store no later round can be complete meanwhile, so all slices
 * are of the same push. How often a key was pushed is what its slices say, not what a worker has
 * counted: with dist_async each counts its own pushes, and a synchronous store's worker 0 may be
 * ahead of the worker that saves. What belongs to the optimizer as a whole is worker 0's.
 */
#include "base/memory.h"
#include "store/exchange.h"

#include <stdio.h>
#include <string.h>

enum { NAME_BYTES = 96, PARTS = KV_MAX_SLOTS + 2 /* with the master, and the step alone */ };

typedef struct transfer {
    kv_exchange_t exchange; /* first */
    int64_t num_keys;
    kv_entry_t **entries; /* pinned */
    kv_client_part_t *parts;
    kv_client_state_t *states;
    kv_client_step_t *steps; /* [num_keys] */
    kv_buffer_t **buffers;   /* of the parts, one share each; NULL: none */
} transfer_t;

static void transfer_free(kv_exchange_t *exchange)
{
    transfer_t *transfer = (transfer_t *)exchange;
    for (int64_t i = 0; i < exchange->call.num_parts; i++)
        kv_buffer_rele(transfer->buffers[i]);
    for (int64_t i = 0; i < transfer->num_keys; i++)
        kv_var_unpin(&transfer->entries[i]->var);
    kv_free(transfer);
}

static kv_status_t transfer_new(kv_store_t *store, kv_client_verb_t verb, int64_t num_keys,
                                transfer_t **out)
{
    size_t keys = (size_t)num_keys, parts = keys * PARTS;
    size_t bytes = sizeof(transfer_t) + keys * (sizeof(kv_client_step_t) + sizeof(void *)) +
                   parts * (sizeof(kv_client_part_t) + sizeof(kv_client_state_t) + sizeof(void *));
    transfer_t *transfer = kv_calloc(1, bytes);
    KV_TRY_ALLOC(transfer, "the states of keys");
    transfer->steps = (kv_client_step_t *)(transfer + 1);
    transfer->parts = (kv_client_part_t *)(transfer->steps + keys);
    transfer->states = (kv_client_state_t *)(transfer->parts + parts);
    transfer->buffers = (kv_buffer_t **)(transfer->states + parts);
    transfer->entries = (kv_entry_t **)(transfer->buffers + parts);
    kv_exchange_init(&transfer->exchange, store, verb, transfer_free);
    transfer->exchange.call.parts = transfer->parts;
    transfer->exchange.call.states = transfer->states;
    *out = transfer;
    return KV_OK;
}

kv_status_t kv_dist_check_key(const kv_entry_t *entry)
{
    char name[NAME_BYTES];
    kv_name_format(&entry->name, name, sizeof name);
    if (entry->deleted)
        return kv_fail(KV_NO_KEY, "key %s was deleted before its state came to its turn", name);
    return KV_OK;
}

static kv_client_step_t *add_key(transfer_t *transfer, kv_entry_t *entry)
{
    kv_var_pin(&entry->var);
    transfer->exchange.name = entry->name;
    transfer->entries[transfer->num_keys] = entry;
    return &transfer->steps[transfer->num_keys++];
}

/* Takes the share of the buffer. */
static void add_part(transfer_t *transfer, kv_entry_t *entry, const kv_client_step_t *step,
                     int slot, bool per_row, kv_buffer_t *buffer)
{
    kv_client_call_t *call = &transfer->exchange.call;
    int64_t i = call->num_parts++;
    bool gets = call->verb == KV_CLIENT_GET_STATE;
    transfer->buffers[i] = buffer;
    size_t bytes = buffer != NULL && slot == KV_SLOT_OBJECT ? buffer->bytes : 0;
    transfer->states[i] = (kv_client_state_t){.slot = slot, .bytes = bytes, .per_row = per_row};
    transfer->parts[i] = (kv_client_part_t){.remote = entry->remote,
                                            .value = buffer != NULL && !gets ? buffer->data : NULL,
                                            .out = buffer != NULL && gets ? buffer->data : NULL,
                                            .step = step};
}

/* ------------------------------------------------------------------------------------ get */

/* Zeros: what is missing of an empty value is nothing. */
static kv_status_t add_out(transfer_t *transfer, kv_entry_t *entry, int slot, bool per_row)
{
    kv_buffer_t *buffer;
    size_t rows = entry->ndim > 0 ? (size_t)entry->shape[0] : 1;
    KV_TRY(kv_buffer_new_zero(rows * kv_state_layout(entry, per_row).row_bytes, &buffer));
    add_part(transfer, entry, transfer->steps, slot, per_row, buffer);
    return KV_OK;
}

static kv_status_t take_part(const transfer_t *transfer, int64_t i, const char *slot,
                             kv_key_state_t *state)
{
    const kv_client_state_t *got = &transfer->states[i];
    const kv_entry_t *entry = transfer->entries[0];
    char name[NAME_BYTES];
    if (got->num_missing > 0 && got->num_there > 0)
        return kv_fail(KV_INVALID,
                       "key %s: state '%s' is there on some of its slices only: save it while no "
                       "worker pushes",
                       kv_name_format(&entry->name, name, sizeof name), slot);
    if (got->num_missing > 0)
        return KV_OK;
    kv_state_part_t *part = &state->parts[state->num_parts++];
    snprintf(part->slot, sizeof part->slot, "%s", slot);
    part->dtype = kv_dtype_wide(entry->dtype);
    part->ndim = kv_state_layout(entry, got->per_row).ndim;
    part->shape = entry->shape;
    part->data = kv_buffer_hold(transfer->buffers[i]);
    return KV_OK;
}

/* What an optimizer in Python keeps, if anything. */
static void take_object(const transfer_t *transfer, kv_key_state_t *state)
{
    kv_buffer_t *buffer = transfer->buffers[0];
    if (buffer == NULL)
        return;
    kv_state_part_t *part = &state->parts[state->num_parts++];
    snprintf(part->slot, sizeof part->slot, KV_STATE_PACKED);
    part->dtype = KV_UINT8;
    part->ndim = 1;
    part->bytes = (int64_t)buffer->bytes;
    part->shape = &part->bytes;
    part->data = kv_buffer_hold(buffer);
}

static kv_status_t get_object(transfer_t *transfer, kv_entry_t *entry,
                              const kv_optimizer_t *optimizer, kv_key_state_t *state,
                              kv_caller_t *caller)
{
    kv_client_step_t *step = add_key(transfer, entry);
    step->optimizer = optimizer->declared;
    add_part(transfer, entry, step, KV_SLOT_OBJECT, false, NULL);
    transfer->parts[0].found = transfer->buffers;
    KV_TRY(kv_exchange_run(&transfer->exchange, caller));
    if (transfer->states[0].t <= 0)
        return KV_OK;
    state->count = transfer->states[0].t;
    take_object(transfer, state);
    return KV_OK;
}

static kv_status_t get_state(transfer_t *transfer, kv_entry_t *entry,
                             const kv_optimizer_t *optimizer, kv_states_share_t share,
                             kv_key_state_t *state, kv_caller_t *caller)
{
    kv_slot_t described[KV_MAX_SLOTS];
    int num_slots = optimizer->optim->slots(&optimizer->numbers, described);
    bool doubled = kv_dtype_is_narrow(entry->dtype) && optimizer->numbers.multi_precision;
    if (share == KV_STATES_PUSHED) {
        num_slots = 0;
        doubled = false;
    }
    kv_client_step_t *step = add_key(transfer, entry);
    step->optimizer = optimizer->declared;
    for (int i = 0; i < num_slots; i++)
        KV_TRY(add_out(transfer, entry, i, described[i].per_row));
    if (doubled)
        KV_TRY(add_out(transfer, entry, KV_SLOT_MASTER, false));
    add_part(transfer, entry, step, KV_SLOT_NONE, false, NULL);
    KV_TRY(kv_exchange_run(&transfer->exchange, caller));
    for (int64_t i = 0; i < transfer->exchange.call.num_parts; i++)
        if (transfer->states[i].t > state->count)
            state->count = transfer->states[i].t;
    if (state->count <= 0) {
        state->count = -1;
        return KV_OK;
    }
    for (int i = 0; i < num_slots; i++)
        KV_TRY(take_part(transfer, i, described[i].name, state));
    return doubled ? take_part(transfer, num_slots, "master", state) : KV_OK;
}

kv_status_t kv_dist_get_state(kv_store_t *store, kv_entry_t *entry, const kv_optimizer_t *optimizer,
                              kv_states_share_t share, kv_key_state_t *state, kv_caller_t *caller)
{
    transfer_t *transfer = NULL;
    state->count = -1;
    KV_TRY(kv_dist_check_key(entry));
    if (!kv_dtype_is_floating(entry->dtype))
        return KV_OK; /* it cannot have been pushed with an optimizer */
    bool object = optimizer->optim == kv_optim_python();
    if (object && kv_remote_num_slices(entry->remote) > 1)
        return KV_OK; /* nor can this one */
    KV_TRY(transfer_new(store, KV_CLIENT_GET_STATE, 1, &transfer));
    kv_status_t status = object && share == KV_STATES_ALL
                             ? get_object(transfer, entry, optimizer, state, caller)
                             : get_state(transfer, entry, optimizer, share, state, caller);
    kv_exchange_rele(&transfer->exchange);
    return status;
}

/* ------------------------------------------------------------------------------------ set */

static kv_buffer_t *share_of(kv_buffer_t *buffer)
{
    return buffer != NULL ? kv_buffer_hold(buffer) : NULL;
}

static void add_arrival(transfer_t *transfer, const kv_arrival_t *arrival,
                        const kv_optimizer_t *optimizer, const kv_optim_state_t *whole)
{
    kv_entry_t *entry = arrival->entry;
    kv_client_step_t *step = add_key(transfer, entry);
    if (arrival->count < 0) {
        add_part(transfer, entry, NULL, KV_SLOT_NONE, false, NULL);
        return;
    }
    step->optimizer = optimizer->declared;
    kv_optimizer_resume(optimizer, entry, whole, arrival->count, &step->step);
    if (optimizer->optim == kv_optim_python()) {
        kv_buffer_t *packed = arrival->slots->slot[kv_slots_place(arrival->slots, KV_STATE_PACKED)];
        add_part(transfer, entry, step, KV_SLOT_OBJECT, false, share_of(packed));
        return;
    }
    add_part(transfer, entry, step, KV_SLOT_NONE, false, NULL);
    /* Those that the file has not are sent as missing, so that none from before remains. */
    kv_slot_t described[KV_MAX_SLOTS];
    int num_slots = optimizer->optim->slots(&optimizer->numbers, described);
    for (int i = 0; i < num_slots; i++) {
        int place = kv_slots_place(arrival->slots, described[i].name);
        bool there = arrival->slots->kept[place].name != NULL;
        add_part(transfer, entry, step, i, described[i].per_row,
                 there ? share_of(arrival->slots->slot[place]) : NULL);
    }
    if (kv_dtype_is_narrow(entry->dtype) && optimizer->numbers.multi_precision)
        add_part(transfer, entry, step, KV_SLOT_MASTER, false, share_of(arrival->slots->master));
}

kv_status_t kv_dist_set_states(kv_store_t *store, const kv_arrival_t *arrivals,
                               int64_t num_arrivals, const kv_optimizer_t *optimizer,
                               const kv_optim_state_t *whole, kv_caller_t *caller)
{
    transfer_t *transfer = NULL;
    KV_TRY(transfer_new(store, KV_CLIENT_SET_STATE, num_arrivals, &transfer));
    for (int64_t k = 0; k < num_arrivals; k++)
        add_arrival(transfer, &arrivals[k], optimizer, whole);
    kv_status_t status = kv_exchange_run(&transfer->exchange, caller);
    if (status != KV_OK && status != KV_INTERRUPTED && status != KV_CALLBACK) {
        kv_sentence_t why;
        kv_sentence_save(&why);
        status = kv_fail(status,
                         "%.400s; servers may have taken a part of the states: load them "
                         "again",
                         why.message);
    }
    kv_exchange_rele(&transfer->exchange);
    return status;
}
