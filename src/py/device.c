/* What Python is told of the CUDA plug-in, its devices, and NCCL. */
#include "comm/nccl.h"
#include "kernels/device_load.h"
#include "py/py.h"
#include "py/store.h"

/* The driver may take seconds to start: others run meanwhile. */
static kv_status_t load(const kv_device_api_t **api)
{
    kv_status_t status;
    Py_BEGIN_ALLOW_THREADS;
    status = kv_device_load(api);
    Py_END_ALLOW_THREADS;
    return status;
}

PyObject *kv_py_cuda_plugin(PyObject *module, PyObject *unused)
{
    (void)unused;
    const kv_device_api_t *api;
    kv_status_t status = load(&api);
    if (status != KV_OK)
        return kv_py_raise(kv_py_state(module), status);
    PyObject *file = PyUnicode_DecodeFSDefault(kv_device_file());
    return file != NULL ? Py_BuildValue("(Ni)", file, api->num_devices) : NULL;
}

PyObject *kv_py_cuda_device(PyObject *module, PyObject *number)
{
    const kv_device_api_t *api;
    kv_device_info_t info;
    kv_device_code_t code;
    char sentence[KV_DEVICE_SENTENCE];
    long device = PyLong_AsLong(number);
    if (device == -1 && PyErr_Occurred())
        return NULL;
    kv_status_t status = load(&api);
    if (status == KV_OK) {
        Py_BEGIN_ALLOW_THREADS;
        code = api->info(device == (int)device ? (int)device : -1, &info, sentence);
        Py_END_ALLOW_THREADS;
        status = kv_device_check(code, sentence);
    }
    if (status != KV_OK)
        return kv_py_raise(kv_py_state(module), status);
    return Py_BuildValue("{s:s,s:L,s:i,s:i,s:i,s:i,s:i}", "name", info.name, "bytes",
                         (long long)info.bytes, "major", info.major, "minor", info.minor,
                         "processors", info.processors, "driver", info.driver, "runtime",
                         info.runtime);
}

PyObject *kv_py_nccl_library(PyObject *module, PyObject *folder)
{
    const char *file = NULL;
    int version = 0;
    kv_status_t status;
    PyObject *path = NULL;
    if (folder != Py_None && !PyUnicode_FSConverter(folder, &path))
        return NULL;
    const char *text = path != NULL ? PyBytes_AS_STRING(path) : NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = kv_nccl_load(text, &file, &version);
    Py_END_ALLOW_THREADS;
    Py_XDECREF(path);
    if (status != KV_OK)
        return kv_py_raise(kv_py_state(module), status);
    PyObject *name = PyUnicode_DecodeFSDefault(file);
    return name != NULL ? Py_BuildValue("(Ni)", name, version) : NULL;
}
