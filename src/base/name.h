/* Names of keys: text or a number. */
#ifndef KV_BASE_NAME_H
#define KV_BASE_NAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A key: text (UTF-8, any bytes but none missing) or a number. */
typedef struct kv_name {
    const char *text; /* NULL: a number */
    size_t bytes;
    int64_t number;
} kv_name_t;

/* "'w'" or "3": for messages; long text is cut. Returns `text`. */
const char *kv_name_format(const kv_name_t *name, char *text, size_t bytes);

uint64_t kv_name_hash(const kv_name_t *name);
bool kv_name_equal(const kv_name_t *a, const kv_name_t *b);

#endif
