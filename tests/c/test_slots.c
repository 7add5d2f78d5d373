/* The state that an optimizer keeps with a value: what is made for a step, what stays, what goes,
 * and that a failed allocation loses nothing. */
#include "update.h"

#include "comm/slots.h"

enum { ROWS = 6, ROW_COUNT = 35, COUNT = ROWS * ROW_COUNT };

static kv_host_t host;
static trial_t trial; /* for its numbers alone */

/* One share of state without buffers. NULL has been reported. */
static kv_slots_t *begin(const char *optim)
{
    kv_slots_t *slots = kv_calloc(1, sizeof *slots);
    trial_begin(&trial, optim);
    host = (kv_host_t){.num_threads = 1};
    if (!CHECK(slots != NULL) || !CHECK_STATUS(kv_kernels_get(&host.kernels), KV_OK) ||
        !CHECK_STATUS(kv_team_new(1, &host.team), KV_OK)) {
        kv_free(slots);
        return NULL;
    }
    slots->refs = 1;
    slots->optim = trial.optim;
    return slots;
}

static void end(kv_slots_t *slots)
{
    kv_slots_rele(slots);
    kv_team_stop(host.team);
    kv_team_free(host.team);
}

static kv_status_t weigh(kv_slots_t *slots, kv_dtype_t dtype, void *data, kv_weight_t *out)
{
    kv_step_t step;
    trial_step(&trial, &step);
    return kv_slots_weight(slots, &host, &step, dtype, ROWS, ROW_COUNT, data, out);
}

static bool is_zero(const kv_buffer_t *buffer)
{
    for (size_t i = 0; i < buffer->bytes; i++)
        if (((const char *)buffer->data)[i] != 0)
            return false;
    return true;
}

static void state_is_made_once_and_kept(void)
{
    double data[COUNT];
    kv_weight_t weight, again;
    kv_slots_t *slots = begin("adam");
    if (slots == NULL)
        return;
    if (CHECK_STATUS(weigh(slots, KV_FLOAT64, data, &weight), KV_OK)) {
        CHECK(weight.data == data && weight.master == NULL);
        CHECK(weight.dtype == KV_FLOAT64 && weight.count == COUNT && weight.row_count == ROW_COUNT);
        for (int i = 0; i < 2; i++) {
            CHECK(weight.slots[i] == slots->slot[i]->data);
            CHECK(slots->slot[i]->bytes == sizeof data && is_zero(slots->slot[i]));
        }
        CHECK(weight.slots[2] == NULL && slots->slot[2] == NULL);
        CHECK_STATUS(weigh(slots, KV_FLOAT64, data, &again), KV_OK);
        CHECK(memcmp(&weight, &again, sizeof weight) == 0);
    }
    end(slots);
}

static void narrow_weight_gets_a_master_and_loses_it(void)
{
    uint16_t data[COUNT];
    float due[COUNT];
    uint64_t random = 31;
    kv_weight_t weight;
    kv_slots_t *slots = begin("dcasgd");
    if (slots == NULL)
        return;
    trial_fill(KV_BFLOAT16, COUNT, &random, data);
    host.kernels->float32_from[KV_BFLOAT16](COUNT, data, due);
    trial.numbers.multi_precision = true;
    if (CHECK_STATUS(weigh(slots, KV_BFLOAT16, data, &weight), KV_OK)) {
        CHECK(weight.master != NULL && memcmp(weight.master, due, sizeof due) == 0);
        /* Its first slot begins as the weight. */
        CHECK(memcmp(weight.slots[0], due, sizeof due) == 0);
        void *kept = weight.slots[0];
        trial.numbers.multi_precision = false;
        CHECK_STATUS(weigh(slots, KV_BFLOAT16, data, &weight), KV_OK);
        CHECK(weight.master == NULL && slots->master == NULL && weight.slots[0] == kept);
    }
    end(slots);
}

static void slot_of_rows_has_one_number_for_each(void)
{
    float data[COUNT];
    kv_weight_t weight;
    kv_slots_t *slots = begin("groupadagrad");
    if (slots == NULL)
        return;
    if (CHECK_STATUS(weigh(slots, KV_FLOAT32, data, &weight), KV_OK))
        CHECK_EQ(slots->slot[0]->bytes, ROWS * sizeof(float));
    end(slots);
}

static void slots_keep_their_places_when_numbers_change(void)
{
    float data[COUNT];
    kv_weight_t weight;
    kv_slots_t *slots = begin("rmsprop");
    if (slots == NULL)
        return;
    if (CHECK_STATUS(weigh(slots, KV_FLOAT32, data, &weight), KV_OK)) {
        void *first = weight.slots[0];
        *trial_param(&trial, "centered") = 1;
        CHECK_STATUS(weigh(slots, KV_FLOAT32, data, &weight), KV_OK);
        CHECK(weight.slots[0] == first && weight.slots[1] != NULL && weight.slots[2] != NULL);
        for (int i = 0; i < KV_MAX_SLOTS; i++)
            CHECK_EQ(kv_slots_place(slots, slots->kept[i].name), i);
    }
    end(slots);
}

static void failed_allocation_is_made_up_for_by_the_next_call(void)
{
    uint16_t data[COUNT] = {0};
    kv_weight_t weight;
    kv_slots_t *slots = begin("ftml");
    if (slots == NULL)
        return;
    trial.numbers.multi_precision = true;
    int failed = 0;
    kv_status_t status = KV_NO_MEMORY;
    while (status == KV_NO_MEMORY) {
        /* Later from call to call, so that each gets on. */
        kv_fault_set("alloc", failed + 1);
        status = weigh(slots, KV_FLOAT16, data, &weight);
        kv_fault_set("alloc", 0);
        failed += status == KV_NO_MEMORY;
    }
    CHECK(failed > 2);
    if (CHECK_STATUS(status, KV_OK)) {
        CHECK(weight.master == slots->master->data);
        for (int i = 0; i < KV_MAX_SLOTS; i++)
            CHECK(weight.slots[i] == slots->slot[i]->data && is_zero(slots->slot[i]));
    }
    end(slots);
}

static const test_t tests[] = {
    TEST(state_is_made_once_and_kept),
    TEST(narrow_weight_gets_a_master_and_loses_it),
    TEST(slot_of_rows_has_one_number_for_each),
    TEST(slots_keep_their_places_when_numbers_change),
    TEST(failed_allocation_is_made_up_for_by_the_next_call),
};
TEST_MAIN(tests)
