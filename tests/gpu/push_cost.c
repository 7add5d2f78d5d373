/* A plug-in whose devices do nothing, at once, and count what they are asked for; and the exchange
 * table of an array library that is as fast. What is left is the store's own cost: push_cost.py.
 */
#include "kernels/device.h"
#include "py/dlpack.h"
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { MOST = 8 };

/* ------------------------------------------------------------------------------------- counting */

#define CALLS(ROW)                                                                                 \
    ROW(current)                                                                                   \
    ROW(make_current)                                                                              \
    ROW(stream_wait)                                                                               \
    ROW(event_new)                                                                                 \
    ROW(event_record)                                                                              \
    ROW(event_done)                                                                                \
    ROW(alloc)                                                                                     \
    ROW(host_alloc)                                                                                \
    ROW(copy)                                                                                      \
    ROW(copy_peer)                                                                                 \
    ROW(zero)                                                                                      \
    ROW(sum)                                                                                       \
    ROW(step)                                                                                      \
    ROW(squares)                                                                                   \
    ROW(encode)                                                                                    \
    ROW(decode)
enum {
#define ROW(name) COUNT_##name,
    CALLS(ROW)
#undef ROW
        NUM_CALLS
};
static const char *const names[] = {
#define ROW(name) #name,
    CALLS(ROW)
#undef ROW
};
static int64_t counts[NUM_CALLS];
static char *heap = (char *)0x100000; /* never touched */

/* What push_cost.py asks. */
EXPORT const char *cost_name(int i); /* NULL behind the last */
EXPORT int64_t cost_count(int i);
EXPORT void cost_tensor(int i, void *object, int64_t count);

const char *cost_name(int i)
{
    return i < NUM_CALLS ? names[i] : NULL;
}

int64_t cost_count(int i)
{
    return counts[i];
}

