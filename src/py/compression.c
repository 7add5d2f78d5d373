/* The codecs of gradient compression on arrays of the user's: what kvstore/compression.py calls.
 *
 * An array of our own takes part by its variable: one operation, run by the calling thread, holds
 * all of them. Strided arrays pass through contiguous copies.
 */
#include "py/py.h"

#include "base/memory.h"

/* Elements of a chunk for the team; and of a piece that is rounded to 16 bits. */
#define CHUNK (KV_CODEC_UNIT * INT64_C(4096))
#define PIECE (KV_CODEC_UNIT * 64)

/* An array of a call, and its elements one after the other: in place or copied. */
typedef struct operand {
    kv_view_t view;
    kv_lease_t lease;
    void *data;   /* NULL until prepared */
    void *staged; /* NULL when in place */
} operand_t;

static void drop(operand_t *operand)
{
    kv_free(operand->staged);
    kv_lease_drop(&operand->lease);
}

/* ------------------------------------------------------------------------------ arguments */

/* An array within reach of an element type that the store can hold. */
static bool take(kv_state_t *state, const char *what, PyObject *object, bool for_out,
                 operand_t *operand)
{
    if (!kv_py_array_in(state, object, for_out, &operand->view, &operand->lease))
        return false;
    const kv_view_t *view = &operand->view;
    if (view->sparse != NULL)
        kv_py_fail(state, KV_BAD_TYPE, "%s must be a dense array, not a RowSparse", what);
    else if (kv_view_beyond(view))
        kv_py_fail(state, KV_BAD_TYPE,
                   "%s must be in memory of the host or of a CUDA device: bring '%.100s' to the "
                   "host first",
                   what, Py_TYPE(object)->tp_name);
    else if (for_out && (view->flags & KV_VIEW_DEVICE))
        kv_py_fail(state, KV_BAD_TYPE,
                   "%s is changed in place and must be in host memory, where '%.100s' is not", what,
                   Py_TYPE(object)->tp_name);
    else if (view->dtype == KV_DTYPE_NONE)
        kv_py_fail(state, KV_BAD_TYPE, "%s cannot have elements of type %.100s", what,
                   view->type_name);
    else
        return true;
    return false;
}

/* The conversion of another array may have run Python code, which may have given a NumPy array a
 * new shape. */
static bool look_again(kv_state_t *state, operand_t *operand)
{
    kv_lease_t fresh;
    if (operand->lease.data != NULL || operand->view.array != NULL)
        return true;
    if (kv_numpy_array_in(state, operand->lease.owner, &operand->view, &fresh) <= 0)
        return false;
    kv_lease_drop(&operand->lease);
    operand->lease = fresh;
    return true;
}

static bool check_floating(kv_state_t *state, const char *what, kv_dtype_t dtype)
{
    if (!kv_dtype_is_floating(dtype))
        kv_py_fail(state, KV_BAD_TYPE,
                   "%s must be of type float64, float32, float16 or bfloat16, not %s", what,
                   kv_dtype_name(dtype));
    return kv_dtype_is_floating(dtype);
}

static bool same_shape(const kv_view_t *a, const kv_view_t *b)
{
    return a->ndim == b->ndim &&
           (a->ndim == 0 || memcmp(a->shape, b->shape, (size_t)a->ndim * sizeof a->shape[0]) == 0);
}

/* Whether they share memory; also if it is the same array, which a store's out may be. */
static bool check_apart(kv_state_t *state, const kv_view_t *gradient, const kv_view_t *residual)
{
    kv_status_t status = kv_outs_check_disjoint(residual, 1);
    if (status == KV_INVALID)
        kv_py_fail(state, KV_INVALID,
                   "residual must have its own memory for each element, and has several at one "
                   "place");
    else if (status != KV_OK)
        kv_py_raise(state, status);
    if (status != KV_OK)
        return false;
    status = kv_outs_check_values(residual, 1, gradient, 1);
    if (status == KV_INVALID || (gradient->data == residual->data && gradient->count > 0)) {
        kv_py_fail(state, KV_INVALID, "residual and gradient must not share memory");
        return false;
    }
    if (status != KV_OK)
        kv_py_raise(state, status);
    return status == KV_OK;
}

static bool check_pair(kv_state_t *state, const kv_view_t *gradient, const kv_view_t *residual)
{
    char one[128], other[128];
    if (!check_floating(state, "gradient", (kv_dtype_t)gradient->dtype))
        return false;
    kv_dtype_t wide = gradient->dtype == KV_FLOAT64 ? KV_FLOAT64 : KV_FLOAT32;
    if (residual->dtype != wide)
        kv_py_fail(state, KV_BAD_TYPE, "the residual of a %s gradient must be of type %s, not %s",
                   kv_dtype_name((kv_dtype_t)gradient->dtype), kv_dtype_name(wide),
                   kv_dtype_name((kv_dtype_t)residual->dtype));
    else if (!same_shape(gradient, residual))
        kv_py_fail(state, KV_INVALID,
                   "gradient has shape %s and residual %s: they must be the same",
                   kv_shape_format(gradient->ndim, gradient->shape, one, sizeof one),
                   kv_shape_format(residual->ndim, residual->shape, other, sizeof other));
    else if (residual->flags & KV_VIEW_READONLY)
        kv_py_fail(state, KV_INVALID, "residual is updated in place, and is read-only");
    else
        return check_apart(state, gradient, residual);
    return false;
}

