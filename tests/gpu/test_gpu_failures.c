/* What is lost when something of a plug-in fails, who is told, and what a wrong call says. */
#include "gpu.h"

enum { COUNT = LANE_COUNT, RUNTIME_ERROR = 999 };

/* -------------------------------------------------------------------------------------- memory */

static void out_of_memory(void)
{
    void *nowhere = &gpu, *memory = nowhere;
    array_t before = array_random(KV_FLOAT32, COUNT, 0, 0);
    gpu_wait();
    /* Once: the pool is trimmed, and the second attempt succeeds. */
    int64_t trims = emu.counter("cudaMemPoolTrimTo"), live = emu.counter("live_allocations");
    emu.fail_alloc(1, 1);
    OK(api.alloc(0, gpu_stream, 1000, &memory, sentence));
    CHECK_EQ(emu.counter("cudaMemPoolTrimTo"), trims + 1);
    OK(api.free(0, gpu_stream, memory, sentence));
    /* Twice: it has failed, and nothing else has changed. */
    memory = nowhere;
    emu.fail_alloc(1, 2);
    CHECK_EQ(api.alloc(0, gpu_stream, 12345, &memory, sentence), KV_DEVICE_NO_MEMORY);
    CHECK(strstr(sentence, "device 0") != NULL && strstr(sentence, "12345") != NULL);
    CHECK(memory == nowhere);
    emu.fail_alloc(1, 1);
    CHECK_EQ(api.host_alloc(0, 999, &memory, sentence), KV_DEVICE_NO_MEMORY);
    CHECK(memory == nowhere && strstr(sentence, "device 0") != NULL);
    /* More than there is, in earnest. */
    CHECK_EQ(api.alloc(0, gpu_stream, GPU_BYTES + 1, &memory, sentence), KV_DEVICE_NO_MEMORY);
    CHECK(memory == nowhere);
    array_fetch(&before);
    gpu_wait();
    CHECK_EQ(emu.counter("live_allocations"), live);
    array_same(&before, "what was there before");
    OK(api.alloc(0, gpu_stream, 12345, &memory, sentence));
    OK(api.free(0, gpu_stream, memory, sentence));
}

static void without_memory_nothing_is_lost(void)
{
    if (gpu_load() && emu.reset != NULL)
        gpu_each_seed(1, out_of_memory);
}

/* ------------------------------------------------------------------------------------ failures */

static void dies(void)
{
    lane_t lanes[2];
    if (!lane_open(&lanes[0], 0) || !lane_open(&lanes[1], 1))
        return;
    emu.kill_device(1, between(0, 4));
    CHECK_EQ(sums_until(&lanes[1], 5), KV_DEVICE_DEAD);
    CHECK(strstr(sentence, "device 1") != NULL);
    CHECK(strstr(sentence, "cudaErrorIllegalAddress") != NULL);
    /* For ever, whatever is asked; and the sentence says what to do. */
    void *nowhere = &gpu, *out = nowhere;
    bool done = true, direct = true;
    CHECK_EQ(api.stream_new(1, &out, sentence), KV_DEVICE_DEAD);
    CHECK_EQ(api.alloc(1, lanes[1].stream, 8, &out, sentence), KV_DEVICE_DEAD);
    CHECK_EQ(api.free(1, lanes[1].stream, lanes[1].memory, sentence), KV_DEVICE_DEAD);
    CHECK_EQ(api.event_done(1, lanes[1].event, &done, sentence), KV_DEVICE_DEAD);
    CHECK_EQ(api.peer(0, 1, &direct, sentence), KV_DEVICE_DEAD);
    CHECK_EQ(api.copy_peer(0, lanes[0].stream, 4, 1, lanes[1].memory, 0, lanes[0].memory, sentence),
             KV_DEVICE_DEAD);
    CHECK(strstr(sentence, "device 1") != NULL && strstr(sentence, "again") != NULL);
    CHECK(out == nowhere);
    /* The other one lives. */
    CHECK_EQ(sums_until(&lanes[0], 2), KV_DEVICE_OK);
    lane_close(&lanes[0]);
    /* Nobody can free what the dead device has. */
    if (atomic_load(&test_failures) == 0) {
        emu.reset(0, GPU_DEVICES, GPU_BYTES, 1);
        OK(gpu.open(KV_DEVICE_ABI, sizeof api, &api, sentence));
        OK(api.stream_new(0, &gpu_stream, sentence));
        OK(api.event_new(0, &gpu_event, sentence));
    }
}

