/* Which instruction sets there are, and which one runs. The loops are in isa.inc and sum.inc, which
 * are compiled here once for each set: on x86-64 for what every such processor has, for AVX2 and
 * for AVX-512; elsewhere for the target of the build alone.
 *
 * No set asks for FMA, and -ffp-contract=off keeps the compiler from the fused operations that
 * AVX-512 brings anyway: they would round once where the contract rounds twice.
 */
#include "kernels/kernels.h"

#include "base/config.h"
#include "kernels/codec.h"
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 4")
#endif
/* The iterations of the next loop do not depend on each other. */
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpass-failed" /* a build without the vectoriser is no mistake   \
                                                  */
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif
#define INLINE static inline __attribute__((always_inline))
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

/* The name of something of this instruction set. */
#define OWN(name) PASTE(name, ISA)

#define ISA baseline
#define WIDTH 16
#include "kernels/isa.inc"
#undef ISA
#undef WIDTH

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define ISA avx2
#define WIDTH 32
#include "kernels/isa.inc"
#undef ISA
#undef WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"))),   \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c")
#endif
#define ISA avx512
#define WIDTH 64
#include "kernels/isa.inc"
#undef ISA
#undef WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* Older compilers do not know this one by name. */
static bool has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && has_f16c();
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#endif

const kv_kernels_t *kv_kernels_at(int i)
{
    if (i == 0)
        return &table_baseline;
#if defined(__x86_64__)
    if (i == 1 && has_avx2())
        return &table_avx2;
    if (i == 2 && has_avx512())
        return &table_avx512;
#endif
    return NULL;
}

kv_status_t kv_kernels_get(const kv_kernels_t **out)
{
    static _Atomic(const kv_kernels_t *) chosen;
    const kv_kernels_t *found = atomic_load(&chosen);
    if (found == NULL) {
        const char *name = kv_config_text(KV_CONFIG_ISA);
        bool best = strcmp(name, "auto") == 0;
        char known[64] = "auto";
        const kv_kernels_t *table;
        for (int i = 0; (table = kv_kernels_at(i)) != NULL; i++) {
            if (best || strcmp(name, table->name) == 0)
                found = table;
            size_t used = strlen(known);
            snprintf(known + used, sizeof known - used, ", %s", table->name);
        }
        if (found == NULL)
            return kv_fail(KV_INVALID, "%s=%s: this processor can run %s",
                           kv_config_row(KV_CONFIG_ISA)->variable, name, known);
        atomic_store(&chosen, found);
    }
    *out = found;
    return KV_OK;
}
