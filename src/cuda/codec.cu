/* Gradient compression: the elements' arithmetic is in kernels/codec.h, the layout of codes in
 * compress/codec.h. A thread makes one byte of codes at a time, or takes a tile out of one. */
#include "cuda/batch.h"
#include "kernels/codec.h"

namespace
{

/* ----------------------------------------------------------------------------------- encode */

struct encode_record {
    int64_t count;
    double threshold;
    uint64_t gradient, residual, codes, unfinite;
    int64_t aligned;
};

KV_INSIDE unsigned quantise(int bits, float gradient, float threshold, float *residual)
{
    float value;
    return bits == 2 ? kv_quantise_2bit_float32(gradient, threshold, residual, &value)
                     : kv_quantise_1bit_float32(gradient, threshold, residual, &value);
}

KV_INSIDE unsigned quantise(int bits, double gradient, double threshold, double *residual)
{
    double value;
    return bits == 2 ? kv_quantise_2bit_float64(gradient, threshold, residual, &value)
                     : kv_quantise_1bit_float64(gradient, threshold, residual, &value);
}

template <typename T, int BITS>
__global__ void encode_kernel(const __grid_constant__ kv_batch batch)
{
    typedef typename T::wide real;
    typedef typename T::wide_type wide_t;
    enum {
        PER_BYTE = 8 / BITS,
        TILE = kv_tile<real>::COUNT,
        N = (int)TILE < (int)PER_BYTE ? (int)TILE : (int)PER_BYTE,
        PER_WORD = 32 / BITS
    };
    const kv_place place = kv_find_place(batch);
    const encode_record job = kv_record_of<encode_record>(place.record);
    const int64_t bytes = (job.count + PER_WORD - 1) / PER_WORD * 4;
    unsigned long long unfinite = 0;
    for (int64_t at = place.block * KV_THREADS + threadIdx.x; at < bytes;
         at += place.blocks * KV_THREADS) {
        unsigned byte = 0;
        KV_UNROLL
        for (int part = 0; part < PER_BYTE; part += N) {
            int64_t i = at * PER_BYTE + part;
            real gradient[N], residual[N];
            kv_load<T, N>((int)job.aligned, (const char *)job.gradient, i, job.count, gradient);
            kv_load<wide_t, N>((int)job.aligned, (const char *)job.residual, i, job.count,
                               residual);
            KV_UNROLL
            for (int k = 0; k < N; k++) {
                unsigned code = quantise(BITS, gradient[k], (real)job.threshold, residual + k);
                if (i + k >= job.count)
                    continue;
                byte |= code << (8 - BITS - (part + k) * BITS);
                unfinite += residual[k] - residual[k] != 0;
            }
            kv_store<wide_t, N>((int)job.aligned, (char *)job.residual, i, job.count, residual);
        }
        ((uint8_t *)job.codes)[at] = (uint8_t)byte;
    }
    if (unfinite != 0)
        atomicAdd((unsigned long long *)job.unfinite, unfinite);
}

template <int BITS> struct encoder {
    template <typename T>
    static void launch(cudaStream_t stream, unsigned blocks, const kv_batch &batch)
    {
        KV_LAUNCH((encode_kernel<T, BITS>), blocks, KV_THREADS, stream, batch);
    }
};

kv_launch_t *encode_of(kv_dtype_t dtype, int bits)
{
    return bits == 2   ? KV_LAUNCH_FOR(dtype, encoder<2>::launch)
           : bits == 1 ? KV_LAUNCH_FOR(dtype, encoder<1>::launch)
                       : NULL;
}

/* ----------------------------------------------------------------------------------- decode */

struct decode_record {
    int64_t count;
    int16_t num_src, num_dst, aligned;
};

struct decode_source {
    uint64_t data;
    double threshold;
    int64_t bits;
};

KV_INSIDE float restore(int bits, unsigned code, float threshold)
{
    return bits == 2 ? kv_restore_2bit_float32(code, threshold) : kv_restore_1bit_float32(code);
}

KV_INSIDE double restore(int bits, unsigned code, double threshold)
{
    return bits == 2 ? kv_restore_2bit_float64(code, threshold) : kv_restore_1bit_float64(code);
}

/* What elements [i, i + N) stand for; they lie in one byte of the codes. */
template <typename T, int N>
KV_INSIDE void load_source(const decode_source &source, int aligned, int64_t i, int64_t count,
                           typename T::wide *value)
{
    typedef typename T::wide real;
    const int bits = (int)source.bits;
    if (bits == 0) {
        kv_load<T, N>(aligned, (const char *)source.data, i, count, value);
        return;
    }
    const int per_byte = 8 / bits;
    const unsigned byte = ((const uint8_t *)source.data)[i / per_byte];
    KV_UNROLL
    for (int k = 0; k < N; k++) {
        int shift = 8 - bits - ((int)(i % per_byte) + k) * bits;
        value[k] = restore(bits, byte >> shift & ((1u << bits) - 1), (real)source.threshold);
    }
}

template <typename T, typename TO>
__global__ void decode_kernel(const __grid_constant__ kv_batch batch)
{
    typedef typename T::wide real;
    enum { N = kv_tile<real>::COUNT };
    const kv_place place = kv_find_place(batch);
    const decode_record job = kv_record_of<decode_record>(place.record);
    const uint64_t *src = place.record + kv_words_of<decode_record>::COUNT;
    const uint64_t *dst = src + job.num_src * kv_words_of<decode_source>::COUNT;
    const int64_t step = place.blocks * KV_THREADS * N;
    for (int64_t i = (place.block * KV_THREADS + threadIdx.x) * N; i < job.count; i += step) {
        real sum[N];
        load_source<T, N>(kv_record_of<decode_source>(src), job.aligned, i, job.count, sum);
        for (int j = 1; j < job.num_src; j++) {
            real more[N];
            load_source<T, N>(
                kv_record_of<decode_source>(src + j * kv_words_of<decode_source>::COUNT),
                job.aligned, i, job.count, more);
            KV_UNROLL
            for (int k = 0; k < N; k++)
                sum[k] += more[k];
        }
        for (int j = 0; j < job.num_dst; j++)
            kv_store<TO, N>(job.aligned, (char *)dst[j], i, job.count, sum);
    }
}

template <typename T>
void decode_to_itself(cudaStream_t stream, unsigned blocks, const kv_batch &batch)
{
    KV_LAUNCH((decode_kernel<T, T>), blocks, KV_THREADS, stream, batch);
}

template <typename T>
void decode_to_wide(cudaStream_t stream, unsigned blocks, const kv_batch &batch)
{
    KV_LAUNCH((decode_kernel<T, typename T::wide_type>), blocks, KV_THREADS, stream, batch);
}

kv_launch_t *decode_of(kv_dtype_t dtype, kv_dtype_t to)
{
    return to == dtype                  ? KV_LAUNCH_FOR(dtype, decode_to_itself)
           : to == kv_dtype_wide(dtype) ? KV_LAUNCH_FOR(dtype, decode_to_wide)
                                        : NULL;
}

kv_device_code_t add_decode(kv_packer *packer, kv_dtype_t dtype, kv_dtype_t to,
                            const kv_device_decode_t *job)
{
    const int n = kv_tile_of(dtype), head = kv_words_of<decode_record>::COUNT;
    const int each = kv_words_of<decode_source>::COUNT, results = head + each * job->num_src;
    kv_aligned_t aligned =
        kv_aligned_for(KV_ALIGNED_TILES, job->num_dst, job->dst, kv_bytes_of(to), n);
    for (int i = 0; i < job->num_src; i++)
        if (job->src[i].bits == 0)
            aligned = kv_aligned_for(aligned, 1, &job->src[i].data, kv_bytes_of(dtype), n);
    decode_record record = {job->count, (int16_t)job->num_src, (int16_t)job->num_dst,
                            (int16_t)aligned};
    uint64_t *words;
    KV_DEVICE_TRY(
        kv_packer_add(packer, kv_blocks_for(job->count, n), results + job->num_dst, &words));
    memcpy(words, &record, sizeof record);
    for (int i = 0; i < job->num_src; i++) {
        decode_source source = {(uint64_t)job->src[i].data, job->src[i].threshold,
                                job->src[i].bits};
        memcpy(words + head + each * i, &source, sizeof source);
    }
    memcpy(words + results, job->dst, (size_t)job->num_dst * 8);
    return KV_DEVICE_OK;
}

} // namespace

