/* Element types on a device, and tiles of a few elements of an array.
 *
 * A type says how an element lies in memory (`store`), in what type it is computed with (`wide`),
 * and how to come from one to the other. The conversions of 16 bits are those of
 * kernels/isa.inc: to nearest even, a NaN stays one.
 *
 * A tile is what one thread takes at a time. Its load and store are one instruction where all
 * arrays of a job are aligned for it, else one for each element, or for each byte.
 */
#ifndef KV_CUDA_NUMBER_H
#define KV_CUDA_NUMBER_H

#include "array/dtype.h"
#include "cuda/gpu.h"
#include "kernels/step.h"
#include <stdint.h>
#include <string.h>

#define KV_INSIDE static __device__ __forceinline__

/* The next loop has few rounds, and what it indexes stays in registers. */
#ifdef __CUDACC__
#define KV_UNROLL _Pragma("unroll")
#else
#define KV_UNROLL
#endif

KV_INSIDE uint32_t kv_bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

KV_INSIDE float kv_float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Computed with as they lie in memory. */
template <typename REAL, typename FACTORS> struct kv_real {
    typedef REAL store, wide;
    typedef kv_real wide_type;
    typedef FACTORS factors;
    KV_INSIDE REAL widen(REAL x)
    {
        return x;
    }
    KV_INSIDE REAL narrow(REAL x)
    {
        return x;
    }
};
typedef kv_real<double, kv_factors_t_double> kv_float64;
typedef kv_real<float, kv_factors_t_float> kv_float32;

