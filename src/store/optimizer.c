/* The optimizer of a store: its numbers, its counts, and the step that each push gets.
 *
 * Everything that depends on the order of the calls is taken when a call has been checked, under
 * the store's lock: the count of the key, the largest count of all keys, what moves with every
 * push. The schedule may be Python code and is asked before, without the lock, with the number that
 * is due; if another call has counted meanwhile, it is asked again.
 */
#include "base/memory.h"
#include "ps/client.h"
#include "store/internal.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 96 };

/* ------------------------------------------------------------------------------ optimizers */

typedef struct hashed {
    uint64_t hash;
    kv_multiplier_t multiplier;
} hashed_t;

static int by_hash(const void *a, const void *b)
{
    uint64_t x = ((const hashed_t *)a)->hash, y = ((const hashed_t *)b)->hash;
    return (x > y) - (x < y);
}

/* Sorted copies, their texts behind them. */
static kv_status_t copy_multipliers(kv_optimizer_t *optimizer, const kv_multiplier_t *multipliers,
                                    int64_t count)
{
    size_t bytes = (size_t)count * sizeof(hashed_t);
    for (int64_t i = 0; i < count; i++)
        bytes += multipliers[i].name.text != NULL ? multipliers[i].name.bytes : 0;
    hashed_t *sorted = kv_alloc(bytes);
    KV_TRY_ALLOC(sorted, "the multipliers of an optimizer");
    char *text = (char *)(sorted + count);
    for (int64_t i = 0; i < count; i++) {
        sorted[i] = (hashed_t){kv_name_hash(&multipliers[i].name), multipliers[i]};
        if (multipliers[i].name.text != NULL) {
            memcpy(text, multipliers[i].name.text, multipliers[i].name.bytes);
            sorted[i].multiplier.name.text = text;
            text += multipliers[i].name.bytes;
        }
    }
    qsort(sorted, (size_t)count, sizeof *sorted, by_hash);
    optimizer->multipliers = sorted;
    optimizer->num_multipliers = count;
    return KV_OK;
}

kv_status_t kv_optimizer_new(const kv_optim_class_t *optim, const kv_optim_numbers_t *numbers,
                             kv_schedule_t *schedule, const kv_multiplier_t *multipliers,
                             int64_t num_multipliers, uint64_t declared, kv_optimizer_t **out)
{
    static _Atomic uint64_t numbered;
    kv_optimizer_t *optimizer = NULL;
    kv_status_t status = kv_optim_check(optim, numbers);
    if (status == KV_OK) {
        optimizer = kv_calloc(1, sizeof *optimizer);
        if (optimizer == NULL)
            status = kv_fail(KV_NO_MEMORY, "no memory for an optimizer");
        else
            status = copy_multipliers(optimizer, multipliers, num_multipliers);
    }
    if (status != KV_OK) {
        kv_free(optimizer);
        if (schedule != NULL)
            schedule->free(schedule);
        return status;
    }
    optimizer->refs = 1;
    optimizer->number = atomic_fetch_add(&numbered, 1) + 1;
    optimizer->declared = declared;
    optimizer->optim = optim;
    optimizer->numbers = *numbers;
    optimizer->schedule = schedule;
    *out = optimizer;
    return KV_OK;
}

void kv_optimizer_rele(kv_optimizer_t *optimizer)
{
    if (optimizer == NULL || atomic_fetch_sub(&optimizer->refs, 1) != 1)
        return;
    if (optimizer->schedule != NULL)
        optimizer->schedule->free(optimizer->schedule);
    kv_free(optimizer->multipliers);
    kv_free(optimizer);
}

/* What the key has of its own, NULL: nothing. */
static const kv_multiplier_t *find_multiplier(const kv_optimizer_t *optimizer,
                                              const kv_entry_t *entry)
{
    const hashed_t *sorted = optimizer->multipliers;
    int64_t low = 0, high = optimizer->num_multipliers;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (sorted[middle].hash < entry->hash)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < optimizer->num_multipliers && sorted[low].hash == entry->hash; low++)
        if (kv_name_equal(&sorted[low].multiplier.name, &entry->name))
            return &sorted[low].multiplier;
    return NULL;
}

