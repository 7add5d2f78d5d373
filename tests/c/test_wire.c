/* Messages are read as they were written, and what was not written so is refused. */
#include "compress/codec.h"
#include "ps/pool.h"
#include "ps/wire.h"
#include "test.h"
#include <stdlib.h>

static kv_wire_record_t some_record(uint64_t *seed)
{
    return (kv_wire_record_t){.request = test_random(seed),
                              .key = test_random(seed),
                              .round = test_random(seed),
                              .bytes = test_random(seed),
                              .tag = (uint32_t)test_random(seed),
                              .slice = (uint32_t)test_random(seed),
                              .action = (uint8_t)test_between(seed, 1, KV_WIRE_ACTIONS - 1),
                              .dtype = (uint8_t)test_between(seed, 0, KV_DTYPE_COUNT - 1),
                              .status = (uint8_t)test_between(seed, 0, KV_STATUS_COUNT - 1),
                              .codec = (uint8_t)test_between(seed, 0, KV_CODEC_1BIT),
                              .optimizer = test_random(seed),
                              .lr = test_random(seed),
                              .wd = test_random(seed),
                              .t = test_random(seed),
                              .own = test_random(seed),
                              .flags = (uint16_t)test_between(seed, 0, KV_WIRE_FLAGS - 1),
                              .slot = (uint16_t)test_between(seed, 0, UINT16_MAX)};
}

static kv_wire_header_t some_header(uint64_t *seed)
{
    return (kv_wire_header_t){.version = KV_WIRE_VERSION,
                              .kind = (uint8_t)test_between(seed, 1, KV_WIRE_KINDS - 1),
                              .priority = (uint32_t)test_random(seed),
                              .timeout_ms = (uint32_t)test_random(seed),
                              .count = (uint32_t)test_random(seed),
                              .record = some_record(seed)};
}

#define CHECK_FIELD(bits, name) CHECK(a->name == b->name);

static void check_same_record(const kv_wire_record_t *a, const kv_wire_record_t *b)
{
    KV_WIRE_RECORD_FIELDS(CHECK_FIELD)
}

static void check_same_header(const kv_wire_header_t *a, const kv_wire_header_t *b)
{
    KV_WIRE_HEADER_FIELDS(CHECK_FIELD)
    check_same_record(&a->record, &b->record);
}

/* A copy of exactly so many bytes, so that a sanitizer sees a step outside. */
static unsigned char *exact(const void *data, size_t bytes)
{
    unsigned char *copy = malloc(bytes > 0 ? bytes : 1);
    memcpy(copy, data, bytes);
    return copy;
}

/* ---------------------------------------------------------------------------------- headers */

static void a_header_is_read_as_it_was_written(void)
{
    uint64_t seed = 1;
    for (int i = 0; i < 1000; i++) {
        kv_wire_header_t header = some_header(&seed), got;
        unsigned char bytes[KV_WIRE_HEADER_BYTES];
        kv_wire_put_header(&header, bytes);
        if (CHECK_STATUS(kv_wire_get_header(bytes, sizeof bytes, &got), KV_OK))
            check_same_header(&header, &got);
    }
}

