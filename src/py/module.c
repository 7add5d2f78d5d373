/* kvstore._core: the module, its state, and the functions that belong to no object. */
#include "base/config.h"
#include "comm/device.h"
#include "py/device_view.h"
#include "py/node.h"
#include "py/py.h"
#include "py/ranks.h"
#include "py/store.h"

#ifndef KV_FLAVOUR
#define KV_FLAVOUR "unknown"
#endif

#ifdef KV_WITH_UCX
#define WITH_UCX true
#else
#define WITH_UCX false
#endif

static struct PyModuleDef MODULE;

kv_state_t *kv_py_state(PyObject *module)
{
    return PyModule_GetState(module);
}

kv_runtime_t *kv_py_runtime(kv_state_t *state)
{
    if (KV_LIKELY(state->runtime != NULL && state->runtime->generation == kv_fork_generation()))
        return state->runtime;
    if (state->closed) {
        kv_py_fail(state, KV_CLOSED, "the interpreter is exiting; kvstore takes no new work");
        return NULL;
    }
    /* A forked child leaves its parent's runtime alone: its threads are not there. */
    kv_status_t status = kv_runtime_new(&state->runtime);
    if (status != KV_OK) {
        state->runtime = NULL;
        kv_py_raise(state, status);
    }
    return state->runtime;
}

/* ------------------------------------------------------------------------------ functions */

static const kv_param_t WAIT_ALL_PARAMS[] = {{"timeout", false}};
static const kv_signature_t WAIT_ALL = {"wait_all", 1, 1, WAIT_ALL_PARAMS};

PyDoc_STRVAR(wait_all_doc,
             "wait_all($module, /, timeout=None)\n--\n\n"
             "Wait for everything pending in the process; raise the first stored error.\n\n"
             "Parameters\n----------\n"
             "timeout : float, optional\n"
             "    Seconds; 300 if not given.\n\n"
             "Raises\n------\n"
             "TimeoutError\n    When the time is over; the operations go on.\n"
             "InvalidArgumentError\n    Inside an updater, which it would wait for.\n"
             "KVStoreError\n    What an operation failed with that nobody has been told of.\n\n"
             "Examples\n--------\n"
             ">>> import kvstore\n"
             ">>> kvstore.wait_all()\n");

static PyObject *wait_all(PyObject *module, PyObject *const *args, Py_ssize_t num_args,
                          PyObject *names)
{
    kv_state_t *state = kv_py_state(module);
    PyObject *value;
    kv_py_caller_t caller;
    int64_t timeout_ns;
    kv_py_release_now();
    if (!kv_py_parse(&WAIT_ALL, args, num_args, names, &value) ||
        !kv_py_timeout(state, value, KV_PY_DEFAULT_TIMEOUT_NS, &timeout_ns))
        return NULL;
    kv_runtime_t *runtime = kv_py_runtime(state);
    if (runtime == NULL)
        return NULL;
    kv_py_caller_init(&caller, timeout_ns);
    kv_status_t status = kv_engine_wait_all(runtime->engine, &caller.base);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    kv_py_release_now();
    Py_RETURN_NONE;
}

static PyObject *counters(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    kv_py_release_now();
    PyObject *result = PyDict_New();
    for (int i = 0; result != NULL && i < KV_COUNTER_COUNT; i++) {
        PyObject *value = PyLong_FromLongLong(kv_counter_value((kv_counter_t)i));
        if (value == NULL ||
            PyDict_SetItemString(result, kv_counter_name((kv_counter_t)i), value) < 0)
            Py_CLEAR(result);
        Py_XDECREF(value);
    }
    return result;
}

static PyObject *fault_set(PyObject *module, PyObject *args)
{
    const char *name;
    long long nth;
    if (!PyArg_ParseTuple(args, "sL:fault_set", &name, &nth))
        return NULL;
    int64_t passed = kv_fault_set(name, nth);
    if (passed < 0)
        return kv_py_fail(kv_py_state(module), KV_INVALID, "there is no fault point '%.64s'", name);
    return PyLong_FromLongLong(passed);
}

static PyObject *lock_violations(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromLongLong(kv_lock_violations());
}

static PyObject *settings(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *rows = PyList_New(0);
    for (int i = 0; rows != NULL && i < KV_CONFIG_COUNT; i++) {
        const kv_config_row_t *row = kv_config_row((kv_config_t)i);
        PyObject *value = Py_BuildValue("(ssss)", row->variable, kv_config_text((kv_config_t)i),
                                        row->fallback, row->help);
        if (value == NULL || PyList_Append(rows, value) < 0)
            Py_CLEAR(rows);
        Py_XDECREF(value);
    }
    return rows;
}

