/* Views: what their memory spans, how they are described, and the copies between a strided view and
 * contiguous memory.
 *
 * A copy first drops dimensions of one element and joins neighbours that are one run of memory, so
 * that contiguous memory becomes one block. What is left is walked as planes of two dimensions.
 * Where the last dimension strides over whole cache lines and another one does not (a transposed
 * matrix), the plane is those two, cut into tiles, so that every line fetched is used up before it
 * leaves the cache.
 */
#include "array/array.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { CACHE_LINE = 64 };

/* ------------------------------------------------------------------------------ descriptions */

void kv_view_of_array(kv_array_t *array, kv_view_t *out)
{
    *out = (kv_view_t){
        .data = array->buffer->data,
        .shape = array->shape,
        .count = array->count,
        .ndim = array->ndim,
        .dtype = (uint8_t)array->dtype,
        .array = array,
    };
}

const char *kv_shape_format(int ndim, const int64_t *shape, char *text, size_t bytes)
{
    size_t length = 0;
    for (int i = 0; i < ndim && length < bytes; i++)
        length += (size_t)snprintf(text + length, bytes - length, "%s%" PRId64, i == 0 ? "(" : ", ",
                                   shape[i]);
    if (length < bytes)
        snprintf(text + length, bytes - length, "%s", ndim == 0 ? "()" : ndim == 1 ? ",)" : ")");
    return text;
}

const char *kv_view_describe(const kv_view_t *view, char *text, size_t bytes)
{
    const char *name = kv_dtype_name((kv_dtype_t)view->dtype);
    if (view->dtype == KV_DTYPE_NONE && view->type_name != NULL)
        name = view->type_name;
    int length = snprintf(text, bytes, "%s ", name);
    if ((size_t)length < bytes)
        kv_shape_format(view->ndim, view->shape, text + length, bytes - (size_t)length);
    return text;
}

bool kv_strides_contiguous(size_t item_bytes, int ndim, const int64_t *shape,
                           const int64_t *strides)
{
    if (strides == NULL)
        return true;
    bool in_order = true;
    int64_t expected = (int64_t)item_bytes;
    for (int i = ndim - 1; i >= 0; i--) {
        if (shape[i] == 0)
            return true;
        if (shape[i] == 1)
            continue;
        in_order = in_order && strides[i] == expected;
        expected = (int64_t)((uint64_t)expected * (uint64_t)shape[i]);
    }
    return in_order;
}

/* Addresses are added as integers: what a stride of the user's points to need not be an object. */
void kv_view_extent(const kv_view_t *view, const char **low, const char **high)
{
    uintptr_t first = (uintptr_t)view->data;
    uintptr_t last = first;
    uintptr_t item = kv_dtype_bytes((kv_dtype_t)view->dtype);
    if (view->count == 0) {
        item = 0;
    } else if (view->strides == NULL) {
        last += (uintptr_t)(view->count - 1) * item;
    } else {
        for (int i = 0; i < view->ndim; i++) {
            uintptr_t reach = (uintptr_t)view->strides[i] * (uintptr_t)(view->shape[i] - 1);
            if (view->strides[i] < 0)
                first += reach;
            else
                last += reach;
        }
    }
    *low = (const char *)first;
    *high = (const char *)(last + item);
}

/* ------------------------------------------------------------------------------------ copies */

/* The dimensions of a copy, outermost first; strides in bytes. */
typedef struct copy {
    int ndim;
    size_t item;
    int64_t shape[KV_MAX_DIMS + 1];
    int64_t to[KV_MAX_DIMS + 1];
    int64_t from[KV_MAX_DIMS + 1];
} copy_t;

/* memcpy of a constant size is one load and one store, and has no opinion on alignment. */
#define COPY_LINE(item)                                                                            \
    for (int64_t i = 0; i < n; i++, to += to_stride, from += from_stride)                          \
    memcpy(to, from, item)

static inline void copy_line(size_t item, int64_t n, char *to, int64_t to_stride, const char *from,
                             int64_t from_stride)
{
    if (to_stride == (int64_t)item && from_stride == (int64_t)item) {
        memcpy(to, from, (size_t)n * item);
        return;
    }
    switch (item) {
    case 1:
        COPY_LINE(1);
        break;
    case 2:
        COPY_LINE(2);
        break;
    case 4:
        COPY_LINE(4);
        break;
    default:
        COPY_LINE(8);
        break;
    }
}

static int64_t magnitude(int64_t stride)
{
    return stride < 0 ? -stride : stride;
}

