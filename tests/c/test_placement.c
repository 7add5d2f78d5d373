/* Slices and their places: values are covered exactly, and servers carry about the same. */
#include "ps/placement.h"
#include "ps/wire.h"
#include "test.h"

enum { MAX_KEYS = 256, MAX_SERVERS = 16, MAX_SLICES = 4096 };

typedef struct model {
    int num_keys;
    size_t rows[MAX_KEYS], row_bytes[MAX_KEYS];
} model_t;

static void add(model_t *model, size_t rows, size_t row_elements)
{
    model->rows[model->num_keys] = rows;
    model->row_bytes[model->num_keys++] = row_elements * 4;
}

/* A vector: each element is a row. */
static void add_vectors(model_t *model, size_t length, int count)
{
    for (int i = 0; i < count; i++)
        add(model, length, 1);
}

/* The 161 parameters of ResNet-50. */
static model_t resnet50(void)
{
    static const int blocks[] = {3, 4, 6, 3};
    model_t model = {0};
    add(&model, 64, 3 * 7 * 7);
    add_vectors(&model, 64, 2);
    size_t in = 64;
    for (int stage = 0; stage < 4; stage++) {
        size_t width = (size_t)64 << stage;
        for (int block = 0; block < blocks[stage]; block++) {
            add(&model, width, in);
            add_vectors(&model, width, 2);
            add(&model, width, width * 9);
            add_vectors(&model, width, 2);
            add(&model, width * 4, width);
            add_vectors(&model, width * 4, 2);
            if (block == 0) {
                add(&model, width * 4, in);
                add_vectors(&model, width * 4, 2);
            }
            in = width * 4;
        }
    }
    add(&model, 1000, 2048);
    add_vectors(&model, 1000, 1);
    return model;
}

/* The 199 parameters of BERT-base with its pooler. */
static model_t bert_base(void)
{
    model_t model = {0};
    add(&model, 30522, 768);
    add(&model, 512, 768);
    add(&model, 2, 768);
    add_vectors(&model, 768, 2);
    for (int layer = 0; layer < 12; layer++) {
        for (int i = 0; i < 4; i++) {
            add(&model, 768, 768);
            add_vectors(&model, 768, 1);
        }
        add_vectors(&model, 768, 2);
        add(&model, 3072, 768);
        add_vectors(&model, 3072, 1);
        add(&model, 768, 3072);
        add_vectors(&model, 768, 3);
    }
    add(&model, 768, 768);
    add_vectors(&model, 768, 1);
    return model;
}

static uint16_t servers[MAX_SLICES * 4];

static int cut(const model_t *model, int32_t num_servers, kv_placed_t *placed)
{
    uint32_t used = 0;
    for (int i = 0; i < model->num_keys; i++) {
        size_t bytes = model->rows[i] * model->row_bytes[i];
        size_t slice = kv_slice_bytes(bytes, model->row_bytes[i], 4, num_servers);
        placed[i] = (kv_placed_t){bytes, slice, kv_slice_count(bytes, slice), servers + used};
        used += placed[i].num_slices;
        CHECK(used <= sizeof servers / sizeof servers[0]);
        CHECK_EQ(slice % model->row_bytes[i], 0); /* every row of these models fits */
    }
    return (int)used;
}

static void check_even(const uint64_t *loads, int32_t num_servers, const kv_placed_t *placed,
                       int num_keys)
{
    uint64_t sum = 0;
    uint64_t most = 0;
    uint64_t counted[MAX_SERVERS] = {0};
    for (int i = 0; i < num_keys; i++) {
        for (uint32_t slice = 0; slice < placed[i].num_slices; slice++) {
            size_t begin = slice * placed[i].slice_bytes;
            size_t rest = placed[i].bytes - begin;
            size_t bytes = rest < placed[i].slice_bytes ? rest : placed[i].slice_bytes;
            if (CHECK(placed[i].servers[slice] < num_servers))
                counted[placed[i].servers[slice]] += bytes;
        }
    }
    for (int32_t server = 0; server < num_servers; server++) {
        CHECK_EQ(loads[server], counted[server]);
        sum += loads[server];
        most = loads[server] > most ? loads[server] : most;
    }
    if (!CHECK((double)most * num_servers <= 1.05 * (double)sum))
        printf("    %.3f of the mean on %d servers\n", (double)most * num_servers / (double)sum,
               num_servers);
}

static void check_model(const model_t *model)
{
    static kv_placed_t placed[MAX_KEYS];
    for (int32_t num_servers = 2; num_servers <= MAX_SERVERS; num_servers++) {
        uint64_t together[MAX_SERVERS] = {0};
        uint64_t single[MAX_SERVERS] = {0};
        cut(model, num_servers, placed);
        CHECK_STATUS(kv_place(together, num_servers, placed, model->num_keys), KV_OK);
        check_even(together, num_servers, placed, model->num_keys);
        for (int i = 0; i < model->num_keys; i++)
            CHECK_STATUS(kv_place(single, num_servers, &placed[i], 1), KV_OK);
        check_even(single, num_servers, placed, model->num_keys);
    }
}