struct kv_float16 {
    typedef uint16_t store;
    typedef float wide;
    typedef kv_float32 wide_type;
    typedef kv_factors_t_float factors;
#ifdef __CUDA_ARCH__
    KV_INSIDE float widen(uint16_t half)
    {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
        return x;
    }
    KV_INSIDE uint16_t narrow(float x)
    {
        uint16_t half;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
        return half;
    }
#else
    /* Subnormal halves are multiples of 2^-24, the unit of the floats from 0.5 to 1. */
    KV_INSIDE float widen(uint16_t half)
    {
        uint32_t size = half & 0x7fffu, bits;
        if (size >= 0x7c00u)
            bits = (size << 13) + (224u << 23);
        else if (size >= 0x400u)
            bits = (size << 13) + (112u << 23);
        else
            bits = kv_bits_of(kv_float_of(size + kv_bits_of(0.5f)) - 0.5f);
        return kv_float_of(bits | (half & 0x8000u) << 16);
    }
    KV_INSIDE uint16_t narrow(float x)
    {
        uint32_t bits = kv_bits_of(x), size = bits & 0x7fffffffu, half;
        if (size > 0x7f800000u)
            half = 0x7e00u | (size >> 13 & 0x3ffu);
        else if (size >= 0x477ff000u)
            half = 0x7c00u;
        else if (size >= 113u << 23)
            half = (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
        else
            half = kv_bits_of(kv_float_of(size) + 0.5f) - kv_bits_of(0.5f);
        return (uint16_t)(half | (bits >> 16 & 0x8000u));
    }
#endif
};

struct kv_bfloat16 {
    typedef uint16_t store;
    typedef float wide;
    typedef kv_float32 wide_type;
    typedef kv_factors_t_float factors;
    KV_INSIDE float widen(uint16_t half)
    {
        return kv_float_of((uint32_t)half << 16);
    }
    KV_INSIDE uint16_t narrow(float x)
    {
        uint32_t bits = kv_bits_of(x);
        if ((bits & 0x7fffffffu) > 0x7f800000u)
            return (uint16_t)(bits >> 16 | 0x40u);
        return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
};

/* Integers wrap, so the signed ones are added as these. */
template <typename STORE, typename WIDE> struct kv_integer {
    typedef STORE store;
    typedef WIDE wide;
    KV_INSIDE WIDE widen(STORE x)
    {
        return x;
    }
    KV_INSIDE STORE narrow(WIDE x)
    {
        return (STORE)x;
    }
};
typedef kv_integer<uint8_t, uint32_t> kv_uint8;
typedef kv_integer<uint32_t, uint32_t> kv_uint32;
typedef kv_integer<uint64_t, uint64_t> kv_uint64;

template <typename A, typename B> struct kv_is_same {
    enum { YES = 0 };
};
template <typename A> struct kv_is_same<A, A> {
    enum { YES = 1 };
};

/* ------------------------------------------------------------------------------------ tiles */

/* How the arrays of a job are aligned: not at all, for their elements, for tiles. */
typedef enum kv_aligned { KV_ALIGNED_NOT, KV_ALIGNED_ELEMENTS, KV_ALIGNED_TILES } kv_aligned_t;

/* What moves so many bytes at once. */
template <int BYTES> struct kv_word;
template <> struct kv_word<2> {
    typedef uint16_t type;
};
template <> struct kv_word<4> {
    typedef uint32_t type;
};
template <> struct kv_word<8> {
    typedef uint2 type;
};
template <> struct kv_word<16> {
    typedef uint4 type;
};

/* Elements of a tile of this type that is computed with. */
enum { KV_TILE_BYTES = 16 };
template <typename WIDE> struct kv_tile {
    enum { COUNT = KV_TILE_BYTES / sizeof(WIDE) };
};

/* Elements [i, i + N) of an array of `count`, zeros past its end. */
template <typename STORE, int N>
KV_INSIDE void kv_load_raw(int aligned, const char *from, int64_t i, int64_t count, STORE *out)
{
    typedef typename kv_word<N * sizeof(STORE)>::type word_t;
    from += i * (int64_t)sizeof(STORE);
    if (aligned == KV_ALIGNED_TILES && count - i >= N) {
        word_t word = *(const word_t *)from;
        memcpy(out, &word, sizeof word);
        return;
    }
    KV_UNROLL
    for (int k = 0; k < N; k++) {
        out[k] = 0;
        if (i + k >= count)
            continue;
        if (aligned == KV_ALIGNED_NOT)
            memcpy(out + k, from + k * sizeof(STORE), sizeof(STORE));
        else
            out[k] = *(const STORE *)(from + k * sizeof(STORE));
    }
}

template <typename STORE, int N>
KV_INSIDE void kv_store_raw(int aligned, char *to, int64_t i, int64_t count, const STORE *from)
{
    typedef typename kv_word<N * sizeof(STORE)>::type word_t;
    to += i * (int64_t)sizeof(STORE);
    if (aligned == KV_ALIGNED_TILES && count - i >= N) {
        word_t word;
        memcpy(&word, from, sizeof word);
        *(word_t *)to = word;
        return;
    }
    KV_UNROLL
    for (int k = 0; k < N; k++) {
        if (i + k >= count)
            continue;
        if (aligned == KV_ALIGNED_NOT)
            memcpy(to + k * sizeof(STORE), from + k, sizeof(STORE));
        else
            *(STORE *)(to + k * sizeof(STORE)) = from[k];
    }
}

template <typename T, int N>
KV_INSIDE void kv_load(int aligned, const char *from, int64_t i, int64_t count,
                       typename T::wide *out)
{
    typename T::store raw[N];
    kv_load_raw<typename T::store, N>(aligned, from, i, count, raw);
    KV_UNROLL
    for (int k = 0; k < N; k++)
        out[k] = T::widen(raw[k]);
}

template <typename T, int N>
KV_INSIDE void kv_store(int aligned, char *to, int64_t i, int64_t count,
                        const typename T::wide *from)
{
    typename T::store raw[N];
    KV_UNROLL
    for (int k = 0; k < N; k++)
        raw[k] = T::narrow(from[k]);
    kv_store_raw<typename T::store, N>(aligned, to, i, count, raw);
}

/* The sum of the arrays at these addresses, from left to right; zeros if there are none. */
template <typename T, int N>
KV_INSIDE void kv_load_sum(int aligned, int num_src, const uint64_t *src, int64_t i, int64_t count,
                           typename T::wide *sum)
{
    if (num_src == 0)
        for (int k = 0; k < N; k++)
            sum[k] = 0;
    else
        kv_load<T, N>(aligned, (const char *)src[0], i, count, sum);
    for (int j = 1; j < num_src; j++) {
        typename T::wide more[N];
        kv_load<T, N>(aligned, (const char *)src[j], i, count, more);
        KV_UNROLL
        for (int k = 0; k < N; k++)
            sum[k] += more[k];
    }
}

#endif
