/* Steps with row-sparse gradients: against the dense step on the same gradient written out, lazy
 * ones against others and against a weight that has only their rows, alone and with a team.
 */
#include "test.h"

#include "comm/update.h"
#include <math.h>
#include <stdlib.h>

enum { STEPS = 3, MAX_SETS = 3 };

/* ---------------------------------------------------------------------------- a weight */

static kv_host_t host_new(int num_threads)
{
    kv_host_t host = {.num_threads = num_threads};
    CHECK_STATUS(kv_kernels_get(&host.kernels), KV_OK);
    CHECK_STATUS(kv_team_new(num_threads, &host.team), KV_OK);
    return host;
}

static void host_end(kv_host_t *host)
{
    kv_team_stop(host->team);
    kv_team_free(host->team);
}

static void put(const kv_host_t *host, kv_dtype_t dtype, void *to, int64_t i, double value)
{
    float narrow = (float)value;
    if (dtype == KV_FLOAT64)
        ((double *)to)[i] = value;
    else if (dtype == KV_FLOAT32)
        ((float *)to)[i] = narrow;
    else
        host->kernels->float32_to[dtype](1, &narrow, (uint16_t *)to + i);
}

static double get(const kv_host_t *host, kv_dtype_t dtype, const void *from, int64_t i)
{
    float wide;
    if (dtype == KV_FLOAT64)
        return ((const double *)from)[i];
    if (dtype == KV_FLOAT32)
        return (double)((const float *)from)[i];
    host->kernels->float32_from[dtype](1, (const uint16_t *)from + i, &wide);
    return (double)wide;
}

/* An optimizer, and what a weight needs for it. */
typedef struct setting {
    const kv_optim_class_t *optim;
    kv_optim_numbers_t numbers;
    kv_dtype_t dtype;
    bool master;
    int64_t num_rows, row_count;
} setting_t;

static setting_t setting_of(const kv_optim_class_t *optim, kv_dtype_t dtype, int64_t num_rows,
                            int64_t row_count)
{
    setting_t setting = {
        .optim = optim, .dtype = dtype, .num_rows = num_rows, .row_count = row_count};
    setting.numbers = (kv_optim_numbers_t){
        .learning_rate = 0.05, .wd = 0.01, .rescale_grad = 0.5, .clip_gradient = NAN};
    for (int i = 0; i < optim->num_params; i++)
        setting.numbers.params[i] = optim->params[i].fallback;
    return setting;
}

static void set_param(setting_t *setting, const char *name, double value)
{
    for (int i = 0; i < setting->optim->num_params; i++)
        if (strcmp(setting->optim->params[i].name, name) == 0) {
            setting->numbers.params[i] = value;
            return;
        }
    CHECK(!"a parameter of this name");
}

static size_t wide_bytes(const setting_t *setting)
{
    return setting->dtype == KV_FLOAT64 ? sizeof(double) : sizeof(float);
}

static size_t slot_bytes(const setting_t *setting, const kv_slot_t *slot)
{
    int64_t count = slot->per_row ? setting->num_rows : setting->num_rows * setting->row_count;
    return (size_t)count * wide_bytes(setting);
}

static kv_weight_t weight_new(const kv_host_t *host, const setting_t *setting, uint64_t seed)
{
    kv_weight_t weight = {.dtype = setting->dtype,
                          .count = setting->num_rows * setting->row_count,
                          .row_count = setting->row_count};
    weight.data = malloc((size_t)weight.count * kv_dtype_bytes(setting->dtype) + 1);
    for (int64_t i = 0; i < weight.count; i++)
        put(host, setting->dtype, weight.data, i, (double)test_between(&seed, -1000, 1000) / 500);
    if (setting->master) {
        weight.master = malloc((size_t)weight.count * sizeof(float) + 1);
        kv_host_widen(host, setting->dtype, weight.count, weight.data, weight.master);
    }
    kv_slot_t slots[KV_MAX_SLOTS];
    int num_slots = setting->optim->slots(&setting->numbers, slots);
    for (int k = 0; k < num_slots; k++) {
        weight.slots[k] = calloc(1, slot_bytes(setting, &slots[k]) + 1);
        if (slots[k].from_weight)
            for (int64_t i = 0; i < weight.count; i++)
                put(host, setting->dtype == KV_FLOAT64 ? KV_FLOAT64 : KV_FLOAT32, weight.slots[k],
                    i, get(host, setting->dtype, weight.data, i));
    }
    return weight;
}

