/* The codecs of every instruction set against slow arithmetic written here, bit for bit: codes,
 * residuals, decoded sums, what is counted, what lies around the arrays; and the limits. */
#include "test.h"

#include "compress/codec.h"
#include "kernels/codec.h"
#include <float.h>
#include <math.h>
#include <stdlib.h>

enum { MAX_COUNT = 2200, GUARD = 64 };

static const kv_dtype_t DTYPES[] = {KV_FLOAT64, KV_FLOAT32, KV_FLOAT16, KV_BFLOAT16};
enum { NUM_DTYPES = sizeof DTYPES / sizeof DTYPES[0] };

static bool is_double(kv_dtype_t dtype)
{
    return dtype == KV_FLOAT64;
}

/* ------------------------------------------------------------------------ slow arithmetic */

/* An element of an array of the wide type. */
static double wide_get(kv_dtype_t dtype, const void *array, int64_t i)
{
    return is_double(dtype) ? ((const double *)array)[i] : (double)((const float *)array)[i];
}

static void wide_set(kv_dtype_t dtype, void *array, int64_t i, double x)
{
    if (is_double(dtype))
        ((double *)array)[i] = x;
    else
        ((float *)array)[i] = (float)x;
}

/* x + y in the wide type: float64 holds the sum of two floats well enough to round it once. */
static double wide_add(kv_dtype_t dtype, double x, double y)
{
    return is_double(dtype) ? x + y : (double)(float)(x + y);
}

/* The code of one element, and its residual. */
static unsigned slow_quantise(kv_dtype_t dtype, const kv_codec_t *codec, double gradient,
                              double *residual)
{
    double t = is_double(dtype) ? codec->threshold : (double)(float)codec->threshold;
    double sum = wide_add(dtype, *residual, gradient);
    unsigned code = 0;
    *residual = sum;
    if (codec->type == KV_CODEC_2BIT && sum >= t) {
        code = 3;
        *residual = wide_add(dtype, sum, -t);
    } else if (codec->type == KV_CODEC_2BIT && sum <= -t) {
        code = 2;
        *residual = wide_add(dtype, sum, t);
    } else if (codec->type == KV_CODEC_1BIT) {
        code = sum > t;
        *residual = wide_add(dtype, sum, code ? -1.0 : 1.0);
    }
    return code;
}

static double slow_restore(kv_dtype_t dtype, const kv_codec_t *codec, unsigned code)
{
    double t = is_double(dtype) ? codec->threshold : (double)(float)codec->threshold;
    if (codec->type == KV_CODEC_1BIT)
        return code ? 1.0 : -1.0;
    return code == 3 ? t : code == 2 ? -t : 0.0;
}

/* Equal bits, or both NaN. */
static bool same(double x, double y)
{
    return memcmp(&x, &y, sizeof x) == 0 || (isnan(x) && isnan(y));
}

/* --------------------------------------------------------------------------------- a case */

typedef struct block {
    char gradient[MAX_COUNT * 8], residual[MAX_COUNT * 8 + GUARD], sums[MAX_COUNT * 8 + GUARD];
    uint8_t codes[MAX_COUNT + GUARD];
    double values[MAX_COUNT]; /* the gradient, widened */
} block_t;

typedef struct codec_case {
    const kv_kernels_t *kernels;
    kv_codec_t codec;
    kv_dtype_t dtype;
    int64_t count;
    int64_t cut; /* elements of one call */
} codec_case_t;

/* Near the threshold, exactly on it and one step off, tiny, huge, not finite. */
static double pick(const kv_codec_t *codec, uint64_t *state, bool odd)
{
    float t = (float)codec->threshold;
    switch (test_between(state, 0, odd ? 12 : 6)) {
    case 0:
        return (double)t;
    case 1:
        return -(double)t;
    case 2:
        return (double)nextafterf(t, 0.0f);
    case 3:
        return -(double)nextafterf(t, INFINITY);
    case 7:
        return (double)INFINITY;
    case 8:
        return -(double)INFINITY;
    case 9:
        return (double)NAN;
    case 10:
        return 1e-44;
    case 11:
        return test_between(state, 0, 1) ? 3e38 : -3e38;
    case 12:
        return -0.0;
    default:
        return (double)test_between(state, -4000, 4000) / 1000.0;
    }
}

