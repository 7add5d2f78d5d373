/* Sums, casts and codecs of a device against those of the CPU, bit for bit. */
#include "gpu.h"

#include "compress/codec.h"

enum { JOBS = 10, SOURCES = 5, OUTPUTS = 3, LARGE = 70001 };

static const int64_t counts[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 255, 256, 1000, 4099};

static int64_t any_count(void)
{
    return counts[between(0, (int64_t)(sizeof counts / sizeof counts[0]) - 1)];
}

/* ---------------------------------------------------------------------------------------- sums */

/* Arrays of one job, and what the table is given of them. */
typedef struct sum_case {
    int num_src, num_dst;
    array_t src[SOURCES], dst[OUTPUTS];
    const void *from[SOURCES];
    void *to[OUTPUTS];
} sum_case_t;

/* A job for the device, done here by the CPU. The first destination may be one of the sources. */
static kv_device_sum_t sum_job(sum_case_t *c, kv_dtype_t dtype, int64_t count)
{
    const void *from[SOURCES];
    void *to[OUTPUTS];
    bool aligned = between(0, 1) == 0;
    c->num_src = (int)between(1, SOURCES);
    c->num_dst = (int)between(1, OUTPUTS);
    for (int i = 0; i < c->num_src; i++) {
        c->src[i] = array_random(dtype, count, 8, aligned ? 0 : any_shift(dtype));
        c->from[i] = c->src[i].device;
        from[i] = c->src[i].host;
    }
    for (int i = 0; i < c->num_dst; i++) {
        c->dst[i] = array_random(dtype, count, 8, aligned ? 0 : any_shift(dtype));
        if (i == 0 && between(0, 1) == 0)
            c->dst[0] = c->src[between(0, c->num_src - 1)];
        c->dst[i].exact = c->num_src == 1;
        c->to[i] = c->dst[i].device;
        to[i] = c->dst[i].host;
    }
    cpu()->sum[dtype](0, count, c->num_src, from, c->num_dst, to, false);
    return (kv_device_sum_t){count, c->num_src, c->num_dst, c->from, c->to};
}

static void check_sums(int num_cases, sum_case_t *cases)
{
    for (int j = 0; j < num_cases; j++) {
        for (int i = 0; i < cases[j].num_src; i++)
            array_fetch(&cases[j].src[i]);
        for (int i = 0; i < cases[j].num_dst; i++)
            array_fetch(&cases[j].dst[i]);
    }
    gpu_wait();
    for (int j = 0; j < num_cases; j++) {
        for (int i = 0; i < cases[j].num_dst; i++)
            array_same(&cases[j].dst[i], "a sum");
        for (int i = 0; i < cases[j].num_src; i++)
            array_same(&cases[j].src[i], "a source");
    }
    gpu_free_arrays();
}

static void sums(void)
{
    for (int dtype = 0; dtype < KV_DTYPE_COUNT; dtype++) {
        static sum_case_t cases[JOBS];
        kv_device_sum_t jobs[JOBS];
        for (int j = 0; j < JOBS; j++)
            jobs[j] = sum_job(&cases[j], (kv_dtype_t)dtype, j == 0 ? LARGE : any_count());
        OK(api.sum(0, gpu_stream, (kv_dtype_t)dtype, (kv_dtype_t)dtype, JOBS, jobs, sentence));
        /* All of it was read before the call returned. */
        memset(jobs, 0xff, sizeof jobs);
        for (int j = 0; j < JOBS; j++) {
            memset(cases[j].from, 0xff, sizeof cases[j].from);
            memset(cases[j].to, 0xff, sizeof cases[j].to);
        }
        check_sums(JOBS, cases);
    }
}

static void sums_are_those_of_the_cpu(void)
{
    gpu_each_seed(1, sums);
}

static void widest(void)
{
    enum { COUNT = 37 };
    array_t src[KV_DEVICE_SOURCES], dst[KV_DEVICE_OUTPUTS];
    const void *from[KV_DEVICE_SOURCES], *host_from[KV_DEVICE_SOURCES];
    void *to[KV_DEVICE_OUTPUTS], *host_to[KV_DEVICE_OUTPUTS];
    for (int i = 0; i < KV_DEVICE_SOURCES; i++) {
        src[i] = array_random(KV_FLOAT16, COUNT, 0, 0);
        from[i] = src[i].device;
        host_from[i] = src[i].host;
    }
    for (int i = 0; i < KV_DEVICE_OUTPUTS; i++) {
        dst[i] = array_of(KV_FLOAT16, COUNT, NULL, 0);
        to[i] = dst[i].device;
        host_to[i] = dst[i].host;
    }
    kv_device_sum_t job = {COUNT, KV_DEVICE_SOURCES, KV_DEVICE_OUTPUTS, from, to};
    kv_device_sum_t jobs[] = {job, job};
    cpu()->sum[KV_FLOAT16](0, COUNT, KV_DEVICE_SOURCES, host_from, KV_DEVICE_OUTPUTS, host_to,
                           false);
    OK(api.sum(0, gpu_stream, KV_FLOAT16, KV_FLOAT16, 2, jobs, sentence));
    for (int i = 0; i < KV_DEVICE_OUTPUTS; i++)
        array_fetch(&dst[i]);
    gpu_wait();
    for (int i = 0; i < KV_DEVICE_OUTPUTS; i++)
        array_same(&dst[i], "a sum of many");
}