static void weight_free(kv_weight_t *weight)
{
    free(weight->data);
    free(weight->master);
    for (int k = 0; k < KV_MAX_SLOTS; k++)
        free(weight->slots[k]);
}

/* Equal bits in all rows of `a`, row i of it being row places[i] of `b` (NULL: row i). */
static bool same_rows(const setting_t *setting, const kv_weight_t *a, const kv_weight_t *b,
                      int64_t num_rows, const int64_t *places)
{
    kv_slot_t slots[KV_MAX_SLOTS];
    int num_slots = setting->optim->slots(&setting->numbers, slots);
    size_t row = (size_t)setting->row_count * kv_dtype_bytes(setting->dtype);
    size_t wide = wide_bytes(setting);
    bool same = true;
    for (int64_t i = 0; i < num_rows; i++) {
        size_t j = (size_t)(places != NULL ? places[i] : i), at = (size_t)i;
        same = same && memcmp((char *)a->data + at * row, (char *)b->data + j * row, row) == 0 &&
               (a->master == NULL || memcmp(a->master + at * (size_t)setting->row_count,
                                            b->master + j * (size_t)setting->row_count,
                                            (size_t)setting->row_count * sizeof(float)) == 0);
        for (int k = 0; k < num_slots; k++) {
            size_t bytes = slots[k].per_row ? wide : (size_t)setting->row_count * wide;
            same = same && memcmp((char *)a->slots[k] + at * bytes, (char *)b->slots[k] + j * bytes,
                                  bytes) == 0;
        }
    }
    return same;
}

/* The largest difference of the weights, as a share of their largest element. */
static double distance(const kv_host_t *host, const kv_weight_t *a, const kv_weight_t *b)
{
    double largest = 1e-30, apart = 0;
    for (int64_t i = 0; i < a->count; i++) {
        double x = get(host, a->dtype, a->data, i), y = get(host, b->dtype, b->data, i);
        largest = fmax(largest, fabs(x));
        apart = fmax(apart, isnan(x) && isnan(y) ? 0 : isnan(x - y) ? INFINITY : fabs(x - y));
    }
    return apart / largest;
}

/* -------------------------------------------------------------------------- gradients */

/* Sets with about `percent` of the rows; small whole numbers, so that sums are exact. */
static void sets_new(const kv_host_t *host, const setting_t *setting, int num_sets, int64_t percent,
                     uint64_t seed, kv_rowset_t *sets)
{
    size_t row_bytes = (size_t)setting->row_count * kv_dtype_bytes(setting->dtype);
    int64_t *ids = malloc((size_t)setting->num_rows * sizeof *ids + 1);
    for (int k = 0; k < num_sets; k++) {
        int64_t num_rows = 0;
        for (int64_t id = 0; id < setting->num_rows; id++)
            if (test_between(&seed, 0, 99) < percent)
                ids[num_rows++] = id;
        sets[k] = (kv_rowset_t){0};
        CHECK_STATUS(kv_rowset_make(&sets[k], num_rows, row_bytes), KV_OK);
        memcpy(sets[k].indices->data, ids, (size_t)num_rows * sizeof *ids);
        for (int64_t i = 0; i < num_rows * setting->row_count; i++)
            put(host, setting->dtype, sets[k].data->data, i, (double)test_between(&seed, -8, 8));
    }
    free(ids);
}

static kv_row_sum_t sum_new(const kv_host_t *host, const setting_t *setting, int num_sets,
                            const kv_rowset_t *sets)
{
    const kv_rowset_t *pointers[MAX_SETS];
    kv_row_sum_t sum = {0};
    for (int k = 0; k < num_sets; k++)
        pointers[k] = &sets[k];
    CHECK_STATUS(
        kv_row_sum_init(host, setting->dtype, setting->row_count, num_sets, pointers, &sum), KV_OK);
    return sum;
}

