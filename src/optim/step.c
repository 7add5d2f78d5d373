/* The numbers of one push: those that are taken when the call enters, and what becomes of them when
 * the pass over memory begins. */
#include "optim/pass.h"

#include <math.h>

/* Nadam's momentum at its t-th step. */
static double nadam_momentum(double beta1, double decay, int64_t t)
{
    return beta1 * (1 - 0.5 * pow(0.96, (double)t * decay));
}

void kv_step_init(kv_step_t *step, const kv_optim_class_t *optim, const kv_optim_numbers_t *numbers,
                  kv_optim_state_t *state, int64_t t, double rate, double lr_mult, double wd_mult,
                  bool plain_rate)
{
    step->optim = optim;
    step->numbers = *numbers;
    step->lr = rate * lr_mult;
    step->wd = numbers->wd * wd_mult;
    step->t = t;
    step->product = 1;
    step->ratio = 1;
    step->plain_rate = plain_rate;
    step->seed = state->seed;
    step->draw = state->draws;
    if (optim->id == KV_OPTIM_NADAM) {
        state->nadam_product *=
            nadam_momentum(numbers->params[KV_BETA1], numbers->params[KV_NADAM_SCHEDULE_DECAY], t);
        step->product = state->nadam_product;
    } else if (optim->id == KV_OPTIM_LARS) {
        double last = state->last_rate;
        if (numbers->params[KV_LARS_MOMENTUM_CORRECTION] != 0 && !isnan(last) && last != 0)
            step->ratio = rate / last;
        state->last_rate = rate;
    } else if (optim->id == KV_OPTIM_SGLD) {
        state->draws++;
    } else if (optim->id == KV_OPTIM_PYTHON) {
        step->lr = rate;
        step->draw = (uint64_t)state->num_update;
    }
}

double kv_step_own(const kv_step_t *step)
{
    switch (step->optim->id) {
    case KV_OPTIM_NADAM:
        return step->product;
    case KV_OPTIM_LARS:
        return step->ratio;
    case KV_OPTIM_SGLD:
    case KV_OPTIM_PYTHON:
        return (double)step->draw;
    default:
        return 0;
    }
}

void kv_step_restore(kv_step_t *step, const kv_optim_class_t *optim,
                     const kv_optim_numbers_t *numbers, double lr, double wd, int64_t t, double own,
                     bool plain_rate)
{
    bool draws =
        (optim->id == KV_OPTIM_SGLD || optim->id == KV_OPTIM_PYTHON) && own >= 0 && own < 0x1p53;
    *step = (kv_step_t){.optim = optim,
                        .numbers = *numbers,
                        .lr = lr,
                        .wd = wd,
                        .t = t,
                        .product = optim->id == KV_OPTIM_NADAM ? own : 1,
                        .ratio = optim->id == KV_OPTIM_LARS ? own : 1,
                        .plain_rate = plain_rate,
                        .draw = draws ? (uint64_t)own : 0};
}

/* Adam's rate with the correction for moments that began at zero. */
static double corrected_rate(const kv_step_t *step)
{
    const double *params = step->numbers.params;
    double first = 1 - pow(params[KV_BETA1], (double)step->t);
    double second = 1 - pow(params[KV_BETA2], (double)step->t);
    return step->lr * (sqrt(second) / first);
}

/* LBSGD: which push of the key this is, epochs before this run counted in. */
static int64_t lbsgd_count(const kv_step_t *step)
{
    const double *params = step->numbers.params;
    return step->t - step->numbers.begin_num_update +
           (int64_t)params[KV_LBSGD_BEGIN_EPOCH] * (int64_t)params[KV_LBSGD_UPDATES_PER_EPOCH];
}

static double lbsgd_warmup(const kv_step_t *step)
{
    const double *params = step->numbers.params;
    double scale = params[KV_LBSGD_BATCH_SCALE];
    double count = (double)lbsgd_count(step);
    double whole = params[KV_LBSGD_WARMUP_EPOCHS] * params[KV_LBSGD_UPDATES_PER_EPOCH];
    if (count >= whole)
        return scale;
    if (whole <= 1)
        return 1;
    switch ((int)params[KV_LBSGD_STRATEGY]) {
    case KV_WARMUP_POWER2:
        return 1 + (scale - 1) * (count * count) / (whole * whole);
    case KV_WARMUP_SQRT:
        return 1 + (scale - 1) * sqrt(count / whole);
    default:
        return 1 + (scale - 1) * count / whole;
    }
}

#define REAL float
#define FACTORS kv_factors_t_float
#define OF(name) name##_float
#define POW powf
#define SQRT sqrtf
#include "optim/pass.inc"
#undef REAL
#undef FACTORS
#undef OF
#undef POW
#undef SQRT

#define REAL double
#define FACTORS kv_factors_t_double
#define OF(name) name##_double
#define POW pow
#define SQRT sqrt
#include "optim/pass.inc"
#undef REAL
#undef FACTORS
#undef OF
#undef POW
#undef SQRT

void kv_pass_init(kv_pass_t *pass, const kv_step_t *step, bool is_double, unsigned how)
{
    pass->norms = KV_NORMS_NONE;
    pass->idle = false;
    pass->rows = (how & KV_PASS_ROWS) != 0;
    if (is_double)
        fill_double(pass, &pass->factors.twice, step, how);
    else
        fill_float(pass, &pass->factors.single, step, how);
}

void kv_pass_set_norms(kv_pass_t *pass, const kv_step_t *step, bool is_double,
                       double weight_squares, double other_squares)
{
    if (is_double)
        set_norms_double(pass, &pass->factors.twice, step, weight_squares, other_squares);
    else
        set_norms_float(pass, &pass->factors.single, step, weight_squares, other_squares);
}

bool kv_step_needs_norms(const kv_step_t *step)
{
    switch ((kv_optim_id_t)step->optim->id) {
    case KV_OPTIM_LAMB:
        return true;
    case KV_OPTIM_LARS:
        return !step->plain_rate;
    case KV_OPTIM_LBSGD:
        return step->numbers.params[KV_LBSGD_STRATEGY] == KV_WARMUP_LARS;
    default:
        return false;
    }
}

double kv_pass_batch(const kv_step_t *step)
{
    return step->optim->id == KV_OPTIM_LBSGD ? step->numbers.params[KV_LBSGD_BATCH_SCALE] : 1;
}
