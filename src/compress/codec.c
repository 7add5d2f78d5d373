/* Codecs: their names, their limits, and the way from whole arrays to the kernels. */
#include "compress/codec.h"

#include <float.h>
#include <math.h>
#include <string.h>

static const char *const NAMES[] = {
    [KV_CODEC_NONE] = "none",
    [KV_CODEC_2BIT] = "2bit",
    [KV_CODEC_1BIT] = "1bit",
};

int kv_codec_type_parse(const char *name)
{
    for (int type = 0; type < (int)(sizeof NAMES / sizeof NAMES[0]); type++)
        if (strcmp(NAMES[type], name) == 0)
            return type;
    return -1;
}

const char *kv_codec_type_name(kv_codec_type_t type)
{
    return NAMES[type];
}

/* One limit for all element types, so that a store can check before it knows its values. */
kv_status_t kv_codec_check(const kv_codec_t *codec)
{
    double threshold = codec->threshold;
    const char *name = NAMES[codec->type];
    if (codec->type == KV_CODEC_NONE)
        return KV_OK;
    if (!isfinite(threshold))
        return kv_fail(KV_INVALID, "the threshold of %s compression must be finite, not %g", name,
                       threshold);
    if (threshold > (double)FLT_MAX)
        return kv_fail(KV_INVALID,
                       "the threshold of %s compression must be at most %.9g, the largest float32, "
                       "not %.9g",
                       name, (double)FLT_MAX, threshold);
    if (threshold < 0.0)
        return kv_fail(KV_INVALID, "the threshold of %s compression must not be below 0, but is %g",
                       name, threshold);
    if (codec->type == KV_CODEC_2BIT && (float)threshold == 0.0f)
        return kv_fail(KV_INVALID,
                       "the threshold of 2bit compression must be above 0 as a float32, and %g is "
                       "not",
                       threshold);
    return KV_OK;
}

static int bits_of(kv_codec_type_t type)
{
    return type == KV_CODEC_2BIT ? 2 : 1;
}

int64_t kv_codec_bytes(kv_codec_type_t type, int64_t count)
{
    int64_t word = 32 / bits_of(type); /* elements of four bytes */
    return (count / word + (count % word != 0)) * 4;
}

static const kv_codec_kernels_t *kernels_of(const kv_kernels_t *kernels, kv_codec_type_t type)
{
    return type == KV_CODEC_2BIT ? &kernels->codec_2bit : &kernels->codec_1bit;
}

/* Bytes of an element of the residual. */
static int64_t wide_bytes(kv_dtype_t dtype)
{
    return dtype == KV_FLOAT64 ? 8 : 4;
}

int64_t kv_codec_encode(const kv_kernels_t *kernels, const kv_codec_t *codec, kv_dtype_t dtype,
                        int64_t begin, int64_t end, int64_t count, const void *gradient,
                        void *residual, uint8_t *codes)
{
    (void)count; /* the kernels write whole words, so the last one is padded */
    int bits = bits_of(codec->type);
    if (begin >= end)
        return 0;
    return kernels_of(kernels, codec->type)
        ->encode[dtype](end - begin, codec->threshold,
                        (const char *)gradient + begin * (int64_t)kv_dtype_bytes(dtype),
                        (char *)residual + begin * wide_bytes(dtype), codes + begin / 8 * bits);
}

void kv_codec_decode(const kv_kernels_t *kernels, const kv_codec_t *codec, kv_dtype_t dtype,
                     int64_t begin, int64_t end, const uint8_t *codes, bool first, void *block)
{
    if (begin < end)
        kernels_of(kernels, codec->type)
            ->decode[dtype](end - begin, codec->threshold, codes + begin / 8 * bits_of(codec->type),
                            first, block);
}

int64_t kv_codec_apply(const kv_kernels_t *kernels, const kv_codec_t *codec, kv_dtype_t dtype,
                       int64_t begin, int64_t end, const void *gradient, void *residual, bool first,
                       void *block)
{
    if (begin >= end)
        return 0;
    return kernels_of(kernels, codec->type)
        ->apply[dtype](end - begin, codec->threshold,
                       (const char *)gradient + begin * (int64_t)kv_dtype_bytes(dtype),
                       (char *)residual + begin * wide_bytes(dtype), first, block);
}
