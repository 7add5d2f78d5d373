/* Pushes of a store of kind `nccl`: the values of a key, one on each device, are added up by NCCL,
 * and every device then updates a copy of its own of the key, all in the same way. A pull finds its
 * value on its own device.
 *
 * The key itself is the copy on the first device; its twins, on the others, are keys of their own
 * that stand in no table and are used by whoever holds the key. What NCCL is not for (values that
 * are not one on each device, codes, updaters, rows) goes the way of `device` stores; that changes
 * the key alone, so its twins go, and come again with the next push that wants them. Over several
 * processes it is refused: the others would not hear of it.
 */
#include "base/memory.h"
#include "store/device.h"
#include "store/nccl.h"

#include <stdio.h>
#include <string.h>

/* ------------------------------------------------------------------------------------ twins */

void kv_entry_drop_twins(kv_entry_t *entry)
{
    kv_twins_t *twins = entry->twins;
    if (KV_LIKELY(twins == NULL))
        return;
    entry->twins = NULL;
    for (int i = 0; i < twins->count; i++)
        kv_var_retire(&twins->entries[i]->var);
    kv_slots_rele(twins->mirrored);
    kv_free(twins);
}

static kv_view_t view_of(const kv_entry_t *entry, void *data, kv_lane_t lane)
{
    return (kv_view_t){.data = data,
                       .shape = entry->shape,
                       .count = entry->count,
                       .ndim = entry->ndim,
                       .dtype = (uint8_t)entry->dtype,
                       .flags = KV_VIEW_DEVICE | KV_VIEW_CUDA | KV_VIEW_FOLLOWS,
                       .device = (int16_t)lane.device,
                       .stream = lane.stream};
}

/* A twin begins with the key's value. */
static kv_status_t fill_twin(const kv_entry_t *entry, kv_entry_t *twin, int device,
                             kv_caller_t *caller)
{
    kv_place_t *place = kv_buffer_place(entry->stored);
    kv_lane_t lane;
    kv_mark_t *after = NULL, *mark = NULL;
    bool launched = false;
    KV_TRY(kv_lane_own(kv_place_device(place), &lane));
    KV_TRY(kv_place_begin(place, lane, &after));
    kv_view_t value = view_of(entry, entry->stored->data, lane);
    kv_work_t work = {.group = {.entry = twin, .num_values = 1, .values = &value},
                      .push = true,
                      .caller = caller};
    const kv_work_t *one = &work;
    kv_status_t status = kv_batch_run(&one, 1, device, NULL, &launched);
    /* The batch let this lane come after it. */
    kv_status_t marked = kv_mark_new(lane, &mark);
    if (marked == KV_OK)
        marked = kv_place_end(place, lane, mark, after);
    else
        kv_mark_rele(after);
    kv_mark_rele(mark);
    return status == KV_OK ? marked : status;
}

static kv_status_t make_twins(kv_entry_t *entry, const kv_nccl_crew_t *crew, kv_caller_t *caller)
{
    size_t count = (size_t)crew->count - 1;
    kv_twins_t *twins = kv_calloc(1, sizeof *twins + count * sizeof twins->entries[0]);
    KV_TRY_ALLOC(twins, "the copies of a key");
    entry->twins = twins;
    kv_view_t like = view_of(entry, NULL, (kv_lane_t){0});
    for (size_t i = 0; i < count; i++) {
        KV_TRY(kv_entry_new(&entry->name, &like, true, &twins->entries[i]));
        twins->count++;
        KV_TRY(fill_twin(entry, twins->entries[i], crew->devices[i + 1], caller));
    }
    return KV_OK;
}

/* Gives the twins the state that the key is updated with: shares of its buffers, of which each
 * device makes copies when it needs them, before the key's own is changed. */
