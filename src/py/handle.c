/* kvstore.Handle: what an asynchronous call returns.
 *
 * A handle is `pending` while it has the core's handle, and finished when it has none; then
 * `exception` is what it raises, NULL if nothing.
 *
 * Awaiting: kvstore/_await.py keeps one waker (an eventfd) for each event loop, which the loop
 * watches. A handle that is awaited holds a share of the waker, so that its descriptor stays open
 * for the completion, which writes to it without the GIL, even if the loop is closed meanwhile.
 */
#include "py/py.h"

#include <errno.h>
#include <fcntl.h>
#include <structmember.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/eventfd.h>
#endif

/* ---------------------------------------------------------------------------------- wakers */

typedef struct waker {
    _Atomic int64_t refs;
    bool watched;          /* GIL; false once its loop is gone */
    int read_fd, write_fd; /* the same for an eventfd */
} waker_t;

static const char WAKER[] = "kvstore.waker";

static void waker_rele(waker_t *waker)
{
    if (waker == NULL || atomic_fetch_sub(&waker->refs, 1) != 1)
        return;
    close(waker->read_fd);
    if (waker->write_fd != waker->read_fd)
        close(waker->write_fd);
    kv_free(waker);
}

static void waker_capsule_free(PyObject *capsule)
{
    waker_t *waker = PyCapsule_GetPointer(capsule, WAKER);
    waker->watched = false;
    waker_rele(waker);
}

static bool open_descriptors(waker_t *waker)
{
#ifdef __linux__
    waker->read_fd = waker->write_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return waker->read_fd >= 0;
#else
    int fds[2];
    if (pipe(fds) < 0)
        return false;
    for (int i = 0; i < 2; i++) {
        fcntl(fds[i], F_SETFD, FD_CLOEXEC);
        fcntl(fds[i], F_SETFL, O_NONBLOCK);
    }
    waker->read_fd = fds[0];
    waker->write_fd = fds[1];
    return true;
#endif
}