static void the_bytes_of_a_header_are_fixed(void)
{
    const kv_wire_header_t header = {.version = 1,
                                     .kind = KV_WIRE_VALUE,
                                     .priority = (uint32_t)-2,
                                     .timeout_ms = 0x01020304,
                                     .count = 5,
                                     .record = {.request = UINT64_C(0x1122334455667788),
                                                .key = 6,
                                                .round = 7,
                                                .bytes = 8,
                                                .tag = 9,
                                                .slice = 10,
                                                .action = KV_WIRE_PUSHPULL,
                                                .dtype = KV_FLOAT16,
                                                .status = KV_TIMEOUT,
                                                .codec = KV_CODEC_1BIT,
                                                .optimizer = 11,
                                                .lr = 12,
                                                .wd = 13,
                                                .t = 14,
                                                .own = 15,
                                                .flags = 3}};
    static const unsigned char due[KV_WIRE_HEADER_BYTES] = {1,
                                                            0,
                                                            KV_WIRE_VALUE,
                                                            0,
                                                            0xfe,
                                                            0xff,
                                                            0xff,
                                                            0xff,
                                                            4,
                                                            3,
                                                            2,
                                                            1,
                                                            5,
                                                            0,
                                                            0,
                                                            0,
                                                            0x88,
                                                            0x77,
                                                            0x66,
                                                            0x55,
                                                            0x44,
                                                            0x33,
                                                            0x22,
                                                            0x11,
                                                            6,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            7,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            8,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            0,
                                                            9,
                                                            0,
                                                            0,
                                                            0,
                                                            10,
                                                            0,
                                                            0,
                                                            0,
                                                            KV_WIRE_PUSHPULL,
                                                            KV_FLOAT16,
                                                            KV_TIMEOUT,
                                                            KV_CODEC_1BIT,
                                                            [KV_WIRE_HEADER_BYTES - 44] = 11,
                                                            [KV_WIRE_HEADER_BYTES - 36] = 12,
                                                            [KV_WIRE_HEADER_BYTES - 28] = 13,
                                                            [KV_WIRE_HEADER_BYTES - 20] = 14,
                                                            [KV_WIRE_HEADER_BYTES - 12] = 15,
                                                            [KV_WIRE_HEADER_BYTES - 4] = 3};
    unsigned char bytes[KV_WIRE_HEADER_BYTES];
    kv_wire_put_header(&header, bytes);
    CHECK(memcmp(bytes, due, sizeof due) == 0);
}

static void a_header_of_another_length_is_refused(void)
{
    uint64_t seed = 2;
    kv_wire_header_t header = some_header(&seed), got;
    unsigned char bytes[KV_WIRE_HEADER_BYTES + 1] = {0};
    kv_wire_put_header(&header, bytes);
    for (size_t length = 0; length <= sizeof bytes; length++) {
        unsigned char *copy = exact(bytes, length);
        CHECK_STATUS(kv_wire_get_header(copy, length, &got),
                     length == KV_WIRE_HEADER_BYTES ? KV_OK : KV_INVALID);
        free(copy);
    }
}

static void a_header_with_a_number_that_means_nothing_is_refused(void)
{
    const kv_wire_header_t good = {
        .version = KV_WIRE_VERSION, .kind = KV_WIRE_PUSH_ONE, .record = {.action = KV_WIRE_PUSH}};
    kv_wire_header_t bad[] = {good, good, good, good, good, good, good, good, good}, got;
    bad[0].version = KV_WIRE_VERSION + 1;
    bad[1].kind = 0;
    bad[2].kind = KV_WIRE_KINDS;
    bad[3].record.action = 0;
    bad[4].record.action = KV_WIRE_ACTIONS;
    bad[5].record.dtype = KV_DTYPE_COUNT;
    bad[6].record.status = KV_STATUS_COUNT;
    bad[7].record.codec = KV_CODEC_1BIT + 1;
    bad[8].record.flags = KV_WIRE_FLAGS;
    unsigned char bytes[KV_WIRE_HEADER_BYTES];
    kv_wire_put_header(&good, bytes);
    CHECK_STATUS(kv_wire_get_header(bytes, sizeof bytes, &got), KV_OK);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        kv_wire_put_header(&bad[i], bytes);
        CHECK_STATUS(kv_wire_get_header(bytes, sizeof bytes, &got), KV_INVALID);
    }
    bad[3].kind = KV_WIRE_BATCH; /* which has no record of its own */
    kv_wire_put_header(&bad[3], bytes);
    CHECK_STATUS(kv_wire_get_header(bytes, sizeof bytes, &got), KV_OK);
}

/* ---------------------------------------------------------------------------------- records */

enum { MAX_RECORDS = 20, ROOM = 64 << 10 };

typedef struct batch {
    kv_wire_record_t records[MAX_RECORDS];
    uint32_t count;
    unsigned char data[ROOM];
    size_t bytes;
} batch_t;

