/* Which outs may be written: the checks against marking every byte, on random views, and the shapes
 * of overlap that users make. */
#include "views.h"
#include <stdlib.h>

enum { ARENA = 1 << 10, MANY = 40 };

/* The columns of a matrix lie between each other: 600 of them are too many pairs to be searched, so
 * that all outs and values beside them are checked by bitmap. */
enum { COLUMNS = 600, ROWS = 3, MATRIX = COLUMNS * ROWS * 4 };

static struct {
    char matrix[MATRIX]; /* first, so that its pairs are looked at first */
    char arena[ARENA];
} memory;

static int64_t column_shape[] = {ROWS};
static int64_t column_strides[] = {COLUMNS * 4};

static void fill_columns(kv_view_t *views)
{
    for (int i = 0; i < COLUMNS; i++)
        views[i] = (kv_view_t){.data = memory.matrix + 4 * i,
                               .shape = column_shape,
                               .strides = column_strides,
                               .count = ROWS,
                               .ndim = 1,
                               .dtype = KV_FLOAT32};
}

static kv_view_t dense(void *data, const int64_t *shape, int64_t count)
{
    return (kv_view_t){.data = data, .shape = shape, .count = count, .ndim = 1, .dtype = KV_INT32};
}

/* Adds one to the number of writes of every byte of a view. */
static void count_writes(const kv_view_t *view, int *writes)
{
    for (int64_t i = 0; i < view->count; i++) {
        int64_t at = view_element(view, i) - memory.arena;
        for (size_t b = 0; b < kv_dtype_bytes((kv_dtype_t)view->dtype); b++)
            writes[at + (int64_t)b]++;
    }
}

static int most_writes(const kv_view_t *a, const kv_view_t *b)
{
    int writes[ARENA] = {0};
    count_writes(a, writes);
    if (b != NULL)
        count_writes(b, writes);
    int most = 0;
    for (int i = 0; i < ARENA; i++)
        most = writes[i] > most ? writes[i] : most;
    return most;
}

static bool same(const example_t *a, const example_t *b)
{
    bool equal = a->view.data == b->view.data && a->view.dtype == b->view.dtype &&
                 a->view.ndim == b->view.ndim;
    for (int i = 0; equal && i < a->view.ndim; i++)
        equal = a->shape[i] == b->shape[i] && (a->shape[i] < 2 || a->strides[i] == b->strides[i]);
    return equal;
}

static bool random_example(uint64_t *seed, example_t *out)
{
    kv_dtype_t dtype = (kv_dtype_t)test_between(seed, 0, KV_DTYPE_COUNT - 1);
    int64_t bytes = test_between(seed, 0, 1) ? 80 : ARENA;
    *out = test_between(seed, 0, 1) ? example_sliced(seed, dtype, 5)
                                    : example_odd(seed, dtype, 8, bytes / 8);
    return example_place(out, seed, memory.arena, bytes);
}

/* `first` views of the list are there to use up the search. */
static void compare_outs(kv_view_t *views, int first, int rounds)
{
    uint64_t seed = 10;
    int64_t results[2] = {0};
    for (int round = 0; round < rounds; round++) {
        example_t a, b;
        if (!random_example(&seed, &a) || !random_example(&seed, &b))
            continue;
        views[first] = a.view;
        views[first + 1] = b.view;
        bool a_twice = most_writes(&a.view, NULL) > 1;
        bool b_twice = most_writes(&b.view, NULL) > 1;
        bool wrong = a_twice || b_twice || most_writes(&a.view, &b.view) > 1;
        kv_status_t status = kv_outs_check_disjoint(views, first + 2);
        if (!CHECK_STATUS(status, wrong ? KV_INVALID : KV_OK))
            printf("    round %d\n", round);
        results[wrong && !a_twice && !b_twice]++;
        if (status != KV_OK) {
            char text[100];
            snprintf(text, sizeof text, "outs %d and %d overlap", first, first + 1);
            const char *due = a_twice || b_twice ? "twice" : text;
            CHECK(strstr(kv_status_message(KV_INVALID), due) != NULL);
        }
    }
    CHECK(results[0] > rounds / 10 && results[1] > rounds / 20);
}

static void outs_are_apart_exactly_when_no_byte_is_written_twice(void)
{
    kv_view_t views[2];
    compare_outs(views, 0, 40000);
}

static void outs_are_checked_exactly_by_bitmap(void)
{
    kv_view_t views[COLUMNS + 2];
    fill_columns(views);
    compare_outs(views, COLUMNS, 400);
}