static PyObject *kinds(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *names = PyList_New(0);
    const char *text;
    for (int i = 0; names != NULL && (text = kv_kind_name(i)) != NULL; i++) {
        PyObject *name = PyUnicode_FromString(text);
        if (name == NULL || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *isa_available(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *names = PyList_New(0);
    const kv_kernels_t *kernels;
    for (int i = 0; names != NULL && (kernels = kv_kernels_at(i)) != NULL; i++) {
        PyObject *name = PyUnicode_FromString(kernels->name);
        if (name == NULL || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *build_info(PyObject *module, PyObject *unused)
{
    PyObject *isas = isa_available(module, unused), *info = NULL;
    kv_runtime_t *runtime = isas != NULL ? kv_py_runtime(kv_py_state(module)) : NULL;
    if (runtime != NULL)
        info =
            Py_BuildValue("{s:s,s:s,s:s,s:O,s:s,s:i,s:s,s:O}", "flavour", KV_FLAVOUR, "compiler",
                          __VERSION__, "isa", runtime->kernels->name, "isas", isas, "engine",
                          kv_engine_name(runtime->engine), "processors", kv_processor_count(),
                          "numpy_target", kv_numpy_target(), "ucx", WITH_UCX ? Py_True : Py_False);
    Py_XDECREF(isas);
    return info;
}

/* How long the exit waits for one queued operation: some wait for an updater in a daemon thread
 * that never returns. */
#define EXIT_TIMEOUT_NS (5 * INT64_C(1000000000))

/* The exit hook: refuse, drain, join, and from then on let no thread free a Python object. */
static PyObject *shut_down(PyObject *module, PyObject *unused)
{
    (void)unused;
    kv_state_t *state = kv_py_state(module);
    kv_runtime_t *runtime = state->runtime;
    state->closed = true;
    if (runtime != NULL && runtime->generation == kv_fork_generation()) {
        kv_py_caller_t caller;
        kv_py_caller_init(&caller, EXIT_TIMEOUT_NS);
        kv_caller_detach(&caller.base);
        kv_runtime_stop(runtime, &caller.base);
        kv_device_settle();
        kv_caller_attach(&caller.base);
        if (PyErr_Occurred())
            return NULL; /* Ctrl-C */
    }
    return PyLong_FromLongLong(kv_py_release_bar());
}

static PyMethodDef FUNCTIONS[] = {
    {"wait_all", (PyCFunction)(void (*)(void))wait_all, METH_FASTCALL | METH_KEYWORDS,
     wait_all_doc},
    {"counters", counters, METH_NOARGS,
     "counters($module, /)\n--\n\nLive objects and bytes of the core by kind, for tests."},
    {"fault_set", fault_set, METH_VARARGS,
     "fault_set($module, name, nth, /)\n--\n\nLet the nth pass of a fault point fail, once; 0 "
     "takes "
     "it back. Returns how often the\npoint was passed since the last call. For tests."},
    {"lock_violations", lock_violations, METH_NOARGS,
     "lock_violations($module, /)\n--\n\nHow often locks were taken out of order; counted by debug "
     "builds."},
    {"settings", settings, METH_NOARGS,
     "settings($module, /)\n--\n\nThe environment's settings: (variable, value, default, help)."},
    {"kinds", kinds, METH_NOARGS,
     "kinds($module, /)\n--\n\nNames of the kinds of stores, also of those that this build lacks."},
    {"isa_available", isa_available, METH_NOARGS,
     "isa_available($module, /)\n--\n\nInstruction sets that the kernels can use here, slowest "
     "first."},
    {"build_info", build_info, METH_NOARGS,
     "build_info($module, /)\n--\n\nHow the core was built and what it chose on this machine."},
    {"cuda_plugin", kv_py_cuda_plugin, METH_NOARGS,
     "cuda_plugin($module, /)\n--\n\nThe CUDA plug-in, opened if it was not: (file, number of "
     "devices).\nRaises NotBuiltError or DeviceError."},
    {"cuda_device", kv_py_cuda_device, METH_O,
     "cuda_device($module, number, /)\n--\n\nWhat the plug-in tells of a device. Raises "
     "DeviceError."},
    {"nccl_library", kv_py_nccl_library, METH_O,
     "nccl_library($module, folder, /)\n--\n\nNCCL, opened if it was not, from the folder of its "
     "package or, None, of the system: (file, version).\nRaises NotBuiltError."},
    {"nccl_id", kv_py_nccl_id, METH_NOARGS,
     "nccl_id($module, /)\n--\n\nWhat the processes of a group join it with. Raises DeviceError."},
    {"optimizer_classes", kv_py_optimizer_classes, METH_NOARGS,
     "optimizer_classes($module, /)\n--\n\nThe built-in optimizers: name -> title, rate, "
     "parameters."},
    {"optimizer_common", kv_py_optimizer_common, METH_NOARGS,
     "optimizer_common($module, /)\n--\n\nThe parameters that all optimizers have."},
    {"optimizer_check", kv_py_optimizer_check, METH_VARARGS,
     "optimizer_check($module, name, numbers, /)\n--\n\nRaise InvalidArgumentError for a number "
     "out of its range."},
    {"compression_check", kv_py_compression_check, METH_VARARGS,
     "compression_check($module, type, threshold, /)\n--\n\nRaise InvalidArgumentError for a "
     "threshold out of its range."},
    {"compression_encode", kv_py_compression_encode, METH_VARARGS,
     "compression_encode($module, gradient, residual, type, threshold, /)\n--\n\n"
     "See kvstore.compression.encode."},
    {"compression_decode", kv_py_compression_decode, METH_VARARGS,
     "compression_decode($module, codes, shape, dtype, type, threshold, /)\n--\n\n"
     "See kvstore.compression.decode."},
    {"options_check", (PyCFunction)(void (*)(void))kv_py_options_check,
     METH_VARARGS | METH_KEYWORDS,
     "options_check($module, kind, /, **options)\n--\n\n"
     "Raise for an option that the kind of store has not, or a value that it cannot have."},
    {"_shut_down", shut_down, METH_NOARGS,
     "_shut_down($module, /)\n--\n\nThe exit hook. Returns how many references are left to leak."},
    {NULL, NULL, 0, NULL},
};

/* --------------------------------------------------------------------------------- module */

static int intern(PyObject **out, const char *text)
{
    *out = PyUnicode_InternFromString(text);
    return *out != NULL ? 0 : -1;
}

/* The exception classes of the status table, made in Python. */
static int take_errors(kv_state_t *state)
{
    PyObject *errors = PyImport_ImportModule("kvstore.errors");
    if (errors == NULL)
        return -1;
    for (int status = 1; status < KV_STATUS_COUNT; status++) {
        const char *name = kv_status_class((kv_status_t)status);
        if (status == KV_NO_MEMORY)
            state->errors[status] = Py_NewRef(PyExc_MemoryError);
        else if (name[0] != '\0')
            state->errors[status] = PyObject_GetAttrString(errors, name);
        if (PyErr_Occurred())
            break;
    }
    Py_DECREF(errors);
    return PyErr_Occurred() ? -1 : 0;
}

static int register_exit_hook(PyObject *module)
{
    PyObject *atexit = PyImport_ImportModule("atexit");
    PyObject *hook = PyObject_GetAttrString(module, "_shut_down");
    PyObject *done = NULL;
    if (atexit != NULL && hook != NULL)
        done = PyObject_CallMethod(atexit, "register", "O", hook);
    Py_XDECREF(atexit);
    Py_XDECREF(hook);
    Py_XDECREF(done);
    return done != NULL ? 0 : -1;
}

static int module_exec(PyObject *module)
{
    kv_state_t *state = kv_py_state(module);
    /* The engine's threads and the release list belong to the process, not to an interpreter. */
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "kvstore works in the main interpreter only");
        return -1;
    }
    state->numpy_bfloat16_num = -1;
    if (!kv_numpy_import() || take_errors(state) < 0 ||
        intern(&state->str_dlpack, "__dlpack__") < 0 ||
        intern(&state->str_dlpack_device, "__dlpack_device__") < 0 ||
        intern(&state->str_exchange_api, "__dlpack_c_exchange_api__") < 0 ||
        intern(&state->str_max_version, "max_version") < 0 ||
        intern(&state->str_stream, "stream") < 0 || (state->exchange_cache = PyDict_New()) == NULL)
        return -1;
    if (kv_ndarray_setup(module, state) < 0 || kv_rowsparse_setup(module, state) < 0 ||
        kv_handle_setup(module, state) < 0 || kv_node_setup(module, state) < 0 ||
        kv_ranks_setup(module, state) < 0 || kv_store_setup(module, state) < 0 ||
        kv_device_view_setup(module, state) < 0)
        return -1;
    return register_exit_hook(module);
}

#define STATE_OBJECTS(state, X)                                                                    \
    do {                                                                                           \
        for (int i_ = 0; i_ < KV_STATUS_COUNT; i_++)                                               \
            X((state)->errors[i_]);                                                                \
        X((state)->store_type);                                                                    \
        X((state)->ndarray_type);                                                                  \
        X((state)->handle_type);                                                                   \
        X((state)->rowsparse_type);                                                                \
        X((state)->node_type);                                                                     \
        X((state)->ranks_type);                                                                    \
        X((state)->device_view_type);                                                              \
        X((state)->numpy_bfloat16);                                                                \
        X((state)->exchange_cache);                                                                \
        X((state)->str_dlpack);                                                                    \
        X((state)->str_dlpack_device);                                                             \
        X((state)->str_exchange_api);                                                              \
        X((state)->str_max_version);                                                               \
        X((state)->str_stream);                                                                    \
    } while (0)

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    kv_state_t *state = kv_py_state(module);
    STATE_OBJECTS(state, Py_VISIT);
    return 0;
}

static int module_clear(PyObject *module)
{
    kv_state_t *state = kv_py_state(module);
    STATE_OBJECTS(state, Py_CLEAR);
    return 0;
}

static PyModuleDef_Slot MODULE_SLOTS[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kvstore._core",
    .m_doc = "The C core of kvstore. Use the names that `kvstore` exports.",
    .m_size = sizeof(kv_state_t),
    .m_methods = FUNCTIONS,
    .m_slots = MODULE_SLOTS,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&MODULE);
}
