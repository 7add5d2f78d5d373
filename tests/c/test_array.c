/* Element types, arrays, views and their copies. The copies are compared with the obvious slow way
 * on random views. */
#include "views.h"
#include <stdlib.h>

/* --------------------------------------------------------------------------- element types */

static void element_types_have_their_names_and_codes(void)
{
    CHECK_EQ(kv_dtype_parse("bfloat16"), KV_BFLOAT16);
    CHECK_EQ(kv_dtype_parse("float"), KV_DTYPE_NONE);
    CHECK_EQ(kv_dtype_bytes(KV_DTYPE_NONE), 0);
    for (int i = 0; i < KV_DTYPE_COUNT; i++) {
        kv_dtype_t dtype = (kv_dtype_t)i;
        unsigned code, bits;
        kv_dtype_to_dlpack(dtype, &code, &bits);
        CHECK_EQ(bits, 8 * kv_dtype_bytes(dtype));
        CHECK_EQ(kv_dtype_from_dlpack(code, bits, 1), dtype);
        CHECK_EQ(kv_dtype_from_dlpack(code, bits, 2), KV_DTYPE_NONE);
        CHECK_EQ(kv_dtype_parse(kv_dtype_name(dtype)), dtype);
    }
    CHECK_EQ(kv_dtype_from_dlpack(5, 64, 1), KV_DTYPE_NONE);
}

/* ---------------------------------------------------------------------------------- arrays */

static void a_shape_has_a_size_or_is_refused(void)
{
    int64_t count = -1;
    size_t bytes = 0;
    CHECK_STATUS(kv_shape_size(KV_FLOAT64, 0, NULL, &count, &bytes), KV_OK);
    CHECK_EQ(count, 1);
    CHECK_EQ(bytes, 8);
    CHECK_STATUS(kv_shape_size(KV_FLOAT16, 3, (int64_t[]){2, 3, 4}, &count, &bytes), KV_OK);
    CHECK_EQ(count, 24);
    CHECK_EQ(bytes, 48);
    CHECK_STATUS(kv_shape_size(KV_INT8, 1, (int64_t[]){INT64_MAX}, &count, &bytes), KV_OK);
    CHECK_EQ(count, INT64_MAX);
    CHECK_STATUS(kv_shape_size(KV_INT64, 2, (int64_t[]){0, 7}, &count, &bytes), KV_OK);
    CHECK_EQ(count, 0);
    CHECK_EQ(bytes, 0);
    int64_t big = INT64_C(1) << 32;
    CHECK_STATUS(kv_shape_size(KV_INT8, 2, (int64_t[]){big, big}, &count, &bytes), KV_INVALID);
    CHECK_STATUS(kv_shape_size(KV_INT8, 3, (int64_t[]){0, big, big}, &count, &bytes), KV_INVALID);
    CHECK_STATUS(kv_shape_size(KV_FLOAT16, 1, (int64_t[]){INT64_MAX}, &count, &bytes), KV_INVALID);
    CHECK_STATUS(kv_shape_size(KV_INT8, 2, (int64_t[]){1, -1}, &count, &bytes), KV_INVALID);
    int64_t ones[KV_MAX_DIMS + 1];
    for (int i = 0; i <= KV_MAX_DIMS; i++)
        ones[i] = 1;
    CHECK_STATUS(kv_shape_size(KV_INT8, KV_MAX_DIMS + 1, ones, &count, &bytes), KV_INVALID);
    CHECK_EQ(count, 0);
    CHECK_STATUS(kv_shape_size(KV_INT8, KV_MAX_DIMS, ones, &count, &bytes), KV_OK);
    CHECK_EQ(count, 1);
}