static void fill(batch_t *batch, uint64_t *seed)
{
    batch->count = (uint32_t)test_between(seed, 0, MAX_RECORDS);
    memset(batch->data, 0, sizeof batch->data);
    size_t place = kv_wire_table_bytes(batch->count);
    for (uint32_t i = 0; i < batch->count; i++) {
        kv_wire_record_t record = some_record(seed);
        record.bytes = (uint64_t)test_between(seed, 0, 3) * (uint64_t)test_between(seed, 0, 100);
        batch->records[i] = record;
        kv_wire_put_record(&record, batch->data + (size_t)i * KV_WIRE_RECORD_BYTES);
        CHECK_EQ(place % KV_WIRE_ALIGN, 0);
        memset(batch->data + place, (int)i + 1, (size_t)record.bytes);
        place += kv_wire_value_bytes((size_t)record.bytes);
    }
    batch->bytes = place;
}

/* Reads to the end or the first error, and every byte of every value. Gives how many were read. */
static uint32_t read_all(const void *data, size_t bytes, uint32_t count, uint64_t *sum)
{
    kv_wire_cursor_t cursor;
    if (kv_wire_cursor_init(&cursor, data, bytes, count) != KV_OK)
        return 0;
    kv_wire_record_t record;
    const void *value;
    while (cursor.left > 0 && kv_wire_next(&cursor, &record, &value) == KV_OK) {
        for (uint64_t i = 0; i < record.bytes; i++)
            *sum += ((const unsigned char *)value)[i];
    }
    return count - cursor.left;
}

static void a_batch_is_read_as_it_was_written(void)
{
    uint64_t seed = 3;
    static batch_t batch;
    for (int round = 0; round < 300; round++) {
        fill(&batch, &seed);
        kv_wire_cursor_t cursor;
        if (!CHECK_STATUS(kv_wire_cursor_init(&cursor, batch.data, batch.bytes, batch.count),
                          KV_OK))
            continue;
        for (uint32_t i = 0; i < batch.count; i++) {
            kv_wire_record_t record;
            const void *value;
            CHECK_EQ(cursor.left, batch.count - i);
            if (!CHECK_STATUS(kv_wire_next(&cursor, &record, &value), KV_OK))
                break;
            check_same_record(&record, &batch.records[i]);
            for (uint64_t j = 0; j < record.bytes; j++)
                CHECK_EQ(((const unsigned char *)value)[j], i + 1);
        }
        CHECK_EQ(cursor.left, 0);
    }
}

static void a_batch_that_is_cut_anywhere_is_refused(void)
{
    uint64_t seed = 4, sum = 0;
    static batch_t batch;
    do
        fill(&batch, &seed);
    while (batch.count < 3 || batch.records[batch.count - 1].bytes == 0);
    size_t padding = kv_wire_value_bytes((size_t)batch.records[batch.count - 1].bytes) -
                     (size_t)batch.records[batch.count - 1].bytes;
    for (size_t length = 0; length <= batch.bytes; length++) {
        unsigned char *copy = exact(batch.data, length);
        uint32_t count = read_all(copy, length, batch.count, &sum);
        CHECK((count == batch.count) == (length >= batch.bytes - padding));
        free(copy);
    }
}

static void a_value_longer_than_its_message_is_refused(void)
{
    static const uint64_t lengths[] = {1, 64, UINT32_MAX, UINT64_MAX - 63, UINT64_MAX};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        unsigned char data[2 * KV_WIRE_ALIGN] = {0}; /* as much as the table of one record takes */
        const kv_wire_record_t record = {.action = KV_WIRE_PUSH, .bytes = lengths[i]};
        kv_wire_put_record(&record, data);
        kv_wire_cursor_t cursor;
        kv_wire_record_t got;
        const void *value;
        CHECK_STATUS(kv_wire_cursor_init(&cursor, data, sizeof data, 1), KV_OK);
        CHECK_STATUS(kv_wire_next(&cursor, &got, &value), KV_INVALID);
    }
    kv_wire_cursor_t cursor;
    CHECK_STATUS(kv_wire_cursor_init(&cursor, "", 0, UINT32_MAX), KV_INVALID);
    CHECK_STATUS(kv_wire_cursor_init(&cursor, "", 0, 0), KV_OK);
}

/* ------------------------------------------------------------------------------------- keys */