/* (waker, descriptor to watch) */
static PyObject *new_waker(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    waker_t *waker = kv_alloc(sizeof *waker);
    if (waker == NULL)
        return PyErr_NoMemory();
    *waker = (waker_t){.refs = 1, .watched = true};
    if (!open_descriptors(waker)) {
        kv_free(waker);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    PyObject *capsule = PyCapsule_New(waker, WAKER, waker_capsule_free);
    if (capsule == NULL) {
        waker_rele(waker);
        return NULL;
    }
    return Py_BuildValue("(Ni)", capsule, waker->read_fd);
}

/* Any thread, no GIL. A waker that is full wakes its loop anyway. */
static void wake(const waker_t *waker)
{
    const uint64_t one = 1;
    while (write(waker->write_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* --------------------------------------------------------------------------------- handles */

/* Loops that await one handle at the same time; nobody has more than one or two. */
enum { MAX_WAKERS = 8 };

typedef struct py_handle {
    PyObject_HEAD
    kv_state_t *state;
    kv_handle_t *handle; /* NULL when finished */
    PyObject *exception;
    int64_t timeout_ns;
    uint64_t generation;
    PyObject *weakrefs;
    int num_wakers; /* changed only while no notification is set */
    waker_t *wakers[MAX_WAKERS];
} py_handle_t;

static py_handle_t *as_handle(PyObject *object)
{
    return (py_handle_t *)object;
}

static PyObject *make(kv_state_t *state, kv_handle_t *handle, PyObject *exception,
                      int64_t timeout_ns)
{
    py_handle_t *self = (py_handle_t *)state->handle_type->tp_alloc(state->handle_type, 0);
    if (self == NULL) {
        kv_handle_rele(handle);
        Py_XDECREF(exception);
        return NULL;
    }
    self->state = state;
    self->handle = handle;
    self->exception = exception;
    self->timeout_ns = timeout_ns;
    self->generation = kv_fork_generation();
    return (PyObject *)self;
}

PyObject *kv_handle_wrap(kv_state_t *state, kv_handle_t *handle, int64_t timeout_ns)
{
    return make(state, handle, NULL, timeout_ns);
}

PyObject *kv_handle_finished(kv_state_t *state, PyObject *exception)
{
    return make(state, NULL, exception, 0);
}

static bool check_process(py_handle_t *self)
{
    kv_py_release_now();
    if (self->generation == kv_fork_generation())
        return true;
    kv_py_fail(self->state, KV_CLOSED, "the handle belongs to the parent of this forked process");
    return false;
}

static PyObject *make_exception(const py_handle_t *self, const kv_error_t *error)
{
    PyObject *class = self->state->errors[error->status];
    return PyObject_CallFunction(class != NULL ? class : PyExc_RuntimeError, "s", error->message);
}

/* From pending to finished, once the core's handle is done. */
static bool finish(py_handle_t *self)
{
    const kv_error_t *error = kv_handle_error(self->handle);
    PyObject *exception = error != NULL ? make_exception(self, error) : NULL;
    if (error != NULL && exception == NULL)
        return false;
    kv_handle_t *handle = self->handle;
    if (handle == NULL) { /* another thread came by while the exception was made */
        Py_XDECREF(exception);
        return true;
    }
    self->handle = NULL;
    self->exception = exception;
    kv_handle_notify(handle, NULL, NULL);
    kv_handle_rele(handle);
    return true;
}

static const kv_param_t WAIT_PARAMS[] = {{"timeout", false}};
static const kv_signature_t WAIT = {"wait", 1, 1, WAIT_PARAMS};

static PyObject *handle_wait(PyObject *object, PyObject *const *args, Py_ssize_t num_args,
                             PyObject *names)
{
    py_handle_t *self = as_handle(object);
    PyObject *value;
    int64_t timeout_ns;
    if (!check_process(self) || !kv_py_parse(&WAIT, args, num_args, names, &value) ||
        !kv_py_timeout(self->state, value, self->timeout_ns, &timeout_ns))
        return NULL;
    if (self->handle != NULL) {
        /* Another thread may finish the object meanwhile, so the wait has a share of its own. */
        kv_handle_t *handle = kv_handle_hold(self->handle);
        kv_py_caller_t caller;
        kv_py_caller_init(&caller, timeout_ns);
        kv_status_t status = kv_handle_wait(handle, &caller.base);
        kv_handle_rele(handle);
        if (status != KV_OK)
            return kv_py_raise(self->state, status);
        kv_py_release_now();
        if (self->handle != NULL && !finish(self))
            return NULL;
    }
    if (self->exception != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(self->exception), self->exception);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *handle_done(PyObject *object, PyObject *unused)
{
    (void)unused;
    py_handle_t *self = as_handle(object);
    if (!check_process(self))
        return NULL;
    return PyBool_FromLong(self->handle == NULL || kv_handle_done(self->handle));
}

static PyObject *handle_exception(PyObject *object, PyObject *unused)
{
    (void)unused;
    py_handle_t *self = as_handle(object);
    if (!check_process(self))
        return NULL;
    if (self->handle != NULL && kv_handle_done(self->handle) && !finish(self))
        return NULL;
    return Py_NewRef(self->handle == NULL && self->exception != NULL ? self->exception : Py_None);
}

/* Looking at a failed handle is not being told of its error: wait_all still raises it. */
static PyObject *handle_repr(PyObject *object)
{
    py_handle_t *self = as_handle(object);
    if (self->generation != kv_fork_generation())
        return PyUnicode_FromString("<kvstore.Handle of the parent process>");
    if (self->handle != NULL && !kv_handle_done(self->handle))
        return PyUnicode_FromString("<kvstore.Handle pending>");
    const kv_error_t *error = self->handle != NULL ? kv_handle_peek(self->handle) : NULL;
    PyObject *exception = error != NULL ? make_exception(self, error) : Py_XNewRef(self->exception);
    if (error != NULL && exception == NULL)
        return NULL;
    if (exception == NULL)
        return PyUnicode_FromString("<kvstore.Handle done>");
    PyObject *text = PyUnicode_FromFormat("<kvstore.Handle failed: %R>", exception);
    Py_DECREF(exception);
    return text;
}

/* --------------------------------------------------------------------------------- await */

static void notify(void *context)
{
    const py_handle_t *self = context;
    for (int i = 0; i < self->num_wakers; i++)
        wake(self->wakers[i]);
}

/* Lets the completion wake this waker too; at once when it is done already. */
static PyObject *handle_wake(PyObject *object, PyObject *capsule)
{
    py_handle_t *self = as_handle(object);
    waker_t *waker = PyCapsule_GetPointer(capsule, WAKER);
    if (waker == NULL || !check_process(self))
        return NULL;
    if (self->handle == NULL) {
        wake(waker);
        Py_RETURN_NONE;
    }
    kv_handle_notify(self->handle, NULL, NULL);
    bool known = false;
    int kept = 0;
    for (int i = 0; i < self->num_wakers; i++) {
        waker_t *other = self->wakers[i];
        known = known || other == waker;
        if (other->watched)
            self->wakers[kept++] = other;
        else
            waker_rele(other);
    }
    self->num_wakers = kept;
    bool full = !known && kept == MAX_WAKERS;
    if (!known && !full) {
        atomic_fetch_add(&waker->refs, 1);
        self->wakers[self->num_wakers++] = waker;
    }
    kv_handle_notify(self->handle, notify, self);
    if (full)
        return kv_py_fail(self->state, KV_INVALID,
                          "a handle can be awaited by %d event loops at the same time", MAX_WAKERS);
    Py_RETURN_NONE;
}

static PyObject *handle_await(PyObject *object)
{
    PyObject *module = PyImport_ImportModule("kvstore._await");
    PyObject *coroutine = NULL, *iterator = NULL;
    if (module != NULL)
        coroutine = PyObject_CallMethod(module, "finish", "O", object);
    if (coroutine != NULL)
        iterator = PyObject_CallMethod(coroutine, "__await__", NULL);
    Py_XDECREF(coroutine);
    Py_XDECREF(module);
    return iterator;
}

/* ---------------------------------------------------------------------------------- type */

static int handle_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(as_handle(object)->exception);
    return 0;
}

static int handle_clear(PyObject *object)
{
    Py_CLEAR(as_handle(object)->exception);
    return 0;
}

static void handle_dealloc(PyObject *object)
{
    py_handle_t *self = as_handle(object);
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->weakrefs != NULL)
        PyObject_ClearWeakRefs(object);
    /* In a forked child the engine's lock may be held for ever. */
    if (self->handle != NULL && self->generation == kv_fork_generation()) {
        kv_handle_notify(self->handle, NULL, NULL);
        kv_handle_rele(self->handle);
    }
    for (int i = 0; i < self->num_wakers; i++)
        waker_rele(self->wakers[i]);
    handle_clear(object);
    type->tp_free(object);
    Py_DECREF(type);
}

PyDoc_STRVAR(HANDLE_DOC,
             "What an asynchronous call returns: `kv.push(key, value, async_op=True)`.\n\n"
             "The call's arrays must not be touched before the handle is done. It can be awaited\n"
             "in asyncio; cancelling the await leaves the operation running.\n\n"
             "Examples\n--------\n"
             ">>> import kvstore, numpy as np\n"
             ">>> kv = kvstore.create('local')\n"
             ">>> kv.init('w', np.zeros(3))\n"
             ">>> handle = kv.push('w', np.ones(3), async_op=True)\n"
             ">>> handle.wait()\n"
             ">>> handle.done()\n"
             "True\n");

PyDoc_STRVAR(WAIT_DOC, "wait($self, /, timeout=None)\n--\n\n"
                       "Wait until the operation is done; raise what it failed with.\n\n"
                       "Parameters\n----------\n"
                       "timeout : float, optional\n"
                       "    Seconds; the store's timeout if not given.\n\n"
                       "Raises\n------\n"
                       "TimeoutError\n    When the time is over; the operation goes on.\n"
                       "KVStoreError\n    The cause, each time, if the operation failed.\n");

PyDoc_STRVAR(DONE_DOC, "done($self, /)\n--\n\nWhether the operation has ended; never blocks.");

PyDoc_STRVAR(EXCEPTION_DOC,
             "exception($self, /)\n--\n\n"
             "What the operation failed with, None if it did not or still runs; never blocks.");

static PyMethodDef METHODS[] = {
    {"wait", (PyCFunction)(void (*)(void))handle_wait, METH_FASTCALL | METH_KEYWORDS, WAIT_DOC},
    {"done", handle_done, METH_NOARGS, DONE_DOC},
    {"exception", handle_exception, METH_NOARGS, EXCEPTION_DOC},
    {"_wake", handle_wake, METH_O, "_wake($self, waker, /)\n--\n\nFor kvstore._await."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef MEMBERS[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(py_handle_t, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot SLOTS[] = {
    {Py_tp_doc, (void *)HANDLE_DOC},
    {Py_tp_dealloc, handle_dealloc},
    {Py_tp_traverse, handle_traverse},
    {Py_tp_clear, handle_clear},
    {Py_tp_repr, handle_repr},
    {Py_tp_methods, METHODS},
    {Py_tp_members, MEMBERS},
    {Py_am_await, handle_await},
    {0, NULL},
};

static PyType_Spec SPEC = {
    .name = "kvstore.Handle",
    .basicsize = sizeof(py_handle_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = SLOTS,
};

static PyMethodDef FUNCTIONS[] = {
    {"_waker", new_waker, METH_NOARGS, "_waker($module, /)\n--\n\nFor kvstore._await."},
    {NULL, NULL, 0, NULL},
};

int kv_handle_setup(PyObject *module, kv_state_t *state)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &SPEC, NULL);
    if (type == NULL)
        return -1;
    state->handle_type = (PyTypeObject *)type;
    return PyModule_AddObjectRef(module, "Handle", type) < 0
               ? -1
               : PyModule_AddFunctions(module, FUNCTIONS);
}
