/* What the files of the plug-in share on the host: errors, and which device is current. */
#ifndef KV_CUDA_PLUGIN_H
#define KV_CUDA_PLUGIN_H

#include "cuda/gpu.h"
#include "kernels/device.h"

enum { KV_CUDA_DEVICES = 64 };

/* Makes the device the current one. KV_DEVICE_DEAD if it is known to be dead. */
kv_device_code_t kv_device_enter(int device, char *sentence);

/* What a failed call means: its code, with a sentence that says what was tried. Clears the error,
 * unless it is one that stays: then the device is dead from here on. */
kv_device_code_t kv_device_failed(int device, cudaError_t error, const char *doing, char *sentence);

/* Multiprocessors of a device that was entered. */
int kv_device_processors(int device);

kv_device_code_t kv_device_refuse(char *sentence, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

#define KV_DEVICE_TRY(expression)                                                                  \
    do {                                                                                           \
        kv_device_code_t kv_try_code = (expression);                                               \
        if (kv_try_code != KV_DEVICE_OK)                                                           \
            return kv_try_code;                                                                    \
    } while (0)

/* For a call of the runtime. */
#define KV_CUDA_TRY(device, call, doing, sentence)                                                 \
    do {                                                                                           \
        cudaError_t kv_try_error = (call);                                                         \
        if (kv_try_error != cudaSuccess)                                                           \
            return kv_device_failed(device, kv_try_error, doing, sentence);                        \
    } while (0)

#endif