static kv_step_t step_at(const setting_t *setting, kv_optim_state_t *state, int64_t t)
{
    kv_step_t step;
    state->num_update = t;
    kv_step_init(&step, setting->optim, &setting->numbers, state, t, setting->numbers.learning_rate,
                 1, 1, false);
    return step;
}

static const kv_optim_state_t fresh = {.nadam_product = 1, .last_rate = NAN, .seed = 12345};

typedef enum how { DENSE, ROWS, LAZY } how_t;

/* STEPS pushes of `num_sets` gradients. DENSE writes their sum out first. */
static void train(const kv_host_t *host, const setting_t *setting, how_t how, int num_sets,
                  int64_t percent, const int64_t *where, const kv_weight_t *weight)
{
    kv_optim_state_t state = fresh;
    for (int64_t t = 1; t <= STEPS; t++) {
        kv_rowset_t sets[MAX_SETS];
        sets_new(host, setting, num_sets, percent, (uint64_t)t, sets);
        kv_row_sum_t sum = sum_new(host, setting, num_sets, sets);
        kv_step_t step = step_at(setting, &state, t);
        if (how == DENSE) {
            void *dense = malloc((size_t)weight->count * kv_dtype_bytes(setting->dtype) + 1);
            const void *src = dense;
            kv_gradients_t gradients = {.num_src = 1, .src = &src};
            kv_rows_to_dense(host, &sum, setting->num_rows, 1, &dense);
            kv_host_update(host, &step, weight, &gradients, 0, NULL);
            free(dense);
        } else {
            kv_host_update_rows(host, &step, weight, &sum, where, how != ROWS);
        }
        kv_row_sum_fini(&sum);
        for (int k = 0; k < num_sets; k++)
            kv_rowset_fini(&sets[k]);
    }
}

static double tolerance(kv_dtype_t dtype, bool master)
{
    double half = dtype == KV_FLOAT16 ? 2e-3 : 8e-3;
    return dtype == KV_FLOAT64 ? 1e-12 : dtype == KV_FLOAT32 ? 2e-6 : master ? half : 10 * half;
}

/* -------------------------------------------------------------------------------- tests */

static void step_that_is_not_lazy_is_the_dense_step(void)
{
    static const struct {
        kv_dtype_t dtype;
        bool master;
    } types[] = {{KV_FLOAT64, false}, {KV_FLOAT32, false},  {KV_FLOAT16, false},
                 {KV_FLOAT16, true},  {KV_BFLOAT16, false}, {KV_BFLOAT16, true}};
    kv_host_t host = host_new(1);
    for (int i = 0; kv_optim_class_at(i) != NULL; i++)
        for (int type = 0; type < 6; type++)
            for (int64_t percent = 0; percent <= 100; percent += 50)
                for (int clip = 0; clip < 2; clip++) {
                    setting_t setting = setting_of(kv_optim_class_at(i), types[type].dtype, 23, 5);
                    setting.master = types[type].master;
                    setting.numbers.multi_precision = setting.master;
                    if (clip)
                        setting.numbers.clip_gradient = 1.5;
                    kv_weight_t dense = weight_new(&host, &setting, 1);
                    kv_weight_t rows = weight_new(&host, &setting, 1);
                    train(&host, &setting, DENSE, 2, percent, NULL, &dense);
                    train(&host, &setting, ROWS, 2, percent, NULL, &rows);
                    double apart = distance(&host, &dense, &rows);
                    if (!CHECK(apart <= tolerance(setting.dtype, setting.master)))
                        printf("    %s, %s: %g\n", setting.optim->title,
                               kv_dtype_name(setting.dtype), apart);
                    weight_free(&dense);
                    weight_free(&rows);
                }
    host_end(&host);
}

static bool is_lazy(const kv_optim_class_t *optim)
{
    return optim->lazy != KV_LAZY_NEVER;
}

/* A weight of the rows that are pushed alone: those end with the same bits as where they lie among
 * others, which stay as they were. Not LARS, whose norm is that of all rows. */
