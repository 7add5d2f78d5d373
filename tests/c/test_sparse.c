/* Row sets and row-sparse arrays: whose memory is reused, what a failure leaves, which row ids are
 * refused, and when everything is given back. */
#include "test.h"

#include "array/sparse.h"

static kv_rowset_t set_of(int64_t num_rows, size_t row_bytes)
{
    kv_rowset_t set = {0};
    CHECK_STATUS(kv_rowset_make(&set, num_rows, row_bytes), KV_OK);
    CHECK_EQ(set.num_rows, num_rows);
    CHECK(set.indices->bytes >= (size_t)num_rows * sizeof(int64_t));
    CHECK(set.data->bytes >= (size_t)num_rows * row_bytes);
    return set;
}

static void rows_are_written_into_their_own_memory_again(void)
{
    kv_rowset_t set = set_of(100, 32), before = set;
    CHECK_STATUS(kv_rowset_make(&set, 90, 32), KV_OK);
    CHECK_EQ(set.num_rows, 90);
    CHECK(set.indices == before.indices && set.data == before.data);
    CHECK_STATUS(kv_rowset_make(&set, 100, 32), KV_OK);
    CHECK(set.indices == before.indices && set.data == before.data);
    kv_rowset_fini(&set);
    CHECK_EQ(set.num_rows, 0);
    CHECK(set.indices == NULL && set.data == NULL);
}

static void more_rows_get_new_memory(void)
{
    kv_rowset_t set = set_of(10, 4);
    CHECK_STATUS(kv_rowset_make(&set, 1000, 4), KV_OK);
    CHECK(set.indices->bytes >= 1000 * sizeof(int64_t) && set.data->bytes >= 4000);
    kv_rowset_fini(&set);
}

static void memory_that_another_holds_is_left_to_it(void)
{
    kv_rowset_t set = set_of(10, 4);
    kv_buffer_t *indices = kv_buffer_hold(set.indices), *data = kv_buffer_hold(set.data);
    CHECK_STATUS(kv_rowset_make(&set, 10, 4), KV_OK);
    CHECK(set.indices != indices && set.data != data);
    kv_buffer_rele(indices);
    kv_buffer_rele(data);
    kv_rowset_fini(&set);
}

static void memory_much_too_large_is_given_back(void)
{
    kv_rowset_t set = set_of(1000000, 16);
    int64_t before = kv_counter_value(KV_COUNT_VALUE_BYTES);
    CHECK_STATUS(kv_rowset_make(&set, 10, 16), KV_OK);
    CHECK(kv_counter_value(KV_COUNT_VALUE_BYTES) < before / 10);
    kv_rowset_fini(&set);
}

static void rows_without_memory_stay_as_they_were(void)
{
    for (int64_t nth = 1;; nth++) {
        kv_rowset_t set = set_of(10, 4), before = set;
        memset(set.data->data, 7, 40);
        kv_fault_set("alloc", nth);
        kv_status_t status = kv_rowset_make(&set, 100000, 4);
        int64_t passed = kv_fault_set("alloc", 0);
        if (status == KV_OK) {
            CHECK(nth > 2 && passed < nth); /* both buffers had their turn */
            kv_rowset_fini(&set);
            return;
        }
        CHECK_STATUS(status, KV_NO_MEMORY);
        CHECK(memcmp(&set, &before, sizeof set) == 0);
        CHECK(((char *)set.data->data)[39] == 7);
        kv_rowset_fini(&set);
    }
}

static void set_without_rows_has_no_ids_and_no_data(void)
{
    kv_rowset_t set = {0};
    CHECK(kv_rowset_ids(&set) == NULL && kv_rowset_data(&set) == NULL);
    CHECK_STATUS(kv_rowset_make(&set, 0, 4), KV_OK);
    CHECK(kv_rowset_ids(&set) == NULL && kv_rowset_data(&set) == NULL);
    kv_rowset_fini(&set);
    kv_rowset_fini(&set);
}

