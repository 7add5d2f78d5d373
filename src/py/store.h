/* kvstore.KVStore, shared by the files that implement it. */
#ifndef KV_PY_STORE_H
#define KV_PY_STORE_H

#include "py/py.h"
#include "py/updater.h"

typedef struct kv_py_store {
    PyObject_HEAD
    kv_state_t *state;
    kv_store_t *store;
    kv_updater_t *updater; /* the store's own, borrowed: for the garbage collector */
    int64_t timeout_ns;
    PyObject *weakrefs;
} kv_py_store_t;

static inline kv_py_store_t *as_store(PyObject *object)
{
    return (kv_py_store_t *)object;
}

/* options.c: what may be given to a store when it is made. */
typedef struct kv_py_options {
    int64_t timeout_ns;
    kv_store_options_t store;
} kv_py_options_t;

/* Reads all keywords but `name`. False with an exception. */
bool kv_py_parse_options(kv_state_t *state, const kv_kind_t *kind, PyObject *keywords,
                         kv_py_options_t *options);

/* Every method begins with it: ClosedError, and references given back meanwhile. */
bool kv_py_store_check_open(kv_py_store_t *self);

/* store_calls.c, vectorcall methods. */
#define KV_PY_METHOD(name)                                                                         \
    PyObject *name(PyObject *self, PyObject *const *args, Py_ssize_t num_args, PyObject *names)
KV_PY_METHOD(kv_py_store_init);
KV_PY_METHOD(kv_py_store_push);
KV_PY_METHOD(kv_py_store_pull);
KV_PY_METHOD(kv_py_store_pushpull);
KV_PY_METHOD(kv_py_store_broadcast);

#endif
