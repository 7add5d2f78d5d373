/* The steps with two moments. */
#include "cuda/step.h"

#define FAMILY(X)                                                                                  \
    X(adam, 2)                                                                                     \
    X(adam_squares, 2)                                                                             \
    X(adamw, 2)                                                                                    \
    X(adamax, 2)                                                                                   \
    X(nadam, 2)                                                                                    \
    X(lamb_moments, 3)                                                                             \
    X(lamb, 2)

KV_STEP_DEFINE(kv_steps_of_adam, FAMILY)