static void swap(int64_t *values, int i, int j)
{
    int64_t value = values[i];
    values[i] = values[j];
    values[j] = value;
}

/* The copy between `view` and contiguous memory, without dimensions that say nothing; at least two
 * are left. `dense` gets the strides of the contiguous side, `strided` those of the view. */
static void prepare(const kv_view_t *view, copy_t *copy, int64_t *dense, int64_t *strided)
{
    size_t item = kv_dtype_bytes((kv_dtype_t)view->dtype);
    int n = 0; /* filled from the innermost on, reversed below */
    if (view->strides == NULL) {
        copy->shape[n] = view->count;
        strided[n++] = (int64_t)item;
    } else {
        for (int i = view->ndim - 1; i >= 0; i--) {
            if (view->shape[i] == 1)
                continue;
            if (n > 0 && view->strides[i] == copy->shape[n - 1] * strided[n - 1]) {
                copy->shape[n - 1] *= view->shape[i];
                continue;
            }
            copy->shape[n] = view->shape[i];
            strided[n++] = view->strides[i];
        }
    }
    for (; n < 2; n++) {
        copy->shape[n] = 1;
        strided[n] = (int64_t)item;
    }
    int64_t bytes = (int64_t)item;
    for (int i = 0; i < n; i++) {
        dense[i] = bytes;
        bytes *= copy->shape[i];
    }
    for (int i = 0; i < n / 2; i++) {
        swap(copy->shape, i, n - 1 - i);
        swap(strided, i, n - 1 - i);
        swap(dense, i, n - 1 - i);
    }
    copy->ndim = n;
    copy->item = item;
}

/* Moves next to the last dimension the one to make tiles with, and returns true; false when rows
 * along the last dimension are good as they are. */
static bool find_tiles(copy_t *copy, const int64_t *strided)
{
    int inner = copy->ndim - 1;
    int best = inner;
    for (int i = 0; i < inner; i++) {
        if (magnitude(strided[i]) < magnitude(strided[best]))
            best = i;
    }
    if (best == inner || magnitude(strided[inner]) < CACHE_LINE)
        return false;
    swap(copy->shape, best, inner - 1);
    swap(copy->to, best, inner - 1);
    swap(copy->from, best, inner - 1);
    return true;
}

/* The last two dimensions. */
static void copy_plane(const copy_t *copy, bool tiled, char *to, const char *from)
{
    int a = copy->ndim - 2;
    int b = copy->ndim - 1;
    int64_t rows = copy->shape[a];
    int64_t columns = copy->shape[b];
    int64_t tile_rows = tiled ? 2 * CACHE_LINE / (int64_t)copy->item : rows;
    int64_t tile_columns = tiled ? 2 * CACHE_LINE / (int64_t)copy->item : columns;
    for (int64_t row = 0; row < rows; row += tile_rows) {
        int64_t row_end = rows - row < tile_rows ? rows : row + tile_rows;
        for (int64_t column = 0; column < columns; column += tile_columns) {
            int64_t width = columns - column < tile_columns ? columns - column : tile_columns;
            for (int64_t i = row; i < row_end; i++)
                copy_line(copy->item, width, to + i * copy->to[a] + column * copy->to[b],
                          copy->to[b], from + i * copy->from[a] + column * copy->from[b],
                          copy->from[b]);
        }
    }
}

static void copy_all(const copy_t *copy, bool tiled, char *to, const char *from)
{
    int outer = copy->ndim - 2;
    int64_t index[KV_MAX_DIMS] = {0};
    int i;
    do {
        copy_plane(copy, tiled, to, from);
        for (i = outer - 1; i >= 0; i--) {
            to += copy->to[i];
            from += copy->from[i];
            if (++index[i] < copy->shape[i])
                break;
            to -= index[i] * copy->to[i];
            from -= index[i] * copy->from[i];
            index[i] = 0;
        }
    } while (i >= 0);
}

void kv_view_gather(const kv_view_t *source, void *contiguous)
{
    if (source->count == 0)
        return;
    copy_t copy;
    prepare(source, &copy, copy.to, copy.from);
    bool tiled = find_tiles(&copy, copy.from);
    copy_all(&copy, tiled, contiguous, source->data);
}

void kv_view_scatter(const kv_view_t *target, const void *contiguous)
{
    if (target->count == 0)
        return;
    copy_t copy;
    prepare(target, &copy, copy.from, copy.to);
    bool tiled = find_tiles(&copy, copy.to);
    copy_all(&copy, tiled, target->data, contiguous);
}