static kv_status_t mirror_slots(const kv_group_t *group)
{
    kv_twins_t *twins = group->entry->twins;
    kv_slots_t *slots = group->slots;
    if (twins == NULL || slots == NULL || twins->mirrored == slots)
        return KV_OK;
    for (int i = 0; i < twins->count; i++) {
        kv_slots_t *copy = kv_slots_new(slots->optim);
        KV_TRY_ALLOC(copy, "the state of a key");
        copy->master = slots->master != NULL ? kv_buffer_hold(slots->master) : NULL;
        for (int s = 0; s < KV_MAX_SLOTS; s++)
            copy->slot[s] = slots->slot[s] != NULL ? kv_buffer_hold(slots->slot[s]) : NULL;
        memcpy(copy->kept, slots->kept, sizeof copy->kept);
        kv_slots_rele(twins->entries[i]->slots);
        twins->entries[i]->slots = copy;
    }
    kv_slots_rele(twins->mirrored);
    atomic_fetch_add(&slots->refs, 1);
    twins->mirrored = slots;
    return KV_OK;
}

/* ---------------------------------------------------------------------------- what is for NCCL */

/* One value on each of several devices, of one where there are several processes, and no device
 * twice: fills `devices`. */
static bool spreads(const kv_group_t *group, bool many, int *devices)
{
    if (group->num_values < (many ? 1 : 2) || group->num_values > KV_NCCL_DEVICES ||
        group->entry->sparse)
        return false;
    for (int32_t i = 0; i < group->num_values; i++) {
        if (!kv_view_is_cuda(&group->values[i]))
            return false;
        devices[i] = group->values[i].device;
        for (int32_t j = 0; j < i; j++)
            if (devices[j] == devices[i])
                return false;
    }
    return true;
}

/* The value of the key on the k-th device of the crew; NULL if there is none. */
static const kv_view_t *value_on(const kv_nccl_crew_t *crew, const kv_group_t *group, int k)
{
    for (int32_t i = 0; i < group->num_values; i++)
        if (group->values[i].device == crew->devices[k])
            return &group->values[i];
    return NULL;
}

bool kv_plan_takes_nccl(const kv_plan_t *plan)
{
    int devices[KV_NCCL_DEVICES];
    bool many = kv_nccl_team_many(plan->team);
    if (plan->team == NULL || plan->updater != NULL || plan->codec.type != KV_CODEC_NONE ||
        plan->num_groups > INT32_MAX)
        return false;
    for (int64_t g = 0; g < plan->num_groups; g++)
        if (!spreads(&plan->groups[g], many, devices) ||
            plan->groups[g].num_values != plan->groups[0].num_values)
            return false;
    return true;
}

/* What a push that NCCL cannot take lacks. */
static const char *lack_of(const kv_plan_t *plan, const kv_group_t *group)
{
    int devices[KV_NCCL_DEVICES];
    if (plan->codec.type != KV_CODEC_NONE)
        return "it cannot be compressed: set_gradient_compression({'type': 'none'})";
    if (plan->updater != NULL)
        return "an updater of one process cannot take part in it: use set_optimizer";
    if (group->entry->sparse)
        return "this key is row-sparse";
    for (int32_t i = 0; i < group->num_values; i++)
        if (!kv_view_is_cuda(&group->values[i]))
            return group->values[i].sparse != NULL ? "there is a row-sparse value"
                                                   : "there is a value in host memory";
    return spreads(group, true, devices) ? "the keys of this call have not all as many values"
                                         : "there are several on one GPU";
}

kv_status_t kv_plan_check_nccl(const kv_plan_t *plan)
{
    char name[96];
    int64_t g = 0;
    KV_TRY(kv_nccl_team_whole(plan->team, true));
    if (plan->num_groups == 0 || kv_plan_takes_nccl(plan))
        return KV_OK;
    int devices[KV_NCCL_DEVICES];
    while (g + 1 < plan->num_groups && spreads(&plan->groups[g], true, devices))
        g++;
    return kv_fail(KV_INVALID,
                   "key %s: a push to a store of kind 'nccl' over several processes is one dense "
                   "value on each GPU of this process, which NCCL adds up, and %s; dist kinds take "
                   "all values",
                   kv_name_format(&plan->groups[g].entry->name, name, sizeof name),
                   lack_of(plan, &plan->groups[g]));
}