static void a_dead_device_is_named_and_the_others_live(void)
{
    if (gpu_load() && emu.reset != NULL)
        gpu_each_seed(1, dies);
}

/* A failure of one call is told of that device, also if another one is current. */
static void failed_once(void)
{
    void *stream = NULL;
    emu.kill_device(1, 0);
    int64_t unused, total;
    CHECK_EQ(api.memory(1, &unused, &total, sentence), KV_DEVICE_DEAD); /* leaves it current */
    emu.fail_call("cudaSetDevice", 1, RUNTIME_ERROR);
    CHECK_EQ(api.stream_new(0, &stream, sentence), KV_DEVICE_REFUSED);
    CHECK(strstr(sentence, "device 0") != NULL);
    OK(api.stream_new(0, &stream, sentence));
    OK(api.stream_free(0, stream, sentence));
}

static void a_failure_is_told_of_its_device(void)
{
    if (gpu_load() && emu.reset != NULL)
        gpu_each_seed(1, failed_once);
}

/* What other libraries have left as this thread's last error is not taken for ours. */
static void left_behind(void)
{
    int (*set_device)(int) = (int (*)(int))gpu_symbol("cudaSetDevice");
    array_t array = array_random(KV_FLOAT32, COUNT, 0, 0);
    const void *src[] = {array.device};
    void *dst[] = {array.device};
    kv_device_sum_t job = {COUNT, 1, 1, src, dst};
    CHECK(set_device(99) != 0);
    OK(api.sum(0, gpu_stream, KV_FLOAT32, KV_FLOAT32, 1, &job, sentence));
    gpu_wait();
}

static void errors_of_others_are_not_ours(void)
{
    if (gpu_load() && emu.reset != NULL)
        gpu_each_seed(1, left_behind);
}

/* Uses every function of the table once. How many of them did not succeed. */
static int exercise(void)
{
    void *stream = NULL, *event = NULL, *memory = NULL, *pinned = NULL;
    kv_device_info_t info;
    int64_t unused, total;
    int failed = 0, device;
    bool direct = false, done = false, there;
    failed += api.info(0, &info, sentence) != KV_DEVICE_OK;
    failed += api.peer(0, 1, &direct, sentence) != KV_DEVICE_OK;
    failed += api.owner(&info, &device, sentence) != KV_DEVICE_OK;
    failed += api.memory(0, &unused, &total, sentence) != KV_DEVICE_OK;
    failed += api.trim(0, sentence) != KV_DEVICE_OK;
    failed += api.stream_new(0, &stream, sentence) != KV_DEVICE_OK;
    failed += api.event_new(0, &event, sentence) != KV_DEVICE_OK;
    there = api.alloc(0, gpu_stream, COUNT * 4, &memory, sentence) == KV_DEVICE_OK;
    failed += !there;
    failed += api.host_alloc(0, 64, &pinned, sentence) != KV_DEVICE_OK;
    if (there && pinned != NULL) {
        const void *src[] = {memory};
        void *dst[] = {memory};
        kv_device_sum_t job = {COUNT, 1, 1, src, dst};
        failed += api.zero(0, gpu_stream, COUNT * 4, memory, sentence) != KV_DEVICE_OK;
        failed += api.copy(0, gpu_stream, KV_DEVICE_TO_HOST, 64, memory, pinned, sentence) !=
                  KV_DEVICE_OK;
        failed += api.copy_peer(0, gpu_stream, 4, 0, memory, 0, dst[0], sentence) != KV_DEVICE_OK;
        failed += api.sum(0, gpu_stream, KV_FLOAT32, KV_FLOAT32, 1, &job, sentence) != KV_DEVICE_OK;
    }
    if (event != NULL && stream != NULL) {
        failed += api.event_record(0, event, gpu_stream, sentence) != KV_DEVICE_OK;
        failed += api.stream_wait(0, stream, event, sentence) != KV_DEVICE_OK;
        for (kv_device_code_t code = KV_DEVICE_OK; code == KV_DEVICE_OK && !done;) {
            code = api.event_done(0, event, &done, sentence);
            failed += code != KV_DEVICE_OK;
        }
    }
    /* What could not be freed is freed now, so that nothing is left. */
    for (int again = 0; again < 2; again++) {
        if (there && api.free(0, gpu_stream, memory, sentence) == KV_DEVICE_OK)
            there = false;
        else
            failed += there;
        if (pinned != NULL && gpu_wait() && api.host_free(0, pinned, sentence) == KV_DEVICE_OK)
            pinned = NULL;
        else
            failed += pinned != NULL;
        if (event != NULL && api.event_free(0, event, sentence) == KV_DEVICE_OK)
            event = NULL;
        else
            failed += event != NULL;
        if (stream != NULL && api.stream_free(0, stream, sentence) == KV_DEVICE_OK)
            stream = NULL;
        else
            failed += stream != NULL;
    }
    return failed;
}

