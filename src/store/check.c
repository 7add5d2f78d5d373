/* From the items of a call to checked groups: keys resolved, values of a key that stands in several
 * items taken together, every array compared with what init fixed.
 *
 * The fast way looks at everything once. Only when something is wrong are the checks made again in
 * the contract's order, so that the first error of that order is the one reported.
 */
#include "base/memory.h"
#include "store/internal.h"
#include "store/nccl.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { NAME_BYTES = 96, VIEW_BYTES = 160 };

kv_status_t kv_names_check_locked(const kv_store_t *store, const kv_item_t *items,
                                  int64_t num_items)
{
    if (store->closed)
        return kv_fail(KV_CLOSED, "the store is closed; create a new one");
    for (int64_t i = 0; i < num_items; i++) {
        kv_key_type_t type = items[i].name.text != NULL ? KV_KEYS_TEXT : KV_KEYS_NUMBER;
        kv_key_type_t due = store->key_type != KV_KEYS_OPEN ? store->key_type
                            : items[0].name.text != NULL    ? KV_KEYS_TEXT
                                                            : KV_KEYS_NUMBER;
        if (type != due) {
            char name[NAME_BYTES];
            kv_name_format(&items[i].name, name, sizeof name);
            return kv_fail(KV_BAD_TYPE, "key %s is %s, but the keys of this store are %s", name,
                           type == KV_KEYS_TEXT ? "a str" : "an integer",
                           due == KV_KEYS_TEXT ? "str" : "integers");
        }
    }
    return KV_OK;
}

/* ----------------------------------------------------------------------------- the views */

/* "value 2 of key 'w'", or without a number when there is only one. */
static const char *position(const kv_group_t *group, bool out, int32_t i, char *text, size_t bytes)
{
    char name[NAME_BYTES];
    kv_name_format(&group->entry->name, name, sizeof name);
    const char *what = out ? "out" : "value";
    if ((out ? group->num_outs : group->num_values) > 1)
        snprintf(text, bytes, "%s %d of key %s", what, (int)i, name);
    else
        snprintf(text, bytes, "the %s of key %s", what, name);
    return text;
}

typedef kv_status_t check_fn(const kv_group_t *group, const kv_view_t *view, bool out, int32_t i);

static kv_status_t check_type(const kv_group_t *group, const kv_view_t *view, bool out, int32_t i)
{
    char where[NAME_BYTES + 32];
    const kv_entry_t *entry = group->entry;
    if (view->dtype == KV_DTYPE_NONE)
        return kv_fail(
            KV_BAD_TYPE,
            "%s has element type %s, which a store cannot hold (it holds native float64, "
            "float32, float16, bfloat16, int8, uint8, int32, int64)",
            position(group, out, i, where, sizeof where),
            view->type_name != NULL ? view->type_name : "unknown");
    if ((kv_dtype_t)view->dtype != entry->dtype)
        return kv_fail(KV_BAD_TYPE, "%s has element type %s, but the key has %s; nothing is cast",
                       position(group, out, i, where, sizeof where),
                       kv_dtype_name((kv_dtype_t)view->dtype), kv_dtype_name(entry->dtype));
    return KV_OK;
}

/* Whether a view of this form goes into, or comes from, this key by this call. */
static bool form_fits(const kv_group_t *group, const kv_view_t *view, bool out)
{
    if (out)
        return group->row_ids == NULL || view->sparse != NULL;
    bool sparse = view->sparse != NULL;
    return sparse == (group->values[0].sparse != NULL) && (sparse || !group->entry->sparse);
}

static kv_status_t check_form(const kv_group_t *group, const kv_view_t *view, bool out, int32_t i)
{
    if (KV_LIKELY(form_fits(group, view, out)))
        return KV_OK;
    char where[NAME_BYTES + 32];
    position(group, out, i, where, sizeof where);
    if (out)
        return kv_fail(KV_BAD_TYPE, "%s is dense; row_sparse_pull writes into a kvstore.RowSparse",
                       where);
    if (view->sparse == NULL && group->entry->sparse)
        return kv_fail(KV_BAD_TYPE,
                       "%s is dense, but the key is row-sparse: push a "
                       "kvstore.RowSparse",
                       where);
    return kv_fail(KV_BAD_TYPE,
                   "%s is %s, but the values before it are %s; all values of a key "
                   "have one form",
                   where, view->sparse != NULL ? "row-sparse" : "dense",
                   view->sparse != NULL ? "dense" : "row-sparse");
}