static void compare_values(kv_view_t *outs, kv_view_t *values, int first, int rounds)
{
    uint64_t seed = 11;
    int64_t results[2] = {0};
    for (int round = 0; round < rounds; round++) {
        example_t a, b, value;
        if (!random_example(&seed, &a) || !random_example(&seed, &b))
            continue;
        if (most_writes(&a.view, &b.view) > 1)
            b.view = a.view;
        if (most_writes(&a.view, NULL) > 1)
            continue;
        int num_outs = b.view.data == a.view.data ? 1 : 2;
        if (test_between(&seed, 0, 3) == 0) {
            value = a;
            value.view.shape = value.shape;
            value.view.strides = value.strides;
            if (value.view.count > 0 && test_between(&seed, 0, 3) == 0)
                value.strides[0] = -value.strides[0];
        } else if (!random_example(&seed, &value)) {
            continue;
        }
        const char *low, *high;
        kv_view_extent(&value.view, &low, &high);
        if (low < memory.arena || high > memory.arena + ARENA)
            continue;
        outs[first] = a.view;
        outs[first + 1] = b.view;
        values[first] = value.view;
        int writes[ARENA] = {0};
        count_writes(&a.view, writes);
        if (num_outs == 2)
            count_writes(&b.view, writes);
        bool meets = false;
        for (int64_t i = 0; i < value.view.count; i++) {
            int64_t at = view_element(&value.view, i) - memory.arena;
            for (size_t k = 0; k < kv_dtype_bytes((kv_dtype_t)value.view.dtype); k++)
                meets = meets || writes[at + (int64_t)k] > 0;
        }
        bool wrong = meets && !same(&a, &value) && !(num_outs == 2 && same(&b, &value));
        kv_status_t status = kv_outs_check_values(outs, first + num_outs, values, first + 1);
        if (!CHECK_STATUS(status, wrong ? KV_INVALID : KV_OK))
            printf("    round %d\n", round);
        if (status != KV_OK) {
            char text[100];
            snprintf(text, sizeof text, "overlaps value %d without being the same array", first);
            CHECK(strstr(kv_status_message(KV_INVALID), text) != NULL);
        }
        results[wrong]++;
    }
    CHECK(results[0] > rounds / 20 && results[1] > rounds / 20);
}

static void an_out_may_be_a_value_and_nothing_between(void)
{
    kv_view_t outs[2], values[1];
    compare_values(outs, values, 0, 40000);
}

static void values_are_checked_exactly_by_bitmap(void)
{
    kv_view_t outs[COLUMNS + 2], values[COLUMNS + 1];
    fill_columns(outs);
    fill_columns(values);
    compare_values(outs, values, COLUMNS, 400);
}

static void many_outs_are_checked_exactly(void)
{
    uint64_t seed = 12;
    int64_t results[2] = {0};
    for (int round = 0; round < 4000; round++) {
        example_t examples[MANY];
        kv_view_t views[MANY];
        int writes[ARENA] = {0};
        int n = 0;
        int64_t most = test_between(&seed, 2, MANY);
        for (int i = 0; i < most; i++) {
            examples[n] = example_odd(&seed, KV_INT32, 4, 40);
            if (!example_place(&examples[n], &seed, memory.arena, ARENA))
                continue;
            int after[ARENA];
            memcpy(after, writes, sizeof after);
            count_writes(&examples[n].view, after);
            bool clash = false;
            for (int k = 0; k < ARENA; k++)
                clash = clash || after[k] > 1;
            if (clash && test_between(&seed, 0, 99) > 0)
                continue; /* most rounds are of outs that are apart */
            memcpy(writes, after, sizeof writes);
            views[n] = examples[n].view;
            n++;
        }
        bool wrong = false;
        for (int k = 0; k < ARENA; k++)
            wrong = wrong || writes[k] > 1;
        CHECK_STATUS(kv_outs_check_disjoint(views, n), wrong ? KV_INVALID : KV_OK);
        results[wrong]++;
    }
    CHECK(results[0] > 400 && results[1] > 400);
}

static void slices_of_one_array_are_apart_or_not(void)
{
    int32_t *a = (int32_t *)(void *)memory.arena;
    int64_t half[] = {10}, step[] = {8};
    kv_view_t even = dense(a, half, 10), odd = dense(a + 1, half, 10);
    even.strides = odd.strides = step;
    kv_view_t interleaved[] = {even, odd};
    CHECK_STATUS(kv_outs_check_disjoint(interleaved, 2), KV_OK);

    int64_t three[] = {4, 3}, rows[] = {20, 4};
    kv_view_t left = dense(a, three, 12), right = dense(a + 2, three, 12);
    left.ndim = right.ndim = 2;
    left.strides = right.strides = rows;
    kv_view_t outs[] = {left, even, right};
    outs[1].data = a + 100;
    CHECK_STATUS(kv_outs_check_disjoint(outs, 3), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID), "outs 0 and 2 overlap in memory");
    int64_t two[] = {4, 2};
    outs[2] = right;
    outs[2].data = a + 3;
    outs[2].shape = two;
    outs[2].count = 8;
    CHECK_STATUS(kv_outs_check_disjoint(outs, 3), KV_OK);

    outs[1].strides = (int64_t[]){0};
    CHECK_STATUS(kv_outs_check_disjoint(outs, 3), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID),
               "out 1 writes some of its elements twice: a stride is "
               "0 or smaller than what it strides over");
}