static void one_fails(void)
{
    static const char *const calls[] = {"cudaSetDevice",
                                        "cudaGetDeviceProperties",
                                        "cudaDriverGetVersion",
                                        "cudaRuntimeGetVersion",
                                        "cudaDeviceCanAccessPeer",
                                        "cudaDeviceEnablePeerAccess",
                                        "cudaMemPoolSetAccess",
                                        "cudaDeviceGetDefaultMemPool",
                                        "cudaMemPoolSetAttribute",
                                        "cudaGetDevice",
                                        "cudaPointerGetAttributes",
                                        "cudaMemGetInfo",
                                        "cudaMemPoolTrimTo",
                                        "cudaStreamCreateWithFlags",
                                        "cudaEventCreateWithFlags",
                                        "cudaMallocFromPoolAsync",
                                        "cudaHostAlloc",
                                        "cudaMemsetAsync",
                                        "cudaMemcpyAsync",
                                        "cudaMemcpyPeerAsync",
                                        "cudaLaunchKernel",
                                        "cudaEventRecord",
                                        "cudaStreamWaitEvent",
                                        "cudaEventQuery",
                                        "cudaFreeAsync",
                                        "cudaFreeHost",
                                        "cudaEventDestroy",
                                        "cudaStreamDestroy"};
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        if (i > 0)
            gpu_end();
        if (i > 0 && !gpu_begin(i, 1))
            return;
        emu.fail_call(calls[i], 1, RUNTIME_ERROR);
        sentence[0] = '\0';
        int failed = exercise();
        if (!CHECK(failed >= 1 && strlen(sentence) > 20) || atomic_load(&test_failures) != 0) {
            printf("    %s failed; %s\n", calls[i], sentence);
            return;
        }
    }
}

static void no_call_of_the_runtime_fails_unseen(void)
{
    if (gpu_load() && emu.reset != NULL)
        gpu_each_seed(1, one_fails);
}

/* ----------------------------------------------------------------------------------- wrong calls
 */

static bool refused(kv_device_code_t code, const char *why)
{
    bool right = CHECK_EQ(code, KV_DEVICE_REFUSED) && CHECK(strstr(sentence, why) != NULL);
    if (!right)
        printf("    %s, not: %s\n", sentence, why);
    sentence[0] = '\0';
    return right;
}