static void lazy_step_touches_its_rows_alone(void)
{
    static const int64_t row_counts[] = {1, 3, 64, 1024, 3000};
    kv_host_t host = host_new(1);
    for (int i = 0; kv_optim_class_at(i) != NULL; i++)
        for (int shape = 0; shape < 5; shape++)
            for (int type = 0; type < 3; type++) {
                setting_t setting = setting_of(kv_optim_class_at(i),
                                               type == 0   ? KV_FLOAT32
                                               : type == 1 ? KV_FLOAT64
                                                           : KV_FLOAT16,
                                               19, row_counts[shape]);
                if (!is_lazy(setting.optim) || strcmp(setting.optim->name, "lars") == 0)
                    continue;
                setting.master = type == 2;
                kv_rowset_t sets[2];
                sets_new(&host, &setting, 2, 30, 7, sets);
                kv_row_sum_t sum = sum_new(&host, &setting, 2, sets);
                kv_weight_t whole = weight_new(&host, &setting, 1);
                kv_weight_t before = weight_new(&host, &setting, 1);
                setting_t few = setting;
                few.num_rows = sum.num_rows;
                kv_weight_t packed = weight_new(&host, &few, 2);
                int64_t where[19], others[19], num_others = 0;
                size_t row = (size_t)setting.row_count * kv_dtype_bytes(setting.dtype);
                for (int64_t id = 0, k = 0; id < 19; id++)
                    if (k < sum.num_rows && sum.ids[k] == id) {
                        memcpy((char *)packed.data + (size_t)k * row,
                               (char *)whole.data + (size_t)id * row, row);
                        where[k] = k;
                        k++;
                    } else {
                        others[num_others++] = id;
                    }
                if (setting.master)
                    kv_host_widen(&host, setting.dtype, packed.count, packed.data, packed.master);
                kv_optim_state_t state = fresh;
                for (int64_t t = 1; t <= STEPS; t++) {
                    kv_step_t step = step_at(&setting, &state, t);
                    kv_host_update_rows(&host, &step, &whole, &sum, NULL, true);
                    kv_host_update_rows(&host, &step, &packed, &sum, where, true);
                }
                CHECK(same_rows(&setting, &packed, &whole, sum.num_rows, sum.ids));
                CHECK(!same_rows(&setting, &packed, &before, sum.num_rows, sum.ids));
                for (int64_t k = 0; k < num_others; k++)
                    CHECK(memcmp((char *)whole.data + (size_t)others[k] * row,
                                 (char *)before.data + (size_t)others[k] * row, row) == 0);
                weight_free(&whole);
                weight_free(&before);
                weight_free(&packed);
                kv_row_sum_fini(&sum);
                for (int k = 0; k < 2; k++)
                    kv_rowset_fini(&sets[k]);
            }
    host_end(&host);
}

static void lazy_step_on_all_rows_is_the_dense_step(void)
{
    kv_host_t host = host_new(1);
    for (int i = 0; kv_optim_class_at(i) != NULL; i++) {
        setting_t setting = setting_of(kv_optim_class_at(i), KV_FLOAT64, 20, 7);
        if (!is_lazy(setting.optim))
            continue;
        kv_weight_t dense = weight_new(&host, &setting, 1);
        kv_weight_t rows = weight_new(&host, &setting, 1);
        train(&host, &setting, DENSE, 3, 100, NULL, &dense);
        train(&host, &setting, LAZY, 3, 100, NULL, &rows);
        CHECK(distance(&host, &dense, &rows) <= 1e-12);
        weight_free(&dense);
        weight_free(&rows);
    }
    host_end(&host);
}

/* The norm of LARS is that of all rows, whichever the gradient has. */
static void lazy_lars_takes_the_norm_of_all_rows(void)
{
    kv_host_t host = host_new(1);
    setting_t setting = setting_of(kv_optim_class_find("lars"), KV_FLOAT64, 3, 2);
    set_param(&setting, "momentum", 0);
    kv_weight_t weight = weight_new(&host, &setting, 1);
    double *w = weight.data, gradient[] = {3, 4}, due[6];
    int64_t id = 1;
    kv_buffer_t indices = {.data = &id}, data = {.data = gradient};
    kv_rowset_t set = {.num_rows = 1, .indices = &indices, .data = &data};
    kv_row_sum_t sum = sum_new(&host, &setting, 1, &set);
    kv_optim_state_t state = fresh;
    kv_step_t step = step_at(&setting, &state, 1);
    double squares = 0;
    for (int i = 0; i < 6; i++) {
        due[i] = w[i];
        squares += w[i] * w[i];
    }
    const kv_optim_numbers_t *n = &setting.numbers;
    double rate =
        n->learning_rate * 0.001 * sqrt(squares) / (5 * n->rescale_grad + n->wd * sqrt(squares));
    for (int i = 2; i < 4; i++)
        due[i] -= rate * (n->wd * w[i] + n->rescale_grad * gradient[i - 2]);
    kv_host_update_rows(&host, &step, &weight, &sum, NULL, true);
    for (int i = 0; i < 6; i++)
        CHECK(fabs(w[i] - due[i]) < 1e-15);
    kv_row_sum_fini(&sum);
    weight_free(&weight);
    host_end(&host);
}

