/* What an optimizer is, apart from where it runs.
 *
 * A class is a descriptor: its name, its numbers with their ranges, the state that it keeps with a
 * value, and how one push's numbers are made. From it come the checks of the Python classes, the
 * state file and, with several processes, the form on the wire. The arithmetic of one element is in
 * kernels/element.inc, the passes over memory are in comm/update.h. To add an optimizer: one entry
 * in classes.c, its factors in pass.inc, one function there.
 *
 * The formulas, and the order in which products and sums are taken, are those of MXNet 1.9.1. For
 * float32 and 16-bit weights every number is rounded to float32 before it is used, as there;
 * float64 weights use unrounded numbers.
 */
#ifndef KV_OPTIM_OPTIM_H
#define KV_OPTIM_OPTIM_H

#include "array/dtype.h"
#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

enum { KV_MAX_SLOTS = 3, KV_MAX_PARAMS = 8 };

typedef enum kv_param_kind {
    KV_PARAM_NUMBER,   /* a finite number within the range */
    KV_PARAM_OPTIONAL, /* the same, or None: NaN */
    KV_PARAM_COUNT,    /* a whole number within the range */
    KV_PARAM_FLAG,     /* 0 or 1 */
    KV_PARAM_CHOICE,   /* the place of one of `choices` */
} kv_param_kind_t;

typedef struct kv_optim_param {
    const char *name; /* MXNet's keyword */
    kv_param_kind_t kind;
    double fallback;            /* when it is not given */
    double low, high;           /* of numbers; may be infinite, which itself is never allowed */
    bool above_low, below_high; /* the end itself is excluded */
    const char *const *choices; /* ends with NULL */
} kv_optim_param_t;

/* When a row-sparse gradient touches only the rows that it has. */
typedef enum kv_lazy {
    KV_LAZY_NEVER,
    KV_LAZY_OPTION, /* if `lazy_update` */
    KV_LAZY_ALWAYS,
    KV_LAZY_SPARSE_WEIGHT, /* if the weight is row-sparse (Ftrl) */
} kv_lazy_t;

/* All numbers of an optimizer, those of every class first. */
typedef struct kv_optim_numbers {
    double learning_rate;
    double wd;
    double rescale_grad;
    double clip_gradient; /* NaN: off */
    bool multi_precision, lazy_update;
    double params[KV_MAX_PARAMS]; /* the class's own, in its order */
    int64_t begin_num_update;     /* where the keys' counts began; LBSGD's warm-up starts there */
    uint64_t python; /* of a class in Python: tells it from others; 0: it is of the table */
} kv_optim_numbers_t;

typedef struct kv_slot {
    const char *name; /* in state files: "m" */
    bool per_row;     /* one number for each row, not for each element */
    bool from_weight; /* begins as a copy of the weight, not as zeros (DCASGD's p) */
} kv_slot_t;

/* What belongs to the optimizer as a whole and moves with every push of any key. Saved. */
typedef struct kv_optim_state {
    int64_t num_update;   /* the largest count of all keys */
    double nadam_product; /* Nadam's P, 1 at first */
    double last_rate;     /* LARS: the rate of the push before; NaN at first */
    uint64_t seed, draws; /* SGLD's generator: which stream, how many pushes have drawn */
} kv_optim_state_t;

typedef struct kv_step kv_step_t;

typedef struct kv_optim_class {
    const char *name;     /* MXNet's, lower case: "adam" */
    const char *title;    /* "Adam" */
    double learning_rate; /* if none is given */
    bool early_rate;      /* the schedule is asked before the push is counted (LBSGD) */
    kv_lazy_t lazy;
    int num_params;
    const kv_optim_param_t *params;
    /* Fills slots[], returns how many there are with these numbers. */
    int (*slots)(const kv_optim_numbers_t *numbers, kv_slot_t *slots);
    int id; /* of this class, for optim/ and comm/ alone: kv_optim_id_t in optim/pass.h */
} kv_optim_class_t;

/* The i-th class, NULL past the last. */
const kv_optim_class_t *kv_optim_class_at(int i);
/* The class of this name, letter case free; NULL if there is none. */
const kv_optim_class_t *kv_optim_class_find(const char *name);

/* What stands for every class of users in Python, which is none of these. It has no numbers of its
 * own, no state and no arithmetic here; its step carries the rate before multipliers in `lr`, and
 * in `draw` the largest count of all keys. */
const kv_optim_class_t *kv_optim_python(void);

/* KV_INVALID names the parameter, the value and the limit. Checks the common numbers too:
 * learning_rate, wd, rescale_grad finite, clip_gradient NaN or above 0. */
KV_MUST_CHECK kv_status_t kv_optim_check(const kv_optim_class_t *optim,
                                         const kv_optim_numbers_t *numbers);

/* The ranges of the common numbers: "learning_rate", "wd", … NULL past the last. */
const kv_optim_param_t *kv_optim_common_at(int i);

/* Whether a row-sparse gradient touches only its rows. */
bool kv_optim_is_lazy(const kv_optim_class_t *optim, const kv_optim_numbers_t *numbers,
                      bool sparse_weight);

/* Everything about one push of one key that the arithmetic needs; the operation carries it, so that
 * results do not depend on which key runs first. */
struct kv_step {
    const kv_optim_class_t *optim;
    kv_optim_numbers_t numbers;
    double lr, wd;   /* with schedule and the key's multipliers */
    int64_t t;       /* pushes of the key, this one counted */
    double product;  /* Nadam: P with this push counted */
    double ratio;    /* LARS: the rate of this push over that of the push before, 1 if it is not
                        to be used */
    bool plain_rate; /* LARS: a name that ends in gamma, beta or bias takes lr itself */
    uint64_t seed, draw;
};

/* Takes the numbers of a push and moves `state` on. `rate`: what the schedule said, or
 * numbers->learning_rate. state->num_update is already that of this push. */
void kv_step_init(kv_step_t *step, const kv_optim_class_t *optim, const kv_optim_numbers_t *numbers,
                  kv_optim_state_t *state, int64_t t, double rate, double lr_mult, double wd_mult,
                  bool plain_rate);

/* A step that was made elsewhere. `own`: what that one's kv_step_own was, the number that some
 * classes have besides (Nadam's product, LARS's ratio, SGLD's draw, …). */
void kv_step_restore(kv_step_t *step, const kv_optim_class_t *optim,
                     const kv_optim_numbers_t *numbers, double lr, double wd, int64_t t, double own,
                     bool plain_rate);
double kv_step_own(const kv_step_t *step);

/* Whether the step takes norms of the whole value and gradient; or another one of its key might
 * (LBSGD between its means). */
bool kv_step_needs_norms(const kv_step_t *step);

#endif
