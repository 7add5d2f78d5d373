/* The optimizers as data: their table, the ranges of their numbers, the states they keep, and what
 * one push takes along. */
#include "test.h"

#include "optim/optim.h"
#include <math.h>

static kv_optim_numbers_t numbers_of(const kv_optim_class_t *optim)
{
    kv_optim_numbers_t numbers = {.learning_rate = optim->learning_rate,
                                  .rescale_grad = 1,
                                  .clip_gradient = NAN,
                                  .lazy_update = true};
    for (int i = 0; i < optim->num_params; i++)
        numbers.params[i] = optim->params[i].fallback;
    return numbers;
}

static double *param_of(const kv_optim_class_t *optim, kv_optim_numbers_t *numbers,
                        const char *name)
{
    for (int i = 0; i < optim->num_params; i++)
        if (strcmp(optim->params[i].name, name) == 0)
            return &numbers->params[i];
    return strcmp(name, "learning_rate") == 0   ? &numbers->learning_rate
           : strcmp(name, "wd") == 0            ? &numbers->wd
           : strcmp(name, "rescale_grad") == 0  ? &numbers->rescale_grad
           : strcmp(name, "clip_gradient") == 0 ? &numbers->clip_gradient
                                                : NULL;
}

static void nineteen_classes_are_found_by_name_in_any_letter_case(void)
{
    int count = 0;
    const kv_optim_class_t *optim;
    for (; (optim = kv_optim_class_at(count)) != NULL; count++) {
        CHECK_EQ(optim->id, count);
        CHECK(kv_optim_class_find(optim->name) == optim);
        CHECK(kv_optim_class_find(optim->title) == optim);
        CHECK(optim->num_params <= KV_MAX_PARAMS);
    }
    CHECK_EQ(count, 19);
    CHECK(kv_optim_class_at(-1) == NULL);
    CHECK(kv_optim_class_find("AdaGRAD") == kv_optim_class_find("adagrad"));
    CHECK(kv_optim_class_find("adagrad") != NULL);
    CHECK(kv_optim_class_find("adagra") == NULL);
    CHECK(kv_optim_class_find("") == NULL);
}

static void numbers_not_given_are_valid(void)
{
    const kv_optim_class_t *optim;
    for (int i = 0; (optim = kv_optim_class_at(i)) != NULL; i++) {
        kv_optim_numbers_t numbers = numbers_of(optim);
        CHECK_STATUS(kv_optim_check(optim, &numbers), KV_OK);
        kv_slot_t slots[KV_MAX_SLOTS];
        int count = optim->slots(&numbers, slots);
        CHECK(count >= 0 && count <= KV_MAX_SLOTS);
        for (int p = 0; p < optim->num_params; p++)
            CHECK((optim->params[p].kind == KV_PARAM_CHOICE) == (optim->params[p].choices != NULL));
    }
    int common = 0;
    while (kv_optim_common_at(common) != NULL)
        common++;
    CHECK_EQ(common, 4);
    CHECK_TEXT(kv_optim_common_at(0)->name, "learning_rate");
    CHECK_TEXT(kv_optim_common_at(3)->name, "clip_gradient");
}

