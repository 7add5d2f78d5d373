/* Keys: their entries, and the table that finds them. */
#include "base/memory.h"
#include "ps/client.h"
#include "store/internal.h"

#include <string.h>

/* ------------------------------------------------------------------------------- entries */

static void entry_free(void *context)
{
    kv_entry_t *entry = context;
    if (entry->cache.drop != NULL)
        entry->cache.drop(entry->cache.data);
    kv_remote_free(entry->remote);
    kv_entry_drop_twins(entry);
    kv_buffer_rele(entry->stored);
    kv_buffer_rele(entry->merged);
    kv_rowset_fini(&entry->rows);
    kv_rowset_fini(&entry->merged_rows);
    kv_residuals_fini(&entry->residuals);
    kv_slots_rele(entry->slots);
    kv_free(entry);
    kv_count(KV_COUNT_KEYS, -1);
}

kv_status_t kv_entry_new(const kv_name_t *name, const kv_view_t *value, bool remote,
                         kv_entry_t **out)
{
    int64_t count, row_count = 1;
    size_t bytes, row_bytes = kv_dtype_bytes((kv_dtype_t)value->dtype);
    KV_TRY(kv_shape_size((kv_dtype_t)value->dtype, value->ndim, value->shape, &count, &bytes));
    if (value->ndim > 1)
        KV_TRY(kv_shape_size((kv_dtype_t)value->dtype, value->ndim - 1, value->shape + 1,
                             &row_count, &row_bytes));
    size_t extents = (size_t)value->ndim * sizeof *value->shape;
    kv_entry_t *entry =
        kv_calloc(1, sizeof *entry + extents + (name->text != NULL ? name->bytes : 0));
    KV_TRY_ALLOC(entry, "a key");
    entry->sparse = value->sparse != NULL;
    kv_status_t status = entry->sparse || remote ? KV_OK : kv_buffer_new(bytes, &entry->stored);
    if (status != KV_OK) {
        kv_free(entry);
        return status;
    }
    kv_var_init(&entry->var, false, entry_free, entry);
    entry->name = *name;
    if (name->text != NULL) {
        char *text = (char *)entry->shape + extents;
        memcpy(text, name->text, name->bytes);
        entry->name.text = text;
    }
    entry->hash = kv_name_hash(name);
    entry->dtype = (kv_dtype_t)value->dtype;
    entry->ndim = value->ndim;
    entry->count = count;
    entry->bytes = bytes;
    entry->row_count = row_count;
    entry->row_bytes = row_bytes;
    entry->updates = -1;
    if (value->ndim > 0)
        memcpy(entry->shape, value->shape, extents);
    kv_count(KV_COUNT_KEYS, 1);
    *out = entry;
    return KV_OK;
}

/* --------------------------------------------------------------------------------- table */

kv_entry_t *kv_table_find(const kv_table_t *table, const kv_name_t *name, uint64_t hash)
{
    if (table->num_slots == 0)
        return NULL;
    uint64_t mask = (uint64_t)table->num_slots - 1;
    for (uint64_t i = hash & mask;; i = (i + 1) & mask) {
        kv_entry_t *entry = table->slots[i];
        if (entry == NULL)
            return NULL;
        if (entry->hash == hash && kv_name_equal(&entry->name, name))
            return entry;
    }
}

static void place(kv_entry_t **slots, int64_t num_slots, kv_entry_t *entry)
{
    uint64_t mask = (uint64_t)num_slots - 1, i = entry->hash & mask;
    while (slots[i] != NULL)
        i = (i + 1) & mask;
    slots[i] = entry;
}

kv_status_t kv_table_reserve(kv_table_t *table, int64_t extra)
{
    int64_t num_slots = table->num_slots > 0 ? table->num_slots : 16;
    while (num_slots / 2 < table->num_entries + extra)
        num_slots *= 2;
    if (num_slots == table->num_slots)
        return KV_OK;
    kv_entry_t **slots = kv_calloc((size_t)num_slots, sizeof(kv_entry_t *));
    KV_TRY_ALLOC(slots, "the table of keys");
    for (kv_entry_t *entry = table->first; entry != NULL; entry = entry->next)
        place(slots, num_slots, entry);
    kv_free(table->slots);
    table->slots = slots;
    table->num_slots = num_slots;
    return KV_OK;
}

void kv_table_insert(kv_table_t *table, kv_entry_t *entry)
{
    place(table->slots, table->num_slots, entry);
    entry->prev = table->last;
    entry->next = NULL;
    *(table->last != NULL ? &table->last->next : &table->first) = entry;
    table->last = entry;
    table->num_entries++;
}

void kv_table_remove(kv_table_t *table, kv_entry_t *entry)
{
    uint64_t mask = (uint64_t)table->num_slots - 1, hole = entry->hash & mask;
    while (table->slots[hole] != entry)
        hole = (hole + 1) & mask;
    /* Close the hole: move up every later entry of the run whose home is not between them. */
    for (uint64_t i = hole;;) {
        i = (i + 1) & mask;
        kv_entry_t *later = table->slots[i];
        if (later == NULL)
            break;
        uint64_t home = later->hash & mask;
        if (((i - home) & mask) >= ((i - hole) & mask)) {
            table->slots[hole] = later;
            hole = i;
        }
    }
    table->slots[hole] = NULL;
    *(entry->prev != NULL ? &entry->prev->next : &table->first) = entry->next;
    *(entry->next != NULL ? &entry->next->prev : &table->last) = entry->prev;
    table->num_entries--;
}

void kv_table_fini(kv_table_t *table)
{
    kv_free(table->slots);
    *table = (kv_table_t){0};
}
