/* Gradient compression with error feedback: what a codec is, apart from where it runs.
 *
 * Per element, in float32 (float64 for float64 gradients): residual += gradient; then
 *   2bit  residual >= threshold: code 11, residual -= threshold; residual <= -threshold: code 10,
 *         residual += threshold; else code 00. Decoded: +threshold, -threshold, 0.
 *   1bit  residual > threshold: bit 1, residual -= 1; else bit 0, residual += 1. Decoded: +1, -1.
 * Element 0 of a byte lies in its highest bits; codes are padded with zeros to a multiple of 4
 * bytes. (1-Bit SGD, Seide et al. 2014, is where error feedback comes from.)
 */
#ifndef KV_COMPRESS_CODEC_H
#define KV_COMPRESS_CODEC_H

#include "array/dtype.h"
#include "base/status.h"
#include "kernels/kernels.h"
#include <stdint.h>

typedef enum kv_codec_type { KV_CODEC_NONE, KV_CODEC_2BIT, KV_CODEC_1BIT } kv_codec_type_t;

typedef struct kv_codec {
    kv_codec_type_t type;
    double threshold;
} kv_codec_t;

/* "none", "2bit", "1bit"; -1 for another text. */
int kv_codec_type_parse(const char *name);
const char *kv_codec_type_name(kv_codec_type_t type);

/* KV_INVALID for a threshold that is not finite, negative, or for 2bit zero (also once rounded to
 * float32); names value and limit. */
KV_MUST_CHECK kv_status_t kv_codec_check(const kv_codec_t *codec);

/* Bytes of the codes of `count` elements: a multiple of 4. */
int64_t kv_codec_bytes(kv_codec_type_t type, int64_t count);

/* Elements may be cut only at multiples of this many, so that codes begin at a byte. */
enum { KV_CODEC_UNIT = 32 };

/* codes[] of gradient[begin, end), `begin` a multiple of KV_CODEC_UNIT; pointers are to the whole
 * arrays. Returns how many residuals are not finite afterwards. `residual` is in the wide type of
 * `dtype` (kernels.h). Padding of the last bytes is written when `end` is the last element, that is
 * when end == count. */
int64_t kv_codec_encode(const kv_kernels_t *kernels, const kv_codec_t *codec, kv_dtype_t dtype,
                        int64_t begin, int64_t end, int64_t count, const void *gradient,
                        void *residual, uint8_t *codes);

/* block[i - begin] = (first ? 0 : block[i - begin]) + decoded codes[i], in the wide type of
 * `dtype`; `begin` a multiple of KV_CODEC_UNIT. */
void kv_codec_decode(const kv_kernels_t *kernels, const kv_codec_t *codec, kv_dtype_t dtype,
                     int64_t begin, int64_t end, const uint8_t *codes, bool first, void *block);

/* Both in one pass, with no codes in between: what a merge in one process does. `begin` is any
 * element. Returns how many residuals are not finite afterwards. */
int64_t kv_codec_apply(const kv_kernels_t *kernels, const kv_codec_t *codec, kv_dtype_t dtype,
                       int64_t begin, int64_t end, const void *gradient, void *residual, bool first,
                       void *block);

#endif