static kv_status_t check_ids(const kv_group_t *group, const kv_view_t *view, bool out, int32_t i)
{
    (void)view;
    if (!out || group->row_ids == NULL || group->row_ids[i].count == 0)
        return KV_OK;
    const int64_t *ids = group->row_ids[i].ids->data;
    int64_t last = ids[group->row_ids[i].count - 1], limit = group->entry->shape[0];
    if (ids[0] >= 0 && last < limit)
        return KV_OK;
    char where[NAME_BYTES + 32];
    return kv_fail(KV_INVALID, "row id %" PRId64 " for %s is outside its %" PRId64 " rows",
                   ids[0] < 0 ? ids[0] : last, position(group, out, i, where, sizeof where), limit);
}

static kv_status_t check_shape(const kv_group_t *group, const kv_view_t *view, bool out, int32_t i)
{
    const kv_entry_t *entry = group->entry;
    if (view->ndim == entry->ndim &&
        (view->ndim == 0 ||
         memcmp(view->shape, entry->shape, (size_t)view->ndim * sizeof *view->shape) == 0))
        return KV_OK;
    char where[NAME_BYTES + 32], given[VIEW_BYTES], due[VIEW_BYTES];
    return kv_fail(KV_INVALID, "%s has shape %s, but the key has shape %s",
                   position(group, out, i, where, sizeof where),
                   kv_shape_format(view->ndim, view->shape, given, sizeof given),
                   kv_shape_format(entry->ndim, entry->shape, due, sizeof due));
}

static kv_status_t check_device(const kv_view_t *view, const char *where)
{
    kv_lane_t own;
    if (!(view->flags & KV_VIEW_CUDA))
        return kv_fail(
            KV_NOT_BUILT,
            "%s is in the memory of a device that is no CUDA device: move it to the host "
            "first",
            where);
    kv_status_t status = kv_lane_own(view->device, &own);
    if (status != KV_OK)
        return kv_fail(status, "%s is in CUDA memory, which cannot be used here: %s", where,
                       kv_status_message(status));
    if (view->strides != NULL)
        return kv_fail(KV_INVALID,
                       "%s is in CUDA memory and not contiguous: call its .contiguous() first",
                       where);
    return KV_OK;
}

static kv_status_t check_memory(const kv_group_t *group, const kv_view_t *view, bool out, int32_t i)
{
    char where[NAME_BYTES + 32];
    if (view->flags & KV_VIEW_DEVICE)
        KV_TRY(check_device(view, position(group, out, i, where, sizeof where)));
    if (out && (view->flags & KV_VIEW_READONLY))
        return kv_fail(KV_INVALID, "%s is read-only", position(group, out, i, where, sizeof where));
    return KV_OK;
}

static kv_status_t check_each(const kv_group_t *groups, int64_t num_groups, check_fn *check)
{
    for (int64_t g = 0; g < num_groups; g++) {
        for (int32_t i = 0; i < groups[g].num_values; i++)
            KV_TRY(check(&groups[g], &groups[g].values[i], false, i));
        for (int32_t i = 0; i < groups[g].num_outs; i++)
            KV_TRY(check(&groups[g], &groups[g].outs[i], true, i));
    }
    return KV_OK;
}

/* False for arrays in device memory, at which nobody needs to look as quickly. */
static bool acceptable(const kv_group_t *groups, int64_t num_groups)
{
    for (int64_t g = 0; g < num_groups; g++) {
        const kv_group_t *group = &groups[g];
        for (int32_t i = 0; i < group->num_values; i++)
            if (!kv_entry_accepts(group->entry, &group->values[i]) ||
                !form_fits(group, &group->values[i], false))
                return false;
        for (int32_t i = 0; i < group->num_outs; i++)
            if (!kv_entry_accepts(group->entry, &group->outs[i]) ||
                !form_fits(group, &group->outs[i], true) ||
                (group->outs[i].flags & KV_VIEW_READONLY))
                return false;
    }
    return true;
}

/* Where values begin, and which key's they are. */
typedef struct owner {
    const void *data; /* NULL: an empty slot */
    int64_t group;    /* -1: of several keys */
} owner_t;

static owner_t *find_owner(owner_t *owners, uint64_t mask, const void *data)
{
    uint64_t i = ((uintptr_t)data * UINT64_C(0x9E3779B97F4A7C15)) >> 20 & mask;
    while (owners[i].data != NULL && owners[i].data != data)
        i = (i + 1) & mask;
    return &owners[i];
}