static void array_knows_its_rows_and_begins_without_any(void)
{
    const int64_t shape[] = {7, 3, 5};
    kv_sparse_t *sparse = NULL;
    if (!CHECK_STATUS(kv_sparse_new(KV_FLOAT16, 3, shape, &sparse), KV_OK))
        return;
    CHECK_EQ(kv_counter_value(KV_COUNT_ARRAYS), 1);
    CHECK_EQ(sparse->ndim, 3);
    CHECK_EQ(sparse->row_count, 15);
    CHECK_EQ(sparse->row_bytes, 30);
    CHECK_EQ(sparse->rows.num_rows, 0);
    CHECK_EQ(sparse->dtype, KV_FLOAT16);
    CHECK(memcmp(sparse->shape, shape, sizeof shape) == 0);

    kv_view_t view;
    kv_view_of_sparse(sparse, &view);
    CHECK(view.sparse == sparse && view.data == sparse && view.shape == sparse->shape);
    CHECK(view.array == NULL && view.strides == NULL && view.flags == 0);
    CHECK_EQ(view.ndim, 3);
    CHECK_EQ(view.dtype, KV_FLOAT16);

    CHECK_STATUS(kv_rowset_make(&sparse->rows, 2, sparse->row_bytes), KV_OK);
    kv_sparse_retire(sparse);
}

static void array_of_one_dimension_has_rows_of_one_element(void)
{
    const int64_t shape[] = {INT64_MAX / 16};
    kv_sparse_t *sparse = NULL;
    if (!CHECK_STATUS(kv_sparse_new(KV_INT64, 1, shape, &sparse), KV_OK))
        return;
    CHECK_EQ(sparse->row_count, 1);
    CHECK_EQ(sparse->row_bytes, 8);
    kv_sparse_retire(sparse);
    kv_sparse_retire(NULL);
}

static void array_that_cannot_be_is_refused(void)
{
    const int64_t negative[] = {3, -1}, beyond[] = {INT64_MAX, 3}, fine[] = {3, 3};
    kv_sparse_t *sparse = NULL;
    CHECK_STATUS(kv_sparse_new(KV_FLOAT32, 0, NULL, &sparse), KV_INVALID);
    CHECK_STATUS(kv_sparse_new(KV_FLOAT32, 2, negative, &sparse), KV_INVALID);
    CHECK_STATUS(kv_sparse_new(KV_FLOAT32, 2, beyond, &sparse), KV_INVALID);
    kv_fault_set("alloc", 1);
    CHECK_STATUS(kv_sparse_new(KV_FLOAT32, 2, fine, &sparse), KV_NO_MEMORY);
    CHECK_EQ(kv_fault_set("alloc", 0), 1);
    CHECK(sparse == NULL);
}

static void row_ids_increase_within_the_shape(void)
{
    const int64_t good[] = {0, 2, 9};
    CHECK_STATUS(kv_row_ids_check(0, NULL, 0), KV_OK);
    CHECK_STATUS(kv_row_ids_check(3, good, 10), KV_OK);
    CHECK_STATUS(kv_row_ids_check(3, good, 9), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID),
               "row id 9 at position 2 is outside the 9 rows of the shape");
    const int64_t negative[] = {-1, 2}, twice[] = {1, 4, 4}, falling[] = {5, 3};
    CHECK_STATUS(kv_row_ids_check(2, negative, 10), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID),
               "row id -1 at position 0 is outside the 10 rows of the shape");
    CHECK_STATUS(kv_row_ids_check(3, twice, 10), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID),
               "row ids must increase strictly, but id 4 at position 2 follows 4");
    CHECK_STATUS(kv_row_ids_check(2, falling, 10), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID),
               "row ids must increase strictly, but id 3 at position 1 follows 5");
}

static const test_t tests[] = {
    TEST(rows_are_written_into_their_own_memory_again),
    TEST(more_rows_get_new_memory),
    TEST(memory_that_another_holds_is_left_to_it),
    TEST(memory_much_too_large_is_given_back),
    TEST(rows_without_memory_stay_as_they_were),
    TEST(set_without_rows_has_no_ids_and_no_data),
    TEST(array_knows_its_rows_and_begins_without_any),
    TEST(array_of_one_dimension_has_rows_of_one_element),
    TEST(array_that_cannot_be_is_refused),
    TEST(row_ids_increase_within_the_shape),
};

TEST_MAIN(tests)