static void numbers_out_of_range_are_refused_by_name(void)
{
    static const struct {
        const char *optim, *param;
        double value;
        const char *says; /* NULL: allowed */
    } cases[] = {
        {"sgd", "learning_rate", -1, NULL},
        {"sgd", "learning_rate", INFINITY, "finite"},
        {"sgd", "learning_rate", NAN, "finite"},
        {"sgd", "learning_rate", 1e39, "finite"}, /* infinite in float32 */
        {"sgd", "wd", -0.1, NULL},
        {"sgd", "wd", NAN, "finite"},
        {"sgd", "rescale_grad", -INFINITY, "finite"},
        {"sgd", "clip_gradient", NAN, NULL},
        {"sgd", "clip_gradient", 0.5, NULL},
        {"sgd", "clip_gradient", 0, "above 0"},
        {"sgd", "clip_gradient", -1, "above 0"},
        {"sgd", "clip_gradient", 1e-60, "above 0"}, /* 0 in float32 */
        {"sgd", "clip_gradient", INFINITY, "finite"},
        {"sgd", "momentum", -0.5, "at least 0"},
        {"sgd", "momentum", 1, NULL},
        {"signum", "momentum", 1.5, "at most 1"},
        {"adam", "beta1", 0, NULL},
        {"adam", "beta1", 1, "below 1"},
        {"adam", "beta2", 1 - 1e-12, "below 1"}, /* 1 in float32 */
        {"adam", "beta2", -0.1, "at least 0"},
        {"adam", "epsilon", -1e-8, "at least 0"},
        {"rmsprop", "centered", 2, "at most 1"},
        {"rmsprop", "centered", 0.5, "whole"},
        {"rmsprop", "clip_weights", 0, "above 0"},
        {"rmsprop", "clip_weights", NAN, NULL},
        {"lamb", "lower_bound", 0, NULL},
        {"lamb", "upper_bound", 0, "above 0"},
        {"lbsgd", "batch_scale", 0, "at least 1"},
        {"lbsgd", "batch_scale", 2.5, "whole"},
        {"lbsgd", "warmup_strategy", 4, "at most 3"},
        {"lbsgd", "warmup_epochs", NAN, "finite"},
        {"groupadagrad", "wd", 0.1, "decay"},
        {"adagrad", "wd", 0.1, NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const kv_optim_class_t *optim = kv_optim_class_find(cases[i].optim);
        kv_optim_numbers_t numbers = numbers_of(optim);
        double *target = param_of(optim, &numbers, cases[i].param);
        if (!CHECK(target != NULL))
            continue;
        *target = cases[i].value;
        kv_status_t status = kv_optim_check(optim, &numbers);
        bool right = status == (cases[i].says == NULL ? KV_OK : KV_INVALID);
        if (cases[i].says != NULL && right)
            right = strstr(kv_status_message(KV_INVALID), cases[i].param) != NULL &&
                    strstr(kv_status_message(KV_INVALID), cases[i].says) != NULL &&
                    strstr(kv_status_message(KV_INVALID), optim->title) != NULL;
        if (!CHECK(right))
            printf("    %s.%s = %g: %s\n", cases[i].optim, cases[i].param, cases[i].value,
                   kv_status_message(status));
    }
}

static void states_follow_from_the_numbers(void)
{
    static const struct {
        const char *optim, *param;
        double value;
        const char *names;
    } cases[] = {
        {"sgd", "momentum", 0, ""},
        {"sgd", "momentum", 0.9, "m "},
        {"nag", "momentum", 0.9, "m "},
        {"signum", "momentum", 0, ""},
        {"signum", "momentum", 0.9, "m "},
        {"adam", "beta1", 0.9, "m v "},
        {"adamw", "beta1", 0.9, "m v "},
        {"adagrad", "eps", 1e-7, "h "},
        {"groupadagrad", "eps", 1e-7, "h "},
        {"rmsprop", "centered", 0, "n "},
        {"rmsprop", "centered", 1, "n g delta "},
        {"adadelta", "rho", 0.9, "acc_g acc_delta "},
        {"ftrl", "beta", 1, "z n "},
        {"adamax", "beta1", 0.9, "m u "},
        {"nadam", "beta1", 0.9, "m v "},
        {"ftml", "beta1", 0.9, "d v z "},
        {"lamb", "beta1", 0.9, "m v "},
        {"lars", "momentum", 0.9, "m "},
        {"lbsgd", "momentum", 0.9, "m "},
        {"lbsgd", "batch_scale", 2, "sum "},
        {"dcasgd", "momentum", 0, "p "},
        {"dcasgd", "momentum", 0.5, "p m "},
        {"sgld", "wd", 0, ""},
        {"test", "wd", 0, "copy "},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const kv_optim_class_t *optim = kv_optim_class_find(cases[i].optim);
        kv_optim_numbers_t numbers = numbers_of(optim);
        *param_of(optim, &numbers, cases[i].param) = cases[i].value;
        kv_slot_t slots[KV_MAX_SLOTS];
        char names[64] = "";
        int count = optim->slots(&numbers, slots);
        for (int s = 0; s < count; s++) {
            strcat(strcat(names, slots[s].name), " ");
            CHECK_EQ(slots[s].per_row, strcmp(cases[i].optim, "groupadagrad") == 0);
            CHECK_EQ(slots[s].from_weight, strcmp(slots[s].name, "p") == 0);
        }
        CHECK_TEXT(names, cases[i].names);
    }
}

static void lazy_is_a_matter_of_class_option_and_weight(void)
{
    static const struct {
        const char *optim;
        bool option, sparse_weight, lazy;
    } cases[] = {{"sgd", true, false, true},          {"sgd", false, true, false},
                 {"adam", true, true, true},          {"lars", false, false, false},
                 {"ftrl", true, false, false},        {"ftrl", false, true, true},
                 {"adagrad", false, false, true},     {"lbsgd", false, false, true},
                 {"groupadagrad", false, true, true}, {"nag", true, true, false}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const kv_optim_class_t *optim = kv_optim_class_find(cases[i].optim);
        kv_optim_numbers_t numbers = numbers_of(optim);
        numbers.lazy_update = cases[i].option;
        CHECK_EQ(kv_optim_is_lazy(optim, &numbers, cases[i].sparse_weight), cases[i].lazy);
    }
}

static void step_takes_the_numbers_and_moves_the_state_on(void)
{
    kv_optim_state_t state = {.num_update = 3, .nadam_product = 1, .last_rate = NAN, .seed = 7};
    kv_step_t step;

    const kv_optim_class_t *optim = kv_optim_class_find("sgd");
    kv_optim_numbers_t numbers = numbers_of(optim);
    numbers.wd = 0.5;
    kv_step_init(&step, optim, &numbers, &state, 3, 0.25, 2, 4, true);
    CHECK(step.lr == 0.5 && step.wd == 2 && step.t == 3 && step.plain_rate);
    CHECK(step.optim == optim && step.numbers.wd == 0.5 && step.ratio == 1);
    CHECK(state.nadam_product == 1 && isnan(state.last_rate) && state.draws == 0);

    optim = kv_optim_class_find("nadam");
    numbers = numbers_of(optim);
    double due = 1;
    for (int t = 1; t <= 3; t++) {
        kv_step_init(&step, optim, &numbers, &state, t, 0.1, 1, 1, false);
        due *= 0.9 * (1 - 0.5 * pow(0.96, t * 0.004));
        CHECK(step.product == due && state.nadam_product == due);
    }

    optim = kv_optim_class_find("lars");
    numbers = numbers_of(optim);
    static const double rates[] = {0.1, 0.2, 0, 0.3};
    static const double ratios[] = {1, 2, 0, 1}; /* nothing to compare with, first and after 0 */
    for (int i = 0; i < 4; i++) {
        kv_step_init(&step, optim, &numbers, &state, 1, rates[i], 5, 1, false);
        CHECK(step.ratio == ratios[i] && state.last_rate == rates[i]);
    }
    *param_of(optim, &numbers, "momentum_correction") = 0;
    kv_step_init(&step, optim, &numbers, &state, 1, 0.6, 1, 1, false);
    CHECK(step.ratio == 1 && state.last_rate == 0.6);

    optim = kv_optim_class_find("sgld");
    numbers = numbers_of(optim);
    for (uint64_t i = 0; i < 3; i++) {
        kv_step_init(&step, optim, &numbers, &state, 1, 0.1, 1, 1, false);
        CHECK(step.seed == 7 && step.draw == i && state.draws == i + 1);
    }
    CHECK(state.num_update == 3);
}

static const test_t tests[] = {
    TEST(nineteen_classes_are_found_by_name_in_any_letter_case),
    TEST(numbers_not_given_are_valid),
    TEST(numbers_out_of_range_are_refused_by_name),
    TEST(states_follow_from_the_numbers),
    TEST(lazy_is_a_matter_of_class_option_and_weight),
    TEST(step_takes_the_numbers_and_moves_the_state_on),
};
TEST_MAIN(tests)