static void wrong_calls(void)
{
    void *out = NULL, *s = gpu_stream;
    char number[8];
    const void *src[KV_DEVICE_SOURCES + 1] = {number};
    void *dst[KV_DEVICE_OUTPUTS + 1] = {number};
    kv_factors_t_float factors = {.lr = 1};
    kv_device_coded_t coded = {.data = number, .bits = 3};
    kv_device_sum_t sum = {.count = 1, .num_src = 1, .num_dst = 1, .src = src, .dst = dst};
    kv_device_sum_t less = sum, many = sum, none = sum, nowhere = sum, everywhere = sum;
    kv_device_step_t step = {.count = 4, .weight = number, .factors = &factors, .row_count = 3};
    kv_device_step_t mastered = step, bare = step;
    kv_device_decode_t decode = {1, 1, 1, &coded, dst};
    kv_device_api_t untouched = api, table = api;
    less.count = -1;
    many.num_src = KV_DEVICE_SOURCES + 1;
    none.num_src = 0;
    nowhere.num_dst = 0;
    everywhere.num_dst = KV_DEVICE_OUTPUTS + 1;
    mastered.master = (float *)(void *)number;
    bare.factors = NULL;
    step.states[0] = number;

    refused(gpu.open(KV_DEVICE_ABI + 1, sizeof table, &table, sentence), "build it again");
    refused(gpu.open(KV_DEVICE_ABI, sizeof table - 8, &table, sentence), "build it again");
    CHECK(memcmp(&table, &untouched, sizeof table) == 0);
    refused(api.stream_new(-1, &out, sentence), "-1");
    refused(api.stream_new(api.num_devices, &out, sentence), "there is no device");
    refused(api.alloc(0, s, 0, &out, sentence), "0 bytes");
    refused(api.alloc(0, s, -8, &out, sentence), "-8 bytes");
    refused(api.host_alloc(0, 0, &out, sentence), "0 bytes");
    refused(api.copy(0, s, KV_DEVICE_WITHIN, -1, number, number, sentence), "-1 bytes");
    refused(api.copy_peer(0, s, -1, 0, number, 0, number, sentence), "-1 bytes");
    refused(api.zero(0, s, -1, number, sentence), "-1 bytes");
    refused(api.sum(0, s, KV_FLOAT32, KV_FLOAT64, 1, &sum, sentence), "no sums");
    refused(api.sum(0, s, KV_FLOAT32, KV_FLOAT32, 1, &less, sentence), "-1");
    refused(api.sum(0, s, KV_FLOAT32, KV_FLOAT32, 1, &many, sentence), "97");
    refused(api.sum(0, s, KV_FLOAT32, KV_FLOAT32, 1, &none, sentence), "not 0");
    refused(api.sum(0, s, KV_FLOAT32, KV_FLOAT32, 1, &nowhere, sentence), "not 0");
    refused(api.sum(0, s, KV_FLOAT32, KV_FLOAT32, 1, &everywhere, sentence), "65");
    refused(api.step(0, s, KV_INT32, KV_STEP_sgd, 1, &step, sentence), "no step");
    refused(api.step(0, s, KV_FLOAT32, KV_STEP_COUNT, 1, &step, sentence), "no step");
    refused(api.step(0, s, KV_FLOAT32, KV_STEP_adam, 1, &step, sentence), "state 1");
    refused(api.step(0, s, KV_FLOAT32, KV_STEP_sgd, 1, &mastered, sentence), "master");
    refused(api.step(0, s, KV_FLOAT32, KV_STEP_sgd, 1, &bare, sentence), "factors");
    refused(api.step(0, s, KV_FLOAT32, KV_STEP_group_adagrad, 1, &step, sentence), "rows of 3");
    refused(api.squares(0, s, KV_INT8, 0, NULL, sentence), "no norms");
    refused(api.encode(0, s, KV_FLOAT32, 3, 0, NULL, sentence), "3 bits");
    refused(api.decode(0, s, KV_FLOAT32, KV_FLOAT16, 0, NULL, sentence), "not decoded");
    refused(api.decode(0, s, KV_FLOAT32, KV_FLOAT32, 1, &decode, sentence), "not 3");
    OK(api.sum(0, s, KV_FLOAT32, KV_FLOAT32, 0, NULL, sentence));
    OK(api.copy(0, s, KV_DEVICE_WITHIN, 0, NULL, NULL, sentence));
    OK(api.zero(0, s, 0, NULL, sentence));
    if (emu.reset != NULL)
        CHECK_EQ(emu.counter("cudaLaunchKernel"), 0);
}

static void wrong_calls_are_refused_before_anything_begins(void)
{
    gpu_each_seed(1, wrong_calls);
}

/* On a machine with a GPU, and no emulation, only that there is one. */
static void without_devices_there_is_no_table(void)
{
    kv_device_api_t table = {.abi = 77};
    if (!gpu_load())
        return;
    if (emu.reset != NULL)
        emu.reset(0, 0, GPU_BYTES, 1);
    kv_device_code_t code = gpu.open(KV_DEVICE_ABI, sizeof table, &table, sentence);
    if (code == KV_DEVICE_OK && emu.reset == NULL) {
        CHECK(table.num_devices > 0);
        return;
    }
    CHECK_EQ(code, KV_DEVICE_NONE);
    CHECK(strstr(sentence, "no CUDA device") != NULL);
    CHECK_EQ(table.abi, 77);
    printf("    %s\n", sentence);
}

static const test_t tests[] = {
    TEST(without_memory_nothing_is_lost),      TEST(a_dead_device_is_named_and_the_others_live),
    TEST(a_failure_is_told_of_its_device),     TEST(errors_of_others_are_not_ours),
    TEST(no_call_of_the_runtime_fails_unseen), TEST(wrong_calls_are_refused_before_anything_begins),
    TEST(without_devices_there_is_no_table),
};
TEST_MAIN(tests)
