/* CUDA arrays of others: the stream in whose order their elements are ready, and the arrays that
 * speak __cuda_array_interface__ alone. */
#ifndef KV_PY_CUDA_IN_H
#define KV_PY_CUDA_IN_H

#include "py/py.h"

/* The array library that an object is of: the module of the first part of its type's name, a new
 * reference, or NULL without an exception. */
PyObject *kv_py_library_of(PyObject *object);
/* `library` may be NULL. */
bool kv_py_is_library(PyObject *library, const char *name);

/* One handle for each stream: of the two that CUDA has for a device's legacy default stream, NULL
 * and 1, only NULL is used. */
static inline void *kv_cuda_stream(void *stream)
{
    return stream == (void *)1 ? NULL : stream;
}

/* The view's elements are ready in the order of the stream, and what their owner does later comes
 * on it too. */
void kv_cuda_follow(kv_view_t *view, void *stream);
/* The current stream of the object's library on a device. 1: found; 0: the library is none that can
 * be asked; -1 with an exception. */
int kv_cuda_library_stream(PyObject *object, int device, void **stream);
/* The store's own stream of a device. 1: found; 0 and *stream NULL: there is no plug-in, or no such
 * device, which the store tells; -1 with an exception. */
int kv_cuda_own_stream(kv_state_t *state, int device, void **stream);

/* By __cuda_array_interface__. 1: filled; 0: the object has none; -1 with an exception. */
int kv_cuda_array_in(kv_state_t *state, PyObject *object, kv_view_t *view, kv_lease_t *lease);

#endif