static void an_array_is_counted_while_it_lives(void)
{
    kv_array_t *array;
    if (!CHECK_STATUS(kv_array_new(KV_FLOAT32, 2, (int64_t[]){3, 5}, &array), KV_OK))
        return;
    CHECK_EQ(array->count, 15);
    CHECK_EQ(array->bytes, 60);
    CHECK_EQ(array->shape[1], 5);
    CHECK_EQ(array->generation, kv_fork_generation());
    CHECK_EQ((uintptr_t)array->buffer->data % 64, 0);
    CHECK_EQ(kv_counter_value(KV_COUNT_ARRAYS), 1);
    CHECK_EQ(kv_counter_value(KV_COUNT_BUFFERS), 1);
    CHECK_EQ(kv_counter_value(KV_COUNT_VALUE_BYTES), 60);
    memset(array->buffer->data, 0, array->bytes);
    kv_view_t view;
    kv_view_of_array(array, &view);
    CHECK(view.data == array->buffer->data && view.shape == array->shape && view.strides == NULL);
    CHECK(view.count == 15 && view.ndim == 2 && view.dtype == KV_FLOAT32 && view.flags == 0);
    CHECK(view.array == array && view.owner == NULL);
    kv_buffer_t *buffer = kv_buffer_hold(array->buffer);
    kv_array_retire(array);
    CHECK_EQ(kv_counter_value(KV_COUNT_ARRAYS), 0);
    CHECK_EQ(kv_counter_value(KV_COUNT_VALUE_BYTES), 60);
    kv_buffer_rele(buffer);
    kv_buffer_rele(NULL);
    kv_array_retire(NULL);
}

static void an_array_can_share_a_buffer(void)
{
    kv_buffer_t *buffer;
    if (!CHECK_STATUS(kv_buffer_new(64, &buffer), KV_OK))
        return;
    kv_array_t *array = NULL;
    int64_t shape[] = {2, 4};
    kv_fault_set("alloc", 1);
    CHECK_STATUS(kv_array_from_buffer(KV_FLOAT64, 2, shape, buffer, &array), KV_NO_MEMORY);
    kv_fault_set("alloc", 0);
    CHECK(array == NULL);
    if (CHECK_STATUS(kv_array_from_buffer(KV_FLOAT64, 2, shape, buffer, &array), KV_OK)) {
        kv_buffer_rele(buffer);
        CHECK(array->buffer == buffer && array->count == 8);
        CHECK_EQ(kv_counter_value(KV_COUNT_BUFFERS), 1);
        kv_array_retire(array);
    }
}

static void an_array_without_elements_has_an_address(void)
{
    kv_array_t *array;
    if (!CHECK_STATUS(kv_array_new(KV_INT64, 2, (int64_t[]){4, 0}, &array), KV_OK))
        return;
    CHECK(array->buffer->data != NULL);
    CHECK_EQ(array->count, 0);
    kv_array_retire(array);
}

static void a_failed_allocation_leaves_nothing_behind(void)
{
    int64_t passed = 0;
    for (int n = 1; n == 1 || passed >= n - 1; n++) {
        kv_array_t *array = NULL;
        kv_fault_set("alloc", n);
        kv_status_t status = kv_array_new(KV_FLOAT32, 1, (int64_t[]){100}, &array);
        passed = kv_fault_set("alloc", 0);
        if (passed < n) {
            CHECK_STATUS(status, KV_OK);
            kv_array_retire(array);
            CHECK_EQ(n, 4);
            break;
        }
        CHECK_STATUS(status, KV_NO_MEMORY);
        CHECK(array == NULL);
        CHECK_EQ(kv_counter_value(KV_COUNT_BUFFERS), 0);
    }
    kv_array_t *array = NULL;
    int64_t huge[] = {INT64_MAX / 8};
    CHECK_STATUS(kv_array_new(KV_FLOAT64, 1, huge, &array), KV_NO_MEMORY);
    CHECK(array == NULL);
}

/* ----------------------------------------------------------------------------------- views */

