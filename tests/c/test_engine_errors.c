/* Errors of operations that nobody waited for: where they are kept, who is told, what they poison.
 * Every test runs on each engine. */
#include "engine_jobs.h"

ON_EACH_ENGINE(an_error_is_raised_once_at_the_variable)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    submit_failing(engine, "the push failed", &var, NULL);
    CHECK_STATUS(touch(engine, &var, KV_READ), KV_DEVICE);
    CHECK_TEXT(kv_status_message(KV_DEVICE), "the push failed");
    CHECK_STATUS(touch(engine, &var, KV_READ), KV_OK);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_EQ(atomic_load(&var.state), 0);
}

ON_EACH_ENGINE(an_error_is_raised_once_by_wait_all)
{
    kv_var_t a, b;
    kv_var_init(&a, false, NULL, NULL);
    kv_var_init(&b, true, NULL, NULL);
    submit_failing(engine, "first", &a, NULL);
    submit_failing(engine, "second", &b, NULL);
    CHECK_STATUS(wait_all(engine), KV_DEVICE);
    CHECK_TEXT(kv_status_message(KV_DEVICE), "first");
    CHECK_STATUS(wait_all(engine), KV_DEVICE);
    CHECK_TEXT(kv_status_message(KV_DEVICE), "second");
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_STATUS(touch(engine, &a, KV_WRITE), KV_OK);
    CHECK_STATUS(touch(engine, &b, KV_WRITE), KV_OK);
}

ON_EACH_ENGINE(an_error_that_the_handle_raised_is_not_raised_again)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    kv_handle_t *handle = handle_new(engine, 1);
    submit_failing(engine, "told by the handle", &var, handle);
    CHECK_TEXT(handle_error(handle), "told by the handle");
    CHECK_TEXT(handle_error(handle), "told by the handle"); /* a handle raises whenever asked */
    CHECK_STATUS(touch(engine, &var, KV_READ), KV_OK);
    CHECK_STATUS(wait_all(engine), KV_OK);
    kv_handle_rele(handle);
}

ON_EACH_ENGINE(waiting_for_a_handle_leaves_no_error_behind)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    kv_handle_t *handle = handle_new(engine, 1);
    submit_failing(engine, "it failed", &var, handle);
    test_caller_t caller = patient();
    CHECK_STATUS(kv_handle_wait(handle, &caller.base), KV_OK);
    kv_handle_rele(handle);
    CHECK_STATUS(touch(engine, &var, KV_READ), KV_OK);
    WAIT_UNTIL(kv_engine_pending(engine) == 0);
    CHECK_EQ(kv_counter_value(KV_COUNT_ERRORS), 0);
}

ON_EACH_ENGINE(an_error_of_a_handle_that_nobody_asked_is_raised_by_wait_all)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    kv_handle_t *handle = handle_new(engine, 2);
    submit_failing(engine, "a task", &var, handle);
    kv_handle_end_one(handle, kv_fail(KV_NO_MEMORY, "not submitted"));
    kv_handle_rele(handle);
    CHECK_STATUS(wait_all(engine), KV_DEVICE);
    CHECK_STATUS(wait_all(engine), KV_NO_MEMORY);
    CHECK_TEXT(kv_status_message(KV_NO_MEMORY), "not submitted");

    /* The exception of a callback is its caller's. */
    handle = handle_new(engine, 1);
    kv_handle_end_one(handle, KV_CALLBACK);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_EQ(kv_handle_error(handle)->status, KV_CALLBACK);
    kv_handle_rele(handle);
    kv_var_retire(&var); /* with the error that was delivered elsewhere */
}

ON_EACH_ENGINE(an_array_whose_task_failed_poisons_until_it_is_overwritten)
{
    kv_var_t array, key;
    job_log_t log = {0};
    kv_var_init(&array, true, NULL, NULL);
    kv_var_init(&key, false, NULL, NULL);
    kv_handle_t *handles[4];
    for (int i = 0; i < 4; i++)
        handles[i] = handle_new(engine, 1);
    job_t *pull = job_new(9, &log);
    pull->failure = "the pull failed";
    CHECK_STATUS(job_submit(engine, pull, &array, KV_OVERWRITE, NULL, KV_READ, 0, handles[0]),
                 KV_OK);
    CHECK_STATUS(
        job_submit(engine, job_new(9, &log), &key, KV_WRITE, &array, KV_READ, 0, handles[1]),
        KV_OK);
    submit_log(engine, 0, &log, &array, KV_OVERWRITE, handles[2]);
    submit_log(engine, 1, &log, &array, KV_READ, handles[3]);
    CHECK_TEXT(handle_error(handles[0]), "the pull failed");
    CHECK_TEXT(handle_error(handles[1]), "the pull failed");
    CHECK_TEXT(handle_error(handles[2]), "none");
    CHECK_TEXT(handle_error(handles[3]), "none");
    check_log(&log, 2);
    for (int i = 0; i < 4; i++)
        kv_handle_rele(handles[i]);
    CHECK_STATUS(touch(engine, &key, KV_READ), KV_OK);
    CHECK_STATUS(wait_all(engine), KV_OK);
}

ON_EACH_ENGINE(a_task_that_reads_a_poisoned_array_has_an_error_of_its_own)
{
    kv_var_t array, key;
    kv_var_init(&array, true, NULL, NULL);
    kv_var_init(&key, false, NULL, NULL);
    kv_handle_t *handle = handle_new(engine, 1);
    submit_failing(engine, "the pull failed", &array, handle);
    CHECK_TEXT(handle_error(handle), "the pull failed");
    kv_handle_rele(handle);
    /* The user knows that the pull failed, but not yet that this push did. */
    CHECK_STATUS(job_submit(engine, job_new(0, NULL), &key, KV_WRITE, &array, KV_READ, 0, NULL),
                 KV_OK);
    CHECK_STATUS(touch(engine, &key, KV_READ), KV_DEVICE);
    CHECK_TEXT(kv_status_message(KV_DEVICE), "the pull failed");
    CHECK_STATUS(touch(engine, &array, KV_OVERWRITE), KV_OK);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_EQ(atomic_load(&array.state), 0);
}

