/* Status, memory, threads, settings. */
#include "test.h"
#include "base/caller.h"
#include "base/config.h"
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---------------------------------------------------------------------------------- status */

static void a_code_without_a_sentence_gets_its_default(void)
{
    CHECK_STATUS(kv_fail(KV_INVALID, "mine"), KV_INVALID);
    CHECK_TEXT(kv_status_message(KV_INVALID), "mine");
    CHECK_TEXT(kv_status_message(KV_CLOSED), "the store is closed");
    CHECK_TEXT(kv_status_message((kv_status_t)99), "unknown status");
    kv_fail(KV_CLOSED, "%s", "");
    CHECK_TEXT(kv_status_message(KV_CLOSED), "the store is closed");
}

static void every_code_has_a_sentence_and_a_class(void)
{
    for (int code = KV_OK + 1; code < KV_STATUS_COUNT; code++) {
        kv_fail(KV_OK, "something else");
        CHECK(kv_status_message((kv_status_t)code)[0] != '\0');
        bool set_already = code == KV_INTERRUPTED || code == KV_CALLBACK;
        CHECK_EQ(kv_status_class((kv_status_t)code)[0] == '\0', set_already);
    }
    CHECK_TEXT(kv_status_class(KV_NO_KEY), "KeyNotFoundError");
    CHECK_TEXT(kv_status_class((kv_status_t)-1), "");
}

static void a_sentence_may_be_made_of_the_one_before(void)
{
    kv_fail(KV_DEVICE, "inner");
    kv_fail(KV_PEER_LOST, "outer: %s", kv_status_message(KV_DEVICE));
    CHECK_TEXT(kv_status_message(KV_PEER_LOST), "outer: inner");
}

static void long_sentences_are_cut_between_characters(void)
{
    static const char *const characters[] = {"a", "\u00e9", "\u20ac", "\U0001f600"};
    for (int c = 0; c < 4; c++) {
        size_t bytes = strlen(characters[c]);
        for (size_t offset = 0; offset < 5; offset++) {
            char text[2 * KV_MESSAGE_BYTES] = {0};
            memset(text, 'x', offset);
            size_t length = offset;
            for (; length < KV_MESSAGE_BYTES + 100; length += bytes)
                memcpy(text + length, characters[c], bytes);
            kv_fail(KV_INVALID, "%s", text);
            const char *got = kv_status_message(KV_INVALID);
            size_t room = KV_MESSAGE_BYTES - 1;
            CHECK_EQ(strlen(got), offset + (room - offset) / bytes * bytes);
            CHECK(memcmp(got, text, strlen(got)) == 0);
        }
    }
    char exact[KV_MESSAGE_BYTES] = {0};
    memset(exact, 'x', KV_MESSAGE_BYTES - 3);
    memcpy(exact + KV_MESSAGE_BYTES - 3, "\u00e9", 2);
    kv_fail(KV_INVALID, "%s", exact);
    CHECK_TEXT(kv_status_message(KV_INVALID), exact);
    char odd[2 * KV_MESSAGE_BYTES] = {0};
    memset(odd, 0x80, sizeof odd - 1);
    kv_fail(KV_INVALID, "%s", odd);
    CHECK_EQ(strlen(kv_status_message(KV_INVALID)), KV_MESSAGE_BYTES - 1);
}

static void a_sentence_can_be_kept_aside(void)
{
    kv_fail(KV_DEVICE, "first");
    kv_sentence_t kept;
    kv_sentence_save(&kept);
    kv_fail(KV_INVALID, "second");
    kv_sentence_restore(&kept);
    CHECK_TEXT(kv_status_message(KV_DEVICE), "first");
    CHECK_TEXT(kv_status_message(KV_INVALID), "an argument is not valid");
}

static void *fail_elsewhere(void *context)
{
    (void)context;
    kv_fail(KV_INVALID, "theirs");
    return NULL;
}

static void every_thread_has_its_own_sentence(void)
{
    kv_fail(KV_INVALID, "mine");
    kv_thread_t thread;
    if (!CHECK_STATUS(kv_thread_start(&thread, "test", fail_elsewhere, NULL), KV_OK))
        return;
    kv_thread_join(thread);
    CHECK_TEXT(kv_status_message(KV_INVALID), "mine");
}

/* ---------------------------------------------------------------------------------- memory */

static void counters_add_up(void)
{
    kv_count(KV_COUNT_TASKS, 3);
    kv_count(KV_COUNT_TASKS, -1);
    CHECK_EQ(kv_counter_value(KV_COUNT_TASKS), 2);
    CHECK_EQ(kv_counter_value(KV_COUNT_KEYS), 0);
    kv_count(KV_COUNT_TASKS, -2);
    CHECK_TEXT(kv_counter_name(KV_COUNT_VALUE_BYTES), "value_bytes");
}

