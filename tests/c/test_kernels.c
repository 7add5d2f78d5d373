/* The kernels of every instruction set against slow arithmetic written here: sums bit for bit, the
 * conversions over all halves and all borders between them, and the choice of a table. */
#include "test.h"

#include "kernels/kernels.h"
#include <math.h>
#include <stdlib.h>

enum { MAX_COUNT = 1200, MAX_SRC = 9, MAX_DST = 3, GUARD = 128 };

/* --------------------------------------------------------------------- slow arithmetic */

/* The value of a small float with `mantissa` explicit bits and an exponent bias; exact. */
static double value_of(unsigned bits, int mantissa, int bias, unsigned top)
{
    unsigned exponent = (bits >> mantissa) & top;
    double fraction = (double)(bits & ((1u << mantissa) - 1));
    double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == top)
        return fraction != 0 ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0)
        return sign * ldexp(fraction, 1 - bias - mantissa);
    return sign * ldexp(fraction + (double)(1u << mantissa), (int)exponent - bias - mantissa);
}

static unsigned nearest(double x, int mantissa, int bias, unsigned top)
{
    unsigned sign = signbit(x) ? 0x8000 : 0;
    if (isnan(x))
        return sign | (top << mantissa) | (1u << (mantissa - 1));
    if (isinf(x))
        return sign | (top << mantissa);
    int exponent = x == 0.0 ? 1 - bias : ilogb(x);
    if (exponent < 1 - bias)
        exponent = 1 - bias;
    /* In units of the last place; nearbyint rounds to even. A carry moves up by itself. */
    unsigned units = (unsigned)nearbyint(ldexp(fabs(x), mantissa - exponent));
    unsigned bits = ((unsigned)(exponent + bias - 1) << mantissa) + units;
    return sign | (bits < top << mantissa ? bits : top << mantissa);
}

static double half_value(unsigned bits)
{
    return value_of(bits, 10, 15, 0x1f);
}

static unsigned half_nearest(double x)
{
    return nearest(x, 10, 15, 0x1f);
}

static double bfloat_value(unsigned bits)
{
    return value_of(bits, 7, 127, 0xff);
}

static unsigned bfloat_nearest(double x)
{
    return nearest(x, 7, 127, 0xff);
}

static float read_float32(kv_dtype_t dtype, const char *at)
{
    uint16_t half;
    float x;
    if (dtype == KV_FLOAT32) {
        memcpy(&x, at, sizeof x);
        return x;
    }
    memcpy(&half, at, sizeof half);
    return (float)(dtype == KV_FLOAT16 ? half_value(half) : bfloat_value(half));
}

/* One element of the sum, into `out`. */
static void slow_sum(kv_dtype_t dtype, int64_t i, int num_src, const char *const *src, char *out)
{
    int64_t bytes = (int64_t)kv_dtype_bytes(dtype);
    if (num_src == 1) {
        memcpy(out, src[0] + i * bytes, (size_t)bytes);
        return;
    }
    if (dtype == KV_FLOAT64) {
        volatile double sum = 0;
        for (int k = 0; k < num_src; k++) {
            double x;
            memcpy(&x, src[k] + i * bytes, sizeof x);
            sum = k == 0 ? x : sum + x;
        }
        memcpy(out, (const void *)&sum, sizeof sum);
    } else if (dtype == KV_FLOAT32 || dtype == KV_FLOAT16 || dtype == KV_BFLOAT16) {
        volatile float sum = 0;
        for (int k = 0; k < num_src; k++) {
            float x = read_float32(dtype, src[k] + i * bytes);
            sum = k == 0 ? x : sum + x;
        }
        uint16_t half = (uint16_t)(dtype == KV_FLOAT16 ? half_nearest((double)sum)
                                                       : bfloat_nearest((double)sum));
        if (dtype == KV_FLOAT32)
            memcpy(out, (const void *)&sum, sizeof sum);
        else
            memcpy(out, &half, sizeof half);
    } else {
        uint64_t sum = 0; /* little-endian: the low bytes are the wrapped sum */
        for (int k = 0; k < num_src; k++) {
            uint64_t x = 0;
            memcpy(&x, src[k] + i * bytes, (size_t)bytes);
            sum += x;
        }
        memcpy(out, &sum, (size_t)bytes);
    }
}

