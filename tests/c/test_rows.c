/* Row sets against a slow model that holds every row: unions, sums and copies, alone and with a
 * team, and what happens without memory. Values are small whole numbers, so that sums are exact.
 */
#include "test.h"

#include "comm/rows.h"
#include <stdlib.h>

enum { MAX_SETS = 20, GUARD = 64 };

static const int64_t row_counts[] = {1, 2, 3, 16, 17, 64, 100};
#define NUM_ROW_COUNTS (int64_t)(sizeof row_counts / sizeof row_counts[0])

/* -------------------------------------------------------------------------------- helpers */

static kv_host_t host_new(int num_threads)
{
    kv_host_t host = {.num_threads = num_threads};
    CHECK_STATUS(kv_kernels_get(&host.kernels), KV_OK);
    CHECK_STATUS(kv_team_new(num_threads, &host.team), KV_OK);
    return host;
}

static void host_end(kv_host_t *host)
{
    kv_team_stop(host->team);
    kv_team_free(host->team);
}

static void put(const kv_host_t *host, kv_dtype_t dtype, void *to, int64_t i, double value)
{
    float narrow = (float)value;
    switch (dtype) {
    case KV_FLOAT64:
        ((double *)to)[i] = value;
        break;
    case KV_FLOAT32:
        ((float *)to)[i] = narrow;
        break;
    case KV_FLOAT16:
    case KV_BFLOAT16:
        host->kernels->float32_to[dtype](1, &narrow, (uint16_t *)to + i);
        break;
    case KV_INT8:
    case KV_UINT8:
        ((uint8_t *)to)[i] = (uint8_t)value;
        break;
    case KV_INT32:
        ((int32_t *)to)[i] = (int32_t)value;
        break;
    default:
        ((int64_t *)to)[i] = (int64_t)value;
    }
}

/* Value of element e of row `id` of set k. */
static double value_at(int k, int64_t id, int64_t e)
{
    return (double)((id * 7 + e * 3 + k * 5) % 11 + 1);
}

static kv_rowset_t set_new(int64_t num_rows, size_t row_bytes)
{
    kv_rowset_t set = {0};
    CHECK_STATUS(kv_rowset_make(&set, num_rows, row_bytes), KV_OK);
    return set;
}

/* About `percent` of the ids below `limit`, shifted by `base`. */
static kv_rowset_t random_set(const kv_host_t *host, kv_dtype_t dtype, int64_t row_count, int k,
                              int64_t base, int64_t limit, int64_t percent, uint64_t *state)
{
    size_t row_bytes = (size_t)row_count * kv_dtype_bytes(dtype);
    int64_t *ids = malloc((size_t)limit * sizeof *ids + 1), num_rows = 0;
    for (int64_t id = 0; id < limit; id++)
        if (test_between(state, 0, 99) < percent)
            ids[num_rows++] = base + id;
    kv_rowset_t set = set_new(num_rows, row_bytes);
    for (int64_t i = 0; i < num_rows; i++) {
        ((int64_t *)set.indices->data)[i] = ids[i];
        for (int64_t e = 0; e < row_count; e++)
            put(host, dtype, set.data->data, i * row_count + e, value_at(k, ids[i] - base, e));
    }
    free(ids);
    return set;
}

/* The place of an id in a set, -1 if it is not there. */
static int64_t place_of(const kv_rowset_t *set, int64_t id)
{
    for (int64_t low = 0, high = set->num_rows; low < high;) {
        int64_t middle = (low + high) / 2;
        if (kv_rowset_ids(set)[middle] == id)
            return middle;
        if (kv_rowset_ids(set)[middle] < id)
            low = middle + 1;
        else
            high = middle;
    }
    return -1;
}

/* Is `sum` the union of these sets, whose ids lie in [base, base + limit)? */
static bool is_union(const kv_row_sum_t *sum, int64_t base, int64_t limit, int num_sets,
                     const kv_rowset_t *const *sets)
{
    int64_t row = 0;
    bool good = true;
    for (int64_t id = base; id < base + limit && good; id++) {
        const void *due[MAX_SETS], *single, *const *parts;
        int num_due = 0;
        for (int k = 0; k < num_sets; k++) {
            int64_t place = place_of(sets[k], id);
            if (place >= 0)
                due[num_due++] = kv_rowset_data(sets[k]) + (size_t)place * sum->row_bytes;
        }
        if (num_due == 0)
            continue;
        good = row < sum->num_rows && sum->ids[row] == id &&
               kv_row_sum_parts(sum, row, &single, &parts) == num_due &&
               memcmp(parts, due, (size_t)num_due * sizeof due[0]) == 0;
        row++;
    }
    return good && row == sum->num_rows;
}