/* --------------------------------------------------------------------- setting an optimizer */

void kv_optim_state_begin(kv_optim_state_t *state, int64_t begin_num_update)
{
    /* The generator begins with the same stream in every store, so that runs can be repeated. */
    *state = (kv_optim_state_t){
        .num_update = begin_num_update, .nadam_product = 1.0, .last_rate = NAN, .seed = 0};
}

void kv_store_forget_training_locked(kv_store_t *store)
{
    for (kv_entry_t *entry = store->table.first; entry != NULL; entry = entry->next) {
        kv_slots_rele(entry->slots);
        entry->slots = NULL;
        entry->updates = -1;
    }
    store->counted++;
}

kv_status_t kv_store_set_optimizer(kv_store_t *store, kv_optimizer_t *optimizer)
{
    KV_TRY(kv_store_check_open(store));
    kv_mutex_lock(&store->lock);
    kv_optimizer_t *before = store->optimizer;
    kv_updater_t *updater = store->updater;
    if (before == NULL || before->optim != optimizer->optim ||
        before->numbers.python != optimizer->numbers.python) {
        kv_store_forget_training_locked(store);
        kv_optim_state_begin(&store->state, optimizer->numbers.begin_num_update);
    }
    store->optimizer = optimizer;
    store->updater = NULL;
    store->counted++;
    kv_mutex_unlock(&store->lock);
    kv_optimizer_rele(before);
    if (updater != NULL && atomic_fetch_sub(&updater->refs, 1) == 1)
        updater->free(updater);
    return KV_OK;
}

kv_status_t kv_store_set_compression(kv_store_t *store, const kv_codec_t *codec)
{
    KV_TRY(kv_store_check_open(store));
    if (codec->type != KV_CODEC_NONE)
        KV_TRY(kv_codec_check(codec));
    kv_mutex_lock(&store->lock);
    if (codec->type != store->codec.type)
        store->codec_epoch++;
    store->codec = *codec;
    kv_mutex_unlock(&store->lock);
    return KV_OK;
}

/* ---------------------------------------------------------------------------------- counts */

static int64_t next_count(const kv_optimizer_t *optimizer, const kv_entry_t *entry)
{
    return (entry->updates < 0 ? optimizer->numbers.begin_num_update : entry->updates) + 1;
}

/* A text key is its own name, unless the optimizer was given another one. */
static bool names_plain_rate(const kv_name_t *name)
{
    static const char *const ENDS[] = {"gamma", "beta", "bias"};
    for (size_t i = 0; name->text != NULL && i < sizeof ENDS / sizeof ENDS[0]; i++) {
        size_t length = strlen(ENDS[i]);
        if (name->bytes >= length &&
            memcmp(name->text + name->bytes - length, ENDS[i], length) == 0)
            return true;
    }
    return false;
}

static void count_locked(kv_store_t *store, const kv_optimizer_t *optimizer, kv_entry_t *entry,
                         double rate, kv_step_t *step) KV_REQUIRES(&store->lock)
{
    entry->updates = next_count(optimizer, entry);
    if (entry->updates > store->state.num_update)
        store->state.num_update = entry->updates;
    if (entry->optimizer != optimizer->number) {
        entry->multiplier = find_multiplier(optimizer, entry);
        entry->plain_rate = entry->multiplier != NULL ? entry->multiplier->plain_rate
                                                      : names_plain_rate(&entry->name);
        entry->optimizer = optimizer->number;
    }
    const kv_multiplier_t *own = entry->multiplier;
    kv_step_init(step, optimizer->optim, &optimizer->numbers, &store->state, entry->updates, rate,
                 own != NULL ? own->lr : 1.0, own != NULL ? own->wd : 1.0, entry->plain_rate);
}