/* Gradients of pushes that do not count wait; the push that counts steps with all of them, also in
 * rows that it has not itself. */
static void lazy_large_batch_steps_with_what_waits(void)
{
    for (int momentum = 0; momentum < 2; momentum++) {
        kv_host_t host = host_new(1);
        setting_t setting = setting_of(kv_optim_class_find("lbsgd"), KV_FLOAT64, 4, 1);
        set_param(&setting, "batch_scale", 2);
        set_param(&setting, "warmup_epochs", 0);
        set_param(&setting, "momentum", momentum ? 0.5 : 0);
        kv_weight_t weight = weight_new(&host, &setting, 1);
        kv_optim_state_t state = fresh;
        double *w = weight.data, due[4], gradient[2][2] = {{8, 6}, {4, 2}};
        int64_t ids[2][2] = {{0, 2}, {2, 3}};
        memcpy(due, w, sizeof due);
        for (int push = 0; push < 2; push++) {
            kv_buffer_t indices = {.data = ids[push]}, data = {.data = gradient[push]};
            kv_rowset_t set = {.num_rows = 2, .indices = &indices, .data = &data};
            kv_row_sum_t sum = sum_new(&host, &setting, 1, &set);
            kv_step_t step = step_at(&setting, &state, push + 1);
            kv_host_update_rows(&host, &step, &weight, &sum, NULL, true);
            kv_row_sum_fini(&sum);
            if (push == 0)
                CHECK(memcmp(w, due, sizeof due) == 0);
        }
        const kv_optim_numbers_t *n = &setting.numbers;
        const double mean[] = {4, 0, 5, 1};
        for (int i = 0; i < 4; i++)
            if (i != 1)
                due[i] -= 2 * n->learning_rate * (n->wd * due[i] + n->rescale_grad * mean[i]);
        for (int i = 0; i < 4; i++)
            CHECK(fabs(w[i] - due[i]) < 1e-15);
        weight_free(&weight);
        host_end(&host);
    }
}

/* The momentum of NAG takes the decay of the weight before the step if that is row-sparse. */
static void row_sparse_weight_has_its_own_formula(void)
{
    kv_host_t host = host_new(1);
    setting_t setting = setting_of(kv_optim_class_find("nag"), KV_FLOAT64, 2, 1);
    set_param(&setting, "momentum", 0.5);
    const kv_optim_numbers_t *n = &setting.numbers;
    for (int sparse = 0; sparse < 2; sparse++) {
        kv_weight_t weight = weight_new(&host, &setting, 1);
        double *w = weight.data, *m = weight.slots[0], gradient = 4, before = w[1];
        int64_t id = sparse ? 70 : 1, place = 1;
        kv_buffer_t indices = {.data = &id}, data = {.data = &gradient};
        kv_rowset_t set = {.num_rows = 1, .indices = &indices, .data = &data};
        kv_row_sum_t sum = sum_new(&host, &setting, 1, &set);
        kv_optim_state_t state = fresh;
        kv_step_t step = step_at(&setting, &state, 1);
        kv_host_update_rows(&host, &step, &weight, &sum, sparse ? &place : NULL, false);
        double due = -n->learning_rate * (n->rescale_grad * 4 + n->wd * (sparse ? before : w[1]));
        CHECK(fabs(m[1] - due) < 1e-15);
        kv_row_sum_fini(&sum);
        weight_free(&weight);
    }
    host_end(&host);
}