static void shapes_print_as_in_numpy(void)
{
    char text[64];
    CHECK_TEXT(kv_shape_format(0, NULL, text, sizeof text), "()");
    CHECK_TEXT(kv_shape_format(1, (int64_t[]){3}, text, sizeof text), "(3,)");
    CHECK_TEXT(kv_shape_format(3, (int64_t[]){3, 0, 12}, text, sizeof text), "(3, 0, 12)");
    kv_view_t view = {.ndim = 2, .shape = (int64_t[]){3, 4}, .dtype = KV_FLOAT32};
    CHECK_TEXT(kv_view_describe(&view, text, sizeof text), "float32 (3, 4)");
    CHECK_TEXT(kv_view_describe(&view, text, 12), "float32 (3,");
    CHECK_TEXT(kv_view_describe(&view, text, 4), "flo");
    view.dtype = KV_DTYPE_NONE;
    CHECK_TEXT(kv_view_describe(&view, text, sizeof text), "unsupported (3, 4)");
    view.type_name = "complex64";
    CHECK_TEXT(kv_view_describe(&view, text, sizeof text), "complex64 (3, 4)");
}

static void contiguous_strides_are_recognised(void)
{
    CHECK(kv_strides_contiguous(4, 2, (int64_t[]){3, 5}, NULL));
    CHECK(kv_strides_contiguous(4, 2, (int64_t[]){3, 5}, (int64_t[]){20, 4}));
    CHECK(kv_strides_contiguous(4, 3, (int64_t[]){3, 1, 5}, (int64_t[]){20, 999, 4}));
    CHECK(kv_strides_contiguous(4, 3, (int64_t[]){3, 0, 5}, (int64_t[]){7, 7, 7}));
    CHECK(kv_strides_contiguous(4, 0, NULL, (int64_t[]){0}));
    CHECK(!kv_strides_contiguous(4, 2, (int64_t[]){3, 5}, (int64_t[]){4, 12}));
    CHECK(!kv_strides_contiguous(4, 1, (int64_t[]){3}, (int64_t[]){8}));
    CHECK(!kv_strides_contiguous(4, 1, (int64_t[]){3}, (int64_t[]){-4}));
    CHECK(!kv_strides_contiguous(4, 1, (int64_t[]){3}, (int64_t[]){0}));
}

enum { ARENA = 1 << 16 };

static char arena[ARENA];

static void check_copies(const kv_view_t *view)
{
    size_t item = kv_dtype_bytes((kv_dtype_t)view->dtype);
    size_t bytes = (size_t)view->count * item;
    char *dense = malloc(bytes + 2);
    if (!CHECK(dense != NULL))
        return;
    dense[0] = dense[bytes + 1] = 77;
    kv_view_gather(view, dense + 1); /* not aligned: nothing may rely on it */
    bool same = true;
    for (int64_t i = 0; i < view->count; i++)
        same = same && memcmp(dense + 1 + (size_t)i * item, view_element(view, i), item) == 0;
    CHECK(same && dense[0] == 77 && dense[bytes + 1] == 77);

    static char before[ARENA], after[ARENA];
    memcpy(before, arena, ARENA);
    for (size_t i = 0; i < bytes; i++)
        dense[1 + i] = (char)~dense[1 + i];
    memcpy(after, arena, ARENA);
    for (int64_t i = 0; i < view->count; i++)
        memcpy(after + (view_element(view, i) - arena), dense + 1 + (size_t)i * item, item);
    kv_view_scatter(view, dense + 1);
    CHECK(memcmp(arena, after, ARENA) == 0);
    memcpy(arena, before, ARENA);
    free(dense);
}

static void fill_arena(uint64_t *seed)
{
    for (int i = 0; i < ARENA; i++)
        arena[i] = (char)test_random(seed);
}

static void sliced_views_are_copied_exactly(void)
{
    uint64_t seed = 1;
    fill_arena(&seed);
    int done = 0;
    for (int round = 0; round < 4000; round++) {
        kv_dtype_t dtype = (kv_dtype_t)test_between(&seed, 0, KV_DTYPE_COUNT - 1);
        example_t example = example_sliced(&seed, dtype, round % 2 ? 6 : 90);
        if (example_place(&example, &seed, arena, ARENA)) {
            check_copies(&example.view);
            done++;
        }
    }
    CHECK(done > 1000);
}

