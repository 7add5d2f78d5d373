/* How the pushes of a round become the next version of their slice: by their sum, or by the step of
 * an optimizer, which takes the sum in the same pass.
 *
 * Servers know optimizers by numbers; what a step takes besides comes with the push. All slices of
 * a key therefore take the same step, on whichever server they lie and whenever it has heard of an
 * optimizer. Without an optimizer the next version is a buffer of its own; a step changes the value
 * where it lies, unless it is still being sent to somebody.
 */
#include "ps/server_internal.h"
#include <inttypes.h>
#include <string.h>

/* ------------------------------------------------------------------------------- optimizers */

const kv_known_optimizer_t *kv_known_optimizer_locked(const kv_server_t *server, uint64_t number)
{
    const kv_known_optimizer_t *known = server->optimizers;
    while (known != NULL && known->number != number)
        known = known->next;
    return known;
}

kv_status_t kv_server_add_optimizer(kv_server_t *server, uint64_t number, int64_t training,
                                    const kv_optim_class_t *optim,
                                    const kv_optim_numbers_t *numbers)
{
    KV_TRY(kv_optim_check(optim, numbers));
    kv_known_optimizer_t *added = kv_alloc(sizeof *added);
    KV_TRY_ALLOC(added, "an optimizer");
    *added = (kv_known_optimizer_t){
        .number = number, .training = training, .optim = optim, .numbers = *numbers};
    kv_mutex_lock(&server->mutex);
    kv_known_optimizer_t **link = &server->optimizers, *earlier;
    for (int kept = 1; kept < KV_KNOWN_OPTIMIZERS && (earlier = *link) != NULL; kept++) {
        if (earlier->number == number)
            break;
        link = &earlier->next;
    }
    earlier = *link; /* the same one, or the oldest */
    if (earlier != NULL)
        *link = earlier->next;
    added->next = server->optimizers;
    server->optimizers = added;
    kv_mutex_unlock(&server->mutex);
    kv_free(earlier);
    return KV_OK;
}

/* Slices of a key, and keys, draw from streams of their own. */
static uint64_t stream_of(const kv_slice_t *slice)
{
    return (slice->node.number << 20) + slice->node.part;
}

bool kv_slice_goes_on(const kv_slice_t *slice, const kv_known_optimizer_t *known)
{
    return slice->slots != NULL && slice->slots->optim == known->optim &&
           slice->step.numbers.python == known->numbers.python &&
           slice->training >= known->training;
}

/* What the push says, or, if it says nothing and has to be applied with something, what the newest
 * push of the slice has said, or what the optimizer begins with. */
static kv_step_t step_of(const kv_slice_t *slice, const kv_known_optimizer_t *known,
                         const kv_wire_record_t *record)
{
    kv_step_t step;
    bool has_begun = kv_slice_goes_on(slice, known);
    if (record->optimizer != 0) {
        kv_wire_get_step(record, known->optim, &known->numbers, &step);
        /* Of an asynchronous server's workers each counts its own pushes. */
        if (has_begun && slice->server->async && slice->step.t > step.t)
            step.t = slice->step.t;
    } else if (has_begun) {
        step = slice->step;
        step.numbers = known->numbers;
    } else {
        kv_optim_state_t begin = {.num_update = known->numbers.begin_num_update,
                                  .nadam_product = 1};
        kv_step_init(&step, known->optim, &known->numbers, &begin,
                     known->numbers.begin_num_update + 1, known->numbers.learning_rate, 1, 1,
                     false);
    }
    step.seed = stream_of(slice);
    return step;
}

/* Elements of a row of a dense slice; one that is a piece of a row, or ends within one, is a row
 * itself. */
static int64_t row_count_of(const kv_slice_t *slice, int64_t count, bool *cut)
{
    int64_t row_count = slice->row_count;
    *cut = row_count <= 0 || row_count > count || count % row_count != 0;
    return *cut ? count : row_count;
}

