/* Memory of the store on a CUDA device, as libraries take it in: an object with __dlpack__. What
 * they put on the stream that they name there comes after what is on the store's. */
#ifndef KV_PY_DEVICE_VIEW_H
#define KV_PY_DEVICE_VIEW_H

#include "comm/device.h"
#include "py/py.h"

int kv_device_view_setup(PyObject *module, kv_state_t *state);
/* Takes the array, also on failure; its buffer is memory of the lane's device, and ready on the
 * lane. */
PyObject *kv_device_view_new(kv_state_t *state, kv_array_t *array, kv_lane_t lane);
/* Where the library that has taken the memory in puts its work on it. */
kv_lane_t kv_device_view_lane(PyObject *view);

#endif
