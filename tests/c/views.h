/* Random views of memory, for comparisons with the obvious slow way. */
#ifndef KV_TESTS_C_VIEWS_H
#define KV_TESTS_C_VIEWS_H

#include "array/array.h"
#include "test.h"

enum { EXAMPLE_DIMS = 5 };

/* A view with room for its own shape and strides. */
typedef struct example {
    kv_view_t view;
    int64_t shape[EXAMPLE_DIMS], strides[EXAMPLE_DIMS];
} example_t;

/* Puts the view somewhere into `bytes` of memory; false when it does not fit. */
static inline bool example_place(example_t *example, uint64_t *seed, char *memory, int64_t bytes)
{
    kv_view_t *view = &example->view;
    view->shape = example->shape;
    view->strides = example->strides;
    view->count = 1;
    int64_t below = 0;
    int64_t above = (int64_t)kv_dtype_bytes((kv_dtype_t)view->dtype);
    for (int i = 0; i < view->ndim; i++) {
        view->count *= example->shape[i];
        int64_t reach = example->strides[i] * (example->shape[i] - 1);
        if (example->shape[i] > 0)
            *(reach < 0 ? &below : &above) += reach < 0 ? -reach : reach;
    }
    if (below + above > bytes)
        return false;
    view->data = memory + below + test_between(seed, 0, bytes - below - above);
    return true;
}

/* A view as slicing and transposing make them. */
static inline example_t example_sliced(uint64_t *seed, kv_dtype_t dtype, int64_t longest)
{
    example_t example = {.view = {.dtype = (uint8_t)dtype}};
    int ndim = example.view.ndim = (int32_t)test_between(seed, 0, EXAMPLE_DIMS);
    int64_t stride = (int64_t)kv_dtype_bytes(dtype);
    for (int i = 0; i < ndim; i++) {
        int at = (int)test_between(seed, 0, i); /* shuffles */
        example.shape[i] = example.shape[at];
        example.strides[i] = example.strides[at];
        int64_t whole = test_between(seed, 1, longest);
        int64_t step = test_between(seed, 0, 3) == 0 ? test_between(seed, 1, 3) : 1;
        int64_t length = test_between(seed, 0, 20) == 0 ? test_between(seed, 0, whole) : whole;
        example.shape[at] = length / step;
        example.strides[at] = stride * step * (test_between(seed, 0, 4) == 0 ? -1 : 1);
        stride *= whole;
    }
    return example;
}

/* A view with any strides at all. */
static inline example_t example_odd(uint64_t *seed, kv_dtype_t dtype, int64_t longest,
                                    int64_t farthest)
{
    example_t example = {.view = {.dtype = (uint8_t)dtype}};
    example.view.ndim = (int32_t)test_between(seed, 1, 3);
    for (int i = 0; i < example.view.ndim; i++) {
        example.shape[i] = test_between(seed, test_between(seed, 0, 9) == 0 ? 0 : 1, longest);
        example.strides[i] = test_between(seed, -farthest, farthest);
    }
    return example;
}

/* The address of element i in C order. */
static inline char *view_element(const kv_view_t *view, int64_t i)
{
    char *at = view->data;
    for (int d = view->ndim - 1; d >= 0; d--) {
        at += i % view->shape[d] * view->strides[d];
        i /= view->shape[d];
    }
    return at;
}

#endif