typedef struct key_sample {
    kv_wire_key_t key;
    char text[40], sentence[40];
    unsigned char servers[60];
} key_sample_t;

static void fill_key(key_sample_t *sample, uint64_t *seed)
{
    memset(sample, 0, sizeof *sample);
    kv_wire_key_t *key = &sample->key;
    for (size_t i = 0; i < sizeof sample->text; i++)
        sample->text[i] = (char)test_random(seed);
    if (test_random(seed) & 1)
        key->name = (kv_name_t){.text = sample->text, .bytes = (size_t)test_between(seed, 0, 40)};
    else
        key->name.number = (int64_t)test_random(seed);
    key->dtype = (uint8_t)test_between(seed, 0, KV_DTYPE_COUNT - 1);
    key->sparse = test_random(seed) & 1;
    key->ndim = test_random(seed) & 1 ? (int32_t)test_between(seed, 0, 3)
                                      : (int32_t)test_between(seed, 0, KV_MAX_DIMS);
    for (int i = 0; i < key->ndim; i++)
        key->shape[i] = (int64_t)test_random(seed);
    if (test_random(seed) & 1) {
        key->placed = 1;
        key->number = test_random(seed);
        key->slice_bytes = test_random(seed);
        key->num_slices = (uint32_t)test_between(seed, 0, 30);
        key->servers = sample->servers;
        for (uint32_t i = 0; i < key->num_slices; i++)
            kv_wire_put_server(sample->servers, i, (int32_t)test_between(seed, 0, 65535));
    }
    if (test_random(seed) & 1) {
        key->status = (uint8_t)test_between(seed, 0, KV_STATUS_COUNT - 1);
        key->sentence = strcpy(sample->sentence, "has another shape");
        key->sentence_bytes = (uint32_t)strlen(sample->sentence);
    }
}

static void check_same_key(const kv_wire_key_t *a, const kv_wire_key_t *b)
{
    CHECK(kv_name_equal(&a->name, &b->name));
    CHECK(a->dtype == b->dtype && a->sparse == b->sparse && a->placed == b->placed);
    CHECK(a->status == b->status && a->number == b->number && a->slice_bytes == b->slice_bytes);
    if (CHECK_EQ(a->ndim, b->ndim))
        CHECK(memcmp(a->shape, b->shape, (size_t)a->ndim * sizeof a->shape[0]) == 0);
    if (CHECK_EQ(a->num_slices, b->num_slices)) {
        for (uint32_t i = 0; i < a->num_slices; i++)
            CHECK_EQ(kv_wire_server_of(a, i), kv_wire_server_of(b, i));
    }
    if (CHECK_EQ(a->sentence_bytes, b->sentence_bytes) && a->sentence_bytes > 0)
        CHECK(memcmp(a->sentence, b->sentence, a->sentence_bytes) == 0);
}

static void keys_are_read_as_they_were_written(void)
{
    enum { COUNT = 5 };
    uint64_t seed = 5;
    for (int round = 0; round < 1000; round++) {
        key_sample_t samples[COUNT];
        unsigned char data[8000], *end = data;
        for (int i = 0; i < COUNT; i++) {
            fill_key(&samples[i], &seed);
            unsigned char *begin = end;
            end = kv_wire_put_key(&samples[i].key, end);
            CHECK_EQ(end - begin, kv_wire_key_bytes(&samples[i].key));
        }
        size_t bytes = (size_t)(end - data), offset = 0;
        unsigned char *copy = exact(data, bytes);
        for (int i = 0; i < COUNT; i++) {
            kv_wire_key_t key;
            if (CHECK_STATUS(kv_wire_get_key(copy, bytes, &offset, &key), KV_OK))
                check_same_key(&key, &samples[i].key);
        }
        CHECK_EQ(offset, bytes);
        free(copy);
    }
}

static void a_key_that_is_cut_anywhere_is_refused(void)
{
    uint64_t seed = 6;
    for (int round = 0; round < 20; round++) {
        key_sample_t sample;
        unsigned char data[2000];
        fill_key(&sample, &seed);
        size_t bytes = (size_t)(kv_wire_put_key(&sample.key, data) - data);
        for (size_t length = 0; length < bytes; length++) {
            unsigned char *copy = exact(data, length);
            kv_wire_key_t key = {.number = 77};
            size_t offset = 0;
            CHECK_STATUS(kv_wire_get_key(copy, length, &offset, &key), KV_INVALID);
            CHECK(offset == 0 && key.number == 77);
            free(copy);
        }
    }
}

