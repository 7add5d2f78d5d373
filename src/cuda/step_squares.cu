/* The steps that keep squares of gradients. */
#include "cuda/step.h"

#define FAMILY(X)                                                                                  \
    X(adagrad, 1)                                                                                  \
    X(adagrad_rows, 1)                                                                             \
    X(rmsprop, 1)                                                                                  \
    X(rmsprop_centered, 3)                                                                         \
    X(adadelta, 2)                                                                                 \
    X(ftrl, 2)                                                                                     \
    X(ftml, 3)

KV_STEP_DEFINE(kv_steps_of_squares, FAMILY)