static void an_allocation_of_nothing_is_valid(void)
{
    void *pointers[] = {kv_alloc(0), kv_calloc(0, 8), kv_calloc(8, 0), kv_alloc_elements(0)};
    for (int i = 0; i < 4; i++) {
        CHECK(pointers[i] != NULL);
        kv_free(pointers[i]);
    }
}

static void an_impossible_allocation_gives_null(void)
{
    volatile size_t huge = SIZE_MAX / 2 + 1; /* or the compiler knows better */
    CHECK(kv_alloc(huge) == NULL);
    CHECK(kv_calloc(huge, 4) == NULL);
    CHECK(kv_alloc_elements(huge) == NULL);
}

static void elements_are_aligned(void)
{
    static const size_t sizes[] = {1, 63, 4096, 100001, 4 << 20, (4 << 20) + 12345};
    for (int i = 0; i < 6; i++) {
        char *data = kv_alloc_elements(sizes[i]);
        if (!CHECK(data != NULL))
            continue;
        CHECK_EQ((uintptr_t)data % (sizes[i] >= 4 << 20 ? 2 << 20 : 64), 0);
        memset(data, 1, sizes[i]);
        kv_free(data);
    }
}

static void the_nth_allocation_fails_once(void)
{
    for (int n = 1; n <= 6; n++) {
        kv_fault_set("alloc", n);
        for (int i = 1; i <= 6; i++) {
            void *pointer = i % 3 == 0   ? kv_alloc(8)
                            : i % 3 == 1 ? kv_calloc(1, 8)
                                         : kv_alloc_elements(8);
            CHECK_EQ(pointer == NULL, i == n);
            kv_free(pointer);
        }
        CHECK_EQ(kv_fault_set("alloc", 0), 6);
    }
    kv_free(kv_alloc(8));
    CHECK_EQ(kv_fault_set("alloc", 0), 0);
    CHECK_EQ(kv_fault_set("no such point", 1), -1);
}

static void fault_points_are_apart(void)
{
    kv_fault_set("engine.run", 2);
    void *pointer = kv_alloc(8);
    CHECK(pointer != NULL);
    kv_free(pointer);
    CHECK(!kv_fault_hit(KV_FAULT_ENGINE_RUN));
    CHECK(kv_fault_hit(KV_FAULT_ENGINE_RUN));
    CHECK(!kv_fault_hit(KV_FAULT_ENGINE_RUN));
    CHECK_EQ(kv_fault_set("alloc", 0), 0);
    CHECK_EQ(kv_fault_set("engine.run", 0), 3);
    CHECK(!kv_fault_hit(KV_FAULT_ENGINE_RUN));
}

/* --------------------------------------------------------------------------------- threads */

static void *look_at_signals(void *context)
{
    pthread_sigmask(SIG_BLOCK, NULL, context);
    return NULL;
}

static void a_thread_leaves_signals_to_others(void)
{
    sigset_t before, after;
    pthread_sigmask(SIG_BLOCK, NULL, &before);
    sigset_t theirs;
    kv_thread_t thread;
    if (!CHECK_STATUS(kv_thread_start(&thread, "test", look_at_signals, &theirs), KV_OK))
        return;
    kv_thread_join(thread);
    pthread_sigmask(SIG_BLOCK, NULL, &after);
    CHECK(sigismember(&theirs, SIGINT) && sigismember(&theirs, SIGTERM) &&
          sigismember(&theirs, SIGCHLD) && sigismember(&theirs, SIGALRM));
    CHECK(!sigismember(&theirs, SIGSEGV) && !sigismember(&theirs, SIGBUS));
    CHECK_EQ(sigismember(&after, SIGINT), sigismember(&before, SIGINT));
    CHECK_EQ(sigismember(&after, SIGTERM), sigismember(&before, SIGTERM));
}

typedef struct gate {
    kv_mutex_t mutex;
    kv_cond_t cond;
    bool open, passed;
} gate_t;

static void *pass_gate(void *context)
{
    gate_t *gate = context;
    kv_mutex_lock(&gate->mutex);
    while (!gate->open)
        kv_cond_wait(&gate->cond, &gate->mutex);
    gate->passed = true;
    kv_cond_broadcast(&gate->cond);
    kv_mutex_unlock(&gate->mutex);
    return NULL;
}

