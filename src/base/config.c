/* The settings from the environment. */
#include "base/config.h"
#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>

static const kv_config_row_t rows[KV_CONFIG_COUNT] = {
#define ROW(id, variable_, fallback_, help_)                                                       \
    [KV_CONFIG_##id] = {.variable = variable_, .fallback = fallback_, .help = help_},
    KV_CONFIG_LIST(ROW)
#undef ROW
};

const kv_config_row_t *kv_config_row(kv_config_t setting)
{
    return &rows[setting];
}

const char *kv_config_text(kv_config_t setting)
{
    const char *text = getenv(rows[setting].variable);
    return text != NULL ? text : rows[setting].fallback;
}

kv_status_t kv_config_int(kv_config_t setting, int64_t low, int64_t high, int64_t *out)
{
    const char *text = kv_config_text(setting);
    /* strtoll would skip leading blanks and take a plus sign. */
    bool plain = text[0] == '-' || (text[0] >= '0' && text[0] <= '9');
    char *end = NULL;
    errno = 0;
    int64_t value = strtoll(text, &end, 10);
    if (!plain || end == text || *end != '\0' || errno != 0 || value < low || value > high)
        return kv_fail(KV_INVALID, "%s='%s' is not a whole number from %" PRId64 " to %" PRId64,
                       rows[setting].variable, text, low, high);
    *out = value;
    return KV_OK;
}
