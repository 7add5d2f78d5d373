/* Training state of one value: made when a step first needs it, freed with its last share. */
#include "comm/slots.h"
#include "base/memory.h"

#include <string.h>

kv_slots_t *kv_slots_new(const kv_optim_class_t *optim)
{
    kv_slots_t *slots = kv_calloc(1, sizeof *slots);
    if (slots != NULL) {
        slots->refs = 1;
        slots->optim = optim;
    }
    return slots;
}

void kv_slots_rele(kv_slots_t *slots)
{
    if (slots == NULL || atomic_fetch_sub(&slots->refs, 1) != 1)
        return;
    kv_buffer_rele(slots->master);
    for (int i = 0; i < KV_MAX_SLOTS; i++)
        kv_buffer_rele(slots->slot[i]);
    kv_buffer_rele(slots->indices);
    kv_free(slots);
}

int kv_slots_place(const kv_slots_t *slots, const char *name)
{
    int place = 0;
    /* No class has more names than there are places. */
    while (place < KV_MAX_SLOTS - 1 && slots->kept[place].name != NULL &&
           slots->kept[place].name != name && strcmp(slots->kept[place].name, name) != 0)
        place++;
    return place;
}

kv_status_t kv_slot_make(const kv_host_t *host, kv_dtype_t dtype, int64_t count, const void *weight,
                         kv_buffer_t **out)
{
    size_t wide = kv_dtype_bytes(kv_dtype_wide(dtype));
    if (weight == NULL || count == 0)
        return kv_buffer_new_zero((size_t)count * wide, out);
    KV_TRY(kv_buffer_new((size_t)count * wide, out));
    if (kv_dtype_is_narrow(dtype))
        kv_host_widen(host, dtype, count, weight, (*out)->data);
    else
        memcpy((*out)->data, weight, (size_t)count * wide);
    return KV_OK;
}

kv_status_t kv_slots_weight_by(kv_slots_t *slots, kv_slot_maker_t *maker, const kv_step_t *step,
                               kv_dtype_t dtype, int64_t num_rows, int64_t row_count, void *data,
                               kv_weight_t *out)
{
    const kv_optim_numbers_t *numbers = &step->numbers;
    kv_slot_t described[KV_MAX_SLOTS];
    int num_slots = slots->optim->slots(numbers, described);
    int64_t count = num_rows * row_count;
    bool doubled = numbers->multi_precision && kv_dtype_is_narrow(dtype);
    if (doubled)
        KV_TRY(maker->make(maker, dtype, count, data, &slots->master));
    if (!doubled && slots->master != NULL) {
        /* From now on it would fall behind the weight. */
        kv_buffer_rele(slots->master);
        slots->master = NULL;
    }
    *out = (kv_weight_t){.dtype = dtype,
                         .count = count,
                         .row_count = row_count,
                         .data = data,
                         .master = slots->master != NULL ? slots->master->data : NULL};
    for (int i = 0; i < num_slots; i++) {
        int place = kv_slots_place(slots, described[i].name);
        KV_TRY(maker->make(maker, dtype, kv_slot_count(&described[i], num_rows, row_count),
                           described[i].from_weight ? data : NULL, &slots->slot[place]));
        slots->kept[place] = described[i];
        out->slots[i] = slots->slot[place]->data;
    }
    return KV_OK;
}

typedef struct host_maker {
    kv_slot_maker_t base;
    const kv_host_t *host;
} host_maker_t;

static kv_status_t make_here(kv_slot_maker_t *maker, kv_dtype_t dtype, int64_t count,
                             const void *weight, kv_buffer_t **buffer)
{
    return *buffer != NULL
               ? KV_OK
               : kv_slot_make(((host_maker_t *)maker)->host, dtype, count, weight, buffer);
}

kv_status_t kv_slots_weight(kv_slots_t *slots, const kv_host_t *host, const kv_step_t *step,
                            kv_dtype_t dtype, int64_t num_rows, int64_t row_count, void *data,
                            kv_weight_t *out)
{
    host_maker_t maker = {.base = {make_here}, .host = host};
    return kv_slots_weight_by(slots, &maker.base, step, dtype, num_rows, row_count, data, out);
}