static void views_with_any_strides_are_gathered_exactly(void)
{
    uint64_t seed = 2;
    fill_arena(&seed);
    int done = 0;
    for (int round = 0; round < 4000; round++) {
        kv_dtype_t dtype = (kv_dtype_t)test_between(&seed, 0, KV_DTYPE_COUNT - 1);
        example_t example = example_odd(&seed, dtype, 12, round % 3 ? 300 : 9);
        if (!example_place(&example, &seed, arena, ARENA))
            continue;
        done++;
        const kv_view_t *view = &example.view;
        size_t item = kv_dtype_bytes(dtype);
        char dense[12 * 12 * 12 * 8];
        kv_view_gather(view, dense);
        bool same = true;
        for (int64_t i = 0; i < view->count; i++)
            same = same && memcmp(dense + (size_t)i * item, view_element(view, i), item) == 0;
        CHECK(same);
    }
    CHECK(done > 2000);
}

static void a_large_transposed_matrix_is_copied_exactly(void)
{
    uint64_t seed = 3;
    fill_arena(&seed);
    for (int i = 0; i < KV_DTYPE_COUNT; i++) {
        int64_t item = (int64_t)kv_dtype_bytes((kv_dtype_t)i);
        int64_t rows = 67;
        int64_t columns = ARENA / item / rows;
        example_t example = {
            .view = {.dtype = (uint8_t)i, .ndim = 2},
            .shape = {columns, rows},
            .strides = {item, item * columns},
        };
        if (CHECK(example_place(&example, &seed, arena, ARENA)))
            check_copies(&example.view);
    }
}

static void as_many_dimensions_as_possible_are_copied(void)
{
    int64_t shape[KV_MAX_DIMS], strides[KV_MAX_DIMS];
    uint64_t seed = 4;
    fill_arena(&seed);
    for (int i = 0; i < KV_MAX_DIMS; i++) {
        /* dimensions of two elements that cannot be joined, far more than there is memory for */
        shape[i] = i % 5 == 0 ? 2 : 1;
        strides[i] = i % 5 == 0 ? (INT64_C(3) << (i / 5)) : -99;
    }
    kv_view_t view = {.data = arena,
                      .shape = shape,
                      .strides = strides,
                      .count = 1 << 13,
                      .ndim = KV_MAX_DIMS,
                      .dtype = KV_UINT8};
    static char dense[1 << 13];
    kv_view_gather(&view, dense);
    bool same = true;
    for (int64_t i = 0; i < view.count; i++)
        same = same && dense[i] == *view_element(&view, i);
    CHECK(same);
}

static void the_extent_of_a_view_is_its_lowest_and_highest_byte(void)
{
    uint64_t seed = 5;
    for (int round = 0; round < 3000; round++) {
        example_t example = example_odd(&seed, KV_INT32, 5, 100);
        const kv_view_t *view = &example.view;
        if (!example_place(&example, &seed, arena, ARENA))
            continue;
        const char *low, *high;
        kv_view_extent(view, &low, &high);
        const char *least = view->data;
        const char *most = view->data;
        for (int64_t i = 0; i < view->count; i++) {
            const char *at = view_element(view, i);
            least = at < least ? at : least;
            most = at + 4 > most ? at + 4 : most;
        }
        CHECK(low == least && high == most);
    }
    kv_view_t plain = {.data = arena, .count = 6, .dtype = KV_FLOAT64};
    const char *low, *high;
    kv_view_extent(&plain, &low, &high);
    CHECK(low == arena && high == arena + 48);
}

static const test_t tests[] = {
    TEST(element_types_have_their_names_and_codes),
    TEST(a_shape_has_a_size_or_is_refused),
    TEST(an_array_is_counted_while_it_lives),
    TEST(an_array_can_share_a_buffer),
    TEST(an_array_without_elements_has_an_address),
    TEST(a_failed_allocation_leaves_nothing_behind),
    TEST(shapes_print_as_in_numpy),
    TEST(contiguous_strides_are_recognised),
    TEST(sliced_views_are_copied_exactly),
    TEST(views_with_any_strides_are_gathered_exactly),
    TEST(a_large_transposed_matrix_is_copied_exactly),
    TEST(as_many_dimensions_as_possible_are_copied),
    TEST(the_extent_of_a_view_is_its_lowest_and_highest_byte),
};
TEST_MAIN(tests)