static kv_status_t check_step(const kv_slice_t *slice, const kv_step_t *step,
                              const kv_request_t *push)
{
    const char *title = step->optim->title;
    kv_slot_t slots[KV_MAX_SLOTS];
    int num_slots = step->optim->slots(&step->numbers, slots);
    bool cut;
    (void)row_count_of(slice, (int64_t)(slice->bytes / kv_dtype_bytes(slice->dtype)), &cut);
    if (!kv_dtype_is_floating(slice->dtype))
        return kv_fail(KV_BAD_TYPE, "the value is %s: the optimizer %s updates floating types only",
                       kv_dtype_name(slice->dtype), title);
    if (step->t < 1)
        return kv_fail(KV_INVALID, "a push says that it is number %" PRId64 " of its key", step->t);
    if (slice->phase == KV_PHASE_WHOLE && slice->key->norms != NULL && kv_step_needs_norms(step))
        return kv_fail(KV_INVALID,
                       "the optimizer %s needs norms of the whole value, and worker %" PRId32
                       " pushed without it; call set_optimizer there, too",
                       title, push->worker);
    if (num_slots > 0 && slots[0].per_row && slice->bytes > 0 && cut && !slice->sparse)
        return kv_fail(KV_NOT_BUILT,
                       "the optimizer %s keeps a number for each row, and rows of this value are "
                       "cut into slices: not in servers of this version",
                       title);
    return KV_OK;
}

kv_status_t kv_slice_take_slots(kv_slice_t *slice, const kv_known_optimizer_t *known)
{
    if (kv_slice_goes_on(slice, known))
        return KV_OK;
    kv_slots_t *slots = kv_slots_new(known->optim);
    KV_TRY_ALLOC(slots, "the state of an optimizer");
    kv_slots_rele(slice->slots);
    kv_slice_keep(slice, NULL, NULL);
    slice->slots = slots;
    slice->training = known->training;
    return KV_OK;
}

/* ----------------------------------------------------------------------------------- rounds */

const kv_request_t *kv_round_first(const kv_slice_t *slice)
{
    int32_t worker = 0;
    while (slice->workers[worker].summing == NULL)
        worker++;
    return slice->workers[worker].summing;
}

static bool is_python(const kv_slice_t *slice)
{
    return slice->steps && slice->step.optim == kv_optim_python();
}

/* Memory for the version that is to be made: a push's own, the value's, or new one. */
static kv_buffer_t *room_locked(kv_server_t *server, const kv_slice_t *slice)
    KV_REQUIRES(server->mutex)
{
    kv_buffer_t *room;
    if (is_python(slice))
        return kv_buffer_new(slice->bytes, &room) == KV_OK ? room : NULL;
    if (slice->steps && atomic_load(&slice->stored->refs) == 1)
        return kv_buffer_hold(slice->stored);
    for (int32_t i = 0; i < server->num_workers && !slice->steps; i++) {
        const kv_request_t *push = slice->workers[i].summing;
        if (push != NULL && push->whole && !slice->by_rows &&
            push->header.record.codec == KV_CODEC_NONE)
            return kv_buffer_hold(push->buffer);
    }
    return kv_pool_get(server->pool, slice->bytes, &room) == KV_OK ? room : NULL;
}

static kv_status_t prepare_locked(kv_server_t *server, kv_slice_t *slice) KV_REQUIRES(server->mutex)
{
    const kv_request_t *first = kv_round_first(slice);
    const kv_wire_record_t *record = &first->header.record;
    const kv_known_optimizer_t *known = record->optimizer != 0
                                            ? kv_known_optimizer_locked(server, record->optimizer)
                                        : server->async ? server->optimizers
                                                        : NULL;
    KV_TRY(kv_round_check_rows(slice));
    slice->by_rows = (record->flags & KV_WIRE_ROWS) != 0;
    slice->steps = known != NULL;
    if (slice->steps) {
        kv_step_t step = step_of(slice, known, record);
        if (slice->phase == KV_PHASE_MEASURES)
            kv_norms_take_turn(slice, &step);
        KV_TRY(check_step(slice, &step, first));
        if (step.optim == kv_optim_python())
            KV_TRY(kv_update_check(slice));
        KV_TRY(kv_slice_take_slots(slice, known));
        slice->step = step;
        slice->optimizer = known->number;
    }
    slice->made = slice->sparse ? NULL : room_locked(server, slice);
    if (slice->made == NULL && !slice->sparse)
        return kv_fail(KV_NO_MEMORY, "no memory for slice %" PRIu32 " of a key", record->slice);
    if (is_python(slice))
        slice->phase = KV_PHASE_SUMS;
    return KV_OK;
}