kv_device_code_t kv_cuda_encode(int device, void *stream, kv_dtype_t dtype, int bits, int num_jobs,
                                const kv_device_encode_t *jobs, char *sentence)
{
    kv_launch_t *launch = encode_of(dtype, bits);
    if (launch == NULL)
        return kv_device_refuse(sentence, "there are no codes of %d bits for type %d", bits,
                                (int)dtype);
    for (int i = 0; i < num_jobs; i++)
        KV_DEVICE_TRY(kv_check_job("encode", i, jobs[i].count, 1, 1, 1, 1, sentence));
    kv_packer packer;
    KV_DEVICE_TRY(kv_packer_start(&packer, device, stream, launch, sentence));
    for (int i = 0; i < num_jobs; i++) {
        const kv_device_encode_t *job = jobs + i;
        if (job->count == 0)
            continue;
        const int tile = kv_tile_of(dtype), wide = kv_wide_bytes_of(dtype);
        const void *const residuals[] = {job->residual};
        kv_aligned_t aligned =
            kv_aligned_for(KV_ALIGNED_TILES, 1, &job->gradient, kv_bytes_of(dtype), tile);
        aligned = kv_aligned_for(aligned, 1, residuals, wide, tile);
        encode_record record = {job->count,
                                job->threshold,
                                (uint64_t)job->gradient,
                                (uint64_t)job->residual,
                                (uint64_t)job->codes,
                                (uint64_t)job->unfinite,
                                aligned};
        uint64_t *words;
        KV_DEVICE_TRY(kv_packer_add(&packer, kv_blocks_for(job->count + 32, 8 / bits),
                                    kv_words_of<encode_record>::COUNT, &words));
        memcpy(words, &record, sizeof record);
    }
    return kv_packer_end(&packer);
}

kv_device_code_t kv_cuda_decode(int device, void *stream, kv_dtype_t dtype, kv_dtype_t to,
                                int num_jobs, const kv_device_decode_t *jobs, char *sentence)
{
    kv_launch_t *launch = decode_of(dtype, to);
    if (launch == NULL)
        return kv_device_refuse(sentence, "codes for type %d are not decoded to type %d",
                                (int)dtype, (int)to);
    for (int i = 0; i < num_jobs; i++) {
        const kv_device_decode_t *job = jobs + i;
        KV_DEVICE_TRY(
            kv_check_job("decode", i, job->count, job->num_src, 1, job->num_dst, 1, sentence));
        for (int j = 0; j < job->num_src; j++)
            if (job->src[j].bits < 0 || job->src[j].bits > 2)
                return kv_device_refuse(sentence, "decode, job %d: codes have 1 or 2 bits, not %d",
                                        i, job->src[j].bits);
    }
    kv_packer packer;
    KV_DEVICE_TRY(kv_packer_start(&packer, device, stream, launch, sentence));
    for (int i = 0; i < num_jobs; i++)
        if (jobs[i].count > 0)
            KV_DEVICE_TRY(add_decode(&packer, dtype, to, jobs + i));
    return kv_packer_end(&packer);
}
