/* Row ids as a user gives them, in any order and repeated, made strictly increasing.
 *
 * Few are sorted by insertion. Many are sorted by digits, least significant first; only bits
 * in which they differ cost passes. Very many are first dealt by their highest digit into buckets,
 * which the team sorts and which stay in the caches.
 */
#include "comm/rows.h"
#include <string.h>

enum {
    INSERTION_MAX = 32,
    SMALL_DIGIT = 8, /* bits of a digit for up to SMALL_COUNT ids, … */
    SMALL_COUNT = 1024,
    DIGIT = 11, /* … and for more */
    BUCKET_BITS = 8,
    BUCKETS = 1 << BUCKET_BITS,
    BUCKETS_FROM = 64 * 1024, /* ids */
};

static int64_t drop_repeated(int64_t num_ids, int64_t *ids)
{
    int64_t kept = 1;
    for (int64_t i = 1; i < num_ids; i++) {
        ids[kept] = ids[i];
        kept += ids[i] != ids[kept - 1];
    }
    return kept;
}

static void sort_few(int64_t num_ids, int64_t *ids)
{
    for (int64_t i = 1; i < num_ids; i++) {
        int64_t id = ids[i], at = i;
        for (; at > 0 && ids[at - 1] > id; at--)
            ids[at] = ids[at - 1];
        ids[at] = id;
    }
}

/* The `width` bits from `shift` upward; the sign is turned, so that negative ids come first. */
static uint64_t digit_of(int64_t id, int shift, int width)
{
    return ((uint64_t)id ^ UINT64_C(1) << 63) >> shift & ((UINT64_C(1) << width) - 1);
}

/* Stable, by one digit. `ends`, one for each value of it, becomes where those ids end in `to`. */
static void deal(int64_t num_ids, const int64_t *from, int64_t *to, int shift, int width,
                 int64_t *ends)
{
    int64_t begin = 0;
    memset(ends, 0, sizeof *ends << width);
    for (int64_t i = 0; i < num_ids; i++)
        ends[digit_of(from[i], shift, width)]++;
    for (int64_t digit = 0; digit < INT64_C(1) << width; digit++) {
        int64_t count = ends[digit];
        ends[digit] = begin;
        begin += count;
    }
    for (int64_t i = 0; i < num_ids; i++)
        to[ends[digit_of(from[i], shift, width)]++] = from[i];
}

/* Sorts by the lowest `bits` bits. The result is in `ids`; so are the ids at first, or, if they are
 * `dealt`, in `scratch`. */
static void sort_digits(int64_t num_ids, int64_t *ids, int64_t *scratch, bool dealt, int bits)
{
    int64_t ends[1 << DIGIT];
    int most = num_ids <= SMALL_COUNT ? SMALL_DIGIT : DIGIT;
    int passes = (bits + most - 1) / most;
    int64_t *from = dealt ? scratch : ids, *to = dealt ? ids : scratch;
    for (int pass = 0; pass < passes; pass++) {
        int shift = bits * pass / passes;
        deal(num_ids, from, to, shift, bits * (pass + 1) / passes - shift, ends);
        int64_t *swap = from;
        from = to;
        to = swap;
    }
    if (from != ids)
        memcpy(ids, from, (size_t)num_ids * sizeof *ids);
}

typedef struct bucket_job {
    int64_t *ids, *scratch; /* dealt into scratch */
    int bits;               /* below the highest digit */
    int64_t ends[BUCKETS];
    int64_t kept[BUCKETS];
} bucket_job_t;

static int64_t bucket_begin(const bucket_job_t *job, int64_t bucket)
{
    return bucket == 0 ? 0 : job->ends[bucket - 1];
}

static void sort_bucket(void *context, int64_t bucket)
{
    bucket_job_t *job = context;
    int64_t begin = bucket_begin(job, bucket), count = job->ends[bucket] - begin;
    if (count > INSERTION_MAX) {
        sort_digits(count, job->ids + begin, job->scratch + begin, true, job->bits);
    } else {
        memcpy(job->ids + begin, job->scratch + begin, (size_t)count * sizeof *job->ids);
        sort_few(count, job->ids + begin);
    }
    job->kept[bucket] = count > 0 ? drop_repeated(count, job->ids + begin) : 0;
}

static int64_t sort_buckets(const kv_host_t *host, int64_t num_ids, int64_t *ids, int64_t *scratch,
                            int bits)
{
    bucket_job_t job = {.ids = ids, .scratch = scratch, .bits = bits - BUCKET_BITS};
    deal(num_ids, ids, scratch, job.bits, BUCKET_BITS, job.ends);
    kv_team_run(host->team, host->num_threads, BUCKETS, sort_bucket, &job);
    int64_t kept = 0;
    for (int64_t i = 0; i < BUCKETS; i++) {
        memmove(ids + kept, ids + bucket_begin(&job, i), (size_t)job.kept[i] * sizeof *ids);
        kept += job.kept[i];
    }
    return kept;
}

int64_t kv_row_ids_unique(const kv_host_t *host, int64_t num_ids, int64_t *ids, int64_t *scratch)
{
    if (num_ids == 0)
        return 0;
    int64_t sorted = 1;
    while (sorted < num_ids && ids[sorted - 1] <= ids[sorted])
        sorted++;
    if (sorted < num_ids && num_ids <= INSERTION_MAX) {
        sort_few(num_ids, ids);
    } else if (sorted < num_ids) {
        uint64_t differ = 0;
        for (int64_t i = 1; i < num_ids; i++)
            differ |= (uint64_t)(ids[i] ^ ids[0]);
        int bits = 64 - __builtin_clzll(differ);
        if (num_ids >= BUCKETS_FROM && bits > BUCKET_BITS)
            return sort_buckets(host, num_ids, ids, scratch, bits);
        sort_digits(num_ids, ids, scratch, false, bits);
    }
    return drop_repeated(num_ids, ids);
}
