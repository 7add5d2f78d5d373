/* inproc with faults. What happens is chosen by `seed` and by `faults`, a list such as
 * "delay=3,reorder,kill=2:100":
 *
 *   - delay=MS: each header is held back up to so many milliseconds; those of one sender stay in
 *     order
 *   - reorder: every second payload comes after a pause of its own (of up to `delay`, or 2,
 *     milliseconds), so that younger messages overtake it
 *   - kill=PEER:N: the session with PEER breaks on both sides once the N-th message was posted
 *   - fail=PEER:N: the N-th send to PEER ends with an error
 *   - short=PEER:N: the N-th message from PEER brings half of its payload, then the session breaks
 *   - stall=PEER:N: from the N-th on, no message from PEER comes any more, and nobody says why
 *
 * Messages are counted from 1. Which of both is told first, a broken session or the ends of its
 * sends, changes from time to time.
 */
#include "net/inproc.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MS_NS INT64_C(1000000)
#define REORDER_NS (2 * MS_NS)

typedef struct rule {
    const char *name;
    int64_t peer, nth; /* nth 0: never */
} rule_t;

enum { KILL, FAIL, SHORT, STALL, NUM_RULES };

struct kv_faults {
    uint64_t random;
    int64_t delay_ns;
    bool reorder;
    rule_t rules[NUM_RULES];
    int64_t *sent, *received; /* messages so far, by peer */
};

/* splitmix64 */
static int64_t random_below(kv_faults_t *faults, int64_t limit)
{
    if (limit <= 0)
        return 0;
    uint64_t z = (faults->random += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (int64_t)((z ^ (z >> 31)) % (uint64_t)limit);
}

static bool applies(const kv_faults_t *faults, int rule, int32_t peer, int64_t count)
{
    const rule_t *row = &faults->rules[rule];
    return row->nth > 0 && row->peer == peer && row->nth == count;
}

kv_send_fate_t kv_faults_of_send(kv_faults_t *faults, int32_t peer)
{
    int64_t count = ++faults->sent[peer];
    if (applies(faults, FAIL, peer, count))
        return KV_SEND_FAILS;
    return applies(faults, KILL, peer, count) ? KV_SEND_KILLS : KV_SEND_PASSES;
}

void kv_faults_of_arrival(kv_faults_t *faults, int32_t peer, bool greeting, kv_arrival_fate_t *out)
{
    *out = (kv_arrival_fate_t){.header_ns = random_below(faults, faults->delay_ns)};
    if (greeting)
        return;
    int64_t count = ++faults->received[peer];
    out->stalls = applies(faults, STALL, peer, count);
    out->is_short = applies(faults, SHORT, peer, count);
    if (faults->reorder && random_below(faults, 2) == 0)
        out->payload_ns =
            1 + random_below(faults, faults->delay_ns > 0 ? faults->delay_ns : REORDER_NS);
}

bool kv_faults_news_first(kv_faults_t *faults)
{
    return random_below(faults, 2) == 0;
}

void kv_faults_free(kv_faults_t *faults)
{
    if (faults == NULL)
        return;
    kv_free(faults->sent);
    kv_free(faults->received);
    kv_free(faults);
}

/* One item: NAME, NAME=NUMBER or NAME=PEER:N, up to a comma. */
static bool parse_item(kv_faults_t *faults, const char *item, size_t length)
{
    char name[16] = "";
    char rest = '\0';
    long long first = 0, second = 0;
    char text[64];
    if (length >= sizeof text)
        return false;
    memcpy(text, item, length);
    text[length] = '\0';
    if (strcmp(text, "reorder") == 0) {
        faults->reorder = true;
        return true;
    }
    int fields = sscanf(text, "%15[a-z]=%lld:%lld%c", name, &first, &second, &rest);
    if (fields == 2 && strcmp(name, "delay") == 0 && first >= 0 && first <= 60000) {
        faults->delay_ns = first * MS_NS;
        return true;
    }
    for (int i = 0; i < NUM_RULES && fields == 3 && second > 0; i++) {
        if (strcmp(name, faults->rules[i].name) == 0) {
            faults->rules[i].peer = first;
            faults->rules[i].nth = second;
            return true;
        }
    }
    return false;
}

static kv_status_t parse(kv_faults_t *faults, const char *text)
{
    while (text != NULL && *text != '\0') {
        size_t length = strcspn(text, ",");
        if (!parse_item(faults, text, length))
            return kv_fail(KV_INVALID, "faults: '%.*s' is none", (int)length, text);
        text += length + (text[length] == ',');
    }
    return KV_OK;
}

static kv_status_t open_faulty(kv_net_t *net, const kv_net_config_t *config)
{
    size_t count = (size_t)kv_net_num_peers(net);
    kv_faults_t *faults = kv_calloc(1, sizeof *faults);
    KV_TRY_ALLOC(faults, "the faults of an endpoint");
    *faults = (kv_faults_t){
        .random = config->seed,
        .rules = {[KILL] = {.name = "kill"},
                  [FAIL] = {.name = "fail"},
                  [SHORT] = {.name = "short"},
                  [STALL] = {.name = "stall"}},
        .sent = kv_calloc(count, sizeof *faults->sent),
        .received = kv_calloc(count, sizeof *faults->received),
    };
    kv_status_t status = KV_OK;
    if (faults->sent == NULL || faults->received == NULL)
        status = kv_fail(KV_NO_MEMORY, "no memory for the faults of an endpoint");
    else
        status = parse(faults, config->faults);
    if (status != KV_OK) {
        kv_faults_free(faults);
        return status;
    }
    return kv_inproc_open(net, faults);
}

const kv_transport_t kv_transport_faulty = {
    .name = "faulty",
    .open = open_faulty,
    .connect = kv_inproc_connect,
    .post = kv_inproc_post,
    .drop = kv_inproc_drop,
    .progress = kv_inproc_progress,
    .wake = kv_inproc_wake,
    .lanes = kv_inproc_lanes,
    .close = kv_inproc_close,
};