static void fill(const codec_case_t *test, uint64_t *state, bool odd, block_t *b)
{
    memset(b, 0x5a, sizeof *b);
    for (int64_t i = 0; i < test->count; i++) {
        double gradient = pick(&test->codec, state, odd);
        wide_set(test->dtype, b->residual, i, pick(&test->codec, state, odd));
        wide_set(test->dtype, b->sums, i, (double)test_between(state, -2, 2));
        if (test->dtype == KV_FLOAT16 || test->dtype == KV_BFLOAT16) {
            uint16_t *half = (uint16_t *)(void *)b->gradient + i;
            float x = (float)gradient;
            test->kernels->float32_to[test->dtype](1, &x, half);
            test->kernels->float32_from[test->dtype](1, half, &x);
            b->values[i] = (double)x;
        } else {
            wide_set(test->dtype, b->gradient, i, gradient);
            b->values[i] = wide_get(test->dtype, b->gradient, i);
        }
    }
}

static bool guard_holds(const void *end)
{
    static const char fresh[] = "ZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZ"; /* 0x5a */
    return memcmp(end, fresh, sizeof fresh - 1) == 0;
}

static bool residuals_agree(const codec_case_t *test, const block_t *b, const double *due)
{
    for (int64_t i = 0; i < test->count; i++)
        if (!same(wide_get(test->dtype, b->residual, i), due[i]))
            return false;
    return guard_holds(b->residual + test->count * (is_double(test->dtype) ? 8 : 4));
}

static bool sums_agree(const codec_case_t *test, const block_t *b, const double *due)
{
    for (int64_t i = 0; i < test->count; i++)
        if (!same(wide_get(test->dtype, b->sums, i), due[i]))
            return false;
    return guard_holds(b->sums + test->count * (is_double(test->dtype) ? 8 : 4));
}

static bool agrees(const codec_case_t *test, bool odd, uint64_t *state)
{
    static block_t start, b;
    static double left[MAX_COUNT], fresh[MAX_COUNT], added[MAX_COUNT];
    static uint8_t codes[MAX_COUNT + 8];
    int bits = test->codec.type == KV_CODEC_2BIT ? 2 : 1;
    int64_t unfinite = 0, bytes = kv_codec_bytes(test->codec.type, test->count);
    fill(test, state, odd, &start);
    memset(codes, 0, sizeof codes);
    for (int64_t i = 0; i < test->count; i++) {
        left[i] = wide_get(test->dtype, start.residual, i);
        unsigned code = slow_quantise(test->dtype, &test->codec, start.values[i], &left[i]);
        unfinite += !isfinite(left[i]);
        codes[i * bits / 8] |= (uint8_t)(code << (8 - bits - i * bits % 8));
        fresh[i] = slow_restore(test->dtype, &test->codec, code);
        added[i] = wide_add(test->dtype, wide_get(test->dtype, start.sums, i), fresh[i]);
    }

    int64_t told = 0;
    b = start;
    for (int64_t at = 0; at < test->count; at += test->cut) {
        int64_t end = test->count - at < test->cut ? test->count : at + test->cut;
        told += kv_codec_encode(test->kernels, &test->codec, test->dtype, at, end, test->count,
                                b.gradient, b.residual, b.codes);
    }
    bool good = told == unfinite && residuals_agree(test, &b, left) &&
                memcmp(b.codes, codes, (size_t)bytes) == 0 && guard_holds(b.codes + bytes);

    for (int first = 0; first <= 1; first++) {
        b = start;
        for (int64_t at = 0; at < test->count; at += test->cut) {
            int64_t end = test->count - at < test->cut ? test->count : at + test->cut;
            kv_codec_decode(test->kernels, &test->codec, test->dtype, at, end, codes, first == 1,
                            b.sums + at * (is_double(test->dtype) ? 8 : 4));
        }
        good = good && sums_agree(test, &b, first ? fresh : added);

        b = start;
        told = 0;
        for (int64_t at = 0; at < test->count; at += test->cut + 3) {
            int64_t end = test->count - at < test->cut + 3 ? test->count : at + test->cut + 3;
            told += kv_codec_apply(test->kernels, &test->codec, test->dtype, at, end, b.gradient,
                                   b.residual, first == 1,
                                   b.sums + at * (is_double(test->dtype) ? 8 : 4));
        }
        good = good && told == unfinite && sums_agree(test, &b, first ? fresh : added) &&
               residuals_agree(test, &b, left);
    }
    if (!good)
        printf("    %s %s %s threshold %g: %" PRId64 " elements, %" PRId64 " a call, odd %d\n",
               test->kernels->name, kv_codec_type_name(test->codec.type),
               kv_dtype_name(test->dtype), test->codec.threshold, test->count, test->cut, odd);
    return good;
}

