/* The harness of the C tests: a table of named functions and checks that count.
 *
 * A failing check prints where and what, and the test goes on; every check is also an expression
 * that says whether it held, for `if (!CHECK(p != NULL)) return;`. A test passes when no check
 * failed, every live-object counter is back at zero and the lock order was kept.
 *
 *     program            all tests          program NAME...    these
 *     program --list     their names
 */
#ifndef KV_TESTS_C_TEST_H
#define KV_TESTS_C_TEST_H

#include "base/memory.h"
#include "base/status.h"
#include "base/thread.h"
#include <inttypes.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

typedef struct test {
    const char *name; /* a claim */
    void (*fn)(void);
} test_t;

static _Atomic int test_failures;
static int64_t test_violations; /* broken lock orders that are known of; a test may add its own */

static inline bool test_check(bool held, const char *text, const char *file, int line)
{
    if (!held) {
        atomic_fetch_add(&test_failures, 1);
        printf("%s:%d: %s\n", file, line, text);
    }
    return held;
}

static inline bool test_equal(int64_t a, int64_t b, const char *text, const char *file, int line)
{
    if (!test_check(a == b, text, file, line))
        printf("    %" PRId64 " is not %" PRId64 "\n", a, b);
    return a == b;
}

static inline bool test_text(const char *a, const char *b, const char *text, const char *file,
                             int line)
{
    bool same = strcmp(a, b) == 0;
    if (!test_check(same, text, file, line))
        printf("    \"%s\" is not \"%s\"\n", a, b);
    return same;
}

static inline bool test_status(kv_status_t got, kv_status_t due, const char *text, const char *file,
                               int line)
{
    if (!test_check(got == due, text, file, line))
        printf("    status %d (%s), not %d\n", (int)got, kv_status_message(got), (int)due);
    return got == due;
}

#define CHECK(expression) test_check((expression), "CHECK(" #expression ")", __FILE__, __LINE__)
#define CHECK_EQ(a, b)                                                                             \
    test_equal((int64_t)(a), (int64_t)(b), "CHECK_EQ(" #a ", " #b ")", __FILE__, __LINE__)
#define CHECK_TEXT(a, b) test_text((a), (b), "CHECK_TEXT(" #a ", " #b ")", __FILE__, __LINE__)
#define CHECK_STATUS(expression, code)                                                             \
    test_status((expression), (code), "CHECK_STATUS(" #expression ", " #code ")", __FILE__,        \
                __LINE__)

/* Repeatable numbers for tests (splitmix64). */
static inline uint64_t test_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* From low to high, both included. */
static inline int64_t test_between(uint64_t *state, int64_t low, int64_t high)
{
    return low + (int64_t)(test_random(state) % (uint64_t)(high - low + 1));
}

static inline bool test_run(const test_t *test)
{
    atomic_store(&test_failures, 0);
    test->fn();
    for (int i = 0; i < KV_COUNTER_COUNT; i++) {
        int64_t alive = kv_counter_value((kv_counter_t)i);
        if (!test_check(alive == 0, "a counter is not back at zero", test->name, 0))
            printf("    %s: %" PRId64 "\n", kv_counter_name((kv_counter_t)i), alive);
        kv_count((kv_counter_t)i, -alive); /* the next test answers for itself only */
    }
    CHECK_EQ(kv_lock_violations(), test_violations);
    test_violations = kv_lock_violations();
    bool passed = atomic_load(&test_failures) == 0;
    printf("%s %s\n", passed ? "ok" : "FAIL", test->name);
    fflush(stdout);
    return passed;
}

static inline int test_main(int argc, char **argv, const test_t *tests, size_t count)
{
    bool list = argc > 1 && strcmp(argv[1], "--list") == 0;
    int ran = 0;
    int failed = 0;
    for (size_t i = 0; i < count; i++) {
        bool wanted = argc == 1;
        for (int arg = 1; arg < argc; arg++)
            wanted = wanted || strcmp(argv[arg], tests[i].name) == 0;
        if (list) {
            printf("%s\n", tests[i].name);
        } else if (wanted) {
            ran++;
            failed += !test_run(&tests[i]);
        }
    }
    if (!list && ran < argc - 1) {
        printf("FAIL: a test that was named is not here\n");
        failed++;
    }
    return failed > 0;
}

#define TEST(fn_)                                                                                  \
    {                                                                                              \
        .name = #fn_, .fn = fn_                                                                    \
    }
#define TEST_MAIN(table)                                                                           \
    int main(int argc, char **argv)                                                                \
    {                                                                                              \
        return test_main(argc, argv, table, sizeof(table) / sizeof((table)[0]));                   \
    }

#endif
