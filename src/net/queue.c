/* The heap of waiting messages. */
#include "net/endpoint.h"
#include <string.h>

enum { FIRST_ROOM = 16 };

static bool is_before(const kv_net_post_t *a, const kv_net_post_t *b)
{
    if (a->message->priority != b->message->priority)
        return a->message->priority > b->message->priority;
    return a->message->sequence < b->message->sequence;
}

static void place(kv_net_queue_t *queue, size_t index, kv_net_post_t *post)
{
    queue->posts[index] = post;
    post->message->state = (int)index + 1;
}

static void sift_up(kv_net_queue_t *queue, size_t index, kv_net_post_t *post)
{
    while (index > 0 && is_before(post, queue->posts[(index - 1) / 2])) {
        place(queue, index, queue->posts[(index - 1) / 2]);
        index = (index - 1) / 2;
    }
    place(queue, index, post);
}

static void sift_down(kv_net_queue_t *queue, size_t index, kv_net_post_t *post)
{
    for (;;) {
        size_t child = 2 * index + 1;
        if (child + 1 < queue->count && is_before(queue->posts[child + 1], queue->posts[child]))
            child++;
        if (child >= queue->count || is_before(post, queue->posts[child]))
            break;
        place(queue, index, queue->posts[child]);
        index = child;
    }
    place(queue, index, post);
}

kv_status_t kv_net_queue_push(kv_net_queue_t *queue, kv_net_post_t *post)
{
    if (queue->count == queue->room) {
        size_t room = queue->room > 0 ? 2 * queue->room : FIRST_ROOM;
        if (room > INT32_MAX)
            return kv_fail(KV_NO_MEMORY, "too many messages wait for one node");
        kv_net_post_t **posts = kv_alloc(room * sizeof *posts);
        KV_TRY_ALLOC(posts, "the queue of messages");
        if (queue->count > 0)
            memcpy(posts, queue->posts, queue->count * sizeof *posts);
        kv_free(queue->posts);
        queue->posts = posts;
        queue->room = room;
    }
    sift_up(queue, queue->count++, post);
    return KV_OK;
}

static kv_net_post_t *take(kv_net_queue_t *queue, size_t index)
{
    kv_net_post_t *post = queue->posts[index];
    kv_net_post_t *last = queue->posts[--queue->count];
    if (last != post) {
        if (index > 0 && is_before(last, queue->posts[(index - 1) / 2]))
            sift_up(queue, index, last);
        else
            sift_down(queue, index, last);
    }
    post->message->state = 0;
    return post;
}

kv_net_post_t *kv_net_queue_pop(kv_net_queue_t *queue)
{
    return queue->count > 0 ? take(queue, 0) : NULL;
}

kv_net_post_t *kv_net_queue_remove(kv_net_queue_t *queue, const kv_net_message_t *message)
{
    return message->state > 0 ? take(queue, (size_t)message->state - 1) : NULL;
}

void kv_net_queue_fini(kv_net_queue_t *queue)
{
    kv_free(queue->posts);
    *queue = (kv_net_queue_t){0};
}