static void the_same_array_is_known_by_start_shape_and_strides(void)
{
    int64_t six[] = {6}, five[] = {5}, matrix[] = {2, 3}, four[] = {4}, twelve_four[] = {12, 4};
    kv_view_t value = dense(memory.arena, six, 6);
    kv_view_t outs[2] = {dense(memory.arena + 100, six, 6), value};
    CHECK_STATUS(kv_outs_check_values(outs, 2, &value, 1), KV_OK);
    outs[1].strides = four;
    CHECK_STATUS(kv_outs_check_values(outs, 2, &value, 1), KV_OK);
    outs[1].strides = NULL;
    outs[1].dtype = KV_FLOAT32;
    CHECK_STATUS(kv_outs_check_values(outs, 2, &value, 1), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID),
               "out 1 overlaps value 0 without being the same array");
    outs[1] = dense(memory.arena, five, 5);
    CHECK_STATUS(kv_outs_check_values(outs, 2, &value, 1), KV_INVALID);
    outs[1] = dense(memory.arena + 4, six, 6);
    CHECK_STATUS(kv_outs_check_values(outs, 2, &value, 1), KV_INVALID);
    outs[1] = dense(memory.arena + 24, six, 6);
    CHECK_STATUS(kv_outs_check_values(outs, 2, &value, 1), KV_OK);
    outs[1] = dense(memory.arena, matrix, 6);
    outs[1].ndim = 2;
    CHECK_STATUS(kv_outs_check_values(outs, 2, &value, 1), KV_INVALID);
    outs[1].strides = twelve_four;
    CHECK_STATUS(kv_outs_check_values(outs, 2, &value, 1), KV_INVALID);
    CHECK_STATUS(kv_outs_check_values(outs, 0, &value, 1), KV_OK);
    CHECK_STATUS(kv_outs_check_values(outs, 2, &value, 0), KV_OK);
}

static void arrays_without_elements_overlap_nothing(void)
{
    int64_t none[] = {0}, ten[] = {10}, zero[] = {0};
    kv_view_t outs[] = {dense(memory.arena + 8, none, 0), dense(memory.arena, ten, 10),
                        dense(memory.arena + 8, none, 0)};
    outs[2].strides = zero;
    CHECK_STATUS(kv_outs_check_disjoint(outs, 3), KV_OK);
    CHECK_STATUS(kv_outs_check_disjoint(outs + 2, 1), KV_OK);
    CHECK_STATUS(kv_outs_check_disjoint(outs, 0), KV_OK);
    CHECK_STATUS(kv_outs_check_values(outs, 1, outs + 1, 1), KV_OK);
    CHECK_STATUS(kv_outs_check_values(outs + 1, 1, outs, 1), KV_OK);
}

static void impossible_strides_are_refused(void)
{
    int64_t shape[] = {3, 2};
    int64_t wild[][2] = {{INT64_MAX, 4},
                         {INT64_MIN, 4},
                         {INT64_MAX / 4, INT64_MAX / 4},
                         {INT64_MIN / 4, 4},
                         {INT64_MAX / 2 + 1, INT64_MAX / 2 + 1}};
    for (size_t i = 0; i < sizeof wild / sizeof wild[0]; i++) {
        kv_view_t views[] = {dense(memory.arena, shape, 6), dense(memory.arena, shape, 6)};
        views[0].ndim = views[1].ndim = 2;
        views[0].strides = wild[i];
        CHECK_STATUS(kv_outs_check_disjoint(views, 2), KV_INVALID);
        CHECK_TEXT(kv_status_message(KV_INVALID), "out 0 reaches beyond the address space");
        CHECK_STATUS(kv_outs_check_values(views + 1, 1, views, 1), KV_INVALID);
        CHECK_TEXT(kv_status_message(KV_INVALID), "value 0 reaches beyond the address space");
    }
}

static void a_check_without_memory_says_so(void)
{
    kv_view_t views[COLUMNS];
    fill_columns(views);
    for (int n = 1; n <= 2; n++) {
        kv_fault_set("alloc", n);
        CHECK_STATUS(kv_outs_check_disjoint(views, COLUMNS), KV_NO_MEMORY);
        kv_fault_set("alloc", n);
        CHECK_STATUS(kv_outs_check_values(views, COLUMNS, views, COLUMNS), KV_NO_MEMORY);
    }
    kv_fault_set("alloc", 3);
    CHECK_STATUS(kv_outs_check_disjoint(views, COLUMNS), KV_OK);
    CHECK_EQ(kv_fault_set("alloc", 0), 2);
    CHECK_STATUS(kv_outs_check_values(views, COLUMNS, views, COLUMNS), KV_OK);
}

static const test_t tests[] = {
    TEST(outs_are_apart_exactly_when_no_byte_is_written_twice),
    TEST(outs_are_checked_exactly_by_bitmap),
    TEST(an_out_may_be_a_value_and_nothing_between),
    TEST(values_are_checked_exactly_by_bitmap),
    TEST(many_outs_are_checked_exactly),
    TEST(slices_of_one_array_are_apart_or_not),
    TEST(the_same_array_is_known_by_start_shape_and_strides),
    TEST(arrays_without_elements_overlap_nothing),
    TEST(impossible_strides_are_refused),
    TEST(a_check_without_memory_says_so),
};
TEST_MAIN(tests)
