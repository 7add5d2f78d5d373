/* Runs kernels of the CUDA plug-in on the emulation, through the table that it fills: what it gives
 * is compared with the same arithmetic here. Ends with 0, or with a sentence on stdout.
 *
 *     kernels_run PLUGIN
 */
#include "emu/emu_control.h"
#include "kernels/device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEEDS = 20, JOBS = 7, SOURCES = 3, DEVICES = 2, BYTES = 64 << 20 };

static const int64_t counts[JOBS] = {1, 7, 1000, 4096, 65537, 3, 300001};

static kv_device_api_t api;
static char sentence[KV_DEVICE_SENTENCE];

static void check(kv_device_code_t code, const char *call)
{
    if (code == KV_DEVICE_OK)
        return;
    printf("%s: %d %s\n", call, (int)code, sentence);
    exit(1);
}

static void fail(uint64_t seed, const char *what, double found, double due)
{
    printf("seed %d, %s: %.17g, not %.17g\n", (int)seed, what, found, due);
    exit(1);
}

static void wait_for(void *stream, void *event)
{
    bool done = false;
    check(api.event_record(0, event, stream, sentence), "event_record");
    while (!done)
        check(api.event_done(0, event, &done, sentence), "event_done");
}

static void *on_device(void *stream, int64_t bytes)
{
    void *memory;
    check(api.alloc(0, stream, bytes, &memory, sentence), "alloc");
    return memory;
}

static float *randoms(int64_t count)
{
    float *values = malloc((size_t)count * sizeof *values);
    for (int64_t i = 0; values != NULL && i < count; i++)
        values[i] = (float)rand() / (float)RAND_MAX * 2 - 1;
    if (values == NULL)
        exit(2);
    return values;
}

/* Sums of three arrays each, one of them not aligned for vectors, in one call; and the squares of
 * one array, whose kernel has barriers. */
static void run(uint64_t seed)
{
    void *stream, *event;
    check(api.stream_new(0, &stream, sentence), "stream_new");
    check(api.event_new(0, &event, sentence), "event_new");
    float *in[JOBS][SOURCES], *out[JOBS];
    const void *src[JOBS][SOURCES];
    void *dst[JOBS];
    kv_device_sum_t jobs[JOBS];
    for (int j = 0; j < JOBS; j++) {
        int64_t bytes = counts[j] * (int64_t)sizeof(float);
        out[j] = randoms(counts[j]);
        dst[j] = on_device(stream, bytes);
        for (int k = 0; k < SOURCES; k++) {
            size_t shift = k == 1 && j % 2 == 1 ? sizeof(float) : 0;
            char *place = (char *)on_device(stream, bytes + (int64_t)shift) + shift;
            in[j][k] = randoms(counts[j]);
            src[j][k] = place;
            check(api.copy(0, stream, KV_DEVICE_TO_DEVICE, bytes, in[j][k], place, sentence),
                  "copy to the device");
        }
        jobs[j] = (kv_device_sum_t){counts[j], SOURCES, 1, src[j], &dst[j]};
    }
    check(api.sum(0, stream, KV_FLOAT32, KV_FLOAT32, JOBS, jobs, sentence), "sum");
    for (int j = 0; j < JOBS; j++)
        check(api.copy(0, stream, KV_DEVICE_TO_HOST, counts[j] * (int64_t)sizeof(float), dst[j],
                       out[j], sentence),
              "copy to the host");
    double *found, due = 0;
    check(api.host_alloc(0, sizeof *found, (void **)&found, sentence), "host_alloc");
    kv_device_squares_t squares = {.count = counts[JOBS - 1],
                                   .num_src = 1,
                                   .src = src[JOBS - 1],
                                   .batch = 1,
                                   .room = on_device(stream, 8 * kv_device_room(counts[JOBS - 1])),
                                   .out = found};
    check(api.squares(0, stream, KV_FLOAT32, 1, &squares, sentence), "squares");
    wait_for(stream, event);

    for (int j = 0; j < JOBS; j++)
        for (int64_t i = 0; i < counts[j]; i++) {
            float sum = in[j][0][i] + in[j][1][i];
            sum += in[j][2][i];
            if (memcmp(&sum, &out[j][i], sizeof sum) != 0)
                fail(seed, "a sum", out[j][i], sum);
        }
    for (int64_t i = 0; i < counts[JOBS - 1]; i++)
        due += (double)in[JOBS - 1][0][i] * in[JOBS - 1][0][i];
    if (*found < due * (1 - 1e-6) || *found > due * (1 + 1e-6))
        fail(seed, "the sum of squares", *found, due);
    for (int j = 0; j < JOBS; j++) {
        free(out[j]);
        for (int k = 0; k < SOURCES; k++)
            free(in[j][k]);
    }
}

int main(int argc, char **argv)
{
    void *plugin = argc == 2 ? dlopen(argv[1], RTLD_NOW) : NULL;
    if (plugin == NULL) {
        printf("%s\n", argc == 2 ? dlerror() : "usage: kernels_run PLUGIN");
        return 2;
    }
    kv_device_open_t *open_plugin = (kv_device_open_t *)dlsym(plugin, KV_DEVICE_ENTRY);
    void (*reset)(uint64_t, int, size_t, int) =
        (void (*)(uint64_t, int, size_t, int))dlsym(plugin, "emu_reset");
    const char *(*report)(void) = (const char *(*)(void))dlsym(plugin, "emu_report");
    if (open_plugin(KV_DEVICE_ABI + 1, sizeof api, &api, sentence) != KV_DEVICE_REFUSED)
        fail(0, "another version of the table was not refused", 0, KV_DEVICE_REFUSED);
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        reset(seed, DEVICES, BYTES, 1);
        check(open_plugin(KV_DEVICE_ABI, sizeof api, &api, sentence), "open");
        run(seed);
        if (report()[0] != '\0') {
            printf("seed %d: %s\n", (int)seed, report());
            return 1;
        }
    }
    return 0;
}
