/* Which bytes a call writes: no byte twice, and none that belongs to a value of another shape.
 *
 * Outs are sorted by their lowest byte; with the highest byte seen so far beside each, those that
 * can touch a given stretch of memory are found by walking back from it. For n outs apart from each
 * other that is all there is, and costs O(n log n).
 *
 * Two arrays whose extents cross may still be apart (columns of one matrix). Bytes of A and B
 * coincide when a sum of strides times index differences falls into a short interval, which a depth
 * first search with bounds and common divisors decides in a few steps for every array that slicing
 * and transposing can make. It could be long for strides that somebody made up, and there may be
 * very many crossing pairs: after a bounded number of steps the question goes to a bitmap of the
 * memory that the outs span, whose cost is that of writing them.
 */
#include "array/array.h"
#include <stdlib.h>
#include <string.h>

enum {
    FEW = 16,               /* outs that need no allocation */
    SEARCH_STEPS = 50000,   /* about a millisecond; for a whole call */
    SEARCH_STEPS_EACH = 64, /* and so many more for every array */
};

/* Arrays that reach farther are refused, so that sums of offsets stay within 64 bits. */
#define MAX_REACH (INT64_C(1) << 60)

/* An out and what it spans; in the sorted list `reach` is the highest `high` up to this one. */
typedef struct region {
    const kv_view_t *view;
    int64_t index;
    uintptr_t low, high, reach;
} region_t;

/* The bytes of a view without the order of its elements: blocks of `width` bytes at low plus every
 * sum of a multiple in [0, shape) of each stride; strides are positive and ascend. */
typedef struct layout {
    uintptr_t low;
    int64_t width;
    int ndim;
    bool repeats; /* a stride of 0: every element stands in the array several times */
    int64_t stride[KV_MAX_DIMS];
    int64_t shape[KV_MAX_DIMS];
} layout_t;

static bool contiguous(const kv_view_t *view)
{
    return kv_strides_contiguous(kv_dtype_bytes((kv_dtype_t)view->dtype), view->ndim, view->shape,
                                 view->strides);
}

static kv_status_t region_of(const kv_view_t *view, const char *what, int64_t index, region_t *out)
{
    int64_t item = (int64_t)kv_dtype_bytes((kv_dtype_t)view->dtype);
    int64_t reach = 0;
    bool fits = true;
    if (view->strides == NULL) {
        fits = !__builtin_mul_overflow(view->count, item, &reach);
    } else {
        for (int i = 0; i < view->ndim && view->count > 0; i++) {
            int64_t part;
            fits = fits && !__builtin_mul_overflow(view->strides[i], view->shape[i] - 1, &part) &&
                   part > -MAX_REACH && part < MAX_REACH;
            fits = fits && (reach += part < 0 ? -part : part) < MAX_REACH;
        }
    }
    const char *low, *high;
    kv_view_extent(view, &low, &high);
    *out = (region_t){view, index, (uintptr_t)low, (uintptr_t)high, (uintptr_t)high};
    if (!fits || reach >= MAX_REACH || out->low > out->high)
        return kv_fail(KV_INVALID, "%s %lld reaches beyond the address space", what,
                       (long long)index);
    return KV_OK;
}

static void layout_of(const region_t *region, layout_t *out)
{
    const kv_view_t *view = region->view;
    out->low = region->low;
    out->ndim = 0;
    out->repeats = false;
    if (contiguous(view)) {
        out->width = (int64_t)(region->high - region->low);
        return;
    }
    int n = 0;
    for (int i = 0; i < view->ndim; i++) {
        if (view->shape[i] == 1)
            continue;
        int64_t stride = view->strides[i] < 0 ? -view->strides[i] : view->strides[i];
        if (stride == 0) {
            out->repeats = true;
            continue;
        }
        int at = n++;
        for (; at > 0 && out->stride[at - 1] > stride; at--) {
            out->stride[at] = out->stride[at - 1];
            out->shape[at] = out->shape[at - 1];
        }
        out->stride[at] = stride;
        out->shape[at] = view->shape[i];
    }
    /* Dimensions that continue each other become one, and the first ones one block. */
    out->width = (int64_t)kv_dtype_bytes((kv_dtype_t)view->dtype);
    for (int i = 0; i < n; i++) {
        int last = out->ndim - 1;
        if (last < 0 && out->stride[i] == out->width) {
            out->width *= out->shape[i];
        } else if (last >= 0 && out->stride[i] == out->stride[last] * out->shape[last]) {
            out->shape[last] *= out->shape[i];
        } else {
            out->stride[out->ndim] = out->stride[i];
            out->shape[out->ndim++] = out->shape[i];
        }
    }
}