static kv_status_t refuse_devices(const kv_nccl_crew_t *crew, const kv_plan_t *plan)
{
    char names[96] = "";
    for (int k = 0, used = 0; k < crew->count && used < (int)sizeof names - 8; k++)
        used += snprintf(names + used, sizeof names - (size_t)used, "%s%d", k == 0 ? "" : ", ",
                         crew->devices[k]);
    return kv_fail(KV_INVALID,
                   "the values of this call (%d of a key) are not one on each of the GPUs %s, "
                   "which the first push has told the other processes",
                   plan->groups[0].num_values, names);
}

/* With the runtime's variable held: *fits tells whether all keys have a value on each of the
 * devices that push. */
static kv_status_t gather(kv_nccl_team_t *team, const kv_plan_t *plan, kv_caller_t *caller,
                          bool *fits)
{
    kv_nccl_crew_t first, *crew = &team->pushing;
    bool begins = atomic_load(&crew->group) == NULL;
    if (begins) {
        crew = &first;
        crew->count = plan->groups[0].num_values;
        (void)spreads(&plan->groups[0], true, crew->devices); /* it does: the plan was looked at */
    }
    *fits = true;
    for (int64_t g = 0; g < plan->num_groups; g++)
        for (int k = 0; k < crew->count && *fits; k++)
            *fits = plan->groups[g].num_values == crew->count &&
                    value_on(crew, &plan->groups[g], k) != NULL;
    if (!*fits || !begins)
        return KV_OK;
    char call[256];
    return kv_nccl_team_join(team, false, first.count, first.devices,
                             kv_plan_tell("first push", plan, call, sizeof call), caller);
}

/* ------------------------------------------------------------------------------------ a push */

typedef struct push {
    kv_nccl_crew_t *crew;
    const kv_plan_t *plan;
    kv_caller_t *caller;
    kv_device_work_t *on; /* [devices] begun: num_on of them */
    int num_on;
    kv_lane_t *lanes;       /* [devices] */
    const void **src;       /* [keys][devices] */
    void **dst;             /* [keys][devices] the sums */
    kv_nccl_job_t *jobs;    /* [keys] */
    kv_view_t *values;      /* [keys][devices] views of the sums */
    kv_view_t *outs;        /* of all keys, those of one device together */
    kv_work_t *works;       /* [devices][keys] */
    const kv_work_t **list; /* [keys] */
} push_t;

static kv_status_t make_room(push_t *push, void **block)
{
    size_t keys = (size_t)push->plan->num_groups, devices = (size_t)push->crew->count, outs = 0;
    for (size_t g = 0; g < keys; g++)
        outs += (size_t)push->plan->groups[g].num_outs;
    size_t cells = keys * devices;
    char *next = *block = kv_calloc(
        1, devices * (sizeof *push->on + sizeof *push->lanes) +
               cells * (sizeof *push->values + sizeof *push->works + 2 * sizeof(void *)) +
               outs * sizeof *push->outs + keys * (sizeof *push->jobs + sizeof *push->list));
    KV_TRY_ALLOC(*block, "a push to several devices");
    push->on = (kv_device_work_t *)next;
    push->lanes = (kv_lane_t *)(next += devices * sizeof *push->on);
    push->values = (kv_view_t *)(next += devices * sizeof *push->lanes);
    push->works = (kv_work_t *)(next += cells * sizeof *push->values);
    push->outs = (kv_view_t *)(next += cells * sizeof *push->works);
    push->jobs = (kv_nccl_job_t *)(next += outs * sizeof *push->outs);
    push->src = (const void **)(next += keys * sizeof *push->jobs);
    push->dst = (void **)(next += cells * sizeof(void *));
    push->list = (const kv_work_t **)(next + cells * sizeof(void *));
    return KV_OK;
}

