/* A libFuzzer target: the bytes of a message, read in every way that a node reads one
 * (test_fuzz_wire.py builds it).
 * What was read is written again and must be the same then. */
#include "ps/wire.h"
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void expect(int holds)
{
    if (!holds)
        __builtin_trap();
}

static void read_header(const uint8_t *data, size_t bytes)
{
    kv_wire_header_t header;
    unsigned char again[KV_WIRE_HEADER_BYTES];
    if (kv_wire_get_header(data, bytes, &header) != KV_OK)
        return;
    kv_wire_put_header(&header, again);
    expect(memcmp(again, data, sizeof again) == 0);
}

static unsigned sum(const void *data, uint64_t bytes)
{
    unsigned total = 0;
    for (uint64_t i = 0; i < bytes; i++)
        total += ((const unsigned char *)data)[i];
    return total;
}

static void read_records(const uint8_t *data, size_t bytes, uint32_t count)
{
    kv_wire_cursor_t cursor;
    if (kv_wire_cursor_init(&cursor, data, bytes, count) != KV_OK)
        return;
    for (uint32_t i = 0; cursor.left > 0; i++) {
        kv_wire_record_t record;
        const void *value;
        unsigned char again[KV_WIRE_RECORD_BYTES];
        if (kv_wire_next(&cursor, &record, &value) != KV_OK)
            return;
        kv_wire_put_record(&record, again);
        expect(memcmp(again, data + (size_t)i * sizeof again, sizeof again) == 0);
        volatile unsigned total = sum(value, record.bytes);
        (void)total;
    }
}

static void read_keys(const uint8_t *data, size_t bytes)
{
    size_t offset = 0;
    kv_wire_key_t key;
    while (kv_wire_get_key(data, bytes, &offset, &key) == KV_OK) {
        volatile unsigned total = sum(key.sentence, key.sentence_bytes);
        for (uint32_t i = 0; i < key.num_slices; i++)
            total += (unsigned)kv_wire_server_of(&key, i);
        (void)total;
        size_t length = kv_wire_key_bytes(&key), end = 0;
        unsigned char *again = malloc(length);
        kv_wire_key_t copy;
        expect(kv_wire_put_key(&key, again) == again + length);
        expect(kv_wire_get_key(again, length, &end, &copy) == KV_OK && end == length);
        expect(kv_name_equal(&copy.name, &key.name) && copy.num_slices == key.num_slices);
        expect(memcmp(copy.shape, key.shape, sizeof key.shape) == 0);
        free(again);
    }
}

static void read_rows(const uint8_t *data, size_t bytes, bool ids_only)
{
    kv_wire_rows_t rows;
    unsigned char *copy = malloc(bytes + 1), again[KV_WIRE_ROWS_HEAD];
    memcpy(copy, data, bytes);
    if (kv_wire_get_rows(copy, bytes, ids_only, &rows) == KV_OK) {
        volatile unsigned total = sum(rows.ids, (uint64_t)rows.count * sizeof *rows.ids);
        if (!ids_only)
            total += sum(rows.data, (uint64_t)rows.count * rows.row_bytes);
        (void)total;
        for (int64_t i = 0; i < rows.count; i++)
            expect(rows.ids[i] >= (i > 0 ? rows.ids[i - 1] + 1 : 0) && rows.ids[i] < rows.num_rows);
        kv_wire_put_rows(&rows, again);
        expect(memcmp(again, copy, sizeof again) == 0);
    }
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    read_rows(data, bytes, true);
    read_rows(data, bytes, false);
    read_header(data, bytes);
    read_keys(data, bytes);
    if (bytes > 0)
        read_records(data + 1, bytes - 1, data[0]);
    return 0;
}