static void a_long_name_is_cut(void)
{
#ifdef __linux__
    gate_t gate = {.mutex = KV_MUTEX_INIT(KV_RANK_LEAF)};
    kv_cond_init(&gate.cond);
    kv_thread_t thread;
    if (!CHECK_STATUS(kv_thread_start(&thread, "kv-a-very-long-name", pass_gate, &gate), KV_OK))
        return;
    char name[32];
    pthread_getname_np(thread, name, sizeof name);
    CHECK_TEXT(name, "kv-a-very-long-");
    kv_mutex_lock(&gate.mutex);
    gate.open = true;
    kv_cond_signal(&gate.cond);
    kv_mutex_unlock(&gate.mutex);
    kv_thread_join(thread);
    kv_cond_fini(&gate.cond);
#endif
}

static void a_waiter_is_woken_long_before_its_deadline(void)
{
    gate_t gate = {.open = false};
    kv_mutex_init(&gate.mutex, KV_RANK_LEAF);
    kv_cond_init(&gate.cond);
    kv_thread_t thread;
    if (!CHECK_STATUS(kv_thread_start(&thread, "test", pass_gate, &gate), KV_OK))
        return;
    kv_mutex_lock(&gate.mutex);
    gate.open = true;
    kv_cond_signal(&gate.cond);
    while (!gate.passed)
        kv_cond_wait_until(&gate.cond, &gate.mutex, INT64_MAX);
    kv_mutex_unlock(&gate.mutex);
    kv_thread_join(thread);
    kv_cond_fini(&gate.cond);
    kv_mutex_fini(&gate.mutex);
}

static void a_wait_ends_at_its_deadline(void)
{
    kv_mutex_t mutex = KV_MUTEX_INIT(KV_RANK_LEAF);
    kv_cond_t cond;
    kv_cond_init(&cond);
    kv_mutex_lock(&mutex);
    kv_cond_wait_until(&cond, &mutex, INT64_MIN);
    kv_cond_wait_until(&cond, &mutex, 0);
    int64_t until = kv_clock_ns() + 20 * 1000 * 1000;
    while (kv_clock_ns() < until)
        kv_cond_wait_until(&cond, &mutex, until);
    CHECK(kv_clock_ns() < until + INT64_C(10000000000));
    kv_mutex_unlock(&mutex);
    kv_cond_fini(&cond);
}

static void a_thread_that_cannot_start_is_an_error(void)
{
    kv_fault_set("thread.start", 1);
    kv_thread_t thread;
    CHECK_STATUS(kv_thread_start(&thread, "test", fail_elsewhere, NULL), KV_NO_MEMORY);
    CHECK_EQ(kv_fault_set("thread.start", 0), 1);
}

static void locks_out_of_order_are_counted(void)
{
    kv_mutex_t store = KV_MUTEX_INIT(KV_RANK_STORE);
    kv_mutex_t engine = KV_MUTEX_INIT(KV_RANK_ENGINE);
    kv_mutex_t leaf = KV_MUTEX_INIT(KV_RANK_LEAF);
    int64_t before = kv_lock_violations();
    kv_mutex_lock(&store);
    kv_mutex_lock(&engine);
    kv_mutex_lock(&leaf);
    kv_mutex_unlock(&store);
    kv_mutex_unlock(&leaf);
    kv_mutex_unlock(&engine);
    kv_mutex_lock(&store);
    kv_mutex_unlock(&store);
    CHECK_EQ(kv_lock_violations(), before);
#ifdef KV_DEBUG
    /* Mutexes of their own, or the thread sanitizer finds the inversion too. */
    kv_mutex_t inner = KV_MUTEX_INIT(KV_RANK_LEAF);
    kv_mutex_t outer = KV_MUTEX_INIT(KV_RANK_STORE);
    kv_mutex_t equal = KV_MUTEX_INIT(KV_RANK_LEAF);
    fprintf(stderr, "two complaints are due here:\n");
    kv_mutex_lock(&inner);
    kv_mutex_lock(&outer);
    kv_mutex_lock(&equal);
    kv_mutex_unlock(&equal);
    kv_mutex_unlock(&outer);
    kv_mutex_unlock(&inner);
    CHECK_EQ(kv_lock_violations(), before + 2);
    test_violations += 2;
#endif
}

static void processors_are_those_of_the_affinity_mask(void)
{
    CHECK(kv_processor_count() >= 1);
#ifdef __linux__
    cpu_set_t before, one;
    if (!CHECK(sched_getaffinity(0, sizeof before, &before) == 0))
        return;
    CHECK_EQ(kv_processor_count(), CPU_COUNT(&before));
    int first = 0;
    while (!CPU_ISSET(first, &before))
        first++;
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    CHECK_EQ(kv_processor_count(), 1);
    sched_setaffinity(0, sizeof before, &before);
#endif
}

