/* A plug-in that has nothing but its entry and two devices to tell of; or, by macros, one that does
 * not fit or finds no device. */
#include "kernels/device.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#ifndef VERSION
#define VERSION KV_DEVICE_ABI
#endif
#ifndef DEVICES
#define DEVICES 2
#endif

static kv_device_code_t info(int device, kv_device_info_t *out, char *sentence)
{
    if (device < 0 || device >= DEVICES) {
        snprintf(sentence, KV_DEVICE_SENTENCE, "there is no device %d", device);
        return KV_DEVICE_REFUSED;
    }
    if (device == 1) {
        snprintf(sentence, KV_DEVICE_SENTENCE, "device 1 is lost");
        return KV_DEVICE_DEAD;
    }
    *out = (kv_device_info_t){"Small", (int64_t)5 << 29, 8, 6, 4, 13000, 12040};
    return KV_DEVICE_OK;
}

kv_device_open_t kv_device_open;
kv_device_code_t kv_device_open(uint32_t abi, size_t bytes, kv_device_api_t *api, char *sentence)
{
    /* How often it was opened, by which process, is told to whoever gave a descriptor. */
#ifdef TELL
    (void)!write(TELL, "opened\n", 7);
#endif
    if (abi != VERSION || bytes != sizeof *api) {
        snprintf(sentence, KV_DEVICE_SENTENCE, "interface %d, not %d", (int)VERSION, (int)abi);
        return KV_DEVICE_REFUSED;
    }
    if (DEVICES == 0) {
        snprintf(sentence, KV_DEVICE_SENTENCE, "there is no CUDA device here");
        return KV_DEVICE_NONE;
    }
    memset(api, 0, sizeof *api);
    api->abi = KV_DEVICE_ABI;
    api->bytes = sizeof *api;
#ifdef EMPTY
    (void)info;
#else
    api->num_devices = DEVICES;
    api->info = info;
#endif
    return KV_DEVICE_OK;
}