static void all_instruction_sets_give_the_codes_of_the_rule(void)
{
    static const double thresholds[] = {0.5, 0.1, 1.0, 0.001, 3.0};
    static const int64_t more[] = {100, 127, 128, 129, 255, 256, 511, 1000, 1024, 2047, 2200};
    enum { FEW = 70, NUM_MORE = sizeof more / sizeof more[0] };
    uint64_t state = 1;
    bool agree = true;
    const kv_kernels_t *kernels;
    for (int k = 0; (kernels = kv_kernels_at(k)) != NULL; k++)
        for (int type = KV_CODEC_2BIT; type <= KV_CODEC_1BIT; type++)
            for (int d = 0; d < NUM_DTYPES; d++)
                for (int c = 0; c < FEW + NUM_MORE; c++) {
                    codec_case_t test = {.kernels = kernels, .dtype = DTYPES[d]};
                    test.codec.type = (kv_codec_type_t)type;
                    test.codec.threshold = thresholds[test_between(&state, 0, 4)];
                    test.count = c < FEW ? c : more[c - FEW];
                    test.cut = test_between(&state, 1, 8) * KV_CODEC_UNIT;
                    for (int odd = 0; odd <= 1; odd++)
                        agree = agree && agrees(&test, odd == 1, &state);
                }
    CHECK(agree);
}

static void a_single_element_by_its_function_agrees(void)
{
    uint64_t state = 2;
    for (int type = KV_CODEC_2BIT; type <= KV_CODEC_1BIT; type++)
        for (int n = 0; n < 20000; n++) {
            kv_codec_t codec = {(kv_codec_type_t)type, 0.25};
            double g = pick(&codec, &state, true), r = pick(&codec, &state, true), due, v;
            float r32 = (float)r, v32;
            unsigned code, got, got32;
            due = r;
            code = slow_quantise(KV_FLOAT64, &codec, g, &due);
            got = type == KV_CODEC_2BIT ? kv_quantise_2bit_float64(g, 0.25, &r, &v)
                                        : kv_quantise_1bit_float64(g, 0.25, &r, &v);
            bool good = got == code && same(r, due) &&
                        same(v, slow_restore(KV_FLOAT64, &codec, code)) &&
                        same(v, type == KV_CODEC_2BIT ? kv_restore_2bit_float64(code, 0.25)
                                                      : kv_restore_1bit_float64(code));
            due = (double)r32;
            code = slow_quantise(KV_FLOAT32, &codec, (double)(float)g, &due);
            got32 = type == KV_CODEC_2BIT ? kv_quantise_2bit_float32((float)g, 0.25f, &r32, &v32)
                                          : kv_quantise_1bit_float32((float)g, 0.25f, &r32, &v32);
            good = good && got32 == code && same((double)r32, due) &&
                   same((double)v32,
                        (double)(type == KV_CODEC_2BIT ? kv_restore_2bit_float32(code, 0.25f)
                                                       : kv_restore_1bit_float32(code)));
            if (!CHECK(good))
                return;
        }
}

static void unknown_codes_decode_to_zero(void)
{
    const kv_kernels_t *kernels;
    kv_codec_t codec = {KV_CODEC_2BIT, 0.5};
    uint8_t codes[8] = {0x1b, 0x55, 0xff, 0xaa}; /* 00 01 10 11, 01 01 01 01, … */
    static const float due[] = {0,    0,    -0.5f, 0.5f, 0,     0,     0,     0,
                                0.5f, 0.5f, 0.5f,  0.5f, -0.5f, -0.5f, -0.5f, -0.5f};
    for (int k = 0; (kernels = kv_kernels_at(k)) != NULL; k++) {
        float got[16];
        kv_codec_decode(kernels, &codec, KV_FLOAT32, 0, 16, codes, true, got);
        CHECK(memcmp(got, due, sizeof got) == 0);
    }
}