static bool is_nan(kv_dtype_t dtype, const char *at)
{
    double x = 0;
    if (dtype == KV_FLOAT64)
        memcpy(&x, at, sizeof x);
    else if (dtype == KV_FLOAT32 || dtype == KV_FLOAT16 || dtype == KV_BFLOAT16)
        x = (double)read_float32(dtype, at);
    return isnan(x);
}

/* Equal bits, or both NaN: payloads are free. */
static bool same(kv_dtype_t dtype, const char *a, const char *b)
{
    return memcmp(a, b, kv_dtype_bytes(dtype)) == 0 || (is_nan(dtype, a) && is_nan(dtype, b));
}

/* Any bits at all, among them all kinds of NaN, infinities, zeros and subnormals; half of the
 * time near each other in size, so that sums round. */
static void fill(kv_dtype_t dtype, int64_t count, uint64_t *state, char *to)
{
    int64_t bytes = (int64_t)kv_dtype_bytes(dtype);
    for (int64_t i = 0; i < count; i++) {
        uint64_t bits = test_random(state);
        double near = (double)(int64_t)(bits & 0xffffff) * 0x1p-20 - 8.0;
        float near_float = (float)near;
        uint16_t half = (uint16_t)(dtype == KV_FLOAT16 ? half_nearest(near) : bfloat_nearest(near));
        const void *from = &bits;
        uint64_t kind = bits >> 60;
        if (kind < 8 && dtype == KV_FLOAT64)
            from = &near;
        else if (kind < 8 && dtype == KV_FLOAT32)
            from = &near_float;
        else if (kind < 8 && (dtype == KV_FLOAT16 || dtype == KV_BFLOAT16))
            from = &half;
        else if (kind == 8)
            bits = 0;
        else if (kind == 9) /* -0, and the smallest integers */
            bits = UINT64_C(1) << (8 * bytes - 1);
        else if (kind == 10) /* a tiny subnormal */
            bits &= 3;
        memcpy(to + i * bytes, from, (size_t)bytes);
    }
}

/* ------------------------------------------------------------------------------- sums */

typedef struct sum_case {
    kv_dtype_t dtype;
    int64_t begin, end, count;
    int num_src, num_dst;
    int shared; /* the source that is the first destination; -1: none */
    bool stream;
    int src_shift, dst_shift; /* bytes off the alignment of malloc */
} sum_case_t;

static char *blocks[MAX_SRC + MAX_DST]; /* GUARD bytes before and after the elements */

