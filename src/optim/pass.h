/* From a push's numbers to what the loops over memory want: which loop, and the factors that it
 * hands to every element. Between optim/ and comm/.
 */
#ifndef KV_OPTIM_PASS_H
#define KV_OPTIM_PASS_H

#include "kernels/step.h"
#include "optim/optim.h"

/* The classes, in the order of their table. */
typedef enum kv_optim_id {
    KV_OPTIM_SGD,
    KV_OPTIM_NAG,
    KV_OPTIM_SIGNUM,
    KV_OPTIM_FTML,
    KV_OPTIM_LARS,
    KV_OPTIM_LBSGD,
    KV_OPTIM_LAMB,
    KV_OPTIM_DCASGD,
    KV_OPTIM_SGLD,
    KV_OPTIM_ADAM,
    KV_OPTIM_ADAMW,
    KV_OPTIM_ADAGRAD,
    KV_OPTIM_GROUPADAGRAD,
    KV_OPTIM_RMSPROP,
    KV_OPTIM_ADADELTA,
    KV_OPTIM_FTRL,
    KV_OPTIM_ADAMAX,
    KV_OPTIM_NADAM,
    KV_OPTIM_TEST,
    KV_OPTIM_COUNT,
    KV_OPTIM_PYTHON = KV_OPTIM_COUNT /* none of the table */
} kv_optim_id_t;

/* Where a class's own numbers lie in kv_optim_numbers_t.params. */
enum {
    KV_SGD_MOMENTUM = 0, /* SGD, NAG, LARS, LBSGD, DCASGD, Signum */
    KV_SIGNUM_WD_LH = 1,
    KV_BETA1 = 0, /* of whatever has betas */
    KV_BETA2 = 1,
    KV_EPSILON = 2,
    KV_ADAMW_ETA = 3,
    KV_ADAMW_CORRECT_BIAS = 4,
    KV_LAMB_LOWER = 3,
    KV_LAMB_UPPER = 4,
    KV_LAMB_BIAS_CORRECTION = 5,
    KV_NADAM_SCHEDULE_DECAY = 3,
    KV_LARS_ETA = 1,
    KV_LARS_EPS = 2,
    KV_LARS_MOMENTUM_CORRECTION = 3,
    KV_LBSGD_STRATEGY = 1,
    KV_LBSGD_WARMUP_EPOCHS = 2,
    KV_LBSGD_BATCH_SCALE = 3,
    KV_LBSGD_UPDATES_PER_EPOCH = 4,
    KV_LBSGD_BEGIN_EPOCH = 5,
    KV_DCASGD_LAMDA = 1,
    KV_ADAGRAD_EPS = 0, /* GroupAdaGrad too */
    KV_RMSPROP_GAMMA1 = 0,
    KV_RMSPROP_GAMMA2 = 1,
    KV_RMSPROP_CENTERED = 3,
    KV_RMSPROP_CLIP_WEIGHTS = 4,
    KV_ADADELTA_RHO = 0,
    KV_ADADELTA_EPSILON = 1,
    KV_FTRL_LAMDA1 = 0,
    KV_FTRL_BETA = 1,
};

enum { KV_WARMUP_LINEAR, KV_WARMUP_POWER2, KV_WARMUP_SQRT, KV_WARMUP_LARS };

/* The gradient is row-sparse; only its rows are touched; the weight is row-sparse as well. Some
 * formulas are written in another order then. */
enum { KV_PASS_ROWS = 1, KV_PASS_LAZY = 2, KV_PASS_SPARSE_WEIGHT = 4 };

typedef enum kv_norms {
    KV_NORMS_NONE,
    KV_NORMS_GRADIENT,  /* of the weight and of the gradient, before the pass */
    KV_NORMS_DIRECTION, /* LAMB: a pass first that makes the moments and the norms */
} kv_norms_t;

typedef struct kv_pass {
    kv_step_kind_t kind;
    kv_norms_t norms; /* what kv_pass_set_norms needs before the pass can run */
    bool idle;        /* this push changes nothing */
    bool rows;        /* KV_PASS_ROWS */
    union {
        kv_factors_t_float single;
        kv_factors_t_double twice;
    } factors; /* of the wide type */
} kv_pass_t;

/* `is_double`: the wide type is float64. `how`: KV_PASS_… */
void kv_pass_init(kv_pass_t *pass, const kv_step_t *step, bool is_double, unsigned how);

/* The sums of squares of the weight and of the gradient or direction. */
void kv_pass_set_norms(kv_pass_t *pass, const kv_step_t *step, bool is_double,
                       double weight_squares, double other_squares);

/* LBSGD: how many gradients a mean has; 1 for the others. */
double kv_pass_batch(const kv_step_t *step);

#endif
