/* The plug-in for devices, opened when it is first asked for and never closed. */
#ifndef KV_KERNELS_DEVICE_LOAD_H
#define KV_KERNELS_DEVICE_LOAD_H

#include "base/status.h"
#include "kernels/device.h"

/* Beside the file that holds this code, unless KVSTORE_CUDA_PLUGIN names another. */
#define KV_DEVICE_PLUGIN "libkvstore_cuda.so"

/* Gives the plug-in's table, which stays. The first call may take seconds: the driver starts. What
 * it comes to holds for the rest of the process. KV_NOT_BUILT: there is no plug-in, or none that
 * fits, and how to get it; KV_DEVICE: no driver, no device, or a process forked from one that has
 * opened the plug-in. Any thread; waits only for another thread's first call. */
KV_MUST_CHECK kv_status_t kv_device_load(const kv_device_api_t **out);

/* The plug-in's file, once it was loaded. */
const char *kv_device_file(void);

/* KV_DEVICE with the plug-in's sentence, unless the code is KV_DEVICE_OK. */
kv_status_t kv_device_check(kv_device_code_t code, const char *sentence);

#endif
