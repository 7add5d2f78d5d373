/* The table of optimizers: names, numbers with their ranges, states. */
#include "optim/pass.h"

#include <math.h>
#include <string.h>
#include <strings.h>

#define COUNT_MAX 2147483647.0

/* Numbers of every size that float32 has, from `low` on. */
#define NUMBER(name_, fallback_, low_)                                                             \
    {                                                                                              \
        .name = name_, .kind = KV_PARAM_NUMBER, .fallback = fallback_, .low = low_,                \
        .high = INFINITY                                                                           \
    }
/* From 0 to below 1: something divides by one minus a power of it. */
#define BETA(name_, fallback_)                                                                     \
    {                                                                                              \
        .name = name_, .kind = KV_PARAM_NUMBER, .fallback = fallback_, .low = 0, .high = 1,        \
        .below_high = true                                                                         \
    }
#define SHARE(name_, fallback_)                                                                    \
    {                                                                                              \
        .name = name_, .kind = KV_PARAM_NUMBER, .fallback = fallback_, .low = 0, .high = 1         \
    }
#define LIMIT(name_)                                                                               \
    {                                                                                              \
        .name = name_, .kind = KV_PARAM_OPTIONAL, .fallback = NAN, .low = 0, .high = INFINITY,     \
        .above_low = true                                                                          \
    }
#define COUNT(name_, fallback_, low_)                                                              \
    {                                                                                              \
        .name = name_, .kind = KV_PARAM_COUNT, .fallback = fallback_, .low = low_,                 \
        .high = COUNT_MAX                                                                          \
    }
#define FLAG(name_, fallback_)                                                                     \
    {                                                                                              \
        .name = name_, .kind = KV_PARAM_FLAG, .fallback = fallback_, .low = 0, .high = 1           \
    }

static const kv_optim_param_t common[] = {
    NUMBER("learning_rate", 0.01, -INFINITY),
    NUMBER("wd", 0, -INFINITY),
    NUMBER("rescale_grad", 1, -INFINITY),
    LIMIT("clip_gradient"),
};

static const kv_optim_param_t momentum_params[] = {NUMBER("momentum", 0, 0)};
static const kv_optim_param_t signum_params[] = {SHARE("momentum", 0.9), NUMBER("wd_lh", 0, 0)};
static const kv_optim_param_t ftml_params[] = {BETA("beta1", 0.6), BETA("beta2", 0.999),
                                               NUMBER("epsilon", 1e-8, 0)};
static const kv_optim_param_t lars_params[] = {NUMBER("momentum", 0, 0), NUMBER("eta", 0.001, 0),
                                               NUMBER("eps", 0, 0), FLAG("momentum_correction", 1)};
static const char *const strategies[] = {"linear", "power2", "sqrt", "lars", NULL};
static const kv_optim_param_t lbsgd_params[] = {
    NUMBER("momentum", 0, 0),
    {.name = "warmup_strategy",
     .kind = KV_PARAM_CHOICE,
     .fallback = KV_WARMUP_LINEAR,
     .low = 0,
     .high = KV_WARMUP_LARS,
     .choices = strategies},
    COUNT("warmup_epochs", 5, 0),
    COUNT("batch_scale", 1, 1),
    COUNT("updates_per_epoch", 32, 0),
    COUNT("begin_epoch", 0, 0),
    COUNT("num_epochs", 60, 0),
};
static const kv_optim_param_t lamb_params[] = {
    BETA("beta1", 0.9),
    BETA("beta2", 0.999),
    NUMBER("epsilon", 1e-6, 0),
    {.name = "lower_bound", .kind = KV_PARAM_OPTIONAL, .fallback = NAN, .high = INFINITY},
    LIMIT("upper_bound"),
    FLAG("bias_correction", 1),
};
static const kv_optim_param_t dcasgd_params[] = {NUMBER("momentum", 0, 0),
                                                 NUMBER("lamda", 0.04, 0)};
static const kv_optim_param_t adam_params[] = {BETA("beta1", 0.9), BETA("beta2", 0.999),
                                               NUMBER("epsilon", 1e-8, 0)};