/* An out may be a value of its own key, not of another one: that one's push would find it changed
 * or not, as the order of the work comes. After the checks for overlap: two arrays that share
 * memory begin at the same place. */
static kv_status_t check_apart(const kv_group_t *groups, int64_t num_groups, int64_t num_values)
{
    uint64_t num_slots = 16;
    while (num_slots < 2 * (uint64_t)num_values)
        num_slots *= 2;
    owner_t *owners = kv_calloc((size_t)num_slots, sizeof *owners);
    KV_TRY_ALLOC(owners, "the list of values");
    for (int64_t g = 0; g < num_groups; g++) {
        for (int32_t i = 0; i < groups[g].num_values; i++) {
            if (groups[g].values[i].count == 0)
                continue;
            owner_t *owner = find_owner(owners, num_slots - 1, groups[g].values[i].data);
            owner->group = owner->data == NULL || owner->group == g ? g : -1;
            owner->data = groups[g].values[i].data;
        }
    }
    kv_status_t status = KV_OK;
    for (int64_t g = 0; g < num_groups && status == KV_OK; g++) {
        for (int32_t i = 0; i < groups[g].num_outs; i++) {
            if (groups[g].outs[i].count == 0)
                continue;
            const owner_t *owner = find_owner(owners, num_slots - 1, groups[g].outs[i].data);
            if (owner->data != NULL && owner->group != g) {
                char where[NAME_BYTES + 32];
                status = kv_fail(KV_INVALID, "%s is also a value of another key of the call",
                                 position(&groups[g], true, i, where, sizeof where));
                break;
            }
        }
    }
    kv_free(owners);
    return status;
}

static bool overlaps(const kv_view_t *out, const kv_buffer_t *buffer, size_t bytes)
{
    const char *low, *high, *data = buffer->data;
    kv_view_extent(out, &low, &high);
    return low < data + bytes && data < high;
}

/* With the value held. */
static kv_status_t check_borrowed_rows(const kv_sparse_t *value, const kv_group_t *groups,
                                       int64_t num_groups)
{
    size_t bytes = (size_t)value->rows.num_rows * value->row_bytes;
    for (int64_t g = 0; g < num_groups && bytes > 0; g++) {
        for (int32_t i = 0; i < groups[g].num_outs; i++) {
            char where[NAME_BYTES + 32];
            if (groups[g].outs[i].sparse == NULL &&
                overlaps(&groups[g].outs[i], value->rows.data, bytes))
                return kv_fail(KV_INVALID, "%s shares memory with a row-sparse value",
                               position(&groups[g], true, i, where, sizeof where));
        }
    }
    return KV_OK;
}

/* A row-sparse value may lie in memory of the user's; a dense out may not be a part of it. A value
 * that somebody writes just now gets rows elsewhere, where nobody has a view yet. */
static kv_status_t check_borrowed(kv_engine_t *engine, const kv_group_t *groups, int64_t num_groups)
{
    for (int64_t g = 0; g < num_groups; g++) {
        for (int32_t i = 0; i < groups[g].num_values; i++) {
            kv_sparse_t *value = groups[g].values[i].sparse;
            if (value == NULL || atomic_load(&value->exports) == 0)
                continue;
            kv_dep_t dep = {.var = &value->var, .access = KV_READ};
            if (!kv_engine_try_enter_one(engine, &dep))
                continue;
            kv_status_t status = check_borrowed_rows(value, groups, num_groups);
            kv_engine_leave_one(engine, &dep);
            KV_TRY(status);
        }
    }
    return KV_OK;
}

