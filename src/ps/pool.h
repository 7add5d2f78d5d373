/* Memory for values on their way, kept when it is given back: the first touch of fresh memory is
 * slower than the network.
 *
 * Buffers come in sizes of powers of two up to a slice; larger ones are not kept. Shared by any
 * number of threads. A buffer may outlive the call for which it was made, not the pool.
 */
#ifndef KV_PS_POOL_H
#define KV_PS_POOL_H

#include "array/array.h"

typedef struct kv_pool kv_pool_t;

KV_MUST_CHECK kv_status_t kv_pool_new(kv_pool_t **out);
/* Gives a buffer of at least `bytes` with one hold, contents unspecified; `bytes` says what was
 * asked for. */
KV_MUST_CHECK kv_status_t kv_pool_get(kv_pool_t *pool, size_t bytes, kv_buffer_t **out);
/* Every buffer has been given back. */
void kv_pool_free(kv_pool_t *pool);

#endif
