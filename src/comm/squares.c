/* Sums of squares that come out the same however the work is split: comm/update_internal.h says in
 * which order they are added. */
#include "comm/update_internal.h"

void kv_squares_leaf(kv_squares_t *squares, double sum)
{
    int level = 0;
    for (int64_t leaves = squares->leaves++; (leaves & 1) != 0; leaves >>= 1)
        sum = squares->level[level++] + sum;
    squares->level[level] = sum;
}

double kv_squares_sum(const kv_squares_t *squares)
{
    double sum = 0;
    bool first = true;
    for (int level = 0; squares->leaves >> level != 0; level++)
        if ((squares->leaves >> level & 1) != 0) {
            sum = first ? squares->level[level] : squares->level[level] + sum;
            first = false;
        }
    return sum;
}

/* Several blocks side by side, since the additions of one wait for each other. */
#define SIDE 8

#define ADD(name, real)                                                                            \
    static void add_##name(kv_squares_t *squares, bool squared, int64_t count, const real *x)      \
    {                                                                                              \
        for (; count >= SIDE * KV_SQUARES_BLOCK; count -= SIDE * KV_SQUARES_BLOCK) {               \
            real sums[SIDE] = {0};                                                                 \
            for (int i = 0; i < KV_SQUARES_BLOCK; i++)                                             \
                for (int j = 0; j < SIDE; j++) {                                                   \
                    real y = x[j * KV_SQUARES_BLOCK + i];                                          \
                    sums[j] += squared ? y : y * y;                                                \
                }                                                                                  \
            for (int j = 0; j < SIDE; j++)                                                         \
                kv_squares_leaf(squares, (double)sums[j]);                                         \
            x += SIDE * KV_SQUARES_BLOCK;                                                          \
        }                                                                                          \
        while (count > 0) {                                                                        \
            int64_t some = count < KV_SQUARES_BLOCK ? count : KV_SQUARES_BLOCK;                    \
            real sum = 0;                                                                          \
            for (int64_t i = 0; i < some; i++)                                                     \
                sum += squared ? x[i] : x[i] * x[i];                                               \
            kv_squares_leaf(squares, (double)sum);                                                 \
            x += some;                                                                             \
            count -= some;                                                                         \
        }                                                                                          \
    }

ADD(float, float)
ADD(double, double)

void kv_squares_add(kv_squares_t *squares, const kv_kernels_t *kernels, bool is_double,
                    kv_dtype_t narrow, int64_t count, const void *values)
{
    if (is_double) {
        add_double(squares, false, count, values);
    } else if (narrow == KV_FLOAT32) {
        add_float(squares, false, count, values);
    } else {
        const float *x = values;
        float wide[SIDE * KV_SQUARES_BLOCK];
        uint16_t rounded[SIDE * KV_SQUARES_BLOCK];
        while (count > 0) {
            int64_t some = count < SIDE * KV_SQUARES_BLOCK ? count : SIDE * KV_SQUARES_BLOCK;
            for (int64_t i = 0; i < some; i++)
                wide[i] = x[i] * x[i];
            kernels->float32_to[narrow](some, wide, rounded);
            kernels->float32_from[narrow](some, rounded, wide);
            add_float(squares, true, some, wide);
            x += some;
            count -= some;
        }
    }
}
