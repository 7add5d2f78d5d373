/* Status codes: the table of sentences and classes, and this thread's last sentence. */
#include "base/status.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *sentence;
    const char *python;
} table[KV_STATUS_COUNT] = {[KV_OK] = {"no error", ""},
#define ROW(code, sentence_, python_) [KV_##code] = {sentence_, python_},
                            KV_STATUS_LIST(ROW)
#undef ROW
};

static _Thread_local kv_sentence_t last;

/* Length of `text`, which holds the first `length` bytes of something longer, without the character
 * at its end that may have lost bytes. */
static size_t whole_characters(const char *text, size_t length)
{
    size_t start = length;
    for (int back = 0; back < 4 && start > 0; back++) {
        unsigned char byte = (unsigned char)text[--start];
        if ((byte & 0xc0) == 0x80)
            continue;
        size_t bytes = byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : byte >= 0xc0 ? 2 : 1;
        return start + bytes > length ? start : length;
    }
    return length; /* not UTF-8 at all */
}

kv_status_t kv_fail(kv_status_t code, const char *format, ...)
{
    char text[KV_MESSAGE_BYTES];
    va_list arguments;
    va_start(arguments, format);
    int written = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);

    size_t length = written < 0 ? 0 : (size_t)written;
    if (length >= sizeof text)
        length = whole_characters(text, sizeof text - 1);
    memcpy(last.message, text, length);
    last.message[length] = '\0';
    last.code = code;
    return code;
}

const char *kv_status_message(kv_status_t code)
{
    if (code == last.code && last.message[0] != '\0')
        return last.message;
    return (unsigned)code < KV_STATUS_COUNT ? table[code].sentence : "unknown status";
}

void kv_sentence_save(kv_sentence_t *out)
{
    *out = last;
}

void kv_sentence_restore(const kv_sentence_t *sentence)
{
    last = *sentence;
}

const char *kv_status_class(kv_status_t code)
{
    return (unsigned)code < KV_STATUS_COUNT ? table[code].python : "";
}