/* The model's row `id` of the sum, zeros if no set has it. */
static void model_row(const kv_host_t *host, kv_dtype_t dtype, int64_t row_count, int64_t id,
                      int num_sets, const kv_rowset_t *const *sets, char *to)
{
    for (int64_t e = 0; e < row_count; e++) {
        double sum = 0;
        for (int k = 0; k < num_sets; k++)
            if (place_of(sets[k], id) >= 0)
                sum += value_at(k, id, e);
        put(host, dtype, to, e, sum);
    }
}

static char *guarded_new(size_t bytes)
{
    char *memory = malloc(bytes + 2 * (size_t)GUARD);
    memset(memory, 0xa5, bytes + 2 * (size_t)GUARD);
    return memory + GUARD;
}

static void guarded_free(char *memory, size_t bytes)
{
    for (int i = 1; i <= GUARD; i++)
        if (!CHECK((uint8_t)memory[-i] == 0xa5 && (uint8_t)memory[bytes + (size_t)i - 1] == 0xa5))
            break;
    free(memory - GUARD);
}

/* ---------------------------------------------------------------------------------- unions */

static void check_union(const kv_host_t *host, kv_dtype_t dtype, int64_t row_count, int num_sets,
                        int64_t base, int64_t limit, uint64_t *state)
{
    kv_rowset_t sets[MAX_SETS];
    const kv_rowset_t *pointers[MAX_SETS];
    for (int k = 0; k < num_sets; k++) {
        int64_t percent = (int64_t[]){0, 1, 10, 50, 100}[test_between(state, 0, 4)];
        sets[k] = random_set(host, dtype, row_count, k, base, limit, percent, state);
        pointers[k] = &sets[k];
    }
    kv_row_sum_t sum;
    if (CHECK_STATUS(kv_row_sum_init(host, dtype, row_count, num_sets, pointers, &sum), KV_OK)) {
        CHECK_EQ(sum.row_bytes, (size_t)row_count * kv_dtype_bytes(dtype));
        CHECK(is_union(&sum, base, limit, num_sets, pointers));
        kv_row_sum_fini(&sum);
    }
    for (int k = 0; k < num_sets; k++)
        kv_rowset_fini(&sets[k]);
}

static void union_has_the_rows_of_all_sets_in_their_order(void)
{
    uint64_t state = 1;
    for (int threads = 1; threads <= 3; threads += 2) {
        kv_host_t host = host_new(threads);
        for (int num_sets = 1; num_sets <= MAX_SETS; num_sets++)
            for (int round = 0; round < 20; round++)
                check_union(&host, KV_FLOAT32, 3, num_sets, 0, test_between(&state, 1, 200),
                            &state);
        host_end(&host);
    }
}

static void large_union_does_not_depend_on_the_cuts(void)
{
    static const int counts[] = {2, 3, 4, 8, 9};
    uint64_t state = 2;
    kv_host_t host = host_new(3);
    for (int i = 0; i < 5; i++)
        for (int round = 0; round < 4; round++)
            check_union(&host, KV_UINT8, 1, counts[i], 0, 30000, &state);
    host_end(&host);
}

static void union_takes_the_highest_ids(void)
{
    uint64_t state = 3;
    kv_host_t host = host_new(2);
    for (int num_sets = 1; num_sets <= MAX_SETS; num_sets++)
        check_union(&host, KV_INT8, 1, num_sets, INT64_MAX - 50, 50, &state);
    host_end(&host);
}