static bool sum_agrees(const kv_kernels_t *kernels, const sum_case_t *test, uint64_t *state)
{
    int64_t bytes = (int64_t)kv_dtype_bytes(test->dtype);
    const char *src[MAX_SRC];
    char *dst[MAX_DST];
    static char due[MAX_DST][MAX_COUNT * 8 + 2 * GUARD];

    for (int k = 0; k < test->num_src; k++) {
        char *start = blocks[k] + GUARD + (test->src_shift * (k + 1)) % 64;
        fill(test->dtype, test->count, state, start);
        src[k] = start;
    }
    for (int j = 0; j < test->num_dst; j++) {
        char *block = blocks[MAX_SRC + j];
        memset(block, 0x5a, MAX_COUNT * 8 + 2 * GUARD);
        dst[j] = block + GUARD + (test->dst_shift * (j + 1)) % 64;
    }
    if (test->shared >= 0)
        dst[0] = blocks[test->shared] + (src[test->shared] - blocks[test->shared]);
    for (int j = 0; j < test->num_dst; j++) {
        memcpy(due[j], dst[j] - GUARD / 2, (size_t)(test->count * bytes + GUARD));
        for (int64_t i = test->begin; i < test->end; i++)
            slow_sum(test->dtype, i, test->num_src, src, due[j] + GUARD / 2 + i * bytes);
    }

    kernels->sum[test->dtype](test->begin, test->end, test->num_src, (const void *const *)src,
                              test->num_dst, (void *const *)dst, test->stream);

    for (int j = 0; j < test->num_dst; j++) {
        const char *got = dst[j] - GUARD / 2;
        bool agrees = memcmp(got, due[j], GUARD / 2) == 0 &&
                      memcmp(got + GUARD / 2 + test->count * bytes,
                             due[j] + GUARD / 2 + test->count * bytes, GUARD / 2) == 0;
        for (int64_t i = 0; i < test->count; i++)
            agrees = agrees &&
                     same(test->dtype, got + GUARD / 2 + i * bytes, due[j] + GUARD / 2 + i * bytes);
        if (!agrees) {
            printf("    %s %s: [%" PRId64 ", %" PRId64 ") of %" PRId64 ", %d sources, %d "
                   "destinations, shared %d, stream %d, shifts %d %d\n",
                   kernels->name, kv_dtype_name(test->dtype), test->begin, test->end, test->count,
                   test->num_src, test->num_dst, test->shared, test->stream, test->src_shift,
                   test->dst_shift);
            return false;
        }
    }
    return true;
}

static bool blocks_new(void)
{
    bool all = true;
    for (int i = 0; i < MAX_SRC + MAX_DST; i++) {
        blocks[i] = calloc(1, MAX_COUNT * 8 + 2 * GUARD);
        all = all && blocks[i] != NULL;
    }
    return all;
}

static void blocks_free(void)
{
    for (int i = 0; i < MAX_SRC + MAX_DST; i++)
        free(blocks[i]);
}

static void all_instruction_sets_sum_to_the_same_bits(void)
{
    static const int64_t counts[] = {0,  1,  2,  3,   5,   7,   8,   9,   15,  16,   17,  31,
                                     33, 63, 65, 127, 129, 255, 257, 511, 600, 1000, 1200};
    uint64_t state = 1;
    if (!CHECK(blocks_new()))
        return;
    bool agree = true;
    const kv_kernels_t *kernels;
    for (int k = 0; (kernels = kv_kernels_at(k)) != NULL; k++)
        for (int dtype = 0; dtype < KV_DTYPE_COUNT; dtype++)
            for (int num_src = 1; num_src <= MAX_SRC; num_src++)
                for (int num_dst = 1; num_dst <= MAX_DST; num_dst++)
                    for (size_t c = 0; c < sizeof counts / sizeof counts[0]; c++) {
                        sum_case_t test = {.dtype = (kv_dtype_t)dtype,
                                           .end = counts[c],
                                           .count = counts[c],
                                           .num_src = num_src,
                                           .num_dst = num_dst};
                        test.shared = (int)test_between(&state, -1, num_src - 1);
                        test.stream = test_between(&state, 0, 1) == 1;
                        test.src_shift = (int)test_between(&state, 0, 63);
                        test.dst_shift = (int)test_between(&state, 0, 63);
                        agree = sum_agrees(kernels, &test, &state) && agree;
                    }
    CHECK(agree);
    blocks_free();
}

static void sum_of_a_part_leaves_the_rest_alone(void)
{
    uint64_t state = 2;
    if (!CHECK(blocks_new()))
        return;
    bool agree = true;
    const kv_kernels_t *kernels;
    for (int k = 0; (kernels = kv_kernels_at(k)) != NULL; k++)
        for (int dtype = 0; dtype < KV_DTYPE_COUNT; dtype++)
            for (int round = 0; round < 60; round++) {
                sum_case_t test = {.dtype = (kv_dtype_t)dtype, .count = MAX_COUNT, .shared = -1};
                test.begin = test_between(&state, 0, MAX_COUNT);
                test.end = test_between(&state, test.begin, MAX_COUNT);
                test.num_src = (int)test_between(&state, 1, 5);
                test.num_dst = (int)test_between(&state, 1, MAX_DST);
                test.stream = round % 2 == 1;
                test.src_shift = (int)test_between(&state, 0, 63);
                test.dst_shift = (int)test_between(&state, 0, 63);
                agree = sum_agrees(kernels, &test, &state) && agree;
            }
    CHECK(agree);
    blocks_free();
}