void kv_optimizer_resume(const kv_optimizer_t *optimizer, const kv_entry_t *entry,
                         const kv_optim_state_t *state, int64_t t, kv_step_t *step)
{
    kv_optim_state_t after = *state;
    const kv_multiplier_t *own = find_multiplier(optimizer, entry);
    kv_step_init(step, optimizer->optim, &optimizer->numbers, &after, t,
                 optimizer->numbers.learning_rate, own != NULL ? own->lr : 1.0,
                 own != NULL ? own->wd : 1.0,
                 own != NULL ? own->plain_rate : names_plain_rate(&entry->name));
}

bool kv_entry_can_count_locked(const kv_store_t *store, const kv_entry_t *entry)
{
    /* Slots have been given by the general way, so the optimizer can update the key. */
    return entry->slots != NULL && store->optimizer->schedule == NULL;
}

void kv_entry_count_locked(kv_store_t *store, kv_entry_t *entry, kv_step_t *step)
{
    const kv_optimizer_t *optimizer = store->optimizer;
    store->counted++;
    count_locked(store, optimizer, entry, optimizer->numbers.learning_rate, step);
}

kv_status_t kv_plan_check_updates(const kv_plan_t *plan)
{
    const kv_optimizer_t *optimizer = plan->optimizer;
    char name[NAME_BYTES], shape[NAME_BYTES];
    for (int64_t g = 0; g < plan->num_groups; g++) {
        const kv_entry_t *entry = plan->groups[g].entry;
        if (!kv_dtype_is_floating(entry->dtype))
            return kv_fail(KV_BAD_TYPE,
                           "push of key %s, whose element type is %s: the optimizer %s updates "
                           "floating types only",
                           kv_name_format(&entry->name, name, sizeof name),
                           kv_dtype_name(entry->dtype), optimizer->optim->title);
        if (optimizer->optim == kv_optim_python() && entry->remote != NULL &&
            kv_remote_num_slices(entry->remote) > 1)
            return kv_fail(KV_INVALID,
                           "push of key %s, which is cut into %" PRIu32
                           " slices: an optimizer in Python needs it whole on one server; call "
                           "set_optimizer before init (above 1 GiB it is always cut)",
                           kv_name_format(&entry->name, name, sizeof name),
                           kv_remote_num_slices(entry->remote));
        kv_slot_t slots[KV_MAX_SLOTS];
        int num_slots = optimizer->optim->slots(&optimizer->numbers, slots);
        if (num_slots > 0 && slots[0].per_row && entry->ndim != 2)
            return kv_fail(KV_INVALID,
                           "push of key %s, whose shape is %s: the optimizer %s needs two "
                           "dimensions",
                           kv_name_format(&entry->name, name, sizeof name),
                           kv_shape_format(entry->ndim, entry->shape, shape, sizeof shape),
                           optimizer->optim->title);
    }
    return KV_OK;
}

/* The store whose schedule runs in this thread. What the schedule itself pushes there would move
 * the counts for which it is asked, again and again. */
static _Thread_local const kv_store_t *asking_for;

/* The rates of a call's keys, in order, as the schedule tells them now. */
static kv_status_t ask_rates(kv_store_t *store, const kv_optimizer_t *optimizer,
                             const kv_plan_t *plan, double *rates, uint64_t *counted, bool *missing)
{
    kv_mutex_lock(&store->lock);
    *counted = store->counted;
    *missing = false;
    int64_t num_update = store->state.num_update;
    /* For the moment the rates are the counts that are to be asked for. */
    for (int64_t g = 0; g < plan->num_groups; g++) {
        int64_t count = next_count(optimizer, plan->groups[g].entry);
        int64_t before = num_update;
        num_update = count > num_update ? count : num_update;
        *missing = *missing || plan->groups[g].entry->slots == NULL;
        rates[g] = (double)(optimizer->optim->early_rate ? before : num_update);
    }
    kv_mutex_unlock(&store->lock);
    for (int64_t g = 0; g < plan->num_groups; g++) {
        double rate = optimizer->numbers.learning_rate;
        if (optimizer->schedule != NULL) {
            const kv_store_t *outer = asking_for;
            asking_for = store;
            kv_status_t status =
                optimizer->schedule->rate(optimizer->schedule, (int64_t)rates[g], &rate);
            asking_for = outer;
            KV_TRY(status);
        }
        rates[g] = rate;
    }
    return KV_OK;
}