static int64_t common_divisor(int64_t a, int64_t b)
{
    while (b != 0) {
        int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* ------------------------------------------------------------------------------------ search */

/* One unknown of a search: a number from low to high, times stride. `least`, `most` and `divisor`
 * are of the sums that this unknown and the later ones can make. */
typedef struct unknown {
    int64_t stride, low, high;
    int64_t least, most, divisor;
} unknown_t;

static int64_t divide_down(int64_t a, int64_t b)
{
    return a / b - (a % b != 0 && a < 0);
}

/* Whether the sum of all unknowns can be within [low, high]. Gives up, with *steps at 0, when that
 * takes too long. */
static bool search(const unknown_t *unknowns, int count, int64_t low, int64_t high, int64_t *steps)
{
    if (count == 0)
        return low <= 0 && 0 <= high;
    const unknown_t *first = unknowns;
    low = low > first->least ? low : first->least;
    high = high < first->most ? high : first->most;
    if (low > high || divide_down(high, first->divisor) * first->divisor < low)
        return false;
    int64_t rest_least = count > 1 ? first[1].least : 0;
    int64_t rest_most = count > 1 ? first[1].most : 0;
    int64_t from = -divide_down(rest_most - low, first->stride);
    int64_t to = divide_down(high - rest_least, first->stride);
    from = from > first->low ? from : first->low;
    to = to < first->high ? to : first->high;
    for (int64_t x = from; x <= to && *steps > 0; x++) {
        --*steps;
        if (search(unknowns + 1, count - 1, low - x * first->stride, high - x * first->stride,
                   steps))
            return true;
    }
    return false;
}

/* Whether two views have a byte in common. Undecided when *steps is 0 afterwards. */
static bool share_bytes(const region_t *a, const region_t *b, int64_t *steps)
{
    layout_t at, bt;
    layout_of(a, &at);
    layout_of(b, &bt);
    /* a.low + Σ a − b.low − Σ b lies within (−a.width, b.width): the larger strides first, those
     * of b counted downwards, equal ones together. */
    unknown_t unknowns[2 * KV_MAX_DIMS];
    int count = 0;
    int i = at.ndim - 1;
    int j = bt.ndim - 1;
    while (i >= 0 || j >= 0) {
        bool take_a = j < 0 || (i >= 0 && at.stride[i] >= bt.stride[j]);
        bool take_b = i < 0 || (j >= 0 && bt.stride[j] >= at.stride[i]);
        unknown_t *next = &unknowns[count++];
        next->stride = take_a ? at.stride[i] : bt.stride[j];
        next->high = take_a ? at.shape[i--] - 1 : 0;
        next->low = take_b ? 1 - bt.shape[j--] : 0;
    }
    int64_t least = 0;
    int64_t most = 0;
    int64_t divisor = 0;
    for (int k = count - 1; k >= 0; k--) {
        unknowns[k].least = least += unknowns[k].low * unknowns[k].stride;
        unknowns[k].most = most += unknowns[k].high * unknowns[k].stride;
        unknowns[k].divisor = divisor = common_divisor(unknowns[k].stride, divisor);
    }
    int64_t apart = (int64_t)(b->low - a->low);
    return search(unknowns, count, apart - at.width + 1, apart + bt.width - 1, steps);
}

/* ------------------------------------------------------------------------------------ bitmap */

/* One bit for each `unit` bytes from `low` on. Every out that it is made for covers units wholly or
 * not at all. */
typedef struct map {
    uintptr_t low;
    int64_t unit;
    int64_t units;
    uint64_t *words;
} map_t;

static size_t map_words(const map_t *map)
{
    return (size_t)(map->units / 64 + 1);
}

static kv_status_t map_init(map_t *map, const region_t *outs, int64_t count)
{
    map->low = outs[0].low;
    map->unit = 0;
    for (int64_t i = 0; i < count; i++) {
        layout_t layout;
        layout_of(&outs[i], &layout);
        map->unit = common_divisor(map->unit, (int64_t)(layout.low - map->low));
        map->unit = common_divisor(map->unit, layout.width);
        for (int k = 0; k < layout.ndim; k++)
            map->unit = common_divisor(map->unit, layout.stride[k]);
    }
    map->units = (int64_t)(outs[count - 1].reach - map->low) / map->unit;
    map->words = kv_calloc(map_words(map), sizeof map->words[0]);
    KV_TRY_ALLOC(map->words, "the check of outs that lie between each other");
    return KV_OK;
}

static void map_fini(map_t *map)
{
    kv_free(map->words);
}

/* Whether bits of bytes [low, high) from the map's start are set; with `mark` they are afterwards.
 */
static bool map_block(map_t *map, int64_t low, int64_t high, bool mark)
{
    int64_t unit = low > 0 ? low / map->unit : 0;
    int64_t end = divide_down(high - 1, map->unit) + 1;
    end = end < map->units ? end : map->units;
    uint64_t found = 0;
    while (unit < end) {
        int64_t in_word = 64 - unit % 64;
        int64_t n = end - unit < in_word ? end - unit : in_word;
        uint64_t mask = (UINT64_MAX >> (64 - n)) << (unit % 64);
        found |= map->words[unit / 64] & mask;
        if (mark)
            map->words[unit / 64] |= mask;
        unit += n;
    }
    return found != 0;
}

/* The same for all bytes of a view; without `mark` it stops at the first that is set. */
static bool map_view(map_t *map, const region_t *region, bool mark)
{
    layout_t layout;
    layout_of(region, &layout);
    int64_t at = (int64_t)(layout.low - map->low);
    int64_t index[KV_MAX_DIMS] = {0};
    bool found = false;
    int i;
    do {
        found |= map_block(map, at, at + layout.width, mark);
        if (found && !mark)
            return true;
        for (i = 0; i < layout.ndim; i++) {
            at += layout.stride[i];
            if (++index[i] < layout.shape[i])
                break;
            at -= index[i] * layout.stride[i];
            index[i] = 0;
        }
    } while (i < layout.ndim);
    return found;
}

/* -------------------------------------------------------------------------------- sorted outs */

static int compare_low(const void *a, const void *b)
{
    uintptr_t x = ((const region_t *)a)->low;
    uintptr_t y = ((const region_t *)b)->low;
    return (x > y) - (x < y);
}

/* Fills `regions` (room for `count`) with the outs that have elements, sorted. */
static kv_status_t sort_outs(const kv_view_t *outs, int64_t count, region_t *regions, int64_t *num)
{
    int64_t n = 0;
    bool sorted = true;
    for (int64_t i = 0; i < count; i++) {
        if (outs[i].count == 0)
            continue;
        KV_TRY(region_of(&outs[i], "out", i, &regions[n]));
        sorted = sorted && (n == 0 || regions[n - 1].low <= regions[n].low);
        n++;
    }
    if (!sorted)
        qsort(regions, (size_t)n, sizeof regions[0], compare_low);
    for (int64_t i = 1; i < n; i++) {
        if (regions[i - 1].reach > regions[i].reach)
            regions[i].reach = regions[i - 1].reach;
    }
    *num = n;
    return KV_OK;
}

/* The end of the run of outs from `first` on whose extents cross or hang together. */
static int64_t group_end(const region_t *outs, int64_t count, int64_t first)
{
    int64_t end = first + 1;
    while (end < count && outs[end].low < outs[end - 1].reach)
        end++;
    return end;
}

/* --------------------------------------------------------------------------- outs among outs */

static kv_status_t fail_twice(const region_t *out)
{
    return kv_fail(KV_INVALID,
                   "out %lld writes some of its elements twice: a stride is 0 or smaller than "
                   "what it strides over",
                   (long long)out->index);
}

static kv_status_t fail_pair(const region_t *a, const region_t *b)
{
    int64_t first = a->index < b->index ? a->index : b->index;
    int64_t second = a->index < b->index ? b->index : a->index;
    return kv_fail(KV_INVALID, "outs %lld and %lld overlap in memory", (long long)first,
                   (long long)second);
}

static kv_status_t check_self(const region_t *out)
{
    if (contiguous(out->view))
        return KV_OK;
    layout_t layout;
    layout_of(out, &layout);
    if (layout.repeats)
        return fail_twice(out);
    bool nested = true;
    int64_t covered = layout.width;
    for (int i = 0; i < layout.ndim; i++) {
        nested = nested && layout.stride[i] >= covered;
        covered += layout.stride[i] * (layout.shape[i] - 1);
    }
    if (nested)
        return KV_OK;
    region_t alone = *out;
    alone.reach = alone.high;
    map_t map;
    KV_TRY(map_init(&map, &alone, 1));
    bool twice = map_view(&map, out, true);
    map_fini(&map);
    return twice ? fail_twice(out) : KV_OK;
}

/* Marks every out of a group; when one meets another, finds out which. */
static kv_status_t check_group_by_map(const region_t *outs, int64_t count)
{
    map_t map;
    KV_TRY(map_init(&map, outs, count));
    kv_status_t status = KV_OK;
    for (int64_t i = 0; i < count && status == KV_OK; i++) {
        if (!map_view(&map, &outs[i], true))
            continue;
        memset(map.words, 0, map_words(&map) * sizeof map.words[0]);
        map_view(&map, &outs[i], true);
        int64_t other = 0;
        while (!map_view(&map, &outs[other], false))
            other++;
        status = fail_pair(&outs[other], &outs[i]);
    }
    map_fini(&map);
    return status;
}

static kv_status_t check_outs(const region_t *outs, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        KV_TRY(check_self(&outs[i]));
    int64_t steps = SEARCH_STEPS + SEARCH_STEPS_EACH * count;
    for (int64_t i = 1; i < count && steps > 0; i++) {
        for (int64_t j = i - 1; j >= 0 && outs[j].reach > outs[i].low && steps > 0; j--) {
            --steps;
            if (outs[j].high > outs[i].low && share_bytes(&outs[j], &outs[i], &steps))
                return fail_pair(&outs[j], &outs[i]);
        }
    }
    if (steps > 0)
        return KV_OK;
    for (int64_t first = 0; first < count;) {
        int64_t end = group_end(outs, count, first);
        if (end - first > 1)
            KV_TRY(check_group_by_map(outs + first, end - first));
        first = end;
    }
    return KV_OK;
}

/* ------------------------------------------------------------------------- outs among values */

static bool same_array(const kv_view_t *a, const kv_view_t *b)
{
    if (a->data != b->data || a->dtype != b->dtype || a->ndim != b->ndim || a->count != b->count)
        return false;
    bool a_contiguous = contiguous(a);
    if (a_contiguous != contiguous(b))
        return false;
    for (int i = 0; i < a->ndim; i++) {
        if (a->shape[i] != b->shape[i] ||
            (!a_contiguous && a->shape[i] > 1 && a->strides[i] != b->strides[i]))
            return false;
    }
    return true;
}

/* The number of outs that begin before `high`; those that can touch a stretch of memory that ends
 * there are found by walking down from it. */
static int64_t count_before(const region_t *outs, int64_t count, uintptr_t high)
{
    int64_t low = 0;
    while (low < count) {
        int64_t middle = low + (count - low) / 2;
        if (outs[middle].low < high)
            low = middle + 1;
        else
            count = middle;
    }
    return low;
}

static kv_status_t fail_value(const region_t *out, const region_t *value)
{
    return kv_fail(KV_INVALID, "out %lld overlaps value %lld without being the same array",
                   (long long)out->index, (long long)value->index);
}

/* One value against the outs that may touch it. Undecided when *steps is 0 afterwards. */
static kv_status_t check_value(const region_t *outs, int64_t count, const region_t *value,
                               int64_t *steps)
{
    int64_t i = count_before(outs, count, value->high);
    while (--i >= 0 && outs[i].reach > value->low && *steps > 0) {
        --*steps;
        if (outs[i].high > value->low && !same_array(outs[i].view, value->view) &&
            share_bytes(&outs[i], value, steps))
            return fail_value(&outs[i], value);
    }
    return KV_OK;
}

/* One value against a group of outs, of which one may be the same array: then no other of them can
 * touch it, since outs are apart. */
static kv_status_t check_value_by_map(map_t *map, const region_t *outs, int64_t count,
                                      const region_t *value)
{
    int64_t at = count_before(outs, count, value->low + 1) - 1;
    for (; at >= 0 && outs[at].low == value->low; at--) {
        if (same_array(outs[at].view, value->view))
            return KV_OK;
    }
    if (!map_view(map, value, false))
        return KV_OK;
    memset(map->words, 0, map_words(map) * sizeof map->words[0]);
    int64_t i = 0;
    while (map_view(map, &outs[i], true), !map_view(map, value, false))
        i++;
    return fail_value(&outs[i], value);
}

static kv_status_t check_values_by_map(const region_t *outs, int64_t count, const kv_view_t *values,
                                       int64_t num_values)
{
    kv_status_t status = KV_OK;
    for (int64_t first = 0; first < count && status == KV_OK;) {
        int64_t end = group_end(outs, count, first);
        map_t map;
        KV_TRY(map_init(&map, outs + first, end - first));
        for (int64_t i = first; i < end; i++)
            map_view(&map, &outs[i], true);
        for (int64_t i = 0; i < num_values && status == KV_OK; i++) {
            region_t value;
            status = region_of(&values[i], "value", i, &value);
            if (status == KV_OK && value.low < outs[end - 1].reach && value.high > outs[first].low)
                status = check_value_by_map(&map, outs + first, end - first, &value);
        }
        map_fini(&map);
        first = end;
    }
    return status;
}

static kv_status_t check_values(const region_t *outs, int64_t count, const kv_view_t *values,
                                int64_t num_values)
{
    int64_t steps = SEARCH_STEPS + SEARCH_STEPS_EACH * num_values;
    for (int64_t i = 0; i < num_values && steps > 0; i++) {
        if (values[i].count == 0)
            continue;
        region_t value;
        KV_TRY(region_of(&values[i], "value", i, &value));
        KV_TRY(check_value(outs, count, &value, &steps));
    }
    return steps > 0 ? KV_OK : check_values_by_map(outs, count, values, num_values);
}

/* ------------------------------------------------------------------------------------- public */

kv_status_t kv_outs_check_disjoint(const kv_view_t *outs, int64_t count)
{
    if (count == 0 || (count == 1 && outs[0].strides == NULL))
        return KV_OK;
    region_t few[FEW];
    region_t *regions = count <= FEW ? few : kv_alloc((size_t)count * sizeof regions[0]);
    KV_TRY_ALLOC(regions, "the list of outs");
    int64_t num;
    kv_status_t status = sort_outs(outs, count, regions, &num);
    if (status == KV_OK)
        status = check_outs(regions, num);
    if (regions != few)
        kv_free(regions);
    return status;
}

kv_status_t kv_outs_check_values(const kv_view_t *outs, int64_t num_outs, const kv_view_t *values,
                                 int64_t num_values)
{
    if (num_outs == 0 || num_values == 0)
        return KV_OK;
    region_t few[FEW];
    region_t *regions = num_outs <= FEW ? few : kv_alloc((size_t)num_outs * sizeof regions[0]);
    KV_TRY_ALLOC(regions, "the list of outs");
    int64_t num;
    kv_status_t status = sort_outs(outs, num_outs, regions, &num);
    if (status == KV_OK)
        status = check_values(regions, num, values, num_values);
    if (regions != few)
        kv_free(regions);
    return status;
}