static void single_set_is_described_in_place(void)
{
    uint64_t state = 4;
    kv_host_t host = host_new(1);
    kv_rowset_t set = random_set(&host, KV_FLOAT32, 2, 0, 0, 50, 50, &state), empty = {0};
    const kv_rowset_t *one[] = {&set}, *beside_empty[] = {&empty, &set, &empty};
    kv_row_sum_t sum;
    kv_fault_set("alloc", 1);
    CHECK_STATUS(kv_row_sum_init(&host, KV_FLOAT32, 2, 1, one, &sum), KV_OK);
    CHECK(sum.ids == kv_rowset_ids(&set) && sum.data == kv_rowset_data(&set));
    kv_row_sum_fini(&sum);
    CHECK_STATUS(kv_row_sum_init(&host, KV_FLOAT32, 2, 3, beside_empty, &sum), KV_OK);
    CHECK(sum.ids == kv_rowset_ids(&set) && sum.data == kv_rowset_data(&set));
    kv_row_sum_fini(&sum);
    CHECK_EQ(kv_fault_set("alloc", 0), 0);
    kv_rowset_fini(&set);
    host_end(&host);
}

static void union_without_memory_fails_and_changes_nothing(void)
{
    uint64_t state = 5;
    kv_host_t host = host_new(2);
    kv_rowset_t sets[2];
    const kv_rowset_t *pointers[2] = {&sets[0], &sets[1]};
    for (int k = 0; k < 2; k++)
        sets[k] = random_set(&host, KV_FLOAT32, 2, k, 0, 50, 50, &state);
    kv_row_sum_t sum, before;
    memset(&sum, 0x5a, sizeof sum);
    before = sum;
    kv_fault_set("alloc", 1);
    CHECK_STATUS(kv_row_sum_init(&host, KV_FLOAT32, 2, 2, pointers, &sum), KV_NO_MEMORY);
    CHECK_EQ(kv_fault_set("alloc", 0), 1);
    CHECK(memcmp(&sum, &before, sizeof sum) == 0);
    for (int k = 0; k < 2; k++)
        kv_rowset_fini(&sets[k]);
    host_end(&host);
}

/* ------------------------------------------------------------------------------------ sums */

static void check_sums(const kv_host_t *host, kv_dtype_t dtype, int64_t row_count, int num_sets,
                       int64_t limit, int num_dst, uint64_t *state)
{
    size_t row_bytes = (size_t)row_count * kv_dtype_bytes(dtype);
    kv_rowset_t sets[MAX_SETS];
    const kv_rowset_t *pointers[MAX_SETS];
    char *dst[3], *row = malloc(row_bytes);
    for (int k = 0; k < num_sets; k++) {
        sets[k] =
            random_set(host, dtype, row_count, k, 0, limit, test_between(state, 0, 100), state);
        pointers[k] = &sets[k];
    }
    kv_row_sum_t sum;
    CHECK_STATUS(kv_row_sum_init(host, dtype, row_count, num_sets, pointers, &sum), KV_OK);

    size_t bytes = (size_t)sum.num_rows * row_bytes;
    char *data = guarded_new(bytes);
    int64_t *ids = malloc((size_t)sum.num_rows * sizeof *ids + 1);
    kv_rows_write(host, &sum, ids, data);
    bool good = true;
    for (int64_t i = 0; i < sum.num_rows; i++) {
        model_row(host, dtype, row_count, sum.ids[i], num_sets, pointers, row);
        good = good && ids[i] == sum.ids[i] &&
               memcmp(row, data + (size_t)i * row_bytes, row_bytes) == 0;
    }
    CHECK(good);
    kv_rows_write(host, &sum, NULL, data);
    guarded_free(data, bytes);
    free(ids);

    bytes = (size_t)limit * row_bytes;
    for (int j = 0; j < num_dst; j++)
        dst[j] = guarded_new(bytes);
    kv_rows_to_dense(host, &sum, limit, num_dst, (void *const *)dst);
    for (int64_t id = 0; id < limit; id++) {
        model_row(host, dtype, row_count, id, num_sets, pointers, row);
        for (int j = 0; j < num_dst; j++)
            good = good && memcmp(row, dst[j] + (size_t)id * row_bytes, row_bytes) == 0;
    }
    CHECK(good);
    for (int j = 0; j < num_dst; j++)
        guarded_free(dst[j], bytes);
    kv_row_sum_fini(&sum);
    for (int k = 0; k < num_sets; k++)
        kv_rowset_fini(&sets[k]);
    free(row);
}

