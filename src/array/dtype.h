/* Element types. The names are NumPy's; bfloat16 is that of ml_dtypes. */
#ifndef KV_ARRAY_DTYPE_H
#define KV_ARRAY_DTYPE_H

#include <stdbool.h>
#include <stddef.h>

/* X(id, name, bytes, DLPack code, DLPack bits) */
#define KV_DTYPE_LIST(X)                                                                           \
    X(FLOAT64, "float64", 8, 2, 64)                                                                \
    X(FLOAT32, "float32", 4, 2, 32)                                                                \
    X(FLOAT16, "float16", 2, 2, 16)                                                                \
    X(BFLOAT16, "bfloat16", 2, 4, 16)                                                              \
    X(INT8, "int8", 1, 0, 8)                                                                       \
    X(UINT8, "uint8", 1, 1, 8)                                                                     \
    X(INT32, "int32", 4, 0, 32)                                                                    \
    X(INT64, "int64", 8, 0, 64)

typedef enum kv_dtype {
#define KV_DTYPE_ENUM(id, name, bytes, code, bits) KV_##id,
    KV_DTYPE_LIST(KV_DTYPE_ENUM)
#undef KV_DTYPE_ENUM
        KV_DTYPE_COUNT,
    KV_DTYPE_NONE = KV_DTYPE_COUNT, /* an array whose elements the store cannot hold */
} kv_dtype_t;

size_t kv_dtype_bytes(kv_dtype_t dtype);
const char *kv_dtype_name(kv_dtype_t dtype);

static inline bool kv_dtype_is_floating(kv_dtype_t dtype)
{
    return dtype <= KV_BFLOAT16; /* they stand first */
}

/* A floating type of 16 bits. */
static inline bool kv_dtype_is_narrow(kv_dtype_t dtype)
{
    return dtype == KV_FLOAT16 || dtype == KV_BFLOAT16;
}

/* The type in which values of a floating type are summed and updated. */
static inline kv_dtype_t kv_dtype_wide(kv_dtype_t dtype)
{
    return dtype == KV_FLOAT64 ? KV_FLOAT64 : KV_FLOAT32;
}

/* KV_DTYPE_NONE for a name that is not in the list. */
kv_dtype_t kv_dtype_parse(const char *name);

/* The type with this DLPack code and width, KV_DTYPE_NONE if there is none. */
kv_dtype_t kv_dtype_from_dlpack(unsigned code, unsigned bits, unsigned lanes);
void kv_dtype_to_dlpack(kv_dtype_t dtype, unsigned *code, unsigned *bits);

#endif
