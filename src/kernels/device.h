/* What a plug-in for devices gives to the core: one table of functions, filled by the one symbol
 * that it exports. Compiles as C17, C++17 and CUDA.
 *
 * Every function that can fail returns a code and, unless that is KV_DEVICE_OK, writes a sentence
 * of at most KV_DEVICE_SENTENCE bytes (with its end) to `sentence`; out-parameters change only on
 * KV_DEVICE_OK. `device` counts from 0. Streams and events are the platform's own handles
 * (cudaStream_t, cudaEvent_t), so a stream may be somebody else's; it must be of the device that is
 * named with it.
 *
 * All may be called by several threads at once. Each makes its device the current one of the
 * calling thread and leaves it so: a caller who has another one current sets it again. Nothing here
 * waits: work is put on a stream, and whoever needs the end of it asks an event, under a deadline
 * of its own. What is described in host memory (jobs, lists of pointers, factors) is read before
 * the call returns; the arrays themselves must live until the stream has passed.
 */
#ifndef KV_KERNELS_DEVICE_H
#define KV_KERNELS_DEVICE_H

#include "array/dtype.h"
#include "kernels/step.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    KV_DEVICE_ABI = 1,
    KV_DEVICE_SENTENCE = 512,
    KV_DEVICE_NAME = 64,
    KV_DEVICE_STATES = 3,   /* the most that an optimizer has for a weight */
    KV_DEVICE_SOURCES = 96, /* the most arrays that one job adds up */
    KV_DEVICE_OUTPUTS = 64, /* the most arrays that one job writes its result to */
};

typedef enum kv_device_code {
    KV_DEVICE_OK,
    KV_DEVICE_NONE,      /* no device, or no driver for one */
    KV_DEVICE_NO_MEMORY, /* the device lives on */
    KV_DEVICE_DEAD,      /* for the rest of this process; other devices live on */
    KV_DEVICE_REFUSED,   /* the call was wrong, or cannot be done; nothing was begun */
} kv_device_code_t;

typedef struct kv_device_info {
    char name[KV_DEVICE_NAME];
    int64_t bytes; /* of its memory */
    int major, minor, processors;
    int driver, runtime; /* versions: 12040 is 12.4 */
} kv_device_info_t;

typedef enum kv_device_way {
    KV_DEVICE_TO_DEVICE, /* from the host; neither this nor the next waits if it is pinned */
    KV_DEVICE_TO_HOST,
    KV_DEVICE_WITHIN, /* one device's memory */
} kv_device_way_t;

/* ------------------------------------------------------------------------------------ jobs
 *
 * Every kernel takes a list of jobs, one for each array; small ones share a launch. Jobs of one
 * call are independent: what one writes no other reads or writes. A job of count 0 is none. Arrays
 * lie in the memory of the device. Pointers that are not aligned for 16 bytes are slower.
 *
 * The arithmetic is that of kernels/kernels.h, bit for bit, but for the payloads of NaNs.
 */

/* dst[…][i] = src[0][i] + src[1][i] + …; a destination may be one of the sources. No alignment is
 * needed. One source of the same type is copied, every bit. */
typedef struct kv_device_sum {
    int64_t count;
    int num_src, num_dst; /* both 1 or more */
    const void *const *src;
    void *const *dst;
} kv_device_sum_t;

/* Gradient = sum of the sources; the element function on weight and states; then every dst becomes
 * the weight. As kv_host_update of comm/update.h. Weight, master and states are aligned for their
 * elements and overlap nothing else; a dst may be a source. */
typedef struct kv_device_step {
    int64_t count;
    void *weight;
    float *master;                  /* of a 16-bit weight, or NULL: the weight itself is read */
    void *states[KV_DEVICE_STATES]; /* as many as the kind has, in the wide type */
    const void *factors;            /* kv_factors_t_float, for float64 weights …_double */
    int num_src;                    /* 0: the gradient is 0 */
    bool wide;                      /* the sources are of the wide type, not of the weight's */
    const void *const *src;
    int num_dst;
    void *const *dst;
    int64_t row_count; /* group_adagrad: elements of a row, of which count is a multiple; its
                          history, a number for each row, is states[0], and the kernel makes p */
} kv_device_step_t;

/* *out = the sum of the squares (0 of no elements) of the sum of the sources, in the order that
 * comm/ has for norms (update_internal.h), whatever the device. */
typedef struct kv_device_squares {
    int64_t count;
    int num_src;
    const void *const *src;
    const void *waiting; /* LBSGD: of (waiting + sum) / batch; in the wide type, or NULL */
    double batch;
    bool rounded; /* 16-bit sources: each square is rounded to their type */
    double *room; /* kv_device_room(count) of them, on the device */
    double *out;  /* on the device or pinned */
} kv_device_squares_t;

/* As kv_codec_encode of comm/'s codec: gradient and residual to codes, with the padding of the last
 * four bytes. Adds to *unfinite, on the device, how many residuals are not finite afterwards. */
typedef struct kv_device_encode {
    int64_t count;
    double threshold;
    const void *gradient;
    void *residual; /* in the wide type */
    uint8_t *codes;
    uint64_t *unfinite;
} kv_device_encode_t;

/* A gradient that comes in codes of 1 or 2 bits, or (0) plain. */
typedef struct kv_device_coded {
    const void *data;
    int bits;
    double threshold;
} kv_device_coded_t;