static void a_job_has_as_many_arrays_as_the_table_says(void)
{
    gpu_each_seed(1, widest);
}

/* --------------------------------------------------------------------------------------- casts */

/* Every number of the narrow type; or floats beside each of them and halfway to the next. */
static void cast_values(kv_dtype_t narrow, bool widens, void *values)
{
    static const int32_t beside[] = {0, 1, -1, 0xfff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001};
    for (int i = 0; i < 1 << 16; i++) {
        uint16_t half = (uint16_t)i;
        uint32_t bits;
        ((uint16_t *)values)[i] = half;
        if (widens)
            continue;
        cpu()->float32_from[narrow](1, &half, (float *)&bits);
        ((uint32_t *)values)[i] = bits + (uint32_t)beside[between(0, 8)];
    }
}

/* The sum of `num_src` arrays of one type in the other; of one array that is a cast. */
static void cast(kv_dtype_t narrow, bool widens, int num_src)
{
    enum { COUNT = 1 << 16 };
    kv_dtype_t from = widens ? narrow : KV_FLOAT32, to = widens ? KV_FLOAT32 : narrow;
    array_t src[SOURCES], dst = array_of(to, COUNT, NULL, any_shift(to));
    const void *sources[SOURCES], *host_sources[SOURCES];
    for (int i = 0; i < num_src; i++) {
        void *values = host_new(COUNT * 4);
        if (i == 0)
            cast_values(narrow, widens, values);
        else
            fill(from, COUNT, 8, values);
        src[i] = array_of(from, COUNT, values, any_shift(from));
        sources[i] = src[i].device;
        host_sources[i] = src[i].host;
    }
    float *wide = host_new(COUNT * 4);
    cpu()->sum_wide[from](0, COUNT, num_src, host_sources, wide);
    if (widens)
        memcpy(dst.host, wide, COUNT * 4);
    else
        cpu()->float32_to[narrow](COUNT, wide, dst.host);
    kv_device_sum_t job = {COUNT, num_src, 1, sources, &dst.device};
    OK(api.sum(0, gpu_stream, from, to, 1, &job, sentence));
    array_fetch(&dst);
    gpu_wait();
    array_same(&dst, widens ? "a wider type" : "a narrower type");
    gpu_free_arrays();
}

static void casts(void)
{
    for (int narrow = KV_FLOAT16; narrow <= KV_BFLOAT16; narrow++)
        for (int num_src = 1; num_src <= 3; num_src += 2) {
            cast((kv_dtype_t)narrow, true, num_src);
            cast((kv_dtype_t)narrow, false, num_src);
        }
}

static void casts_are_those_of_the_cpu(void)
{
    gpu_each_seed(1, casts);
}

/* -------------------------------------------------------------------------------------- codecs */

static kv_codec_t any_codec(int bits)
{
    double threshold = between(0, 1) == 0 ? 0.5 : 0.05 + fabs(number());
    return (kv_codec_t){bits == 2 ? KV_CODEC_2BIT : KV_CODEC_1BIT,
                        bits == 1 && between(0, 2) == 0 ? 0 : threshold};
}

static void encode(kv_dtype_t dtype, int bits)
{
    array_t gradient[JOBS], residual[JOBS], codes[JOBS], unfinite[JOBS];
    kv_device_encode_t jobs[JOBS];
    const int64_t before = 5;
    for (int j = 0; j < JOBS; j++) {
        kv_codec_t codec = any_codec(bits);
        int64_t count = j == 0 ? LARGE : any_count();
        gradient[j] = array_random(dtype, count, 16, any_shift(dtype));
        residual[j] = array_random(kv_dtype_wide(dtype), count, 16, any_shift(dtype));
        codes[j] = array_of(KV_UINT8, kv_codec_bytes(codec.type, count), NULL, between(0, 9));
        unfinite[j] = array_of(KV_INT64, 1, &before, 0);
        jobs[j] = (kv_device_encode_t){
            count,           codec.threshold,   gradient[j].device, residual[j].device,
            codes[j].device, unfinite[j].device};
        /* Twice: the second time begins with what the first has left. */
        for (int push = 0; push < 2; push++)
            *(int64_t *)unfinite[j].host +=
                kv_codec_encode(cpu(), &codec, dtype, 0, count, count, gradient[j].host,
                                residual[j].host, codes[j].host);
    }
    for (int push = 0; push < 2; push++)
        OK(api.encode(0, gpu_stream, dtype, bits, JOBS, jobs, sentence));
    for (int j = 0; j < JOBS; j++) {
        array_fetch(&residual[j]);
        array_fetch(&codes[j]);
        array_fetch(&unfinite[j]);
    }
    gpu_wait();
    for (int j = 0; j < JOBS; j++) {
        array_same(&codes[j], "codes");
        array_same(&residual[j], "a residual");
        array_same(&unfinite[j], "how many are not finite");
    }
    gpu_free_arrays();
}