static bool parse_codec(kv_state_t *state, const char *type, double threshold, kv_codec_t *codec)
{
    int known = kv_codec_type_parse(type);
    if (known < 0) {
        kv_py_fail(state, KV_INVALID, "there is no compression of type '%.64s'", type);
        return false;
    }
    *codec = (kv_codec_t){(kv_codec_type_t)known, threshold};
    kv_status_t status = kv_codec_check(codec);
    if (status != KV_OK)
        kv_py_raise(state, status);
    return status == KV_OK;
}

/* The same for a codec that has codes. */
static bool parse_coding(kv_state_t *state, const char *type, double threshold, kv_codec_t *codec)
{
    if (!parse_codec(state, type, threshold, codec))
        return false;
    if (codec->type == KV_CODEC_NONE)
        kv_py_fail(state, KV_INVALID, "compression of type 'none' has no codes");
    return codec->type != KV_CODEC_NONE;
}

/* ----------------------------------------------------------------------------------- work */

/* Room for the elements of an array that is not contiguous; and those of a CUDA array. */
static bool stage(kv_state_t *state, operand_t *operand)
{
    const kv_view_t *view = &operand->view;
    operand->data = view->data;
    if (view->strides == NULL && !(view->flags & KV_VIEW_DEVICE))
        return true;
    operand->data = operand->staged =
        kv_alloc_elements((size_t)view->count * kv_dtype_bytes((kv_dtype_t)view->dtype));
    if (operand->staged == NULL)
        PyErr_NoMemory();
    return operand->staged != NULL &&
           (!(view->flags & KV_VIEW_DEVICE) || kv_view_copy_out(state, view, operand->staged));
}

static void gather(operand_t *operand)
{
    if (operand->staged != NULL && !(operand->view.flags & KV_VIEW_DEVICE))
        kv_view_gather(&operand->view, operand->staged);
}

typedef struct job {
    const kv_kernels_t *kernels;
    kv_codec_t codec;
    kv_dtype_t dtype;
    int64_t count;
    operand_t operands[2]; /* gradient and residual, or codes alone */
    int num_operands;
    void *out; /* codes, or elements of `dtype` */
} job_t;

static void encode_chunk(void *context, int64_t chunk)
{
    const job_t *job = context;
    int64_t begin = chunk * CHUNK;
    int64_t end = job->count - begin < CHUNK ? job->count : begin + CHUNK;
    kv_codec_encode(job->kernels, &job->codec, job->dtype, begin, end, job->count,
                    job->operands[0].data, job->operands[1].data, job->out);
}

static void decode_chunk(void *context, int64_t chunk)
{
    const job_t *job = context;
    int64_t item = (int64_t)kv_dtype_bytes(job->dtype), begin = chunk * CHUNK;
    int64_t end = job->count - begin < CHUNK ? job->count : begin + CHUNK;
    char *out = job->out;
    const uint8_t *codes = job->operands[0].data;
    if (item > 2) {
        kv_codec_decode(job->kernels, &job->codec, job->dtype, begin, end, codes, true,
                        out + begin * item);
        return;
    }
    for (int64_t at = begin; at < end; at += PIECE) {
        float piece[PIECE];
        int64_t count = end - at < PIECE ? end - at : PIECE;
        kv_codec_decode(job->kernels, &job->codec, job->dtype, at, at + count, codes, true, piece);
        job->kernels->float32_to[job->dtype](count, piece, out + at * item);
    }
}

/* Waits for the turn on our own arrays among the operands and runs the chunks, detached. False with
 * an exception: nothing has been read or written. */
