/* Names of keys: how they are shown, compared and hashed. */
#include "base/name.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

const char *kv_name_format(const kv_name_t *name, char *text, size_t bytes)
{
    if (name->text == NULL) {
        snprintf(text, bytes, "%" PRId64, name->number);
        return text;
    }
    int room = bytes > 8 ? (int)bytes - 8 : 0;
    if (name->bytes <= (size_t)room) {
        snprintf(text, bytes, "'%.*s'", (int)name->bytes, name->text);
        return text;
    }
    while (room > 0 && ((unsigned char)name->text[room] & 0xC0) == 0x80)
        room--;
    snprintf(text, bytes, "'%.*s…'", room, name->text);
    return text;
}

uint64_t kv_name_hash(const kv_name_t *name)
{
    const uint64_t multiplier = UINT64_C(0x9E3779B97F4A7C15);
    uint64_t hash = multiplier, word;
    if (name->text == NULL) {
        hash ^= (uint64_t)name->number;
    } else {
        const char *text = name->text;
        size_t left = name->bytes;
        for (; left >= 8; left -= 8, text += 8) {
            memcpy(&word, text, 8);
            hash = (hash ^ word) * multiplier;
            hash ^= hash >> 32;
        }
        word = left;
        for (size_t i = 0; i < left; i++)
            word = word << 8 | (unsigned char)text[i];
        hash ^= word;
    }
    hash *= multiplier;
    return hash ^ hash >> 29;
}

bool kv_name_equal(const kv_name_t *a, const kv_name_t *b)
{
    if (a->text == NULL || b->text == NULL)
        return a->text == b->text && a->number == b->number;
    return a->bytes == b->bytes && memcmp(a->text, b->text, a->bytes) == 0;
}