static void encodes(void)
{
    for (int dtype = KV_FLOAT64; dtype <= KV_BFLOAT16; dtype++)
        for (int bits = 1; bits <= 2; bits++)
            encode((kv_dtype_t)dtype, bits);
}

static void codes_and_residuals_are_those_of_the_cpu(void)
{
    gpu_each_seed(1, encodes);
}

/* block = what the source stands for, or block + that. */
static void add_source(kv_dtype_t dtype, const kv_device_coded_t *source, int64_t count,
                       const void *data, bool first, void *block)
{
    bool is_double = dtype == KV_FLOAT64;
    if (source->bits != 0) {
        kv_codec_t codec = {source->bits == 2 ? KV_CODEC_2BIT : KV_CODEC_1BIT, source->threshold};
        kv_codec_decode(cpu(), &codec, dtype, 0, count, data, first, block);
        return;
    }
    void *plain = first ? block : host_new(count * 8);
    cpu()->sum_wide[dtype](0, count, 1, &data, plain);
    for (int64_t i = 0; !first && i < count; i++)
        if (is_double)
            ((double *)block)[i] += ((double *)plain)[i];
        else
            ((float *)block)[i] += ((float *)plain)[i];
}

static void decode(kv_dtype_t dtype, kv_dtype_t to)
{
    array_t dst[JOBS][OUTPUTS];
    kv_device_coded_t sources[JOBS][SOURCES];
    void *results[JOBS][OUTPUTS];
    kv_device_decode_t jobs[JOBS];
    for (int j = 0; j < JOBS; j++) {
        int64_t count = j == 0 ? LARGE : any_count();
        int num_src = (int)between(1, SOURCES), num_dst = (int)between(1, OUTPUTS);
        void *block = host_new(count * 8);
        for (int i = 0; i < num_src; i++) {
            kv_codec_t codec = any_codec((int)between(1, 2));
            bool plain = between(0, 3) == 0;
            int64_t bytes = kv_codec_bytes(codec.type, count);
            array_t data = plain ? array_random(dtype, count, 16, any_shift(dtype))
                                 : array_random(KV_UINT8, bytes, 0, between(0, 5));
            int bits = plain ? 0 : codec.type == KV_CODEC_2BIT ? 2 : 1;
            sources[j][i] = (kv_device_coded_t){data.device, bits, codec.threshold};
            add_source(dtype, &sources[j][i], count, data.host, i == 0, block);
        }
        for (int i = 0; i < num_dst; i++) {
            dst[j][i] = array_of(to, count, NULL, any_shift(to));
            results[j][i] = dst[j][i].device;
            if (kv_dtype_is_narrow(to))
                cpu()->float32_to[to](count, block, dst[j][i].host);
            else
                memcpy(dst[j][i].host, block, (size_t)array_bytes(&dst[j][i]));
        }
        jobs[j] = (kv_device_decode_t){count, num_src, num_dst, sources[j], results[j]};
    }
    OK(api.decode(0, gpu_stream, dtype, to, JOBS, jobs, sentence));
    for (int j = 0; j < JOBS; j++)
        for (int i = 0; i < jobs[j].num_dst; i++)
            array_fetch(&dst[j][i]);
    gpu_wait();
    for (int j = 0; j < JOBS; j++)
        for (int i = 0; i < jobs[j].num_dst; i++)
            array_same(&dst[j][i], "a decoded sum");
    gpu_free_arrays();
}

static void decodes(void)
{
    for (int dtype = KV_FLOAT64; dtype <= KV_BFLOAT16; dtype++) {
        decode((kv_dtype_t)dtype, (kv_dtype_t)dtype);
        decode((kv_dtype_t)dtype, kv_dtype_wide((kv_dtype_t)dtype));
    }
}

static void decoded_sums_are_those_of_the_cpu(void)
{
    gpu_each_seed(1, decodes);
}

static const test_t tests[] = {
    TEST(sums_are_those_of_the_cpu),         TEST(a_job_has_as_many_arrays_as_the_table_says),
    TEST(casts_are_those_of_the_cpu),        TEST(codes_and_residuals_are_those_of_the_cpu),
    TEST(decoded_sums_are_those_of_the_cpu),
};
TEST_MAIN(tests)