static void single_source_keeps_signalling_nans(void)
{
    const kv_kernels_t *kernels;
    for (int k = 0; (kernels = kv_kernels_at(k)) != NULL; k++)
        for (int stream = 0; stream < 2; stream++) {
            uint16_t from[100], to[100] = {0};
            for (int i = 0; i < 100; i++)
                from[i] = (uint16_t)(0x7c01 + i);
            const void *src = from;
            void *dst = to;
            kernels->sum[KV_FLOAT16](0, 100, 1, &src, 1, &dst, stream == 1);
            CHECK(memcmp(from, to, sizeof from) == 0);
        }
}

/* ------------------------------------------------------------------------ conversions */

/* `count` floats, as 16-bit numbers, in one call and in the slow way. */
static bool narrowing_agrees(const kv_kernels_t *kernels, kv_dtype_t dtype, int64_t count,
                             const float *from, uint16_t *to)
{
    kernels->float32_to[dtype](count, from, to);
    for (int64_t i = 0; i < count; i++) {
        uint16_t due = (uint16_t)(dtype == KV_FLOAT16 ? half_nearest((double)from[i])
                                                      : bfloat_nearest((double)from[i]));
        bool quiet = isnan(from[i]) ? (to[i] & due) == due : to[i] == due;
        if (!quiet) {
            printf("    %s %s: %a became %04x, not %04x\n", kernels->name, kv_dtype_name(dtype),
                   (double)from[i], to[i], due);
            return false;
        }
    }
    return true;
}

static void every_half_has_its_value_and_comes_back(void)
{
    uint16_t *bits = malloc(65536 * sizeof *bits);
    uint16_t *back = malloc(65536 * sizeof *back);
    float *floats = malloc(65536 * sizeof *floats);
    const kv_kernels_t *kernels;
    for (int k = 0; CHECK(bits && back && floats) && (kernels = kv_kernels_at(k)) != NULL; k++)
        for (int dtype = KV_FLOAT16; dtype <= KV_BFLOAT16; dtype++) {
            bool right = true;
            for (int i = 0; i < 65536; i++)
                bits[i] = (uint16_t)i;
            kernels->float32_from[dtype](65536, bits, floats);
            kernels->float32_to[dtype](65536, floats, back);
            for (int i = 0; i < 65536; i++) {
                double due = dtype == KV_FLOAT16 ? half_value(bits[i]) : bfloat_value(bits[i]);
                if (isnan(due))
                    right =
                        right && isnan(floats[i]) &&
                        isnan(dtype == KV_FLOAT16 ? half_value(back[i]) : bfloat_value(back[i]));
                else
                    right = right && (double)floats[i] == due &&
                            !signbit(floats[i]) == !signbit(due) && back[i] == bits[i];
            }
            CHECK(right);
        }
    free(bits);
    free(back);
    free(floats);
}