static const kv_optim_param_t adamw_params[] = {BETA("beta1", 0.9), BETA("beta2", 0.999),
                                                NUMBER("epsilon", 1e-8, 0), NUMBER("eta", 1, 0),
                                                FLAG("correct_bias", 1)};
static const kv_optim_param_t adagrad_params[] = {NUMBER("eps", 1e-7, 0)};
static const kv_optim_param_t group_params[] = {NUMBER("eps", 1e-5, 0)};
static const kv_optim_param_t rmsprop_params[] = {SHARE("gamma1", 0.9), NUMBER("gamma2", 0.9, 0),
                                                  NUMBER("epsilon", 1e-8, 0), FLAG("centered", 0),
                                                  LIMIT("clip_weights")};
static const kv_optim_param_t adadelta_params[] = {SHARE("rho", 0.9), NUMBER("epsilon", 1e-5, 0)};
static const kv_optim_param_t ftrl_params[] = {NUMBER("lamda1", 0.01, 0), NUMBER("beta", 1, 0)};
static const kv_optim_param_t adamax_params[] = {BETA("beta1", 0.9), BETA("beta2", 0.999)};
static const kv_optim_param_t nadam_params[] = {BETA("beta1", 0.9), BETA("beta2", 0.999),
                                                NUMBER("epsilon", 1e-8, 0),
                                                NUMBER("schedule_decay", 0.004, 0)};

/* Slots of these names, zeros at first. */
static int name_slots(kv_slot_t *slots, int count, const char *const *names)
{
    for (int i = 0; i < count; i++)
        slots[i] = (kv_slot_t){.name = names[i]};
    return count;
}

#define SLOTS(function, ...)                                                                       \
    static int function(const kv_optim_numbers_t *numbers, kv_slot_t *slots)                       \
    {                                                                                              \
        static const char *const names[] = {__VA_ARGS__};                                          \
        (void)numbers;                                                                             \
        return name_slots(slots, sizeof names / sizeof names[0], names);                           \
    }

SLOTS(moment_slots, "m", "v")
SLOTS(history_slots, "h")
SLOTS(ftml_slots, "d", "v", "z")
SLOTS(adadelta_slots, "acc_g", "acc_delta")
SLOTS(ftrl_slots, "z", "n")
SLOTS(adamax_slots, "m", "u")
SLOTS(copy_slots, "copy")

static int no_slots(const kv_optim_numbers_t *numbers, kv_slot_t *slots)
{
    (void)numbers, (void)slots;
    return 0;
}

static int momentum_slots(const kv_optim_numbers_t *numbers, kv_slot_t *slots)
{
    slots[0] = (kv_slot_t){.name = "m"};
    return numbers->params[KV_SGD_MOMENTUM] != 0;
}

static int lbsgd_slots(const kv_optim_numbers_t *numbers, kv_slot_t *slots)
{
    int count = 0;
    if (numbers->params[KV_LBSGD_BATCH_SCALE] > 1)
        slots[count++] = (kv_slot_t){.name = "sum"};
    return count + momentum_slots(numbers, slots + count);
}

static int dcasgd_slots(const kv_optim_numbers_t *numbers, kv_slot_t *slots)
{
    slots[0] = (kv_slot_t){.name = "p", .from_weight = true};
    return 1 + momentum_slots(numbers, slots + 1);
}

static int group_slots(const kv_optim_numbers_t *numbers, kv_slot_t *slots)
{
    (void)numbers;
    slots[0] = (kv_slot_t){.name = "h", .per_row = true};
    return 1;
}

static int rmsprop_slots(const kv_optim_numbers_t *numbers, kv_slot_t *slots)
{
    static const char *const names[] = {"n", "g", "delta"};
    return name_slots(slots, numbers->params[KV_RMSPROP_CENTERED] != 0 ? 3 : 1, names);
}

#define PARAMS(list) .params = list, .num_params = sizeof list / sizeof list[0]