/* Lanes, and memory for the sums; whatever else may fail for want of memory. */
static kv_status_t prepare(push_t *push)
{
    int count = push->crew->count;
    for (int k = 0; k < count; k++) {
        const kv_plan_t *plan = push->plan;
        push->lanes[k] = kv_view_lane(value_on(push->crew, &plan->groups[0], k));
        KV_TRY(kv_device_work_begin(&push->on[k], push->lanes[k]));
        push->num_on = k + 1;
        KV_TRY(kv_nccl_come_after(push->lanes[k]));
        for (int64_t g = 0; g < plan->num_groups; g++) {
            const kv_entry_t *entry = plan->groups[g].entry;
            const kv_view_t *value = value_on(push->crew, &plan->groups[g], k);
            int64_t cell = g * count + k;
            KV_TRY(kv_lane_join(kv_view_lane(value), push->lanes[k]));
            KV_TRY(kv_device_temp(&push->on[k], entry->bytes, &push->dst[cell]));
            push->src[cell] = value->data;
            push->values[cell] = view_of(entry, push->dst[cell], push->lanes[k]);
        }
    }
    return KV_OK;
}

/* What is done on each device: `models` have all values and outs of their keys. */
static void plan_works(push_t *push, const kv_work_t *models)
{
    int count = push->crew->count;
    int64_t keys = push->plan->num_groups;
    kv_view_t *next = push->outs;
    for (int64_t g = 0; g < keys; g++) {
        const kv_group_t *group = &push->plan->groups[g];
        kv_entry_t *entry = group->entry;
        push->jobs[g] = (kv_nccl_job_t){.dtype = entry->dtype,
                                        .count = entry->count,
                                        .src = push->src + g * count,
                                        .dst = push->dst + g * count};
        for (int k = 0; k < count; k++) {
            kv_work_t *work = &push->works[k * keys + g];
            *work = models[g];
            work->group.values = &push->values[g * count + k];
            work->group.num_values = 1;
            work->group.outs = next;
            work->group.num_outs = 0;
            for (int32_t i = 0; i < group->num_outs; i++) {
                const kv_view_t *out = &group->outs[i];
                bool elsewhere = true; /* than on a device of the crew: the first sees to it */
                for (int j = 0; j < count && kv_view_is_cuda(out); j++)
                    elsewhere = elsewhere && push->crew->devices[j] != out->device;
                if (elsewhere ? k == 0 : out->device == push->crew->devices[k]) {
                    *next++ = *out;
                    work->group.num_outs++;
                }
            }
        }
    }
}

kv_status_t kv_nccl_settle(const kv_nccl_crew_t *crew, const kv_work_t *model)
{
    kv_entry_t *entry = model->group.entry;
    kv_place_t *place = kv_buffer_place(entry->stored);
    if (place == NULL || kv_place_device(place) != crew->devices[0]) {
        kv_work_t nothing = *model;
        const kv_work_t *one = &nothing;
        bool launched;
        nothing.push = false;
        nothing.group.num_values = nothing.group.num_outs = 0;
        kv_entry_drop_twins(entry);
        KV_TRY(kv_work_bring_home(model));
        KV_TRY(kv_batch_run(&one, 1, crew->devices[0], NULL, &launched));
    }
    if (entry->twins == NULL && crew->count > 1)
        KV_TRY(make_twins(entry, crew, model->caller));
    return mirror_slots(&model->group);
}

/* The twins first: they take their state from the key's, which the last batch changes. */
static kv_status_t update_all(push_t *push, bool *launched)
{
    int64_t keys = push->plan->num_groups;
    for (int k = push->crew->count - 1; k >= 0; k--) {
        for (int64_t g = 0; g < keys; g++) {
            kv_work_t *work = &push->works[k * keys + g];
            push->list[g] = work;
            if (k == 0)
                continue;
            work->group.entry = work->group.entry->twins->entries[k - 1];
            work->group.slots = work->group.entry->slots;
        }
        KV_TRY(kv_batch_run(push->list, keys, push->crew->devices[k], NULL, launched));
    }
    return KV_OK;
}

static kv_status_t work_on_all(push_t *push, const kv_work_t *models, bool *launched)
{
    int64_t keys = push->plan->num_groups;
    for (int64_t g = 0; g < keys; g++)
        KV_TRY(kv_nccl_settle(push->crew, &models[g]));
    KV_TRY(prepare(push));
    plan_works(push, models);
    KV_TRY(kv_nccl_sum(push->crew->group, push->lanes, (int)keys, push->jobs, push->caller));
    return update_all(push, launched);
}