static void more_elements_than_a_lane_counts_at_a_time(void)
{
    enum { COUNT = (1 << 20) + (1 << 19) + 5 };
    const kv_kernels_t *kernels;
    float *gradient = calloc(COUNT, sizeof *gradient), *residual = calloc(COUNT, sizeof *residual);
    float *block = malloc(COUNT * sizeof *block);
    uint8_t *codes = malloc(COUNT / 4 + 8);
    kv_codec_t codec = {KV_CODEC_2BIT, 0.5};
    if (CHECK(gradient != NULL && residual != NULL && block != NULL && codes != NULL))
        for (int k = 0; (kernels = kv_kernels_at(k)) != NULL; k++) {
            for (int64_t i = 0; i < COUNT; i++)
                residual[i] = i % 2 ? INFINITY : NAN;
            CHECK_EQ(kv_codec_encode(kernels, &codec, KV_FLOAT32, 0, COUNT, COUNT, gradient,
                                     residual, codes),
                     COUNT);
            CHECK_EQ(kv_codec_apply(kernels, &codec, KV_FLOAT32, 0, COUNT, gradient, residual, true,
                                    block),
                     COUNT);
            CHECK(codes[0] == 0x33 && codes[COUNT / 4 - 1] == 0x33 && block[COUNT - 2] == 0.5f);
        }
    free(gradient);
    free(residual);
    free(block);
    free(codes);
}

static void codes_are_padded_to_four_bytes(void)
{
    CHECK_EQ(kv_codec_bytes(KV_CODEC_2BIT, 0), 0);
    CHECK_EQ(kv_codec_bytes(KV_CODEC_2BIT, 1), 4);
    CHECK_EQ(kv_codec_bytes(KV_CODEC_2BIT, 16), 4);
    CHECK_EQ(kv_codec_bytes(KV_CODEC_2BIT, 17), 8);
    CHECK_EQ(kv_codec_bytes(KV_CODEC_1BIT, 32), 4);
    CHECK_EQ(kv_codec_bytes(KV_CODEC_1BIT, 33), 8);
    CHECK_EQ(kv_codec_bytes(KV_CODEC_2BIT, INT64_MAX), (INT64_MAX / 16 + 1) * 4);
}

static void limits_are_told(void)
{
    static const double bad[] = {-0.5, -1e-300, 1e39};
    for (int type = KV_CODEC_2BIT; type <= KV_CODEC_1BIT; type++) {
        kv_codec_t codec = {(kv_codec_type_t)type, 0.5};
        CHECK_STATUS(kv_codec_check(&codec), KV_OK);
        for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
            codec.threshold = bad[i];
            CHECK_STATUS(kv_codec_check(&codec), KV_INVALID);
        }
        codec.threshold = (double)NAN;
        CHECK_STATUS(kv_codec_check(&codec), KV_INVALID);
        codec.threshold = -(double)INFINITY;
        CHECK_STATUS(kv_codec_check(&codec), KV_INVALID);
        codec.threshold = (double)FLT_MAX;
        CHECK_STATUS(kv_codec_check(&codec), KV_OK);
        codec.threshold = 1e-60; /* 0 as a float32 */
        CHECK_STATUS(kv_codec_check(&codec), type == KV_CODEC_2BIT ? KV_INVALID : KV_OK);
        codec.threshold = 0.0;
        CHECK_STATUS(kv_codec_check(&codec), type == KV_CODEC_2BIT ? KV_INVALID : KV_OK);
        if (type == KV_CODEC_2BIT)
            CHECK_TEXT(kv_status_message(KV_INVALID), "the threshold of 2bit compression must be "
                                                      "above 0 as a float32, and 0 is not");
    }
}

static void names_and_types_belong_together(void)
{
    for (int type = KV_CODEC_NONE; type <= KV_CODEC_1BIT; type++)
        CHECK_EQ(kv_codec_type_parse(kv_codec_type_name((kv_codec_type_t)type)), type);
    CHECK_EQ(kv_codec_type_parse("2bits"), -1);
    CHECK_EQ(kv_codec_type_parse("2BIT"), -1);
    CHECK_EQ(kv_codec_type_parse(""), -1);
}

static const test_t TESTS[] = {
    TEST(all_instruction_sets_give_the_codes_of_the_rule),
    TEST(a_single_element_by_its_function_agrees),
    TEST(unknown_codes_decode_to_zero),
    TEST(more_elements_than_a_lane_counts_at_a_time),
    TEST(codes_are_padded_to_four_bytes),
    TEST(limits_are_told),
    TEST(names_and_types_belong_together),
};

TEST_MAIN(TESTS)
