/* From a core status to a Python exception, and the core's view of the calling thread. */
#include "py/py.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

PyObject *kv_py_raise(kv_state_t *state, kv_status_t status)
{
    if (state->errors[status] == NULL)
        return NULL; /* the exception is there: a signal handler's or a callback's */
    const char *message = kv_status_message(status);
    PyObject *text = PyUnicode_DecodeUTF8(message, (Py_ssize_t)strlen(message), "replace");
    if (text != NULL) {
        PyErr_SetObject(state->errors[status], text);
        Py_DECREF(text);
    }
    return NULL;
}

PyObject *kv_py_fail(kv_state_t *state, kv_status_t status, const char *format, ...)
{
    char message[KV_MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return kv_py_raise(state, kv_fail(status, "%s", message));
}

/* -------------------------------------------------------------------------------- caller */

static void detach(kv_caller_t *caller)
{
    ((kv_py_caller_t *)caller)->thread = PyEval_SaveThread();
}

static void attach(kv_caller_t *caller)
{
    PyEval_RestoreThread(((kv_py_caller_t *)caller)->thread);
}

static kv_status_t poll(kv_caller_t *caller)
{
    attach(caller);
    kv_py_release_now();
    int interrupted = PyErr_CheckSignals();
    detach(caller);
    return interrupted ? KV_INTERRUPTED : KV_OK;
}

void kv_py_caller_init(kv_py_caller_t *caller, int64_t timeout_ns)
{
    caller->base =
        (kv_caller_t){.detach = detach, .attach = attach, .poll = poll, .timeout_ns = timeout_ns};
}

bool kv_py_timeout(kv_state_t *state, PyObject *value, int64_t fallback_ns, int64_t *out)
{
    if (value == NULL || value == Py_None) {
        *out = fallback_ns;
        return true;
    }
    double seconds = PyFloat_AsDouble(value);
    if (seconds == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError))
            kv_py_fail(state, KV_BAD_TYPE, "timeout must be a number of seconds, not %.100s",
                       Py_TYPE(value)->tp_name);
        return false;
    }
    if (!(seconds > 0.0)) {
        char text[64];
        snprintf(text, sizeof text, "%g", seconds);
        kv_py_fail(state, KV_INVALID, "timeout must be above 0 seconds, not %s", text);
        return false;
    }
    *out = seconds < 9.0e9 ? (int64_t)ceil(seconds * 1e9) : INT64_MAX / 2;
    return true;
}