static void sums_are_those_of_the_model_for_every_type(void)
{
    uint64_t state = 6;
    kv_host_t host = host_new(3);
    for (int dtype = 0; dtype < KV_DTYPE_COUNT; dtype++)
        for (int round = 0; round < 20; round++)
            check_sums(&host, (kv_dtype_t)dtype,
                       row_counts[test_between(&state, 0, NUM_ROW_COUNTS - 1)],
                       (int)test_between(&state, 1, 5), test_between(&state, 1, 100),
                       (int)test_between(&state, 1, 3), &state);
    host_end(&host);
}

static void large_sums_are_cut_by_rows_and_by_pieces_of_rows(void)
{
    uint64_t state = 7;
    for (int threads = 1; threads <= 3; threads += 2) {
        kv_host_t host = host_new(threads);
        for (int num_sets = 1; num_sets <= 3; num_sets++) {
            check_sums(&host, KV_FLOAT32, 64, num_sets, 6000, 1, &state);
            check_sums(&host, KV_FLOAT16, 300001, num_sets, 3, 2, &state);
        }
        host_end(&host);
    }
}

static void half_sums_are_rounded_once(void)
{
    kv_host_t host = host_new(1);
    kv_rowset_t sets[3];
    const kv_rowset_t *pointers[3];
    for (int k = 0; k < 3; k++) {
        sets[k] = set_new(1, 2);
        ((int64_t *)sets[k].indices->data)[0] = 4;
        put(&host, KV_FLOAT16, sets[k].data->data, 0, k == 0 ? 2048 : 1);
        pointers[k] = &sets[k];
    }
    kv_row_sum_t sum;
    uint16_t got, due;
    CHECK_STATUS(kv_row_sum_init(&host, KV_FLOAT16, 1, 3, pointers, &sum), KV_OK);
    kv_rows_write(&host, &sum, NULL, &got);
    put(&host, KV_FLOAT16, &due, 0, 2050);
    CHECK_EQ(got, due);
    kv_row_sum_fini(&sum);
    for (int k = 0; k < 3; k++)
        kv_rowset_fini(&sets[k]);
    host_end(&host);
}

static void nothing_at_all_is_summed_and_copied(void)
{
    kv_host_t host = host_new(2);
    kv_rowset_t empty = {0}, hollow = set_new(3, 0);
    const kv_rowset_t *none[] = {&empty, &empty}, *some[] = {&hollow, &hollow};
    int64_t ids[3] = {0, 5, 9}, where[3];
    float dense[6] = {1, 1, 1, 1, 1, 1};
    void *dst[] = {dense};
    kv_row_sum_t sum;
    memcpy(hollow.indices->data, ids, sizeof ids);
    for (int num_sets = 1; num_sets <= 2; num_sets++) {
        CHECK_STATUS(kv_row_sum_init(&host, KV_FLOAT32, 2, num_sets, none, &sum), KV_OK);
        CHECK_EQ(sum.num_rows, 0);
        kv_rows_write(&host, &sum, NULL, NULL);
        memset(dense, 1, sizeof dense);
        kv_rows_to_dense(&host, &sum, 3, 1, dst);
        for (int i = 0; i < 6; i++)
            CHECK(dense[i] == 0);
        kv_row_sum_fini(&sum);

        const void *single, *const *parts;
        CHECK_STATUS(kv_row_sum_init(&host, KV_FLOAT32, 0, num_sets, some, &sum), KV_OK);
        CHECK_EQ(sum.num_rows, 3);
        CHECK_EQ(kv_row_sum_parts(&sum, 2, &single, &parts), num_sets);
        kv_rows_write(&host, &sum, where, NULL);
        CHECK(memcmp(where, ids, sizeof ids) == 0);
        dst[0] = NULL;
        kv_rows_to_dense(&host, &sum, INT64_MAX, 1, dst);
        dst[0] = dense;
        kv_row_sum_fini(&sum);
    }
    kv_rows_gather(&host, 0, 3, ids, NULL, NULL);
    kv_rows_gather(&host, 8, 0, NULL, dense, NULL);
    kv_rows_select(&host, 0, &hollow, 3, ids, NULL);
    kv_rows_select(&host, 8, &empty, 3, ids, dense);
    for (int i = 0; i < 6; i++)
        CHECK(dense[i] == 0);
    CHECK_EQ(kv_rows_locate(&empty, 3, ids, where), 3);
    CHECK(where[0] == -1 && where[1] == -1 && where[2] == -1);
    CHECK_EQ(kv_rows_locate(&hollow, 0, NULL, NULL), 0);
    CHECK_EQ(kv_rows_nonzero(&host, KV_FLOAT32, INT64_MAX, 0, NULL, NULL), 0);
    CHECK_EQ(kv_rows_nonzero(&host, KV_FLOAT32, 0, 5, NULL, NULL), 0);
    CHECK_EQ(kv_row_ids_unique(&host, 0, NULL, NULL), 0);
    kv_rowset_fini(&hollow);
    host_end(&host);
}

