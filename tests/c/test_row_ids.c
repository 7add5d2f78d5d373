/* Row ids in any order, sorted and made unique, against qsort: all numbers of bits in use, counts
 * on both sides of every change of method, and orders that favour none. */
#include "test.h"

#include "comm/rows.h"
#include <stdlib.h>

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

static int by_value(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void check_unique(const kv_host_t *host, int64_t num_ids, int64_t *ids)
{
    size_t bytes = (size_t)num_ids * sizeof *ids;
    int64_t *due = malloc(bytes), num_due = 0;
    int64_t *scratch = malloc(bytes); /* no larger than it must be */
    memcpy(due, ids, bytes);
    qsort(due, (size_t)num_ids, sizeof *due, by_value);
    for (int64_t i = 0; i < num_ids; i++)
        if (num_due == 0 || due[num_due - 1] != due[i])
            due[num_due++] = due[i];
    CHECK_EQ(kv_row_ids_unique(host, num_ids, ids, scratch), num_due);
    CHECK(memcmp(ids, due, (size_t)num_due * sizeof *due) == 0);
    free(scratch);
    free(due);
}

static void ids_are_sorted_and_unique(void)
{
    static const int64_t counts[] = {1,    2,    3,    31,    32,    33,    100,   1023,
                                     1024, 1025, 5000, 65535, 65536, 65537, 150000};
    uint64_t state = 10;
    kv_host_t host = host_new(3);
    int64_t *ids = malloc(150000 * sizeof *ids);
    for (int i = 0; i < 15; i++)
        for (int bits = 1; bits <= 64; bits += i < 10 ? 1 : 9) {
            for (int64_t k = 0; k < counts[i]; k++) /* of both signs */
                ids[k] = (int64_t)test_random(&state) >> (64 - bits);
            check_unique(&host, counts[i], ids);
        }
    free(ids);
    host_end(&host);
}

static void ids_of_special_order_are_sorted_too(void)
{
    enum { COUNT = 70000 };
    uint64_t state = 11;
    kv_host_t host = host_new(2);
    int64_t *ids = malloc(COUNT * sizeof *ids);
    for (int kind = 0; kind < 8; kind++)
        for (int64_t count = 20; count <= COUNT; count = count == 20 ? 2000 : count * 35) {
            for (int64_t i = 0; i < count; i++)
                ids[i] = (int64_t[]){i,
                                     count - i,
                                     i / 3,
                                     7,
                                     i % 2 ? INT64_MAX : INT64_MIN,
                                     i % 97 - 48,
                                     INT64_C(1) << 40,
                                     i % 100 ? i : (count - i) << 40}[kind];
            if (kind == 6) /* all alike but one, so that every id is in one bucket */
                ids[test_between(&state, 0, count - 1)] = -1;
            check_unique(&host, count, ids);
        }
    free(ids);
    host_end(&host);
}

static const test_t tests[] = {
    TEST(ids_are_sorted_and_unique),
    TEST(ids_of_special_order_are_sorted_too),
};

TEST_MAIN(tests)