kv_status_t kv_groups_check(kv_engine_t *engine, const kv_group_t *groups, int64_t num_groups,
                            const kv_call_t *call, const char *verb)
{
    if (KV_UNLIKELY(!acceptable(groups, num_groups))) {
        KV_TRY(check_each(groups, num_groups, check_form));
        KV_TRY(check_each(groups, num_groups, check_type));
        KV_TRY(check_each(groups, num_groups, check_shape));
        KV_TRY(check_each(groups, num_groups, check_memory));
    }
    if (call->num_outs == 0)
        return KV_OK;
    if (call->row_ids != NULL)
        KV_TRY(check_each(groups, num_groups, check_ids));
    KV_TRY(check_borrowed(engine, groups, num_groups));
    kv_status_t status = kv_outs_check_disjoint(call->outs, call->num_outs);
    if (status == KV_OK && call->num_values > 0)
        status = kv_outs_check_values(call->outs, call->num_outs, call->values, call->num_values);
    if (status == KV_OK) {
        /* Where the values are the outs, that these are apart says it all. */
        bool apart = num_groups == 1 || call->num_values == 0 || call->outs == call->values;
        return apart ? KV_OK : check_apart(groups, num_groups, call->num_values);
    }
    char name[NAME_BYTES], others[64] = "";
    if (num_groups > 1)
        snprintf(others, sizeof others, " and %" PRId64 " more, counted over all keys",
                 num_groups - 1);
    return kv_fail(status, "%s of key %s%s: %s", verb,
                   kv_name_format(&groups[0].entry->name, name, sizeof name), others,
                   kv_status_message(status));
}

/* ------------------------------------------------------------------------------ the keys */

static const kv_row_ids_t *row_ids_of(const kv_call_t *call, int64_t item)
{
    return call->row_ids != NULL ? call->row_ids + (call->items[item].outs - call->outs) : NULL;
}

/* Finds and pins the entry of every distinct key; group_of[i] tells the group of item i. */
static kv_status_t resolve_locked(kv_store_t *store, const kv_call_t *call, const char *verb,
                                  kv_plan_t *plan, int64_t *group_of) KV_REQUIRES(&store->lock)
{
    KV_TRY(kv_names_check_locked(store, call->items, call->num_items));
    uint64_t stamp = ++store->stamp;
    plan->num_groups = 0;
    for (int64_t i = 0; i < call->num_items; i++) {
        const kv_name_t *name = &call->items[i].name;
        kv_entry_t *entry = kv_table_find(&store->table, name, kv_name_hash(name));
        if (entry == NULL) {
            for (int64_t g = 0; g < plan->num_groups; g++)
                kv_var_unpin(&plan->groups[g].entry->var);
            char text[NAME_BYTES];
            return kv_fail(KV_NO_KEY, "%s of key %s, which was not initialised; call init first",
                           verb, kv_name_format(name, text, sizeof text));
        }
        if (entry->stamp != stamp) {
            entry->stamp = stamp;
            entry->group = plan->num_groups++;
            kv_var_pin(&entry->var);
            plan->groups[entry->group] = (kv_group_t){.entry = entry,
                                                      .num_values = call->items[i].num_values,
                                                      .num_outs = call->items[i].num_outs,
                                                      .values = call->items[i].values,
                                                      .outs = call->items[i].outs,
                                                      .row_ids = row_ids_of(call, i)};
        }
        group_of[i] = entry->group;
    }
    return KV_OK;
}

/* Puts the views of each key side by side, when some key stood in several items. */
static kv_status_t regroup(const kv_call_t *call, const int64_t *group_of, kv_plan_t *plan)
{
    kv_view_t *next = kv_alloc((size_t)(call->num_values + call->num_outs) * sizeof(kv_view_t));
    KV_TRY_ALLOC(next, "the values of a key that stands twice");
    plan->regrouped = next;
    kv_row_ids_t *ids = NULL;
    if (call->row_ids != NULL) {
        ids = plan->same_ids = kv_alloc((size_t)call->num_outs * sizeof *ids);
        KV_TRY_ALLOC(ids, "the row ids of a key that stands twice");
    }
    for (int64_t g = 0; g < plan->num_groups; g++)
        plan->groups[g] = (kv_group_t){.entry = plan->groups[g].entry};
    for (int64_t i = 0; i < call->num_items; i++) {
        plan->groups[group_of[i]].num_values += call->items[i].num_values;
        plan->groups[group_of[i]].num_outs += call->items[i].num_outs;
    }
    for (int64_t g = 0; g < plan->num_groups; g++) {
        plan->groups[g].values = next;
        next += plan->groups[g].num_values;
        plan->groups[g].outs = next;
        next += plan->groups[g].num_outs;
        plan->groups[g].row_ids = ids;
        ids = ids != NULL ? ids + plan->groups[g].num_outs : NULL;
        plan->groups[g].num_values = plan->groups[g].num_outs = 0;
    }
    for (int64_t i = 0; i < call->num_items; i++) {
        const kv_item_t *item = &call->items[i];
        kv_group_t *group = &plan->groups[group_of[i]];
        if (item->num_values > 0)
            memcpy((kv_view_t *)group->values + group->num_values, item->values,
                   (size_t)item->num_values * sizeof(kv_view_t));
        if (group->row_ids != NULL && item->num_outs > 0)
            memcpy((kv_row_ids_t *)group->row_ids + group->num_outs, row_ids_of(call, i),
                   (size_t)item->num_outs * sizeof(kv_row_ids_t));
        if (item->num_outs > 0)
            memcpy((kv_view_t *)group->outs + group->num_outs, item->outs,
                   (size_t)item->num_outs * sizeof(kv_view_t));
        group->num_values += item->num_values;
        group->num_outs += item->num_outs;
    }
    return KV_OK;
}

