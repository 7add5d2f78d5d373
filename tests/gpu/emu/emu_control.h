/* What tests may ask of the emulation. Plain C, for ctypes and for modules in C. */
#ifndef EMU_CONTROL_H
#define EMU_CONTROL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#define EMU_CONTROL __attribute__((visibility("default")))

/* Begins anew: all devices, streams, events and memory are new ones; old handles are invalid. No
 * call may be under way. `peer`: whether devices can be given access to each other. Without this
 * call the emulation begins with EMU_SEED (0), EMU_DEVICES (2), EMU_BYTES (64 MiB a device) and
 * EMU_PEER (1) of the environment. */
EMU_CONTROL void emu_reset(uint64_t seed, int devices, size_t bytes_per_device, int peer);

/* The order in which work runs is from now on the one of this seed. */
EMU_CONTROL void emu_seed(uint64_t seed);

/* The n-th allocation from now, and those after it, `times` in all, find no memory: on devices and
 * of pinned memory. n = 0: none. */
EMU_CONTROL void emu_fail_alloc(int64_t n, int64_t times);

/* The n-th kernel that the device runs from now kills it; n = 0: at once. What is queued is
 * dropped, its memory is spoilt, and each later call on it returns cudaErrorIllegalAddress. */
EMU_CONTROL void emu_kill_device(int device, int64_t n);

/* The n-th call of this name from now does nothing and returns `error`. A launch is
 * "cudaLaunchKernel". */
EMU_CONTROL void emu_fail_call(const char *name, int64_t n, int error);

/* From now on `n` copies run, on all streams together; the next one stays where it is, and what is
 * behind it, until this is called again. n < 0: all run. Nobody may synchronise meanwhile. */
EMU_CONTROL void emu_let_copies(int64_t n);

/* Runs everything that is queued. */
EMU_CONTROL void emu_run_all(void);

/* Runs a few operations or none, as a query does. */
EMU_CONTROL void emu_run_some(void);

/* How many: "launches" (kernels run), "copies" (done), "queued" (operations not run yet),
 * "mistakes" (sentences written), "live_allocations", "live_bytes" (of devices that live),
 * "live_pinned", "live_streams", "live_events"; or, by the name of one of the runtime's calls, how
 * often it was called. */
EMU_CONTROL int64_t emu_counter(const char *name);

/* The last sentence about a mistake, "" if there is none since emu_reset. Valid until the next. */
EMU_CONTROL const char *emu_report(void);

/* For other libraries that work on devices (emu_nccl.cpp). An array that work touches, in the
 * memory of a device. */
typedef struct emu_array {
    int device;
    const void *pointer;
    size_t bytes;
} emu_array_t;

/* Puts one piece of work into several streams of different devices: it begins when each of them
 * has come to it and all the devices live, and each goes on when it is done. `begin(context)` is
 * asked by the executor, which must not be called by it: 1: run(context) is called, once; 0: not
 * yet; -1: it is left out, also where a device is lost. drop(context) is called once, in the end.
 * The arrays must lie whole in their devices' memory. Gives a cudaError_t; if that is not 0,
 * nothing was put anywhere and nothing will be called. */
EMU_CONTROL int emu_together(const char *caller, int num_streams, const int *devices,
                             void *const *streams, int num_arrays, const emu_array_t *arrays,
                             int (*begin)(void *context), void (*run)(void *context),
                             void (*drop)(void *context), void *context);

/* The calling thread's. */
EMU_CONTROL int emu_current_device(void);

/* Tells a mistake as the emulation's own are told. */
EMU_CONTROL void emu_tell(const char *sentence);

#ifdef __cplusplus
}
#endif
#endif
