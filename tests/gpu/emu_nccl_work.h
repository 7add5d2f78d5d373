/* What ranks of the stand-in for NCCL do together: sums and broadcasts, in one process or by files
 * between several. Included by emu_nccl.cpp alone. */
#ifndef EMU_NCCL_WORK_H
#define EMU_NCCL_WORK_H

#include "cuda/number.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <unistd.h>
#include <vector>

namespace
{

struct Call {
    const void *src;
    void *dst;
    size_t count;
    int dtype, root; /* -1: a sum */
    void *stream;
};

struct Comm;

/* The communicators of one id. What is atomic is read by the executor as well. */
struct Clique {
    std::vector<Comm *> ranks; /* NULL: not there yet, or not any more; or another process's */
    int joined, ending;
    std::string shared; /* where the files of its id begin, "": it is of one process */
    int64_t sequence;   /* of sums and broadcasts put */
    uint64_t patience;  /* questions until something goes on */
    bool begun;         /* all ranks are there, and it has gone on once */
    bool fails, never;
    std::atomic<int> aborted, under_way;
    int size() const
    {
        return (int)ranks.size();
    }
    int here() const /* all there, or all of this process */
    {
        return shared.empty() ? size() : joined;
    }
    std::string file(const char *what, int64_t number, int rank) const
    {
        return shared + "." + what + std::to_string(number) + "." + std::to_string(rank);
    }
};

struct Work {
    std::shared_ptr<Clique> clique;
    std::vector<Call> calls; /* by rank; those of this process … */
    std::vector<int> ranks;  /* … and whose they are */
    int first;               /* rank of the sum */
    bool never, gathers;     /* the second piece */
    int64_t sequence;
};

/* ---------------------------------------------------------------------------------------- sums */

template <typename T> void sum(const Work &work)
{
    int ranks = (int)work.calls.size();
    for (size_t i = 0; i < work.calls[0].count; i++) {
        typename T::store total = {};
        for (int k = 0; k < ranks; k++) {
            const Call &call = work.calls[(work.first + k) % ranks];
            typename T::store next;
            memcpy(&next, (const char *)call.src + i * sizeof next, sizeof next);
            total = k == 0 ? next : T::narrow(T::widen(total) + T::widen(next));
        }
        for (const Call &call : work.calls)
            memcpy((char *)call.dst + i * sizeof total, &total, sizeof total);
    }
}

/* By the number of ncclDataType_t. */
const struct {
    size_t bytes;
    void (*sum)(const Work &work);
} types[] = {
    {1, sum<kv_integer<uint8_t, uint8_t>>},
    {1, sum<kv_integer<uint8_t, uint8_t>>},
    {4, sum<kv_integer<uint32_t, uint32_t>>},
    {4, sum<kv_integer<uint32_t, uint32_t>>},
    {8, sum<kv_integer<uint64_t, uint64_t>>},
    {8, sum<kv_integer<uint64_t, uint64_t>>},
    {2, sum<kv_float16>},
    {4, sum<kv_float32>},
    {8, sum<kv_float64>},
    {2, sum<kv_bfloat16>},
};
enum { TYPES = sizeof types / sizeof types[0] };

/* With the calls of all ranks. */
void run_whole(const Work &work)
{
    const Call &first = work.calls[0];
    if (first.root < 0) {
        types[first.dtype].sum(work);
        return;
    }
    for (const Call &call : work.calls)
        if (call.dst != work.calls[first.root].src)
            memcpy(call.dst, work.calls[first.root].src, first.count * types[first.dtype].bytes);
}

/* ------------------------------------------------------------------------- between processes */

struct Head {
    uint64_t count;
    int32_t dtype, root;
};

/* Another process sees the whole file or none. */
void write_file(const std::string &name, const void *head, size_t head_bytes, const void *data,
                size_t bytes)
{
    std::string making = name + ".new";
    FILE *file = fopen(making.c_str(), "wb");
    bool good = file != nullptr && fwrite(head, 1, head_bytes, file) == head_bytes &&
                fwrite(data, 1, bytes, file) == bytes;
    good = file != nullptr && fclose(file) == 0 && good;
    if (!good || rename(making.c_str(), name.c_str()) != 0) {
        fprintf(stderr, "emulated NCCL: cannot write %s\n", name.c_str());
        _Exit(3);
    }
}

bool is_there(const std::string &name)
{
    return access(name.c_str(), R_OK) == 0;
}

void bring(const Work &work)
{
    for (size_t i = 0; i < work.calls.size(); i++) {
        const Call &call = work.calls[i];
        Head head = {call.count, call.dtype, call.root};
        size_t bytes = call.count * types[call.dtype].bytes;
        bool is_read = call.root < 0 || call.root == work.ranks[i];
        write_file(work.clique->file("call", work.sequence, work.ranks[i]), &head, sizeof head,
                   call.src, is_read ? bytes : 0);
    }
}

bool all_there(const Work &work)
{
    for (int rank = 0; rank < work.clique->size(); rank++)
        if (!is_there(work.clique->file("call", work.sequence, rank)))
            return false;
    return true;
}

void gather(const Work &own)
{
    Work whole = {own.clique, {},   {},          (int)(own.sequence % own.clique->size()),
                  false,      true, own.sequence};
    Call like = own.calls[0];
    size_t bytes = like.count * types[like.dtype].bytes;
    std::vector<std::vector<char>> data(own.clique->ranks.size());
    for (int rank = 0; rank < own.clique->size(); rank++) {
        Head head = {};
        FILE *file = fopen(own.clique->file("call", own.sequence, rank).c_str(), "rb");
        bool good = file != nullptr && fread(&head, 1, sizeof head, file) == sizeof head &&
                    head.count == like.count && head.dtype == like.dtype && head.root == like.root;
        data[rank].resize(bytes);
        if (good && (like.root < 0 || like.root == rank))
            good = fread(data[rank].data(), 1, bytes, file) == bytes;
        if (file != nullptr)
            fclose(file);
        if (!good) { /* real ranks would wait for ever, or take what they find */
            fprintf(stderr, "emulated NCCL: processes differ in what they sum or broadcast\n");
            _Exit(3);
        }
        whole.calls.push_back(
            {data[rank].data(), data[rank].data(), like.count, like.dtype, like.root, nullptr});
    }
    run_whole(whole);
    int from = like.root < 0 ? 0 : like.root;
    for (const Call &call : own.calls)
        memcpy(call.dst, data[from].data(), bytes);
}

} // namespace

#endif
