/* What tests may ask of the stand-in for NCCL. Plain C. */
#ifndef EMU_NCCL_H
#define EMU_NCCL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#define EMU_NCCL __attribute__((visibility("default")))

/* Forgets all communicators and faults. After emu_reset, which makes what they know invalid. */
EMU_NCCL void emu_nccl_reset(uint64_t seed);

/* The n-th from now fails or never ends; n = 0: none. "init": a communicator fails to begin;
 * "init never"; "call": a sum or broadcast is refused; "put": it fails on its way to the streams;
 * "put never": it does not come there; "work never": the devices do not end it, unless it is
 * aborted; "async": a question for the state of a communicator, where nothing is under way, finds
 * an error; "end never": a communicator does not end. */
EMU_NCCL void emu_nccl_fault(const char *what, int64_t n);

/* How many: "live" (communicators), "puts" (sums and broadcasts put on streams), "groups" (of
 * those), "aborted" (communicators), "inits" (begun). */
EMU_NCCL int64_t emu_nccl_counter(const char *what);

#ifdef __cplusplus
}
#endif
#endif
