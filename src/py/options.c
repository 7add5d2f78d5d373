/* The options of kvstore.create, checked for every kind before anything else is tried. */
#include "py/store.h"

static bool refuse(kv_state_t *state, const char *name, const char *due, PyObject *value)
{
    PyObject *shown = PyObject_Repr(value);
    if (shown != NULL)
        kv_py_fail(state, KV_INVALID, "%s must be %s, not %.100s", name, due,
                   PyUnicode_AsUTF8(shown));
    Py_XDECREF(shown);
    return false;
}

/* A whole number within limits; None leaves `out` alone. */
static bool parse_count(kv_state_t *state, const char *name, PyObject *value, int low, int high,
                        int *out)
{
    char due[64];
    long long number = (long long)low - 1;
    if (value == Py_None)
        return true;
    if (!PyBool_Check(value) && PyIndex_Check(value)) {
        number = PyLong_AsLongLong(value);
        if (number == -1 && PyErr_Occurred()) {
            PyErr_Clear();
            number = (long long)low - 1;
        }
    }
    if (number < low || number > high) {
        snprintf(due, sizeof due, "an integer from %d to %d", low, high);
        return refuse(state, name, due, value);
    }
    *out = (int)number;
    return true;
}

/* What only the kinds of several processes have; kvstore/cluster uses it before it makes the store.
 */
static bool parse_dist_option(kv_state_t *state, const char *name, PyObject *value)
{
    int unused;
    if (strcmp(name, "rank") == 0)
        return parse_count(state, name, value, 0, INT32_MAX, &unused);
    if (strcmp(name, "num_workers") == 0)
        return parse_count(state, name, value, 1, INT32_MAX, &unused);
    if (strcmp(name, "num_servers") == 0) /* a cluster of kind nccl has none */
        return parse_count(state, name, value, 0, INT32_MAX, &unused);
    return value == Py_None || PyUnicode_Check(value) || refuse(state, name, "a str", value);
}

static bool parse_option(kv_state_t *state, const kv_kind_t *kind, PyObject *key, PyObject *value,
                         kv_py_options_t *options)
{
    static const char *const DIST[] = {"token",       "scheduler",   "role", "rank",
                                       "num_workers", "num_servers", NULL};
    bool dist = kind->family == KV_KIND_DIST || kind->family == KV_KIND_NCCL;
    const char *name = PyUnicode_AsUTF8(key);
    if (name == NULL)
        return false;
    if (strcmp(name, "timeout") == 0)
        return kv_py_timeout(state, value, options->timeout_ns, &options->timeout_ns);
    if (strcmp(name, "num_threads") == 0)
        return parse_count(state, name, value, 1, KV_MAX_THREADS, &options->store.num_threads);
    /* In one process the order of a sum is always that of the list. */
    if (strcmp(name, "deterministic") == 0)
        return PyBool_Check(value) || refuse(state, name, "True or False", value);
    if (strcmp(name, "_member") == 0 && dist) {
        options->member = value;
        return true;
    }
    for (int i = 0; DIST[i] != NULL; i++) {
        if (strcmp(name, DIST[i]) == 0) {
            if (dist)
                return parse_dist_option(state, name, value);
            kv_py_fail(state, KV_INVALID, "option '%s' belongs to the dist kinds and nccl", name);
            return false;
        }
    }
    kv_py_fail(state, KV_INVALID,
               "there is no option '%.64s' (options: timeout, deterministic, num_threads%s)", name,
               dist ? ", token, scheduler, role, rank, num_workers, num_servers" : "");
    return false;
}

bool kv_py_parse_options(kv_state_t *state, const kv_kind_t *kind, PyObject *keywords,
                         kv_py_options_t *options)
{
    PyObject *name, *value;
    Py_ssize_t position = 0;
    while (keywords != NULL && PyDict_Next(keywords, &position, &name, &value)) {
        if (PyUnicode_CompareWithASCIIString(name, "name") != 0 &&
            !parse_option(state, kind, name, value, options))
            return false;
    }
    return true;
}

PyObject *kv_py_options_check(PyObject *module, PyObject *args, PyObject *keywords)
{
    kv_state_t *state = kv_py_state(module);
    const char *name;
    kv_kind_t kind;
    kv_py_options_t options = {.timeout_ns = KV_PY_DEFAULT_TIMEOUT_NS};
    if (!PyArg_ParseTuple(args, "s:options_check", &name))
        return NULL;
    kv_status_t status = kv_kind_parse(name, &kind);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    if (!kv_py_parse_options(state, &kind, keywords, &options))
        return NULL;
    Py_RETURN_NONE;
}