/* What the owner of a value does later comes after its use. */
static kv_status_t close_value(const push_t *push, const kv_view_t *value, int k, kv_mark_t *mark)
{
    if (!kv_lane_same(kv_view_lane(value), push->lanes[k]))
        KV_TRY(kv_mark_before(mark, kv_view_lane(value)));
    return value->flags & KV_VIEW_FOLLOWS ? KV_OK : kv_mark_wait(mark, push->caller);
}

static kv_status_t close_all(push_t *push, kv_hold_t *hold)
{
    kv_status_t status = KV_OK;
    for (int k = 0; k < push->num_on; k++) {
        kv_mark_t *mark = NULL;
        kv_status_t ended = kv_device_work_end(&push->on[k], &mark);
        if (ended == KV_OK) {
            kv_hold_until(hold, mark);
            kv_nccl_set_newest(push->lanes[k].device, mark);
        }
        for (int64_t g = 0; g < push->plan->num_groups && ended == KV_OK; g++)
            ended = close_value(push, value_on(push->crew, &push->plan->groups[g], k), k, mark);
        kv_mark_rele(mark);
        status = status == KV_OK ? ended : status;
    }
    return status;
}

static kv_status_t push_by_nccl(const kv_plan_t *plan, const kv_work_t *works, kv_caller_t *caller,
                                bool *fits, bool *launched)
{
    push_t push = {.crew = &plan->team->pushing, .plan = plan, .caller = caller};
    void *block = NULL;
    *launched = false;
    KV_TRY(gather(plan->team, plan, caller, fits));
    if (!*fits)
        return kv_nccl_team_many(plan->team) ? refuse_devices(push.crew, plan) : KV_OK;
    kv_status_t status = make_room(&push, &block);
    if (status == KV_OK)
        status = work_on_all(&push, works, launched);
    kv_status_t closed = close_all(&push, works[0].hold);
    status = status == KV_OK ? closed : status;
    for (int64_t g = 0; g < plan->num_groups && status != KV_OK; g++)
        kv_entry_drop_twins(plan->groups[g].entry); /* nobody knows which of them are done */
    kv_free(block);
    return status;
}

kv_status_t kv_nccl_push(const kv_plan_t *plan, const kv_work_t *works, kv_caller_t *caller,
                         bool *fits, bool *launched)
{
    atomic_fetch_add(&plan->team->inside, 1);
    kv_status_t status = push_by_nccl(plan, works, caller, fits, launched);
    atomic_fetch_sub(&plan->team->inside, 1);
    return status;
}

/* -------------------------------------------------------------------------------------- a pull */

/* Whether the out is on the i-th twin's device, or (-1) on none of theirs. */
static bool belongs(const kv_twins_t *twins, int i, const kv_view_t *out)
{
    int owner = -1;
    for (int j = 0; j < twins->count && kv_view_is_cuda(out); j++)
        if (kv_place_device(kv_buffer_place(twins->entries[j]->stored)) == out->device)
            owner = j;
    return owner == i;
}

kv_status_t kv_work_pull_twins(const kv_work_t *work, bool *delivering)
{
    const kv_entry_t *entry = work->group.entry;
    kv_view_t *outs = kv_alloc((size_t)work->group.num_outs * sizeof *outs);
    KV_TRY_ALLOC(outs, "the outs of a call");
    kv_status_t status = KV_OK;
    for (int i = -1; i < entry->twins->count && status == KV_OK; i++) {
        kv_work_t pull = *work;
        const kv_work_t *one = &pull;
        kv_entry_t *from = i < 0 ? work->group.entry : entry->twins->entries[i];
        pull.group.entry = from;
        pull.group.outs = outs;
        pull.group.num_outs = 0;
        for (int32_t o = 0; o < work->group.num_outs; o++)
            if (belongs(entry->twins, i, &work->group.outs[o]))
                outs[pull.group.num_outs++] = work->group.outs[o];
        if (pull.group.num_outs > 0)
            status = kv_batch_run(&one, 1, kv_place_device(kv_buffer_place(from->stored)), NULL,
                                  delivering);
    }
    kv_free(outs);
    return status;
}