kv_error_t *kv_round_prepare_locked(kv_server_t *server, kv_slice_t *slice)
{
    bool shares = (kv_round_first(slice)->header.record.flags & KV_WIRE_SHARES_NORMS) != 0;
    slice->phase = shares && slice->key->norms != NULL ? KV_PHASE_MEASURES : KV_PHASE_WHOLE;
    slice->steps = false;
    slice->sums = (kv_norm_sums_t){.weight = 0};
    for (int32_t i = 0; i < server->num_workers; i++) {
        const kv_request_t *push = slice->workers[i].summing;
        if (push != NULL && push->failure != NULL)
            return kv_error_hold(push->failure);
    }
    kv_status_t status = prepare_locked(server, slice);
    return status == KV_OK ? NULL : kv_error_capture(status);
}

/* The pushes of the round, in the order of the ranks. */
static kv_gradients_t gradients_of(kv_slice_t *slice)
{
    kv_gradients_t gradients = {.src = slice->sources};
    for (int32_t i = 0; i < slice->server->num_workers; i++) {
        const kv_request_t *push = slice->workers[i].summing;
        if (push == NULL)
            continue;
        const unsigned char *data = push->data;
        kv_codec_t codec = {.type = (kv_codec_type_t)push->header.record.codec};
        if (codec.type != KV_CODEC_NONE) {
            codec.threshold = kv_wire_get_threshold(data);
            data += KV_WIRE_THRESHOLD_BYTES;
            gradients.coded = slice->codecs;
        }
        slice->codecs[gradients.num_src] = codec;
        slice->sources[gradients.num_src++] = data;
    }
    return gradients;
}

/* The value at `data` as a weight for the step. */
static kv_status_t weight_of(kv_slice_t *slice, const kv_host_t *host, int64_t count, void *data,
                             kv_weight_t *out)
{
    bool cut;
    int64_t row_count = row_count_of(slice, count, &cut);
    return kv_slots_weight(slice->slots, host, &slice->step, slice->dtype, count / row_count,
                           row_count, data, out);
}

kv_status_t kv_round_run(kv_slice_t *slice)
{
    kv_host_t alone = slice->server->host;
    alone.num_threads = 1; /* slices run side by side */
    if (slice->phase == KV_PHASE_MEASURES && !slice->steps)
        return KV_OK;
    if (slice->phase == KV_PHASE_SUMS)
        KV_TRY(kv_update_room(slice));
    if (slice->by_rows)
        return kv_round_run_rows(slice, &alone);
    int64_t count = (int64_t)(slice->bytes / kv_dtype_bytes(slice->dtype));
    kv_gradients_t gradients = gradients_of(slice);
    bool sums = slice->phase == KV_PHASE_SUMS;
    void *made = sums ? slice->recv->data : slice->made->data;
    kv_weight_t weight;
    if (count == 0)
        return KV_OK;
    if (slice->phase == KV_PHASE_MEASURES) {
        KV_TRY(weight_of(slice, &alone, count, slice->stored->data, &weight));
        kv_host_measure(&alone, &slice->step, &weight, &gradients, &slice->sums);
    } else if (slice->steps && !sums) {
        if (slice->made != slice->stored)
            memcpy(made, slice->stored->data, slice->bytes);
        KV_TRY(weight_of(slice, &alone, count, made, &weight));
        if (slice->phase == KV_PHASE_ENDS)
            (void)kv_host_update_part(&alone, &slice->step, &weight, &gradients, &slice->sums);
        else
            (void)kv_host_update(&alone, &slice->step, &weight, &gradients, 0, NULL);
    } else if (gradients.coded != NULL) {
        (void)kv_host_sum_gradients(&alone, slice->dtype, count, &gradients, 1, &made);
    } else {
        kv_host_sum(&alone, slice->dtype, count, gradients.num_src, gradients.src, 1, &made);
    }
    return KV_OK;
}
