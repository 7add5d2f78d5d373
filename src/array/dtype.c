/* The table of element types. */
#include "array/dtype.h"
#include <string.h>

static const struct {
    const char *name;
    size_t bytes;
    unsigned code, bits;
} table[KV_DTYPE_COUNT + 1] = {
#define ROW(id, name_, bytes_, code_, bits_)                                                       \
    [KV_##id] = {.name = name_, .bytes = bytes_, .code = code_, .bits = bits_},
    KV_DTYPE_LIST(ROW)
#undef ROW
        [KV_DTYPE_NONE] = {.name = "unsupported"},
};

size_t kv_dtype_bytes(kv_dtype_t dtype)
{
    return table[dtype].bytes;
}

const char *kv_dtype_name(kv_dtype_t dtype)
{
    return table[dtype].name;
}

kv_dtype_t kv_dtype_parse(const char *name)
{
    int dtype = 0;
    while (dtype < KV_DTYPE_COUNT && strcmp(table[dtype].name, name) != 0)
        dtype++;
    return (kv_dtype_t)dtype;
}

kv_dtype_t kv_dtype_from_dlpack(unsigned code, unsigned bits, unsigned lanes)
{
    int dtype = 0;
    while (dtype < KV_DTYPE_COUNT &&
           (table[dtype].code != code || table[dtype].bits != bits || lanes != 1))
        dtype++;
    return (kv_dtype_t)dtype;
}

void kv_dtype_to_dlpack(kv_dtype_t dtype, unsigned *code, unsigned *bits)
{
    *code = table[dtype].code;
    *bits = table[dtype].bits;
}