/* ------------------------------------------------------------------------------------ damage */

static void damage(unsigned char *data, size_t bytes, uint64_t *seed)
{
    for (int64_t i = test_between(seed, 1, 4); i > 0 && bytes > 0; i--) {
        size_t place = (size_t)test_between(seed, 0, (int64_t)bytes - 1);
        data[place] = test_random(seed) & 1 ? (unsigned char)test_random(seed)
                                            : (unsigned char)(data[place] ^ 1 << (*seed & 7));
    }
}

static void damaged_messages_are_never_read_outside(void)
{
    uint64_t sum = 0, whole = 0;
    static batch_t batch;
    for (uint64_t i = 0; i < 100000; i++) {
        uint64_t seed = i;
        if (i % 50 == 0)
            fill(&batch, &seed);
        size_t length = (size_t)test_between(&seed, 0, (int64_t)batch.bytes);
        if (i % 2 == 0)
            length = batch.bytes;
        unsigned char *copy = exact(batch.data, length);
        damage(copy, length < 900 ? length : 900, &seed);
        whole += read_all(copy, length, batch.count, &sum) == batch.count;
        free(copy);
    }
    CHECK(whole > 0 && whole < 100000);
}

static void damaged_headers_and_keys_are_never_read_outside(void)
{
    uint64_t good = 0, sum = 0;
    for (uint64_t i = 0; i < 100000; i++) {
        uint64_t seed = i;
        kv_wire_header_t header = some_header(&seed);
        unsigned char bytes[KV_WIRE_HEADER_BYTES], data[2000];
        kv_wire_put_header(&header, bytes);
        damage(bytes, sizeof bytes, &seed);
        if (kv_wire_get_header(bytes, sizeof bytes, &header) == KV_OK)
            CHECK(header.kind > 0 && header.kind < KV_WIRE_KINDS);
        key_sample_t sample;
        fill_key(&sample, &seed);
        size_t length = (size_t)(kv_wire_put_key(&sample.key, data) - data), offset = 0;
        unsigned char *copy = exact(data, length);
        damage(copy, length, &seed);
        kv_wire_key_t key;
        if (kv_wire_get_key(copy, length, &offset, &key) == KV_OK) {
            good++;
            CHECK(offset <= length && key.ndim >= 0 && key.ndim <= KV_MAX_DIMS);
            for (uint32_t j = 0; j < key.num_slices; j++)
                CHECK(kv_wire_server_of(&key, j) >= 0);
            for (uint32_t j = 0; j < key.sentence_bytes; j++)
                sum += (unsigned char)key.sentence[j];
            sum += kv_name_hash(&key.name);
        }
        free(copy);
    }
    CHECK(good > 0 && good < 100000 && sum > 0);
}

/* -------------------------------------------------------------------------------------- pool */

static void a_pool_lends_what_was_given_back(void)
{
    kv_pool_t *pool;
    kv_buffer_t *first, *second, *other;
    if (!CHECK_STATUS(kv_pool_new(&pool), KV_OK))
        return;
    CHECK_STATUS(kv_pool_get(pool, 1000, &first), KV_OK);
    CHECK_EQ(first->bytes, 1000);
    CHECK_EQ((uintptr_t)first->data % KV_WIRE_ALIGN, 0);
    CHECK_STATUS(kv_pool_get(pool, 1000, &second), KV_OK);
    CHECK(first->data != second->data);
    CHECK_EQ(kv_counter_value(KV_COUNT_BUFFERS), 2);
    void *data = first->data;
    kv_buffer_rele(kv_buffer_hold(first));
    kv_buffer_rele(first);
    CHECK_EQ(kv_counter_value(KV_COUNT_VALUE_BYTES), 1000);
    CHECK_STATUS(kv_pool_get(pool, 1025, &other), KV_OK);
    CHECK(other->data != data);
    CHECK_STATUS(kv_pool_get(pool, 513, &first), KV_OK);
    CHECK(first->data == data);
    CHECK_EQ(first->bytes, 513);
    kv_buffer_rele(first);
    kv_buffer_rele(second);
    kv_buffer_rele(other);
    static const size_t sizes[] = {0, 1, 63, 64, 65, 4096, 1 << 20, (1 << 20) + 1, 5 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        if (!CHECK_STATUS(kv_pool_get(pool, sizes[i], &first), KV_OK))
            continue;
        memset(first->data, 1, sizes[i]);
        kv_buffer_rele(first);
    }
    kv_pool_free(pool);
}