static void a_child_process_is_of_the_next_generation(void)
{
    uint64_t mine = kv_fork_generation();
    pid_t child = fork();
    if (child == 0) {
        if (kv_fork_generation() != mine + 1)
            _exit(1);
        pid_t grandchild = fork();
        if (grandchild == 0)
            _exit(kv_fork_generation() != mine + 2);
        int status = -1;
        waitpid(grandchild, &status, 0);
        _exit(!WIFEXITED(status) || WEXITSTATUS(status) != 0);
    }
    int status = -1;
    if (CHECK(child > 0) && CHECK(waitpid(child, &status, 0) == child))
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_EQ(kv_fork_generation(), mine);
}

static void the_deadline_of_a_call_starts_with_its_first_wait(void)
{
    kv_caller_t caller = {.timeout_ns = INT64_C(1000000000)};
    int64_t before = kv_clock_ns();
    int64_t deadline = kv_caller_deadline(&caller);
    CHECK(deadline >= before + caller.timeout_ns);
    CHECK(deadline <= kv_clock_ns() + caller.timeout_ns);
    CHECK_EQ(kv_caller_deadline(&caller), deadline);
    kv_caller_t patient = {.timeout_ns = INT64_MAX};
    CHECK_EQ(kv_caller_deadline(&patient), INT64_MAX);
}

/* -------------------------------------------------------------------------------- settings */

static void a_setting_has_a_default(void)
{
    unsetenv("KVSTORE_ENGINE");
    CHECK_TEXT(kv_config_text(KV_CONFIG_ENGINE), "threaded");
    setenv("KVSTORE_ENGINE", "naive", 1);
    CHECK_TEXT(kv_config_text(KV_CONFIG_ENGINE), "naive");
    unsetenv("KVSTORE_ENGINE");
    for (int i = 0; i < KV_CONFIG_COUNT; i++) {
        const kv_config_row_t *row = kv_config_row((kv_config_t)i);
        CHECK(strncmp(row->variable, "KVSTORE_", 8) == 0);
        CHECK(row->help[0] != '\0');
    }
}

static void a_number_is_parsed_whole_or_refused(void)
{
    int64_t value = -7;
    unsetenv("KVSTORE_NUM_THREADS");
    CHECK_STATUS(kv_config_int(KV_CONFIG_NUM_THREADS, 0, 64, &value), KV_OK);
    CHECK_EQ(value, 0);
    setenv("KVSTORE_NUM_THREADS", "64", 1);
    CHECK_STATUS(kv_config_int(KV_CONFIG_NUM_THREADS, 0, 64, &value), KV_OK);
    CHECK_EQ(value, 64);
    setenv("KVSTORE_NUM_THREADS", "-3", 1);
    CHECK_STATUS(kv_config_int(KV_CONFIG_NUM_THREADS, -5, 64, &value), KV_OK);
    CHECK_EQ(value, -3);
    static const char *const wrong[] = {
        "", " 1", "1 ", "+1", "x", "-", "1.5", "0x10", "65", "-1", "99999999999999999999"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        setenv("KVSTORE_NUM_THREADS", wrong[i], 1);
        CHECK_STATUS(kv_config_int(KV_CONFIG_NUM_THREADS, 0, 64, &value), KV_INVALID);
        CHECK(strstr(kv_status_message(KV_INVALID), "KVSTORE_NUM_THREADS") != NULL);
    }
    CHECK_TEXT(kv_status_message(KV_INVALID),
               "KVSTORE_NUM_THREADS='99999999999999999999' is not a whole number from 0 to 64");
    CHECK_EQ(value, -3);
    unsetenv("KVSTORE_NUM_THREADS");
}

static const test_t tests[] = {
    TEST(a_code_without_a_sentence_gets_its_default),
    TEST(every_code_has_a_sentence_and_a_class),
    TEST(a_sentence_may_be_made_of_the_one_before),
    TEST(long_sentences_are_cut_between_characters),
    TEST(a_sentence_can_be_kept_aside),
    TEST(every_thread_has_its_own_sentence),
    TEST(counters_add_up),
    TEST(an_allocation_of_nothing_is_valid),
    TEST(an_impossible_allocation_gives_null),
    TEST(elements_are_aligned),
    TEST(the_nth_allocation_fails_once),
    TEST(fault_points_are_apart),
    TEST(a_thread_leaves_signals_to_others),
    TEST(a_long_name_is_cut),
    TEST(a_waiter_is_woken_long_before_its_deadline),
    TEST(a_wait_ends_at_its_deadline),
    TEST(a_thread_that_cannot_start_is_an_error),
    TEST(locks_out_of_order_are_counted),
    TEST(processors_are_those_of_the_affinity_mask),
    TEST(a_child_process_is_of_the_next_generation),
    TEST(the_deadline_of_a_call_starts_with_its_first_wait),
    TEST(a_setting_has_a_default),
    TEST(a_number_is_parsed_whole_or_refused),
};
TEST_MAIN(tests)
