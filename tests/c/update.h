/* A weight with its state and an optimizer, for tests of steps. */
#ifndef KV_TESTS_C_UPDATE_H
#define KV_TESTS_C_UPDATE_H

#include "test.h"

#include "comm/update.h"
#include <math.h>
#include <stdlib.h>

typedef struct trial {
    const kv_optim_class_t *optim;
    kv_optim_numbers_t numbers;
    kv_optim_state_t state;
    kv_weight_t weight;
    int64_t pushes;
    double lr_mult, wd_mult;
} trial_t;

static inline size_t trial_wide(const trial_t *trial)
{
    return trial->weight.dtype == KV_FLOAT64 ? 8 : 4;
}

/* By name; NAN where there is no such number. */
static inline double *trial_param(trial_t *trial, const char *name)
{
    static double nowhere;
    for (int i = 0; i < trial->optim->num_params; i++)
        if (strcmp(trial->optim->params[i].name, name) == 0)
            return &trial->numbers.params[i];
    nowhere = NAN;
    return &nowhere;
}

static inline void trial_begin(trial_t *trial, const char *optim)
{
    memset(trial, 0, sizeof *trial);
    trial->optim = kv_optim_class_find(optim);
    trial->numbers = (kv_optim_numbers_t){.learning_rate = trial->optim->learning_rate,
                                          .rescale_grad = 1,
                                          .clip_gradient = NAN,
                                          .lazy_update = true};
    for (int i = 0; i < trial->optim->num_params; i++)
        trial->numbers.params[i] = trial->optim->params[i].fallback;
    trial->state = (kv_optim_state_t){.nadam_product = 1, .last_rate = NAN, .seed = 5};
    trial->lr_mult = trial->wd_mult = 1;
}

/* Memory for a weight of these elements and its state; `values` are its first ones. */
static inline bool trial_make(trial_t *trial, kv_dtype_t dtype, int64_t count, int64_t row_count,
                              const void *values, bool master)
{
    kv_weight_t *weight = &trial->weight;
    kv_slot_t slots[KV_MAX_SLOTS];
    size_t bytes = (size_t)count * kv_dtype_bytes(dtype);
    *weight = (kv_weight_t){.dtype = dtype, .count = count, .row_count = row_count};
    weight->data = malloc(bytes);
    bool all = weight->data != NULL;
    if (all)
        memcpy(weight->data, values, bytes);
    if (master) {
        weight->master = malloc((size_t)count * 4);
        all = all && weight->master != NULL;
        if (all)
            kv_kernels_at(0)->float32_from[dtype](count, values, weight->master);
    }
    int num_slots = trial->optim->slots(&trial->numbers, slots);
    for (int i = 0; i < num_slots; i++) {
        weight->slots[i] = calloc((size_t)count, trial_wide(trial));
        all = all && weight->slots[i] != NULL;
        if (!all || !slots[i].from_weight)
            continue;
        if (dtype == KV_FLOAT16 || dtype == KV_BFLOAT16)
            kv_kernels_at(0)->float32_from[dtype](count, values, weight->slots[i]);
        else
            memcpy(weight->slots[i], values, bytes);
    }
    return all;
}

static inline void trial_end(trial_t *trial)
{
    free(trial->weight.data);
    free(trial->weight.master);
    for (int i = 0; i < KV_MAX_SLOTS; i++)
        free(trial->weight.slots[i]);
    trial->weight = (kv_weight_t){.data = NULL};
}

static inline void trial_step(trial_t *trial, kv_step_t *step)
{
    trial->pushes++;
    trial->state.num_update = trial->pushes;
    kv_step_init(step, trial->optim, &trial->numbers, &trial->state, trial->pushes,
                 trial->numbers.learning_rate, trial->lr_mult, trial->wd_mult, false);
}

/* One push of these gradients. */
static inline int64_t trial_push(trial_t *trial, const kv_host_t *host,
                                 const kv_gradients_t *gradients, int num_dst, void *const *dst)
{
    kv_step_t step;
    trial_step(trial, &step);
    return kv_host_update(host, &step, &trial->weight, gradients, num_dst, dst);
}

static inline int64_t trial_push_one(trial_t *trial, const kv_host_t *host, const void *gradient)
{
    kv_gradients_t gradients = {.num_src = 1, .src = &gradient};
    return trial_push(trial, host, &gradients, 0, NULL);
}

static inline bool trial_same(const trial_t *a, const trial_t *b)
{
    size_t count = (size_t)a->weight.count;
    bool same =
        memcmp(a->weight.data, b->weight.data, count * kv_dtype_bytes(a->weight.dtype)) == 0;
    if (a->weight.master != NULL)
        same = same && memcmp(a->weight.master, b->weight.master, count * 4) == 0;
    for (int i = 0; i < KV_MAX_SLOTS; i++)
        if (a->weight.slots[i] != NULL)
            same =
                same && memcmp(a->weight.slots[i], b->weight.slots[i], count * trial_wide(a)) == 0;
    return same;
}

/* Somewhere from -1 to 1. */
static inline double trial_random(uint64_t *state)
{
    return (double)(int64_t)(test_random(state) >> 40) * 0x1p-23 - 1;
}

static inline void trial_fill(kv_dtype_t dtype, int64_t count, uint64_t *state, void *to)
{
    for (int64_t i = 0; i < count; i++) {
        double x = trial_random(state);
        float single = (float)x;
        if (dtype == KV_FLOAT64)
            ((double *)to)[i] = x;
        else if (dtype == KV_FLOAT32)
            ((float *)to)[i] = single;
        else
            kv_kernels_at(0)->float32_to[dtype](1, &single, (uint16_t *)to + i);
    }
}

#endif