static void a_pool_without_memory_gives_up_what_it_keeps(void)
{
    kv_pool_t *pool;
    kv_buffer_t *buffer;
    kv_fault_set("alloc", 1);
    CHECK_STATUS(kv_pool_new(&pool), KV_NO_MEMORY);
    kv_fault_set("alloc", 0);
    if (!CHECK_STATUS(kv_pool_new(&pool), KV_OK))
        return;
    kv_fault_set("alloc", 1);
    CHECK_STATUS(kv_pool_get(pool, 100, &buffer), KV_NO_MEMORY);
    kv_fault_set("alloc", 0);
    CHECK_STATUS(kv_pool_get(pool, 100, &buffer), KV_OK);
    kv_buffer_rele(buffer);
    kv_fault_set("alloc", 1);
    CHECK_STATUS(kv_pool_get(pool, 100, &buffer), KV_OK); /* the one that was kept */
    kv_buffer_t *large;
    CHECK_STATUS(kv_pool_get(pool, 5000, &large), KV_NO_MEMORY);
    kv_fault_set("alloc", 0);
    kv_buffer_rele(buffer);
    kv_fault_set("alloc", 1);
    CHECK_STATUS(kv_pool_get(pool, 5000, &large), KV_OK); /* in the place of the other */
    CHECK_EQ(kv_fault_set("alloc", 0), 3); /* the one that failed, a slab and its memory */
    kv_buffer_rele(large);
    CHECK_STATUS(kv_pool_get(pool, SIZE_MAX, &large), KV_NO_MEMORY);
    kv_pool_free(pool);
    kv_pool_free(NULL);
}

static void *borrow(void *context)
{
    uint64_t seed = (uint64_t)(uintptr_t)&seed;
    for (int i = 0; i < 3000; i++) {
        kv_buffer_t *buffer;
        size_t bytes = (size_t)test_between(&seed, 1, 3000);
        if (!CHECK_STATUS(kv_pool_get(context, bytes, &buffer), KV_OK))
            break;
        memset(buffer->data, i & 255, bytes);
        kv_buffer_rele(buffer);
    }
    return NULL;
}

static void threads_share_a_pool(void)
{
    kv_pool_t *pool;
    kv_thread_t threads[3];
    if (!CHECK_STATUS(kv_pool_new(&pool), KV_OK))
        return;
    for (int i = 0; i < 3; i++)
        CHECK_STATUS(kv_thread_start(&threads[i], "borrow", borrow, pool), KV_OK);
    for (int i = 0; i < 3; i++)
        kv_thread_join(threads[i]);
    kv_pool_free(pool);
}

static const test_t tests[] = {
    TEST(a_header_is_read_as_it_was_written),
    TEST(the_bytes_of_a_header_are_fixed),
    TEST(a_header_of_another_length_is_refused),
    TEST(a_header_with_a_number_that_means_nothing_is_refused),
    TEST(a_batch_is_read_as_it_was_written),
    TEST(a_batch_that_is_cut_anywhere_is_refused),
    TEST(a_value_longer_than_its_message_is_refused),
    TEST(keys_are_read_as_they_were_written),
    TEST(a_key_that_is_cut_anywhere_is_refused),
    TEST(damaged_messages_are_never_read_outside),
    TEST(damaged_headers_and_keys_are_never_read_outside),
    TEST(a_pool_lends_what_was_given_back),
    TEST(a_pool_without_memory_gives_up_what_it_keeps),
    TEST(threads_share_a_pool),
};
TEST_MAIN(tests)
