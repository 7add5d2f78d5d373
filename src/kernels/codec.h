/* Gradient compression of one element: the arithmetic of every processor and device. Compiles as C,
 * C++ and CUDA; the CPU's vectors use the two formulas at the top, everybody else the functions.
 *
 * What a code stands for, its value, is taken off the sum and the rest is the new residual: taking
 * off 0, t or -t has the bits of leaving it, subtracting t, adding t. A NaN compares false, so in
 * 2bit it has code 0 and stays in the residual; an infinity stays there too.
 */
#ifndef KV_KERNELS_CODEC_H
#define KV_KERNELS_CODEC_H

#if defined(__CUDACC__)
#define KV_CODEC_FUNCTION static inline __host__ __device__
#else
#define KV_CODEC_FUNCTION static inline
#endif

/* KEEP(mask, x): x where the comparison holds, else 0. */
#define KV_QUANTISE_2BIT(KEEP, sum, threshold, up, down, value)                                    \
    do {                                                                                           \
        (up) = (sum) >= (threshold);                                                               \
        (down) = (sum) <= -(threshold);                                                            \
        (value) = KEEP(up, threshold) - KEEP(down, threshold);                                     \
    } while (0)

#define KV_QUANTISE_1BIT(KEEP, sum, threshold, one, up, value)                                     \
    do {                                                                                           \
        (up) = (sum) > (threshold);                                                                \
        (value) = KEEP(up, (one) + (one)) - (one);                                                 \
    } while (0)

#define KV_CODEC_KEEP(mask, x) ((mask) ? (x) : 0)

/* quantise: from the residual and a gradient to the code, two bits or one, and what it stands for.
 * restore: from the code to that. */
#define KV_CODEC_ELEMENT(name, real)                                                               \
    KV_CODEC_FUNCTION unsigned kv_quantise_2bit_##name(real gradient, real threshold,              \
                                                       real *residual, real *value)                \
    {                                                                                              \
        real sum = *residual + gradient;                                                           \
        int up, down;                                                                              \
        KV_QUANTISE_2BIT(KV_CODEC_KEEP, sum, threshold, up, down, *value);                         \
        *residual = sum - *value;                                                                  \
        return up ? 3u : down ? 2u : 0u;                                                           \
    }                                                                                              \
                                                                                                   \
    KV_CODEC_FUNCTION unsigned kv_quantise_1bit_##name(real gradient, real threshold,              \
                                                       real *residual, real *value)                \
    {                                                                                              \
        real sum = *residual + gradient;                                                           \
        int up;                                                                                    \
        KV_QUANTISE_1BIT(KV_CODEC_KEEP, sum, threshold, (real)1, up, *value);                      \
        *residual = sum - *value;                                                                  \
        return up ? 1u : 0u;                                                                       \
    }                                                                                              \
                                                                                                   \
    KV_CODEC_FUNCTION real kv_restore_2bit_##name(unsigned code, real threshold)                   \
    {                                                                                              \
        return code == 3u ? threshold : code == 2u ? -threshold : (real)0;                         \
    }                                                                                              \
                                                                                                   \
    KV_CODEC_FUNCTION real kv_restore_1bit_##name(unsigned code)                                   \
    {                                                                                              \
        return code == 1u ? (real)1 : (real)-1;                                                    \
    }

KV_CODEC_ELEMENT(float32, float)
KV_CODEC_ELEMENT(float64, double)
#undef KV_CODEC_ELEMENT

#endif