static bool run(kv_state_t *state, job_t *job, void (*chunk)(void *context, int64_t chunk))
{
    kv_runtime_t *runtime = kv_py_runtime(state);
    kv_py_caller_t caller;
    kv_dep_t deps[2];
    kv_op_t op;
    int num_deps = 0;
    if (runtime == NULL)
        return false;
    for (int i = 0; i < job->num_operands; i++) {
        kv_array_t *array = job->operands[i].view.array;
        if (array != NULL && array->generation != kv_fork_generation()) {
            kv_py_fail(state, KV_CLOSED, "the array belongs to the parent of this forked process");
            return false;
        }
        if (array != NULL)
            deps[num_deps++] =
                (kv_dep_t){.var = &array->var, .access = i == 1 ? KV_WRITE : KV_READ};
        if (!stage(state, &job->operands[i]))
            return false;
    }
    kv_py_caller_init(&caller, KV_PY_DEFAULT_TIMEOUT_NS);
    if (num_deps > 0) {
        kv_op_init(&op, deps, num_deps, 0);
        kv_status_t status = kv_engine_enter(runtime->engine, &op, &caller.base);
        if (status != KV_OK) {
            kv_py_raise(state, status);
            return false;
        }
    }
    job->kernels = runtime->kernels;
    if (job->count * (int64_t)kv_dtype_bytes(job->dtype) >= KV_DETACH_BYTES)
        kv_caller_detach(&caller.base);
    for (int i = 0; i < job->num_operands; i++)
        gather(&job->operands[i]);
    if (job->count > 0)
        kv_team_run(runtime->team, runtime->num_threads, (job->count - 1) / CHUNK + 1, chunk, job);
    if (job->num_operands == 2 && job->operands[1].staged != NULL)
        kv_view_scatter(&job->operands[1].view, job->operands[1].staged);
    if (num_deps > 0)
        kv_engine_leave(runtime->engine, &op);
    kv_caller_attach(&caller.base);
    return true;
}

/* ------------------------------------------------------------------------------ functions */

PyObject *kv_py_compression_check(PyObject *module, PyObject *args)
{
    const char *type;
    double threshold;
    kv_codec_t codec;
    if (!PyArg_ParseTuple(args, "sd:compression_check", &type, &threshold) ||
        !parse_codec(kv_py_state(module), type, threshold, &codec))
        return NULL;
    Py_RETURN_NONE;
}

PyObject *kv_py_compression_encode(PyObject *module, PyObject *args)
{
    kv_state_t *state = kv_py_state(module);
    PyObject *gradient, *residual, *codes = NULL;
    const char *type;
    double threshold;
    job_t job = {.num_operands = 2};
    operand_t *from = &job.operands[0], *left = &job.operands[1];
    kv_py_release_now();
    if (!PyArg_ParseTuple(args, "OOsd:compression_encode", &gradient, &residual, &type,
                          &threshold) ||
        !parse_coding(state, type, threshold, &job.codec))
        return NULL;
    if (!take(state, "gradient", gradient, false, from) ||
        !take(state, "residual", residual, true, left) || !look_again(state, from) ||
        !check_pair(state, &from->view, &left->view))
        goto end;
    job.dtype = (kv_dtype_t)from->view.dtype;
    job.count = from->view.count;
    int64_t bytes = kv_codec_bytes(job.codec.type, job.count);
    codes = kv_numpy_empty(state, KV_UINT8, 1, &bytes, &job.out);
    if (codes != NULL && !run(state, &job, encode_chunk))
        Py_CLEAR(codes);
end:
    drop(from);
    drop(left);
    return codes;
}

PyObject *kv_py_compression_decode(PyObject *module, PyObject *args)
{
    kv_state_t *state = kv_py_state(module);
    PyObject *codes, *shape, *like, *result = NULL;
    const char *type;
    double threshold;
    int64_t extents[KV_MAX_DIMS];
    size_t bytes;
    job_t job = {.num_operands = 1};
    operand_t *from = &job.operands[0];
    kv_py_release_now();
    if (!PyArg_ParseTuple(args, "OOOsd:compression_decode", &codes, &shape, &like, &type,
                          &threshold) ||
        !parse_coding(state, type, threshold, &job.codec))
        return NULL;
    job.dtype = kv_numpy_dtype(state, like);
    if (job.dtype == KV_DTYPE_NONE || !check_floating(state, "dtype", job.dtype))
        return NULL;
    int ndim = kv_py_extents(state, shape, extents);
    if (ndim < 0)
        return NULL;
    kv_status_t status = kv_shape_size(job.dtype, ndim, extents, &job.count, &bytes);
    if (status != KV_OK)
        return kv_py_raise(state, status);
    if (!take(state, "codes", codes, false, from))
        goto end;
    char text[128];
    int64_t due = kv_codec_bytes(job.codec.type, job.count);
    if (from->view.dtype != KV_UINT8)
        kv_py_fail(state, KV_BAD_TYPE, "codes must be of type uint8, not %s",
                   kv_dtype_name((kv_dtype_t)from->view.dtype));
    else if (from->view.ndim != 1 || from->view.count != due)
        kv_py_fail(state, KV_INVALID,
                   "codes must have shape (%lld,) for %lld elements of type %s, not %s",
                   (long long)due, (long long)job.count, kv_codec_type_name(job.codec.type),
                   kv_shape_format(from->view.ndim, from->view.shape, text, sizeof text));
    else
        result = kv_numpy_empty(state, job.dtype, ndim, extents, &job.out);
    if (result != NULL && !run(state, &job, decode_chunk))
        Py_CLEAR(result);
end:
    drop(from);
    return result;
}
