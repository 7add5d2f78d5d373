/* Writing and reading of messages.
 *
 * Records and headers are written and read field by field from the tables of wire.h, so that
 * neither padding nor the byte order of the machine matters. What is read comes from another
 * process: every length is compared with what is left before it is used, and lengths are only
 * subtracted from, never added up.
 */
#include "ps/wire.h"
#include "compress/codec.h"
#include "net/net.h"
#include <inttypes.h>
#include <string.h>

#define COUNT_BYTES(bits, name) +(bits) / 8
_Static_assert(0 KV_WIRE_RECORD_FIELDS(COUNT_BYTES) == KV_WIRE_RECORD_BYTES, "bytes of a record");
_Static_assert(0 KV_WIRE_HEADER_FIELDS(COUNT_BYTES) + KV_WIRE_RECORD_BYTES == KV_WIRE_HEADER_BYTES,
               "bytes of a header");
_Static_assert((int)KV_WIRE_HEADER_BYTES <= (int)KV_NET_HEADER_BYTES,
               "a header fits where the endpoint keeps it");

/* ---------------------------------------------------------------------------------- numbers */

static unsigned char *put(unsigned char *out, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        out[i] = (unsigned char)(value >> 8 * i);
    return out + bytes;
}

static uint64_t get(const unsigned char *data, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)data[i] << 8 * i;
    return value;
}

/* ------------------------------------------------------------------------ records and headers */

