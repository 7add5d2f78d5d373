/* Python references that threads without the GIL are done with.
 *
 * A stack that any thread pushes to and that a thread with the GIL empties in one exchange: so
 * there is no node that is taken twice, and nothing to lock. When the first node arrives, a pending
 * call is asked for, in case no kvstore call comes along soon.
 */
#include "py/py.h"

#include "comm/device.h"
#include <stdatomic.h>

static _Atomic(kv_release_t *) gathered;
static atomic_bool barred;

static int pending_call(void *unused)
{
    (void)unused;
    kv_py_release_now();
    return 0;
}

void kv_py_release_later(kv_release_t *release)
{
    kv_release_t *head = atomic_load(&gathered);
    do
        release->next = head;
    while (!atomic_compare_exchange_weak(&gathered, &head, release));
    /* A full queue of pending calls is no loss: the next call of the module empties the stack. */
    if (head == NULL && !atomic_load(&barred))
        Py_AddPendingCall(pending_call, NULL);
}

void kv_py_release_now(void)
{
    kv_device_reap();
    if (atomic_load_explicit(&gathered, memory_order_relaxed) == NULL || atomic_load(&barred))
        return;
    kv_release_t *release = atomic_exchange(&gathered, NULL), *next;
    for (; release != NULL; release = next) {
        next = release->next;
        release->free(release);
    }
}

int64_t kv_py_release_bar(void)
{
    kv_py_release_now();
    atomic_store(&barred, true);
    int64_t left = 0;
    for (kv_release_t *release = atomic_load(&gathered); release != NULL; release = release->next)
        left++;
    return left;
}