/* Slots for every key that has none; false if the store has another optimizer by now or somebody
 * has counted since `counted`. */
static bool count_all_locked(kv_store_t *store, kv_plan_t *plan, kv_slots_t **fresh,
                             const double *rates, uint64_t counted) KV_REQUIRES(&store->lock)
{
    const kv_optimizer_t *optimizer = plan->optimizer;
    if (store->optimizer != optimizer || store->counted != counted)
        return false;
    plan->before = store->state;
    plan->counted = ++store->counted;
    for (int64_t g = 0; g < plan->num_groups; g++) {
        kv_group_t *group = &plan->groups[g];
        kv_entry_t *entry = group->entry;
        if (KV_UNLIKELY(entry->slots == NULL)) {
            entry->slots = fresh[g];
            fresh[g] = NULL;
        }
        group->slots = entry->slots;
        group->step = &plan->steps[g];
        atomic_fetch_add(&entry->slots->refs, 1);
        count_locked(store, optimizer, entry, rates[g], group->step);
    }
    return true;
}

static kv_status_t make_slots(const kv_plan_t *plan, kv_slots_t **fresh)
{
    for (int64_t g = 0; g < plan->num_groups; g++) {
        fresh[g] = kv_slots_new(plan->optimizer->optim);
        KV_TRY_ALLOC(fresh[g], "the state of an optimizer");
    }
    return KV_OK;
}

kv_status_t kv_plan_count(kv_store_t *store, kv_plan_t *plan)
{
    double one_rate, *rates = &one_rate;
    kv_slots_t *one_slots = NULL, **fresh = &one_slots;
    size_t count = (size_t)plan->num_groups;
    kv_status_t status = KV_OK;
    plan->steps = &plan->one_step;
    KV_TRY(kv_plan_check_updates(plan));
    if (asking_for == store)
        return kv_fail(KV_INVALID, "a push from inside the schedule of the store's optimizer");
    if (count > 1) {
        plan->steps = kv_calloc(count, sizeof(kv_step_t) + sizeof(double) + sizeof(kv_slots_t *));
        if (plan->steps == NULL) {
            plan->steps = &plan->one_step;
            return kv_fail(KV_NO_MEMORY, "no memory for the steps of a call");
        }
        rates = (double *)(plan->steps + count);
        fresh = (kv_slots_t **)(rates + count);
    }
    bool done = false, made = false, missing;
    while (status == KV_OK && !done) {
        uint64_t counted;
        status = ask_rates(store, plan->optimizer, plan, rates, &counted, &missing);
        if (status == KV_OK && missing && !made) {
            made = true;
            status = make_slots(plan, fresh);
        }
        if (status != KV_OK)
            break;
        kv_mutex_lock(&store->lock);
        done = count_all_locked(store, plan, fresh, rates, counted);
        bool replaced = store->optimizer != plan->optimizer;
        kv_mutex_unlock(&store->lock);
        if (!done && replaced)
            status = kv_fail(KV_INVALID, "the optimizer was replaced during the push");
    }
    for (size_t g = 0; g < count; g++)
        kv_slots_rele(fresh[g]);
    return status;
}

void kv_plan_uncount(kv_store_t *store, const kv_plan_t *plan, int64_t num_done)
{
    kv_mutex_lock(&store->lock);
    if (plan->counted != 0 && plan->counted == store->counted) {
        if (num_done == 0)
            store->state = plan->before;
        for (int64_t g = num_done; g < plan->num_groups; g++) {
            kv_entry_t *entry = plan->groups[g].entry;
            if (--entry->updates == plan->optimizer->numbers.begin_num_update)
                entry->updates = -1;
        }
    }
    kv_mutex_unlock(&store->lock);
}