static void large_step_does_not_depend_on_the_threads(void)
{
    static const struct {
        int64_t num_rows, row_count;
    } shapes[] = {{3000, 64}, {2, 150000}, {9000, 1}};
    static const kv_dtype_t dtypes[] = {KV_FLOAT32, KV_BFLOAT16};
    kv_host_t one = host_new(1), three = host_new(3);
    for (int i = 0; kv_optim_class_at(i) != NULL; i++)
        for (int shape = 0; shape < 3; shape++)
            for (int lazy = 0; lazy < 2; lazy++) {
                setting_t setting = setting_of(kv_optim_class_at(i), dtypes[i % 2],
                                               shapes[shape].num_rows, shapes[shape].row_count);
                if (lazy ? !is_lazy(setting.optim) : shape != i % 3)
                    continue;
                setting.master = i % 4 == 1;
                kv_weight_t a = weight_new(&one, &setting, 1), b = weight_new(&one, &setting, 1);
                train(&one, &setting, lazy ? LAZY : ROWS, 2, 60, NULL, &a);
                train(&three, &setting, lazy ? LAZY : ROWS, 2, 60, NULL, &b);
                CHECK(same_rows(&setting, &a, &b, setting.num_rows, NULL));
                weight_free(&a);
                weight_free(&b);
            }
    host_end(&one);
    host_end(&three);
}

static void nothing_to_step_with_is_fine(void)
{
    kv_host_t host = host_new(2);
    for (int i = 0; kv_optim_class_at(i) != NULL; i++)
        for (int lazy = 0; lazy < 2; lazy++)
            for (int64_t row_count = 0; row_count < 3; row_count += 2) {
                setting_t setting = setting_of(kv_optim_class_at(i), KV_FLOAT32, 4, row_count);
                kv_weight_t weight = weight_new(&host, &setting, 1);
                train(&host, &setting, lazy ? LAZY : ROWS, 1, 0, NULL, &weight);
                train(&host, &setting, lazy ? LAZY : ROWS, 2, row_count == 0 ? 50 : 0, NULL,
                      &weight);
                weight_free(&weight);
                setting.num_rows = 0;
                weight = weight_new(&host, &setting, 1);
                train(&host, &setting, lazy ? LAZY : ROWS, 1, 0, NULL, &weight);
                weight_free(&weight);
            }
    host_end(&host);
}

/* Rows of a user's memory may begin anywhere. */
static void gradient_at_an_odd_address_is_read(void)
{
    kv_host_t host = host_new(1);
    setting_t setting = setting_of(kv_optim_class_find("sgd"), KV_FLOAT32, 3, 5);
    kv_weight_t a = weight_new(&host, &setting, 1), b = weight_new(&host, &setting, 1);
    _Alignas(float) char odd[2 * 5 * sizeof(float) + 1];
    float even[10];
    int64_t ids[] = {0, 2};
    for (int i = 0; i < 10; i++)
        even[i] = (float)(i - 4);
    memcpy(odd + 1, even, sizeof even);
    kv_optim_state_t state = fresh;
    kv_step_t step = step_at(&setting, &state, 1);
    for (int k = 0; k < 2; k++) {
        kv_buffer_t indices = {.data = ids}, data = {.data = k == 0 ? (void *)even : odd + 1};
        kv_rowset_t set = {.num_rows = 2, .indices = &indices, .data = &data};
        kv_row_sum_t sum = sum_new(&host, &setting, 1, &set);
        kv_host_update_rows(&host, &step, k == 0 ? &a : &b, &sum, NULL, true);
        kv_row_sum_fini(&sum);
    }
    CHECK(same_rows(&setting, &a, &b, 3, NULL));
    weight_free(&a);
    weight_free(&b);
    host_end(&host);
}

static const test_t tests[] = {
    TEST(step_that_is_not_lazy_is_the_dense_step),   TEST(lazy_step_touches_its_rows_alone),
    TEST(lazy_step_on_all_rows_is_the_dense_step),   TEST(lazy_lars_takes_the_norm_of_all_rows),
    TEST(lazy_large_batch_steps_with_what_waits),    TEST(row_sparse_weight_has_its_own_formula),
    TEST(large_step_does_not_depend_on_the_threads), TEST(nothing_to_step_with_is_fine),
    TEST(gradient_at_an_odd_address_is_read),
};

TEST_MAIN(tests)