static const kv_optim_class_t classes[KV_OPTIM_COUNT] = {
    [KV_OPTIM_SGD] = {.id = KV_OPTIM_SGD,
                      .name = "sgd",
                      .title = "SGD",
                      .learning_rate = 0.01,
                      .lazy = KV_LAZY_OPTION,
                      PARAMS(momentum_params),
                      .slots = momentum_slots},
    [KV_OPTIM_NAG] = {.id = KV_OPTIM_NAG,
                      .name = "nag",
                      .title = "NAG",
                      .learning_rate = 0.01,
                      PARAMS(momentum_params),
                      .slots = momentum_slots},
    [KV_OPTIM_SIGNUM] = {.id = KV_OPTIM_SIGNUM,
                         .name = "signum",
                         .title = "Signum",
                         .learning_rate = 0.01,
                         PARAMS(signum_params),
                         .slots = momentum_slots},
    [KV_OPTIM_FTML] = {.id = KV_OPTIM_FTML,
                       .name = "ftml",
                       .title = "FTML",
                       .learning_rate = 0.01,
                       PARAMS(ftml_params),
                       .slots = ftml_slots},
    [KV_OPTIM_LARS] = {.id = KV_OPTIM_LARS,
                       .name = "lars",
                       .title = "LARS",
                       .learning_rate = 0.01,
                       .lazy = KV_LAZY_OPTION,
                       PARAMS(lars_params),
                       .slots = momentum_slots},
    [KV_OPTIM_LBSGD] = {.id = KV_OPTIM_LBSGD,
                        .name = "lbsgd",
                        .title = "LBSGD",
                        .learning_rate = 0.01,
                        .early_rate = true,
                        .lazy = KV_LAZY_ALWAYS,
                        PARAMS(lbsgd_params),
                        .slots = lbsgd_slots},
    [KV_OPTIM_LAMB] = {.id = KV_OPTIM_LAMB,
                       .name = "lamb",
                       .title = "LAMB",
                       .learning_rate = 0.001,
                       PARAMS(lamb_params),
                       .slots = moment_slots},
    [KV_OPTIM_DCASGD] = {.id = KV_OPTIM_DCASGD,
                         .name = "dcasgd",
                         .title = "DCASGD",
                         .learning_rate = 0.01,
                         PARAMS(dcasgd_params),
                         .slots = dcasgd_slots},
    [KV_OPTIM_SGLD] = {.id = KV_OPTIM_SGLD,
                       .name = "sgld",
                       .title = "SGLD",
                       .learning_rate = 0.01,
                       .slots = no_slots},
    [KV_OPTIM_ADAM] = {.id = KV_OPTIM_ADAM,
                       .name = "adam",
                       .title = "Adam",
                       .learning_rate = 0.001,
                       .lazy = KV_LAZY_OPTION,
                       PARAMS(adam_params),
                       .slots = moment_slots},
    [KV_OPTIM_ADAMW] = {.id = KV_OPTIM_ADAMW,
                        .name = "adamw",
                        .title = "AdamW",
                        .learning_rate = 0.001,
                        PARAMS(adamw_params),
                        .slots = moment_slots},
    [KV_OPTIM_ADAGRAD] = {.id = KV_OPTIM_ADAGRAD,
                          .name = "adagrad",
                          .title = "AdaGrad",
                          .learning_rate = 0.01,
                          .lazy = KV_LAZY_ALWAYS,
                          PARAMS(adagrad_params),
                          .slots = history_slots},
    [KV_OPTIM_GROUPADAGRAD] = {.id = KV_OPTIM_GROUPADAGRAD,
                               .name = "groupadagrad",
                               .title = "GroupAdaGrad",
                               .learning_rate = 0.01,
                               .lazy = KV_LAZY_ALWAYS,
                               PARAMS(group_params),
                               .slots = group_slots},
    [KV_OPTIM_RMSPROP] = {.id = KV_OPTIM_RMSPROP,
                          .name = "rmsprop",
                          .title = "RMSProp",
                          .learning_rate = 0.001,
                          PARAMS(rmsprop_params),
                          .slots = rmsprop_slots},
    [KV_OPTIM_ADADELTA] = {.id = KV_OPTIM_ADADELTA,
                           .name = "adadelta",
                           .title = "AdaDelta",
                           .learning_rate = 0.01,
                           PARAMS(adadelta_params),
                           .slots = adadelta_slots},
    [KV_OPTIM_FTRL] = {.id = KV_OPTIM_FTRL,
                       .name = "ftrl",
                       .title = "Ftrl",
                       .learning_rate = 0.1,
                       .lazy = KV_LAZY_SPARSE_WEIGHT,
                       PARAMS(ftrl_params),
                       .slots = ftrl_slots},
    [KV_OPTIM_ADAMAX] = {.id = KV_OPTIM_ADAMAX,
                         .name = "adamax",
                         .title = "Adamax",
                         .learning_rate = 0.002,
                         PARAMS(adamax_params),
                         .slots = adamax_slots},
    [KV_OPTIM_NADAM] = {.id = KV_OPTIM_NADAM,
                        .name = "nadam",
                        .title = "Nadam",
                        .learning_rate = 0.001,
                        PARAMS(nadam_params),
                        .slots = moment_slots},
    [KV_OPTIM_TEST] = {.id = KV_OPTIM_TEST,
                       .name = "test",
                       .title = "Test",
                       .learning_rate = 0.01,
                       .slots = copy_slots},
};