static void resnet50_is_even_on_up_to_16_servers(void)
{
    model_t model = resnet50();
    CHECK_EQ(model.num_keys, 161);
    check_model(&model);
}

static void bert_base_is_even_on_up_to_16_servers(void)
{
    model_t model = bert_base();
    CHECK_EQ(model.num_keys, 199);
    check_model(&model);
}

static void slices_cover_any_value_within_the_limit(void)
{
    uint64_t seed = 3;
    for (int trial = 0; trial < 20000; trial++) {
        size_t item = (size_t)1 << test_between(&seed, 0, 3);
        size_t row = item * (size_t)test_between(&seed, 0, 1 << test_between(&seed, 0, 20));
        size_t bytes = row * (size_t)test_between(&seed, 0, 1 << test_between(&seed, 0, 12));
        int32_t num_servers = (int32_t)test_between(&seed, 1, 1 << test_between(&seed, 0, 10));
        size_t slice = kv_slice_bytes(bytes, row, item, num_servers);
        uint32_t count = kv_slice_count(bytes, slice);
        bool good = CHECK(slice > 0 && slice <= KV_WIRE_SLICE_BYTES);
        good = good && CHECK_EQ(slice % item, 0);
        good = good && CHECK(count > 0 && (bytes == 0 || (count - 1) * slice < bytes));
        good = good && CHECK(count * slice >= bytes);
        if (good && count > 1 && row <= bytes / count) /* a row fits */
            good = CHECK_EQ(slice % row, 0);
        if (good && bytes >= (size_t)num_servers * (384 << 10))
            good = CHECK(count >= (uint32_t)num_servers);
        if (!good) {
            printf("    %zu bytes in rows of %zu, items of %zu, %d servers: slices of %zu\n", bytes,
                   row, item, num_servers, slice);
            return;
        }
    }
}

static void a_value_without_elements_has_one_slice(void)
{
    size_t slice = kv_slice_bytes(0, 0, 8, 3);
    CHECK_EQ(kv_slice_count(0, slice), 1);
    uint16_t server = 9;
    uint64_t loads[3] = {5, 2, 4};
    kv_placed_t value = {0, slice, 1, &server};
    CHECK_STATUS(kv_place(loads, 3, &value, 1), KV_OK);
    CHECK_EQ(server, 1);
    CHECK_EQ(loads[1], 2);
}

static void slices_of_rows_cover_any_value(void)
{
    uint64_t seed = 5;
    for (int trial = 0; trial < 20000; trial++) {
        size_t row = (size_t)test_between(&seed, 0, 1 << test_between(&seed, 0, 28));
        int64_t num_rows = test_between(&seed, 0, INT64_C(1) << test_between(&seed, 0, 40));
        int32_t num_servers = (int32_t)test_between(&seed, 1, 1 << test_between(&seed, 0, 12));
        if (row > 0 && num_rows > INT64_MAX / (int64_t)row)
            continue;
        int64_t rows = kv_slice_rows(num_rows, row, num_servers);
        int64_t count = kv_slice_count_rows(num_rows, rows);
        int64_t most = num_servers > 1024 ? num_servers : 1024;
        bool good = CHECK(rows > 0 && count > 0 && count <= most);
        good = good && CHECK((count - 1) * rows < num_rows || num_rows == 0);
        good = good && CHECK(num_rows / count <= rows);
        if (good && count < most / num_servers * num_servers / 2) /* not at its end */
            good = CHECK(rows == 1 || (size_t)(rows - 1) * (row + 8) <= (size_t)32 << 20);
        if (good && num_rows * (int64_t)row > 1 << 20 && num_rows >= 8 * (int64_t)num_servers)
            good = CHECK(count >= num_servers - num_servers / 8);
        if (!good) {
            printf("    %lld rows of %zu, %d servers: slices of %lld rows\n", (long long)num_rows,
                   row, num_servers, (long long)rows);
            return;
        }
    }
    CHECK_EQ(kv_slice_rows(1000000, 256, 2), 125000);
}

static void without_memory_the_loads_stay(void)
{
    uint16_t server = 9;
    uint64_t loads[2] = {5, 2};
    kv_placed_t value = {4, 4, 1, &server};
    kv_fault_set("alloc", 1);
    CHECK_STATUS(kv_place(loads, 2, &value, 1), KV_NO_MEMORY);
    kv_fault_set("alloc", 0);
    CHECK_EQ(loads[0], 5);
    CHECK_EQ(loads[1], 2);
    CHECK_EQ(server, 9);
}

static const test_t tests[] = {
    TEST(resnet50_is_even_on_up_to_16_servers),    TEST(bert_base_is_even_on_up_to_16_servers),
    TEST(slices_cover_any_value_within_the_limit), TEST(a_value_without_elements_has_one_slice),
    TEST(slices_of_rows_cover_any_value),          TEST(without_memory_the_loads_stay),
};

TEST_MAIN(tests)
