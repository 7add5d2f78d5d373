/* The steps without divisions: SGD and its like. */
#include "cuda/step.h"

#define FAMILY(X)                                                                                  \
    X(test, 1)                                                                                     \
    X(sgd, 0)                                                                                      \
    X(sgd_momentum, 1)                                                                             \
    X(shrink, 0)                                                                                   \
    X(gather, 1)                                                                                   \
    X(large_batch, 1)                                                                              \
    X(large_batch_momentum, 2)                                                                     \
    X(nag, 1)                                                                                      \
    X(nag_old_weight, 1)                                                                           \
    X(sign, 0)                                                                                     \
    X(signum, 1)                                                                                   \
    X(dcasgd, 1)                                                                                   \
    X(dcasgd_momentum, 2)                                                                          \
    X(sgld, 0)

KV_STEP_DEFINE(kv_steps_of_sgd, FAMILY)