static void rows_without_elements_need_no_memory(void)
{
    kv_host_t host = host_new(1);
    int64_t ids[2] = {1, 3};
    kv_buffer_t indices = {.data = ids}, data = {.data = NULL};
    kv_rowset_t set = {.num_rows = 2, .indices = &indices, .data = &data};
    const kv_rowset_t *sets[] = {&set};
    const void *single, *const *parts;
    kv_row_sum_t sum;
    CHECK_STATUS(kv_row_sum_init(&host, KV_FLOAT32, 0, 1, sets, &sum), KV_OK);
    CHECK_EQ(kv_row_sum_parts(&sum, 1, &single, &parts), 1);
    kv_row_sum_fini(&sum);
    host_end(&host);
}

/* ---------------------------------------------------------------------------------- copies */

static void check_copies(const kv_host_t *host, int64_t limit, int64_t percent, int64_t asked,
                         int64_t row_count, uint64_t *state)
{
    size_t row_bytes = (size_t)row_count * sizeof(float), all = (size_t)limit * row_bytes;
    kv_rowset_t set = random_set(host, KV_FLOAT32, row_count, 0, 0, limit, percent, state);
    kv_rowset_t want = random_set(host, KV_UINT8, 1, 0, 0, limit, asked, state);
    const int64_t *ids = kv_rowset_ids(&want);
    int64_t num_ids = want.num_rows, absent = 0;
    char *dense = calloc(all + 1, 1);
    for (int64_t i = 0; i < set.num_rows; i++)
        memcpy(dense + (size_t)kv_rowset_ids(&set)[i] * row_bytes,
               kv_rowset_data(&set) + (size_t)i * row_bytes, row_bytes);
    size_t bytes = (size_t)num_ids * row_bytes;
    char *gathered = guarded_new(bytes), *selected = guarded_new(bytes);
    int64_t *where = malloc((size_t)num_ids * sizeof *where + 1);
    kv_rows_gather(host, row_bytes, num_ids, ids, dense, gathered);
    kv_rows_select(host, row_bytes, &set, num_ids, ids, selected);
    int64_t told = kv_rows_locate(&set, num_ids, ids, where);
    bool good = true;
    for (int64_t i = 0; i < num_ids; i++) {
        const char *due = dense + (size_t)ids[i] * row_bytes;
        int64_t place = place_of(&set, ids[i]);
        absent += place < 0;
        good = good && where[i] == place &&
               memcmp(gathered + (size_t)i * row_bytes, due, row_bytes) == 0 &&
               memcmp(selected + (size_t)i * row_bytes, due, row_bytes) == 0;
    }
    CHECK(good);
    CHECK_EQ(told, absent);
    guarded_free(gathered, bytes);
    guarded_free(selected, bytes);
    free(where);
    free(dense);
    kv_rowset_fini(&set);
    kv_rowset_fini(&want);
}

static void copies_are_those_of_the_model(void)
{
    static const int64_t percents[] = {0, 1, 10, 50, 90, 100};
    uint64_t state = 8;
    for (int threads = 1; threads <= 3; threads += 2) {
        kv_host_t host = host_new(threads);
        for (int have = 0; have < 6; have++)
            for (int asked = 0; asked < 6; asked++) {
                for (int round = 0; round < 10; round++)
                    check_copies(&host, test_between(&state, 1, 300), percents[have],
                                 percents[asked],
                                 row_counts[test_between(&state, 0, NUM_ROW_COUNTS - 1)], &state);
                check_copies(&host, 20000, percents[have], percents[asked], 16, &state);
            }
        check_copies(&host, 4, 50, 100, 500009, &state);
        host_end(&host);
    }
}