/* Every border between two halves, the floats beside it, and the same far out of range. */
static void float32_rounds_to_the_nearest_even_half(void)
{
    enum { SIDES = 5, COUNT = 65536 * SIDES };
    float *floats = malloc(COUNT * sizeof *floats);
    uint16_t *halves = malloc(COUNT * sizeof *halves);
    if (!CHECK(floats != NULL && halves != NULL))
        goto done;
    for (int dtype = KV_FLOAT16; dtype <= KV_BFLOAT16; dtype++) {
        for (int i = 0; i < 65536; i++) {
            double low = dtype == KV_FLOAT16 ? half_value((unsigned)i) : bfloat_value((unsigned)i);
            double high = i % 32768 == 32767    ? low
                          : dtype == KV_FLOAT16 ? half_value((unsigned)i + 1)
                                                : bfloat_value((unsigned)i + 1);
            float border = (float)(low + (high - low) / 2);
            if (isinf(high) && !isinf(low)) /* the border to infinity is that to the next power */
                border = (float)(low + ldexp(low > 0 ? 0.5 : -0.5,
                                             ilogb(low) - (dtype == KV_FLOAT16 ? 10 : 7)));
            float *five = floats + (ptrdiff_t)i * SIDES;
            five[0] = border;
            five[1] = nextafterf(border, -INFINITY);
            five[2] = nextafterf(border, INFINITY);
            uint32_t any = (uint32_t)i * 2654435761u;
            memcpy(&five[3], &any, sizeof any);
            five[4] = (float)low * 1.37f;
        }
        const kv_kernels_t *kernels;
        for (int k = 0; (kernels = kv_kernels_at(k)) != NULL; k++)
            CHECK(narrowing_agrees(kernels, (kv_dtype_t)dtype, COUNT, floats, halves));
    }
done:
    free(floats);
    free(halves);
}

static void short_conversions_write_no_further(void)
{
    const kv_kernels_t *kernels;
    for (int k = 0; (kernels = kv_kernels_at(k)) != NULL; k++)
        for (int dtype = KV_FLOAT16; dtype <= KV_BFLOAT16; dtype++)
            for (int64_t count = 0; count < 70; count++) {
                int64_t bytes = count * (int64_t)kv_dtype_bytes((kv_dtype_t)dtype);
                char narrow[70 * 8 + 16];
                float wide[80], back[80];
                for (int i = 0; i < 80; i++)
                    wide[i] = (float)(i % 50);
                memset(narrow, 0x5a, sizeof narrow);
                kernels->float32_to[dtype](count, wide, narrow + 1);
                CHECK_EQ(narrow[0], 0x5a);
                CHECK_EQ(narrow[1 + bytes], 0x5a);
                back[count] = 77.0f;
                kernels->float32_from[dtype](count, narrow + 1, back);
                CHECK(memcmp(wide, back, (size_t)count * sizeof wide[0]) == 0);
                CHECK(back[count] == 77.0f);
            }
}

/* ----------------------------------------------------------------------------- choice */

static void kvstore_isa_chooses_the_table_once(void)
{
    const kv_kernels_t *kernels = NULL;
    setenv("KVSTORE_ISA", "mmx", 1);
    CHECK_STATUS(kv_kernels_get(&kernels), KV_INVALID);
    CHECK(kernels == NULL);
    const char *message = kv_status_message(KV_INVALID);
    CHECK(strstr(message, "KVSTORE_ISA=mmx") != NULL);
    for (int k = 0; kv_kernels_at(k) != NULL; k++)
        CHECK(strstr(message, kv_kernels_at(k)->name) != NULL);

    setenv("KVSTORE_ISA", "baseline", 1);
    CHECK_STATUS(kv_kernels_get(&kernels), KV_OK);
    CHECK(kernels == kv_kernels_at(0));
    setenv("KVSTORE_ISA", "auto", 1);
    CHECK_STATUS(kv_kernels_get(&kernels), KV_OK);
    CHECK(kernels == kv_kernels_at(0));
}

static const test_t tests[] = {
    TEST(all_instruction_sets_sum_to_the_same_bits), TEST(sum_of_a_part_leaves_the_rest_alone),
    TEST(single_source_keeps_signalling_nans),       TEST(every_half_has_its_value_and_comes_back),
    TEST(float32_rounds_to_the_nearest_even_half),   TEST(short_conversions_write_no_further),
    TEST(kvstore_isa_chooses_the_table_once),
};
TEST_MAIN(tests)