ON_EACH_ENGINE(a_key_whose_push_failed_goes_on)
{
    kv_var_t key;
    job_log_t log = {0};
    kv_var_init(&key, false, NULL, NULL);
    submit_failing(engine, "the push failed", &key, NULL);
    submit_log(engine, 0, &log, &key, KV_READ, NULL);
    submit_log(engine, 1, &log, &key, KV_OVERWRITE, NULL);
    /* An assignment does not look at the value; the error stays for who does. */
    CHECK_STATUS(touch(engine, &key, KV_OVERWRITE), KV_OK);
    CHECK_STATUS(touch(engine, &key, KV_READ), KV_DEVICE);
    CHECK_STATUS(wait_all(engine), KV_OK);
    check_log(&log, 2);
}

ON_EACH_ENGINE(an_injected_fault_fails_the_task_and_nothing_else)
{
    kv_var_t var;
    job_log_t log = {0};
    kv_var_init(&var, false, NULL, NULL);
    kv_fault_set("engine.run", 1);
    kv_handle_t *handle = handle_new(engine, 1);
    submit_log(engine, 9, &log, &var, KV_WRITE, handle);
    CHECK_TEXT(handle_error(handle), "injected");
    kv_handle_rele(handle);
    submit_log(engine, 0, &log, &var, KV_WRITE, NULL);
    CHECK_STATUS(wait_all(engine), KV_OK);
    CHECK_STATUS(touch(engine, &var, KV_READ), KV_OK);
    check_log(&log, 1);
    kv_fault_set("engine.run", 0);
}

ON_EACH_ENGINE(errors_beyond_the_limit_do_not_pile_up)
{
    kv_var_t vars[KV_UNTOLD_ERRORS + 8];
    int told = 0;
    for (int i = 0; i < KV_UNTOLD_ERRORS + 8; i++) {
        kv_var_init(&vars[i], false, NULL, NULL);
        submit_failing(engine, "again", &vars[i], NULL);
    }
    while (wait_all(engine) != KV_OK)
        told++;
    CHECK_EQ(told, KV_UNTOLD_ERRORS);
    for (int i = 0; i < KV_UNTOLD_ERRORS + 8; i++)
        told += touch(engine, &vars[i], KV_READ) != KV_OK;
    CHECK_EQ(told, KV_UNTOLD_ERRORS + 8);
}

ON_EACH_ENGINE(leaving_keeps_the_sentence_of_this_thread)
{
    kv_var_t var;
    kv_var_init(&var, false, NULL, NULL);
    held_t held;
    hold(&held, engine, &var);
    submit_failing(engine, "another's", &var, NULL);
    kv_status_t status = kv_fail(KV_DEVICE, "mine");
    kv_engine_leave(engine, &held.op);
    CHECK_TEXT(kv_status_message(status), "mine");
    CHECK_STATUS(wait_all(engine), KV_DEVICE);
    CHECK_STATUS(touch(engine, &var, KV_READ), KV_OK);
}

ON_EACH_ENGINE(no_memory_fails_the_call_or_the_task_but_loses_nothing)
{
    for (int nth = 1; nth < 12; nth++) {
        kv_var_t var;
        kv_var_init(&var, true, NULL, NULL);
        kv_handle_t *handle = NULL;
        int64_t before = kv_engine_pending(engine);
        kv_fault_set("alloc", nth);
        kv_status_t status = kv_handle_new(engine, 1, &handle);
        job_t *job = status == KV_OK ? job_new(0, NULL) : NULL;
        if (job != NULL) {
            job->failure = "it failed";
            status = job_submit(engine, job, &var, KV_WRITE, NULL, KV_READ, 0, handle);
            if (status == KV_OK) {
                const char *error = handle_error(handle);
                CHECK(strcmp(error, "it failed") == 0 || strstr(error, "no memory") != NULL);
            }
        }
        kv_fault_set("alloc", 0);
        CHECK(status == KV_OK || status == KV_NO_MEMORY);
        kv_handle_rele(handle);
        CHECK_STATUS(touch(engine, &var, KV_OVERWRITE), KV_OK);
        while (wait_all(engine) != KV_OK)
            ;
        CHECK_EQ(kv_engine_pending(engine), before);
        CHECK_EQ(atomic_load(&var.state), 0);
    }
}

static const test_t tests[] = {
    TEST(an_error_is_raised_once_at_the_variable),
    TEST(an_error_is_raised_once_by_wait_all),
    TEST(an_error_that_the_handle_raised_is_not_raised_again),
    TEST(waiting_for_a_handle_leaves_no_error_behind),
    TEST(an_error_of_a_handle_that_nobody_asked_is_raised_by_wait_all),
    TEST(an_array_whose_task_failed_poisons_until_it_is_overwritten),
    TEST(a_task_that_reads_a_poisoned_array_has_an_error_of_its_own),
    TEST(a_key_whose_push_failed_goes_on),
    TEST(an_injected_fault_fails_the_task_and_nothing_else),
    TEST(errors_beyond_the_limit_do_not_pile_up),
    TEST(leaving_keeps_the_sentence_of_this_thread),
    TEST(no_memory_fails_the_call_or_the_task_but_loses_nothing),
};
TEST_MAIN(tests)