static kv_status_t check_not_inside(const kv_plan_t *plan, const char *verb)
{
    if (KV_LIKELY(kv_callback_depth() == 0))
        return KV_OK;
    for (int64_t g = 0; g < plan->num_groups; g++) {
        if (kv_var_held_here(&plan->groups[g].entry->var)) {
            char name[NAME_BYTES];
            kv_name_format(&plan->groups[g].entry->name, name, sizeof name);
            return kv_fail(KV_INVALID,
                           "%s of key %s from inside the updater of this key would wait for itself",
                           verb, name);
        }
    }
    return KV_OK;
}

bool kv_call_has_cuda(const kv_call_t *call)
{
    unsigned flags = 0;
    for (int64_t i = 0; i < call->num_values; i++)
        flags |= call->values[i].flags;
    for (int64_t i = 0; i < call->num_outs; i++)
        flags |= call->outs[i].flags;
    return (flags & KV_VIEW_CUDA) != 0;
}

kv_status_t kv_plan_init(kv_store_t *store, const kv_call_t *call, const char *verb,
                         kv_plan_t *plan)
{
    int64_t one, *group_of = &one;
    plan->groups = &plan->one;
    plan->updater = NULL;
    plan->optimizer = NULL;
    plan->team = NULL;
    plan->codec.type = KV_CODEC_NONE;
    plan->regrouped = NULL;
    plan->same_ids = NULL;
    plan->steps = &plan->one_step;
    plan->counted = 0;
    plan->num_groups = 0;
    plan->stage = NULL;
    plan->cuda = kv_call_has_cuda(call);
    if (KV_UNLIKELY(call->num_items > 1)) {
        size_t bytes = (size_t)call->num_items * (sizeof(kv_group_t) + sizeof(int64_t));
        plan->groups = kv_alloc(bytes);
        KV_TRY_ALLOC(plan->groups, "the keys of a call");
        group_of = (int64_t *)(plan->groups + call->num_items);
    }
    kv_store_lock(store);
    kv_status_t status = resolve_locked(store, call, verb, plan, group_of);
    if (status == KV_OK && call->num_values > 0) {
        plan->codec = store->codec;
        plan->codec_epoch = store->codec_epoch;
        plan->updater = store->updater;
        plan->optimizer = store->optimizer;
        if (plan->updater != NULL)
            atomic_fetch_add(&plan->updater->refs, 1);
        if (plan->optimizer != NULL)
            atomic_fetch_add(&plan->optimizer->refs, 1);
    }
    plan->team = kv_nccl_team_hold(store->team);
    kv_mutex_unlock(&store->lock);
    if (status != KV_OK)
        plan->num_groups = 0;
    if (status == KV_OK && plan->num_groups < call->num_items)
        status = regroup(call, group_of, plan);
    if (status == KV_OK)
        status = check_not_inside(plan, verb);
    if (status == KV_OK)
        status =
            kv_groups_check(store->runtime->engine, plan->groups, plan->num_groups, call, verb);
    if (status != KV_OK)
        kv_plan_fini(plan);
    return status;
}

void kv_plan_fini(kv_plan_t *plan)
{
    for (int64_t g = 0; g < plan->num_groups; g++) {
        kv_slots_rele(plan->groups[g].slots);
        kv_var_unpin(&plan->groups[g].entry->var);
    }
    if (plan->groups != &plan->one)
        kv_free(plan->groups);
    if (plan->steps != &plan->one_step)
        kv_free(plan->steps);
    kv_stage_free(plan->stage);
    kv_free(plan->regrouped);
    kv_free(plan->same_ids);
    kv_optimizer_rele(plan->optimizer);
    kv_nccl_team_rele(plan->team);
    if (plan->updater != NULL && atomic_fetch_sub(&plan->updater->refs, 1) == 1)
        plan->updater->free(plan->updater);
}