static void ids_need_not_increase_for_a_gather(void)
{
    kv_host_t host = host_new(1);
    const int64_t ids[] = {3, 0, 3, 1}, dense[] = {10, 11, 12, 13};
    int64_t out[4];
    kv_rows_gather(&host, sizeof out[0], 4, ids, dense, out);
    CHECK(out[0] == 13 && out[1] == 10 && out[2] == 13 && out[3] == 11);
    host_end(&host);
}

/* What is far outside the set on either side, and between its two far ends. */
static void ids_outside_the_set_have_no_place(void)
{
    for (int gap = 0; gap <= 1; gap++) {
        kv_rowset_t set = set_new(3, 0);
        const int64_t there[] = {100, 101, gap ? INT64_MAX - 1 : 102};
        const int64_t ids[] = {0, 99, 100, 101, 103, INT64_MAX - 2, INT64_MAX - 1, INT64_MAX};
        int64_t where[8];
        memcpy(set.indices->data, there, sizeof there);
        CHECK_EQ(kv_rows_locate(&set, 8, ids, where), gap ? 5 : 6);
        for (int i = 0; i < 8; i++)
            CHECK_EQ(where[i], place_of(&set, ids[i]));
        kv_rowset_fini(&set);
    }
}

static void check_nonzero(const kv_host_t *host, kv_dtype_t dtype, int64_t num_rows,
                          int64_t row_count, uint64_t *state)
{
    size_t element = kv_dtype_bytes(dtype), bytes = (size_t)(num_rows * row_count) * element;
    uint8_t *dense = calloc(bytes + 1, 1), sign[8] = {0};
    int64_t *ids = malloc((size_t)num_rows * sizeof *ids + 1);
    int64_t *due = malloc((size_t)num_rows * sizeof *due + 1), num_due = 0;
    bool floating = dtype <= KV_BFLOAT16;
    sign[element - 1] = 0x80;
    for (int64_t i = 0; i < num_rows; i++) {
        uint8_t *row = dense + (size_t)(i * row_count) * element;
        uint8_t *at = row + (size_t)test_between(state, 0, row_count - 1) * element;
        switch (test_between(state, 0, 3)) {
        case 0: /* one bit, at the low or the high end */
            at[test_between(state, 0, 1) != 0 ? element - 1 : 0] = 1;
            due[num_due++] = i;
            break;
        case 1: /* a float's minus zero, an integer's lowest value */
            memcpy(at, sign, element);
            if (!floating)
                due[num_due++] = i;
            break;
        case 2: /* a float's NaN */
            memset(at, 0xff, element);
            due[num_due++] = i;
            break;
        default:
            break;
        }
    }
    CHECK_EQ(kv_rows_nonzero(host, dtype, num_rows, row_count, dense, ids), num_due);
    CHECK(memcmp(ids, due, (size_t)num_due * sizeof *ids) == 0);
    free(dense);
    free(ids);
    free(due);
}

static void rows_with_a_nonzero_are_found(void)
{
    uint64_t state = 9;
    for (int threads = 1; threads <= 3; threads += 2) {
        kv_host_t host = host_new(threads);
        for (int dtype = 0; dtype < KV_DTYPE_COUNT; dtype++) {
            for (int i = 0; i < NUM_ROW_COUNTS; i++)
                check_nonzero(&host, (kv_dtype_t)dtype, 100, row_counts[i], &state);
            check_nonzero(&host, (kv_dtype_t)dtype, 20000, 5, &state);
        }
        check_nonzero(&host, KV_FLOAT32, 3, 1000003, &state);
        host_end(&host);
    }
}

static const test_t tests[] = {
    TEST(union_has_the_rows_of_all_sets_in_their_order),
    TEST(large_union_does_not_depend_on_the_cuts),
    TEST(union_takes_the_highest_ids),
    TEST(single_set_is_described_in_place),
    TEST(union_without_memory_fails_and_changes_nothing),
    TEST(sums_are_those_of_the_model_for_every_type),
    TEST(large_sums_are_cut_by_rows_and_by_pieces_of_rows),
    TEST(half_sums_are_rounded_once),
    TEST(nothing_at_all_is_summed_and_copied),
    TEST(rows_without_elements_need_no_memory),
    TEST(copies_are_those_of_the_model),
    TEST(ids_need_not_increase_for_a_gather),
    TEST(ids_outside_the_set_have_no_place),
    TEST(rows_with_a_nonzero_are_found),
};

TEST_MAIN(tests)