static const kv_optim_class_t python = {
    .id = KV_OPTIM_PYTHON, .name = "python", .title = "in Python", .slots = no_slots};

const kv_optim_class_t *kv_optim_python(void)
{
    return &python;
}

const kv_optim_class_t *kv_optim_class_at(int i)
{
    return i >= 0 && i < KV_OPTIM_COUNT ? &classes[i] : NULL;
}

const kv_optim_class_t *kv_optim_class_find(const char *name)
{
    for (int i = 0; i < KV_OPTIM_COUNT; i++)
        if (strcasecmp(name, classes[i].name) == 0)
            return &classes[i];
    return NULL;
}

const kv_optim_param_t *kv_optim_common_at(int i)
{
    return i >= 0 && i < (int)(sizeof common / sizeof common[0]) ? &common[i] : NULL;
}

bool kv_optim_is_lazy(const kv_optim_class_t *optim, const kv_optim_numbers_t *numbers,
                      bool sparse_weight)
{
    return optim->lazy == KV_LAZY_ALWAYS ||
           (optim->lazy == KV_LAZY_OPTION && numbers->lazy_update) ||
           (optim->lazy == KV_LAZY_SPARSE_WEIGHT && sparse_weight);
}

/* Numbers are used in float32 as well: what rounds to infinity, or to an end that is excluded, is
 * no better there than that. */
static kv_status_t check_param(const kv_optim_class_t *optim, const kv_optim_param_t *param,
                               double x)
{
    const char *title = optim->title;
    if (param->kind == KV_PARAM_OPTIONAL && isnan(x))
        return KV_OK;
    if (!isfinite((float)x))
        return kv_fail(KV_INVALID, "%s: %s=%g is not a finite number in float32", title,
                       param->name, x);
    if (x < param->low || (param->above_low && (float)x <= (float)param->low))
        return kv_fail(KV_INVALID, "%s: %s=%.9g must be %s %g", title, param->name, x,
                       param->above_low ? "above" : "at least", param->low);
    if (x > param->high || (param->below_high && (float)x >= (float)param->high))
        return kv_fail(KV_INVALID, "%s: %s=%.9g must be %s %g", title, param->name, x,
                       param->below_high ? "below" : "at most", param->high);
    if (param->kind != KV_PARAM_NUMBER && param->kind != KV_PARAM_OPTIONAL && x != floor(x))
        return kv_fail(KV_INVALID, "%s: %s=%g must be a whole number", title, param->name, x);
    return KV_OK;
}

kv_status_t kv_optim_check(const kv_optim_class_t *optim, const kv_optim_numbers_t *numbers)
{
    const double values[] = {numbers->learning_rate, numbers->wd, numbers->rescale_grad,
                             numbers->clip_gradient};
    for (size_t i = 0; i < sizeof common / sizeof common[0]; i++)
        KV_TRY(check_param(optim, &common[i], values[i]));
    for (int i = 0; i < optim->num_params; i++)
        KV_TRY(check_param(optim, &optim->params[i], numbers->params[i]));
    if (optim->id == KV_OPTIM_GROUPADAGRAD && numbers->wd != 0)
        return kv_fail(KV_INVALID, "%s has no weight decay: wd=%g must be 0", optim->title,
                       numbers->wd);
    return KV_OK;
}
