/* Values that go out compressed: slice by slice, each with the threshold in front of its codes. */
#include "ps/client_internal.h"
#include <stdatomic.h>

size_t kv_remote_coded_stride(const kv_remote_t *remote, kv_codec_type_t codec)
{
    return kv_wire_value_bytes(kv_wire_coded_bytes(codec, remote->dtype, remote->slice_bytes));
}

size_t kv_remote_coded_bytes(const kv_remote_t *remote, kv_codec_type_t codec)
{
    return remote->num_slices * kv_remote_coded_stride(remote, codec);
}

typedef struct encoding {
    const kv_remote_t *remote;
    const kv_host_t *host;
    const kv_codec_t *codec;
    const char *value;
    char *residual;
    unsigned char *out;
    size_t stride;
    _Atomic int64_t unfinite;
} encoding_t;

static void encode_slice(void *context, int64_t slice)
{
    encoding_t *encoding = context;
    const kv_remote_t *remote = encoding->remote;
    size_t item = kv_dtype_bytes(remote->dtype),
           wide = kv_dtype_bytes(kv_dtype_wide(remote->dtype));
    size_t offset = (size_t)slice * remote->slice_bytes;
    size_t bytes = remote->bytes - offset;
    if (bytes > remote->slice_bytes)
        bytes = remote->slice_bytes;
    int64_t count = (int64_t)(bytes / item);
    unsigned char *out = encoding->out + (size_t)slice * encoding->stride;
    kv_wire_put_threshold(encoding->codec->threshold, out);
    int64_t unfinite =
        kv_codec_encode(encoding->host->kernels, encoding->codec, remote->dtype, 0, count, count,
                        encoding->value + offset, encoding->residual + offset / item * wide,
                        out + KV_WIRE_THRESHOLD_BYTES);
    atomic_fetch_add(&encoding->unfinite, unfinite);
}

int64_t kv_remote_encode(const kv_remote_t *remote, const kv_host_t *host, const kv_codec_t *codec,
                         const void *value, void *residual, void *out)
{
    encoding_t encoding = {.remote = remote,
                           .host = host,
                           .codec = codec,
                           .value = value,
                           .residual = residual,
                           .out = out,
                           .stride = kv_remote_coded_stride(remote, codec->type)};
    if (remote->num_slices == 1)
        encode_slice(&encoding, 0);
    else
        kv_team_run(host->team, host->num_threads, remote->num_slices, encode_slice, &encoding);
    return atomic_load(&encoding.unfinite);
}
