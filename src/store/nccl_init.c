/* New keys of a store of kind `nccl` over several processes: all begin with the value that worker 0
 * gives, on all devices. Without a push before, one device of each process takes part.
 */
#include "base/memory.h"
#include "store/device.h"
#include "store/nccl.h"

#include <string.h>

/* Copies of a new key, one on each device: the key itself and its twins. */
static kv_entry_t *copy_on(const kv_entry_t *entry, int k)
{
    return k == 0 ? (kv_entry_t *)entry : entry->twins->entries[k - 1];
}

typedef struct spreading {
    kv_nccl_crew_t *crew;
    const kv_plan_t *plan;
    kv_lane_t lanes[KV_NCCL_DEVICES];
    kv_mark_t **after; /* [keys][devices] */
    int64_t begun;     /* so many of them */
    void **data;       /* [keys][devices] */
    kv_nccl_job_t *jobs;
} spreading_t;

static kv_status_t begin_spreading(spreading_t *spreading)
{
    int count = spreading->crew->count;
    int64_t keys = spreading->plan->num_groups;
    for (int k = 0; k < count; k++) {
        KV_TRY(kv_lane_own(spreading->crew->devices[k], &spreading->lanes[k]));
        KV_TRY(kv_nccl_come_after(spreading->lanes[k]));
    }
    for (int64_t cell = 0; cell < keys * count; cell++) {
        const kv_entry_t *copy =
            copy_on(spreading->plan->groups[cell / count].entry, (int)(cell % count));
        KV_TRY(kv_place_begin(kv_buffer_place(copy->stored), spreading->lanes[cell % count],
                              &spreading->after[cell]));
        spreading->begun = cell + 1;
        spreading->data[cell] = copy->stored->data;
    }
    for (int64_t g = 0; g < keys; g++) {
        const kv_entry_t *entry = spreading->plan->groups[g].entry;
        spreading->jobs[g] =
            (kv_nccl_job_t){.dtype = entry->dtype,
                            .count = entry->count,
                            .src = (const void *const *)spreading->data + g * count,
                            .dst = spreading->data + g * count};
    }
    return KV_OK;
}

/* Whatever comes later comes after it. */
static kv_status_t end_spreading(const spreading_t *spreading)
{
    kv_mark_t *marks[KV_NCCL_DEVICES] = {NULL};
    int count = spreading->crew->count;
    kv_status_t status = KV_OK;
    for (int k = 0; k < count && status == KV_OK; k++) {
        status = kv_mark_new(spreading->lanes[k], &marks[k]);
        if (status == KV_OK)
            kv_nccl_set_newest(spreading->crew->devices[k], marks[k]);
    }
    for (int64_t cell = 0; cell < spreading->begun; cell++) {
        int k = (int)(cell % count);
        const kv_entry_t *copy = copy_on(spreading->plan->groups[cell / count].entry, k);
        if (status == KV_OK)
            status = kv_place_end(kv_buffer_place(copy->stored), spreading->lanes[k], marks[k],
                                  spreading->after[cell]);
        else
            kv_mark_rele(spreading->after[cell]);
    }
    for (int k = 0; k < count; k++)
        kv_mark_rele(marks[k]);
    return status;
}

static kv_status_t spread(kv_nccl_crew_t *crew, const kv_plan_t *plan, kv_caller_t *caller)
{
    spreading_t spreading = {.crew = crew, .plan = plan};
    size_t cells = (size_t)plan->num_groups * (size_t)crew->count;
    char *block = kv_calloc(1, cells * (sizeof *spreading.after + sizeof *spreading.data) +
                                   (size_t)plan->num_groups * sizeof *spreading.jobs);
    KV_TRY_ALLOC(block, "the keys of a call");
    spreading.jobs = (kv_nccl_job_t *)block;
    spreading.after = (kv_mark_t **)(block + (size_t)plan->num_groups * sizeof *spreading.jobs);
    spreading.data = (void **)(spreading.after + cells);
    kv_status_t status = begin_spreading(&spreading);
    if (status == KV_OK)
        status = kv_nccl_broadcast(crew->group, spreading.lanes, 0, (int)plan->num_groups,
                                   spreading.jobs, caller);
    kv_status_t ended = end_spreading(&spreading);
    kv_free(block);
    return status == KV_OK ? ended : status;
}

/* Where this process begins: the device of the call's first array there, else the current one. */
static kv_status_t first_device(const kv_call_t *call, int *device)
{
    const kv_device_api_t *api;
    const kv_view_t *found = NULL;
    for (int64_t i = 0; i < call->num_values + call->num_outs && found == NULL; i++) {
        const kv_view_t *view =
            i < call->num_values ? &call->values[i] : &call->outs[i - call->num_values];
        found = kv_view_is_cuda(view) ? view : NULL;
    }
    if (found != NULL) {
        *device = found->device;
        return KV_OK;
    }
    char sentence[KV_DEVICE_SENTENCE];
    KV_TRY(kv_device_enter(&api));
    kv_status_t status = kv_device_check(api->current(device, sentence), sentence);
    kv_device_leave();
    return status;
}

/* With the runtime's variable held. */
static kv_status_t begin_keys(kv_nccl_team_t *team, kv_store_t *store, const kv_plan_t *plan,
                              const char *verb, const kv_call_t *call, kv_caller_t *caller)
{
    char words[256];
    bool early = atomic_load(&team->pushing.group) == NULL;
    kv_nccl_crew_t *crew = early ? &team->early : &team->pushing;
    kv_nccl_crew_t wanted = {.count = crew->count};
    memcpy(wanted.devices, crew->devices, sizeof wanted.devices);
    if (atomic_load(&crew->group) == NULL) {
        wanted.count = 1;
        KV_TRY(first_device(call, &wanted.devices[0]));
    }
    for (int64_t g = 0; g < plan->num_groups; g++) {
        kv_work_t work = {.host = &store->host,
                          .group = {.entry = plan->groups[g].entry},
                          .caller = caller,
                          .hold = call->hold};
        KV_TRY(kv_nccl_settle(&wanted, &work));
    }
    KV_TRY(kv_nccl_team_join(team, early, wanted.count, wanted.devices,
                             kv_plan_tell(verb, plan, words, sizeof words), caller));
    return spread(crew, plan, caller);
}

kv_status_t kv_nccl_init(kv_store_t *store, const kv_plan_t *plan, const char *verb,
                         const kv_call_t *call, kv_caller_t *caller)
{
    kv_dep_t dep = {.var = &store->runtime->nccl, .access = KV_WRITE};
    kv_op_t op;
    char name[96];
    for (int64_t g = 0; g < plan->num_groups; g++)
        if (plan->groups[g].entry->sparse)
            return kv_fail(KV_INVALID,
                           "key %s is row-sparse, and NCCL carries dense values: use a dist kind",
                           kv_name_format(&plan->groups[g].entry->name, name, sizeof name));
    kv_op_init(&op, &dep, 1, call->priority);
    kv_status_t status = kv_nccl_team_check(plan->team);
    if (status == KV_OK)
        status = kv_engine_enter(store->runtime->engine, &op, caller);
    if (status == KV_OK) {
        atomic_fetch_add(&plan->team->inside, 1);
        status = begin_keys(plan->team, store, plan, verb, call, caller);
        atomic_fetch_sub(&plan->team->inside, 1);
        kv_engine_leave(store->runtime->engine, &op);
    }
    kv_caller_attach(caller);
    return status == KV_OK ? KV_OK : kv_nccl_team_failed(plan->team, status, caller);
}