/* dst[…] = the sum of what the sources stand for, rounded once. */
typedef struct kv_device_decode {
    int64_t count;
    int num_src, num_dst;
    const kv_device_coded_t *src;
    void *const *dst;
} kv_device_decode_t;

/* Elements whose squares one block of threads adds up, and what a job needs room for. */
enum { KV_DEVICE_SQUARES = 1 << 14 };

static inline int64_t kv_device_room(int64_t count)
{
    return (count + KV_DEVICE_SQUARES - 1) / KV_DEVICE_SQUARES;
}

/* ------------------------------------------------------------------------------- the table */

typedef struct kv_device_api {
    uint32_t abi;     /* KV_DEVICE_ABI */
    uint32_t bytes;   /* sizeof(kv_device_api_t) */
    int num_devices;  /* 1 or more */
    const char *name; /* "cuda" */

    kv_device_code_t (*info)(int device, kv_device_info_t *out, char *sentence);
    /* Whether copies go straight from one device to the other, which it switches on if it can be.
     */
    kv_device_code_t (*peer)(int device, int other, bool *direct, char *sentence);
    /* Whose memory this is: the device, or -1 for the host's, also if it is unknown. */
    kv_device_code_t (*owner)(const void *pointer, int *device, char *sentence);
    /* Which device is the calling thread's current one, and to make another that. */
    kv_device_code_t (*current)(int *device, char *sentence);
    kv_device_code_t (*make_current)(int device, char *sentence);

    /* A stream of its own waits for no other stream, the legacy default one included. */
    kv_device_code_t (*stream_new)(int device, void **out, char *sentence);
    kv_device_code_t (*stream_free)(int device, void *stream, char *sentence);
    /* What is put on the stream later runs after the event as it was recorded last. The event may
     * be another device's. */
    kv_device_code_t (*stream_wait)(int device, void *stream, void *event, char *sentence);

    kv_device_code_t (*event_new)(int device, void **out, char *sentence);
    kv_device_code_t (*event_free)(int device, void *event, char *sentence);
    kv_device_code_t (*event_record)(int device, void *event, void *stream, char *sentence);
    /* Whether the event has passed; one that was never recorded has. A failure of the work before
     * it is reported here. */
    kv_device_code_t (*event_done)(int device, void *event, bool *done, char *sentence);

    /* In the order of the stream: usable by what is put on it later; freed when it comes there.
     * Without memory the pool is trimmed and asked once more. What is freed stays in the pool. */
    kv_device_code_t (*alloc)(int device, void *stream, int64_t bytes, void **out, char *sentence);
    kv_device_code_t (*free)(int device, void *stream, void *pointer, char *sentence);
    /* Gives the device what the pool does not need. */
    kv_device_code_t (*trim)(int device, char *sentence);
    kv_device_code_t (*memory)(int device, int64_t *unused, int64_t *total, char *sentence);
    /* Pinned, for every device. To free it may wait for the devices. */
    kv_device_code_t (*host_alloc)(int device, int64_t bytes, void **out, char *sentence);
    kv_device_code_t (*host_free)(int device, void *pointer, char *sentence);

    kv_device_code_t (*copy)(int device, void *stream, kv_device_way_t way, int64_t bytes,
                             const void *from, void *to, char *sentence);
    /* The stream is of `device`, either of the two. */
    kv_device_code_t (*copy_peer)(int device, void *stream, int64_t bytes, int from_device,
                                  const void *from, int to_device, void *to, char *sentence);
    kv_device_code_t (*zero)(int device, void *stream, int64_t bytes, void *to, char *sentence);

    /* From one type to the same; or, which casts, from a 16-bit floating type to float32 (not
     * rounded) and back (rounded once, to nearest even). */
    kv_device_code_t (*sum)(int device, void *stream, kv_dtype_t from, kv_dtype_t to, int num_jobs,
                            const kv_device_sum_t *jobs, char *sentence);
    /* `dtype`: of the weights. SGLD draws with log and cos in double, whose last bit a device may
     * round differently: there the results agree to a few units in the last place of the noise.
     * lamb_moments leaves the weight alone: its third state is the direction, a buffer. */
    kv_device_code_t (*step)(int device, void *stream, kv_dtype_t dtype, kv_step_kind_t kind,
                             int num_jobs, const kv_device_step_t *jobs, char *sentence);
    kv_device_code_t (*squares)(int device, void *stream, kv_dtype_t dtype, int num_jobs,
                                const kv_device_squares_t *jobs, char *sentence);
    /* `bits`: 2 or 1. */
    kv_device_code_t (*encode)(int device, void *stream, kv_dtype_t dtype, int bits, int num_jobs,
                               const kv_device_encode_t *jobs, char *sentence);
    /* `to`: `dtype`, or its wide type, for a step that follows. */
    kv_device_code_t (*decode)(int device, void *stream, kv_dtype_t dtype, kv_dtype_t to,
                               int num_jobs, const kv_device_decode_t *jobs, char *sentence);
} kv_device_api_t;

/* The entry. `abi` and `bytes` are the caller's KV_DEVICE_ABI and sizeof *api: KV_DEVICE_REFUSED if
 * the plug-in was built for others. KV_DEVICE_NONE on a machine without a device or its driver.
 * Called again, it looks for the devices again; not while another thread uses them. */
#define KV_DEVICE_ENTRY "kv_device_open"
typedef kv_device_code_t kv_device_open_t(uint32_t abi, size_t bytes, kv_device_api_t *api,
                                          char *sentence);

#ifdef __cplusplus
}
#endif

#endif