#define PUT_FIELD(bits, name) out = put(out, source->name, (bits) / 8);
#define GET_FIELD(bits, name)                                                                      \
    target->name = (uint##bits##_t)get(data, (bits) / 8);                                          \
    data += (bits) / 8;

void kv_wire_put_record(const kv_wire_record_t *record, unsigned char *out)
{
    const kv_wire_record_t *source = record;
    KV_WIRE_RECORD_FIELDS(PUT_FIELD)
}

void kv_wire_put_header(const kv_wire_header_t *header, unsigned char *out)
{
    const kv_wire_header_t *source = header;
    KV_WIRE_HEADER_FIELDS(PUT_FIELD)
    kv_wire_put_record(&header->record, out);
}

static void get_record(const unsigned char *data, kv_wire_record_t *target)
{
    KV_WIRE_RECORD_FIELDS(GET_FIELD)
}

static kv_status_t check_type(unsigned dtype, unsigned status)
{
    if (dtype >= KV_DTYPE_COUNT)
        return kv_fail(KV_INVALID, "a message names element type %u, which there is none of",
                       dtype);
    if (status >= KV_STATUS_COUNT)
        return kv_fail(KV_INVALID, "a message names status %u, which there is none of", status);
    return KV_OK;
}

static kv_status_t check_record(const kv_wire_record_t *record)
{
    if (record->action == 0 || record->action >= KV_WIRE_ACTIONS)
        return kv_fail(KV_INVALID, "a message names action %u, which there is none of",
                       (unsigned)record->action);
    if (record->flags >= KV_WIRE_FLAGS)
        return kv_fail(KV_INVALID, "a message has flags %u, which there are none of",
                       (unsigned)record->flags);
    if (record->codec > KV_CODEC_1BIT)
        return kv_fail(KV_INVALID, "a message names codec %u, which there is none of",
                       (unsigned)record->codec);
    return check_type(record->dtype, record->status);
}

kv_status_t kv_wire_get_header(const void *data_, size_t bytes, kv_wire_header_t *out)
{
    const unsigned char *data = data_;
    kv_wire_header_t header, *target = &header;
    if (bytes != KV_WIRE_HEADER_BYTES)
        return kv_fail(KV_INVALID, "a message has a header of %zu bytes, not %d", bytes,
                       (int)KV_WIRE_HEADER_BYTES);
    KV_WIRE_HEADER_FIELDS(GET_FIELD)
    get_record(data, &header.record);
    if (header.version != KV_WIRE_VERSION)
        return kv_fail(KV_INVALID, "a message is of version %u of the protocol, this node has %d",
                       (unsigned)header.version, (int)KV_WIRE_VERSION);
    if (header.kind == 0 || header.kind >= KV_WIRE_KINDS)
        return kv_fail(KV_INVALID, "a message is of kind %u, which there is none of",
                       (unsigned)header.kind);
    if (header.kind == KV_WIRE_PUSH_ONE || header.kind == KV_WIRE_VALUE ||
        header.kind == KV_WIRE_NORMS)
        KV_TRY(check_record(&header.record));
    *out = header;
    return KV_OK;
}

/* ------------------------------------------------------------------------- steps and codes */

static uint64_t bits_of(double number)
{
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

static double number_of(uint64_t bits)
{
    double number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

void kv_wire_put_step(kv_wire_record_t *record, uint64_t optimizer, const kv_step_t *step)
{
    record->optimizer = optimizer;
    record->lr = bits_of(step->lr);
    record->wd = bits_of(step->wd);
    record->t = (uint64_t)step->t;
    record->own = bits_of(kv_step_own(step));
    record->flags |= step->plain_rate ? KV_WIRE_PLAIN_RATE : 0;
}

void kv_wire_get_step(const kv_wire_record_t *record, const kv_optim_class_t *optim,
                      const kv_optim_numbers_t *numbers, kv_step_t *out)
{
    kv_step_restore(out, optim, numbers, number_of(record->lr), number_of(record->wd),
                    (int64_t)record->t, number_of(record->own),
                    (record->flags & KV_WIRE_PLAIN_RATE) != 0);
}

void kv_wire_put_sums(kv_wire_record_t *record, const kv_norm_sums_t *sums)
{
    record->lr = bits_of(sums->weight);
    record->wd = bits_of(sums->other);
    record->t = bits_of(sums->exact_weight);
    record->own = bits_of(sums->exact_other);
}

void kv_wire_get_sums(const kv_wire_record_t *record, kv_norm_sums_t *out)
{
    *out = (kv_norm_sums_t){.weight = number_of(record->lr),
                            .other = number_of(record->wd),
                            .exact_weight = number_of(record->t),
                            .exact_other = number_of(record->own)};
}

size_t kv_wire_coded_bytes(kv_codec_type_t codec, kv_dtype_t dtype, size_t bytes)
{
    int64_t count = (int64_t)(bytes / kv_dtype_bytes(dtype));
    return KV_WIRE_THRESHOLD_BYTES + (size_t)kv_codec_bytes(codec, count);
}

void kv_wire_put_threshold(double threshold, unsigned char *out)
{
    put(out, bits_of(threshold), KV_WIRE_THRESHOLD_BYTES);
}

double kv_wire_get_threshold(const unsigned char *data)
{
    return number_of(get(data, KV_WIRE_THRESHOLD_BYTES));
}

/* ------------------------------------------------------------------------------------- rows */

int64_t *kv_wire_put_rows(const kv_wire_rows_t *rows, void *out_)
{
    unsigned char *out = out_;
    out = put(out, (uint64_t)rows->count, 8);
    out = put(out, (uint64_t)rows->num_rows, 8);
    out = put(out, rows->row_bytes, 8);
    return (int64_t *)(void *)out;
}

kv_status_t kv_wire_get_rows(const void *data_, size_t bytes, bool ids_only, kv_wire_rows_t *out)
{
    const unsigned char *data = data_;
    if (bytes < KV_WIRE_ROWS_HEAD)
        return kv_fail(KV_INVALID, "rows of %zu bytes are none", bytes);
    uint64_t count = get(data, 8), num_rows = get(data + 8, 8), row_bytes = get(data + 16, 8);
    size_t left = bytes - KV_WIRE_ROWS_HEAD, each = sizeof(int64_t);
    if (num_rows > INT64_MAX || row_bytes > KV_WIRE_ROWS_BYTES)
        return kv_fail(KV_INVALID, "%" PRIu64 " rows of %" PRIu64 " bytes are no slice", num_rows,
                       row_bytes);
    each += ids_only ? 0 : (size_t)row_bytes;
    if (count > left / each || count * each != left)
        return kv_fail(KV_INVALID, "%" PRIu64 " rows of %" PRIu64 " bytes do not fill %zu bytes",
                       count, row_bytes, bytes);
    data += KV_WIRE_ROWS_HEAD;
    *out = (kv_wire_rows_t){.count = (int64_t)count,
                            .num_rows = (int64_t)num_rows,
                            .row_bytes = (size_t)row_bytes,
                            .ids = (const int64_t *)(const void *)data};
    if (!ids_only)
        out->data = (const char *)data + count * sizeof(int64_t);
    bool good = true;
    for (int64_t i = 0, last = -1; i < out->count; last = out->ids[i++])
        good = good && out->ids[i] > last && out->ids[i] < out->num_rows;
    return good ? KV_OK
                : kv_fail(KV_INVALID, "row ids do not increase within the %" PRIu64 " of a slice",
                          num_rows);
}

/* ------------------------------------------------------------------------- records in payloads */

static size_t aligned(size_t bytes)
{
    return (bytes + KV_WIRE_ALIGN - 1) / KV_WIRE_ALIGN * KV_WIRE_ALIGN;
}

size_t kv_wire_table_bytes(uint32_t count)
{
    return aligned((size_t)count * KV_WIRE_RECORD_BYTES);
}

size_t kv_wire_value_bytes(size_t bytes)
{
    return aligned(bytes);
}

kv_status_t kv_wire_cursor_init(kv_wire_cursor_t *cursor, const void *payload, size_t bytes,
                                uint32_t count)
{
    if (count > bytes / KV_WIRE_RECORD_BYTES)
        return kv_fail(KV_INVALID, "a message of %zu bytes cannot hold %" PRIu32 " records", bytes,
                       count);
    *cursor = (kv_wire_cursor_t){
        .data = payload, .bytes = bytes, .value = kv_wire_table_bytes(count), .left = count};
    return KV_OK;
}

kv_status_t kv_wire_next(kv_wire_cursor_t *cursor, kv_wire_record_t *record, const void **value)
{
    kv_wire_record_t next;
    get_record(cursor->data + cursor->record, &next);
    KV_TRY(check_record(&next));
    /* What is behind the table may be missing when there is no data, and so may the padding of the
     * last value. */
    size_t begin = cursor->value < cursor->bytes ? cursor->value : cursor->bytes;
    if (next.bytes > cursor->bytes - begin)
        return kv_fail(KV_INVALID, "a value of %" PRIu64 " bytes does not fit into its message",
                       next.bytes);
    cursor->record += KV_WIRE_RECORD_BYTES;
    cursor->value = begin + kv_wire_value_bytes((size_t)next.bytes);
    cursor->left--;
    *record = next;
    *value = cursor->data + begin;
    return KV_OK;
}

/* ------------------------------------------------------------------------------------- keys */

/* Name, number and places of a key; its extents, the text of its name, its sentence and its servers
 * follow. */
#define KEY_FIELDS(X)                                                                              \
    X(8, is_text)                                                                                  \
    X(8, dtype)                                                                                    \
    X(8, sparse)                                                                                   \
    X(8, placed)                                                                                   \
    X(8, status)                                                                                   \
    X(8, ndim)                                                                                     \
    X(16, unused)                                                                                  \
    X(32, name_bytes)                                                                              \
    X(32, sentence_bytes)                                                                          \
    X(32, num_slices)                                                                              \
    X(64, name_number)                                                                             \
    X(64, number)                                                                                  \
    X(64, slice_bytes)

typedef struct key_fields {
    KEY_FIELDS(KV_WIRE_DECLARE_FIELD)
} key_fields_t;
enum { KEY_BYTES = 0 KEY_FIELDS(COUNT_BYTES) };

size_t kv_wire_key_bytes(const kv_wire_key_t *key)
{
    return KEY_BYTES + 8 * (size_t)key->ndim + (key->name.text != NULL ? key->name.bytes : 0) +
           key->sentence_bytes + (key->placed ? 2 * (size_t)key->num_slices : 0);
}

static unsigned char *put_bytes(unsigned char *out, const void *data, size_t bytes)
{
    if (bytes > 0)
        memcpy(out, data, bytes);
    return out + bytes;
}

unsigned char *kv_wire_put_key(const kv_wire_key_t *key, unsigned char *out)
{
    bool is_text = key->name.text != NULL;
    const key_fields_t fields = {
        .is_text = is_text,
        .dtype = key->dtype,
        .sparse = key->sparse,
        .placed = key->placed,
        .status = key->status,
        .ndim = (uint8_t)key->ndim,
        .name_bytes = is_text ? (uint32_t)key->name.bytes : 0,
        .sentence_bytes = key->sentence_bytes,
        .num_slices = key->placed ? key->num_slices : 0,
        .name_number = is_text ? 0 : (uint64_t)key->name.number,
        .number = key->placed ? key->number : 0,
        .slice_bytes = key->placed ? key->slice_bytes : 0,
    };
    const key_fields_t *source = &fields;
    KEY_FIELDS(PUT_FIELD)
    for (int i = 0; i < key->ndim; i++)
        out = put(out, (uint64_t)key->shape[i], 8);
    out = put_bytes(out, key->name.text, fields.name_bytes);
    out = put_bytes(out, key->sentence, fields.sentence_bytes);
    return put_bytes(out, key->servers, 2 * (size_t)fields.num_slices);
}

/* The next `bytes` of what is left, NULL when there are not so many. */
static const unsigned char *take(const unsigned char **data, size_t *left, size_t bytes)
{
    const unsigned char *taken = *data;
    if (bytes > *left)
        return NULL;
    *data += bytes;
    *left -= bytes;
    return taken;
}

kv_status_t kv_wire_get_key(const void *payload, size_t bytes, size_t *offset, kv_wire_key_t *out)
{
    if (*offset > bytes || bytes - *offset < KEY_BYTES)
        return kv_fail(KV_INVALID, "a message ends within a key");
    const unsigned char *data = (const unsigned char *)payload + *offset;
    size_t left = bytes - *offset - KEY_BYTES;
    key_fields_t fields, *target = &fields;
    KEY_FIELDS(GET_FIELD)
    KV_TRY(check_type(fields.dtype, fields.status));
    if (fields.is_text > 1 || fields.sparse > 1 || fields.placed > 1 || fields.ndim > KV_MAX_DIMS ||
        (!fields.placed && fields.num_slices > 0) || (!fields.is_text && fields.name_bytes > 0))
        return kv_fail(KV_INVALID, "a message declares a key in a form that there is none of");
    const unsigned char *shape = take(&data, &left, 8 * (size_t)fields.ndim);
    const unsigned char *text = shape ? take(&data, &left, fields.name_bytes) : NULL;
    const unsigned char *sentence = text ? take(&data, &left, fields.sentence_bytes) : NULL;
    const unsigned char *servers =
        sentence ? take(&data, &left, 2 * (size_t)fields.num_slices) : NULL;
    if (servers == NULL)
        return kv_fail(KV_INVALID, "a message ends within a key");
    memset(out, 0, sizeof *out);
    if (fields.is_text)
        out->name = (kv_name_t){.text = (const char *)text, .bytes = fields.name_bytes};
    else
        out->name.number = (int64_t)fields.name_number;
    out->dtype = fields.dtype;
    out->sparse = fields.sparse;
    out->ndim = fields.ndim;
    for (int i = 0; i < out->ndim; i++)
        out->shape[i] = (int64_t)get(shape + 8 * i, 8);
    out->placed = fields.placed;
    out->number = fields.number;
    out->slice_bytes = fields.slice_bytes;
    out->num_slices = fields.num_slices;
    out->servers = servers;
    out->status = fields.status;
    out->sentence = (const char *)sentence;
    out->sentence_bytes = fields.sentence_bytes;
    *offset = (size_t)(data - (const unsigned char *)payload);
    return KV_OK;
}

int32_t kv_wire_server_of(const kv_wire_key_t *key, uint32_t slice)
{
    return (int32_t)get(key->servers + 2 * (size_t)slice, 2);
}

void kv_wire_put_server(unsigned char *servers, uint32_t slice, int32_t server)
{
    put(servers + 2 * (size_t)slice, (uint64_t)server, 2);
}