#define COUNTED(name, parameters, body)                                                            \
    static kv_device_code_t name parameters                                                        \
    {                                                                                              \
        counts[COUNT_##name]++;                                                                    \
        body return KV_DEVICE_OK;                                                                  \
    }

#pragma GCC diagnostic ignored "-Wunused-parameter"

static kv_device_code_t info(int device, kv_device_info_t *out, char *sentence)
{
    *out = (kv_device_info_t){.name = "None", .bytes = INT64_C(1) << 40, .major = 9};
    return KV_DEVICE_OK;
}

static kv_device_code_t peer(int device, int other, bool *direct, char *sentence)
{
    *direct = true;
    return KV_DEVICE_OK;
}

static kv_device_code_t owner(const void *pointer, int *device, char *sentence)
{
    *device = 0;
    return KV_DEVICE_OK;
}

static kv_device_code_t handle_new(int device, void **out, char *sentence)
{
    *out = heap += 16;
    return KV_DEVICE_OK;
}

static kv_device_code_t handle_free(int device, void *handle, char *sentence)
{
    return KV_DEVICE_OK;
}

static kv_device_code_t free_memory(int device, void *stream, void *pointer, char *sentence)
{
    return KV_DEVICE_OK;
}

static kv_device_code_t trim(int device, char *sentence)
{
    return KV_DEVICE_OK;
}

static kv_device_code_t memory(int device, int64_t *unused, int64_t *total, char *sentence)
{
    *unused = *total = INT64_C(1) << 40;
    return KV_DEVICE_OK;
}

COUNTED(current, (int *device, char *sentence), *device = 0;)
COUNTED(make_current, (int device, char *sentence), )
COUNTED(stream_wait, (int device, void *stream, void *event, char *sentence), )
COUNTED(event_new, (int device, void **out, char *sentence), *out = heap += 16;)
COUNTED(event_record, (int device, void *event, void *stream, char *sentence), )
COUNTED(event_done, (int device, void *event, bool *done, char *sentence), *done = true;)
COUNTED(alloc, (int device, void *stream, int64_t bytes, void **out, char *sentence),
        *out = heap += (bytes + 255) / 256 * 256;)
COUNTED(host_alloc, (int device, int64_t bytes, void **out, char *sentence),
        *out = malloc((size_t)bytes);)
COUNTED(copy,
        (int device, void *stream, kv_device_way_t way, int64_t bytes, const void *from, void *to,
         char *sentence), )
COUNTED(copy_peer,
        (int device, void *stream, int64_t bytes, int from_device, const void *from, int to_device,
         void *to, char *sentence), )
COUNTED(zero, (int device, void *stream, int64_t bytes, void *to, char *sentence), )
COUNTED(sum,
        (int device, void *stream, kv_dtype_t from, kv_dtype_t to, int num_jobs,
         const kv_device_sum_t *jobs, char *sentence), )
COUNTED(step,
        (int device, void *stream, kv_dtype_t dtype, kv_step_kind_t kind, int num_jobs,
         const kv_device_step_t *jobs, char *sentence), )
COUNTED(squares,
        (int device, void *stream, kv_dtype_t dtype, int num_jobs, const kv_device_squares_t *jobs,
         char *sentence), )
COUNTED(encode,
        (int device, void *stream, kv_dtype_t dtype, int bits, int num_jobs,
         const kv_device_encode_t *jobs, char *sentence), )
COUNTED(decode,
        (int device, void *stream, kv_dtype_t dtype, kv_dtype_t to, int num_jobs,
         const kv_device_decode_t *jobs, char *sentence), )

static kv_device_code_t host_free(int device, void *pointer, char *sentence)
{
    free(pointer);
    return KV_DEVICE_OK;
}

EXPORT kv_device_open_t kv_device_open;

kv_device_code_t kv_device_open(uint32_t abi, size_t bytes, kv_device_api_t *api, char *sentence)
{
    *api = (kv_device_api_t){
        .abi = abi,
        .bytes = (uint32_t)bytes,
        .num_devices = 2,
        .name = "none",
        .info = info,
        .peer = peer,
        .owner = owner,
        .current = current,
        .make_current = make_current,
        .stream_new = handle_new,
        .stream_free = handle_free,
        .stream_wait = stream_wait,
        .event_new = event_new,
        .event_free = handle_free,
        .event_record = event_record,
        .event_done = event_done,
        .alloc = alloc,
        .free = free_memory,
        .trim = trim,
        .memory = memory,
        .host_alloc = host_alloc,
        .host_free = host_free,
        .copy = copy,
        .copy_peer = copy_peer,
        .zero = zero,
        .sum = sum,
        .step = step,
        .squares = squares,
        .encode = encode,
        .decode = decode,
    };
    return KV_DEVICE_OK;
}

/* ------------------------------------------------------------------------------------- tensors */

/* The objects that are tensors of float32, one-dimensional, on device 0. */
static struct {
    void *object;
    int64_t shape;
    kv_dl_versioned_t managed;
} tensors[MOST];

void cost_tensor(int i, void *object, int64_t count)
{
    tensors[i].object = object;
    tensors[i].shape = count;
    tensors[i].managed = (kv_dl_versioned_t){
        .version = {KV_DLPACK_MAJOR, KV_DLPACK_MINOR},
        .tensor = {.data = heap += 4 * (count + 64) / 256 * 256,
                   .device = {KV_DL_CUDA, 0},
                   .ndim = 1,
                   .dtype = {KV_DL_FLOAT, 32, 1},
                   .shape = &tensors[i].shape},
    };
}

static int from_object(void *object, kv_dl_versioned_t **out)
{
    for (int i = 0; i < MOST; i++) {
        if (tensors[i].object == object) {
            *out = &tensors[i].managed;
            return 0;
        }
    }
    return -1;
}

static int current_stream(int32_t device_type, int32_t device_id, void **out)
{
    *out = (void *)0x700;
    return 0;
}

extern EXPORT kv_dl_exchange_t cost_exchange;
kv_dl_exchange_t cost_exchange = {
    .header = {.version = {KV_DLPACK_MAJOR, KV_DLPACK_MINOR}},
    .from_object = from_object,
    .current_stream = current_stream,
};
