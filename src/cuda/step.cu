/* Steps on the host: checks, and records for the kernels. */
#include "cuda/step.h"

namespace
{

int states_of(kv_step_kind_t kind)
{
    static const int states[] = {
#define STATES(name, num) num,
        KV_STEP_LIST(STATES)
#undef STATES
    };
    /* A history for each row is not one for each element. */
    return kind == KV_STEP_group_adagrad ? 1 : states[kind];
}

kv_launch_t *launch_of(kv_step_kind_t kind, kv_dtype_t dtype)
{
    kv_step_family_t *const families[] = {kv_steps_of_sgd, kv_steps_of_adam, kv_steps_of_squares,
                                          kv_steps_of_group};
    kv_launch_t *found = NULL;
    for (kv_step_family_t *family : families)
        if (found == NULL)
            found = family(kind, dtype);
    return found;
}

kv_device_code_t check(kv_step_kind_t kind, kv_dtype_t dtype, int i, const kv_device_step_t *job,
                       char *sentence)
{
    KV_DEVICE_TRY(kv_check_job("step", i, job->count, job->num_src, 0, job->num_dst, 0, sentence));
    if (job->count == 0)
        return KV_DEVICE_OK;
    for (int s = 0; s < states_of(kind); s++)
        if (job->states[s] == NULL)
            return kv_device_refuse(sentence, "step, job %d: state %d is missing", i, s);
    if (job->weight == NULL || job->factors == NULL)
        return kv_device_refuse(sentence, "step, job %d: weight or factors are missing", i);
    if (job->master != NULL && !kv_dtype_is_narrow(dtype))
        return kv_device_refuse(sentence, "step, job %d: only 16-bit weights have a master", i);
    if (kind == KV_STEP_group_adagrad && (job->row_count <= 0 || job->count % job->row_count != 0))
        return kv_device_refuse(sentence, "step, job %d: %lld elements are no rows of %lld", i,
                                (long long)job->count, (long long)job->row_count);
    return KV_DEVICE_OK;
}

kv_device_code_t add(kv_packer *packer, kv_step_kind_t kind, kv_dtype_t dtype,
                     const kv_device_step_t *job)
{
    int wide = kv_wide_bytes_of(dtype), bytes = kv_bytes_of(dtype), n = kv_tile_of(dtype);
    const void *const mine[] = {job->weight};
    const void *const masters[] = {job->master, job->states[0], job->states[1], job->states[2]};
    int num_states = states_of(kind);
    kv_aligned_t aligned = kv_aligned_for(KV_ALIGNED_TILES, 1, mine, bytes, n);
    aligned = kv_aligned_for(aligned, 1 + num_states, masters, wide, n);
    aligned = kv_aligned_for(aligned, job->num_src, job->src, job->wide ? wide : bytes, n);
    aligned = kv_aligned_for(aligned, job->num_dst, job->dst, bytes, n);
    kv_step_record record = {job->count,
                             job->row_count,
                             (uint64_t)job->weight,
                             (uint64_t)job->master,
                             {},
                             (int16_t)job->num_src,
                             (int16_t)job->num_dst,
                             (int16_t)aligned,
                             (int16_t)job->wide};
    for (int s = 0; s < num_states; s++)
        record.states[s] = (uint64_t)job->states[s];
    size_t bytes_of_factors =
        dtype == KV_FLOAT64 ? sizeof(kv_factors_t_double) : sizeof(kv_factors_t_float);
    const int head = kv_words_of<kv_step_record>::COUNT;
    const int sources = head + (int)((bytes_of_factors + 7) / 8);
    int64_t blocks =
        kind == KV_STEP_group_adagrad ? job->count / job->row_count : kv_blocks_for(job->count, n);
    uint64_t *words;
    KV_DEVICE_TRY(kv_packer_add(packer, blocks, sources + job->num_src + job->num_dst, &words));
    memcpy(words, &record, sizeof record);
    memcpy(words + head, job->factors, bytes_of_factors);
    memcpy(words + sources, job->src, (size_t)job->num_src * 8);
    memcpy(words + sources + job->num_src, job->dst, (size_t)job->num_dst * 8);
    return KV_DEVICE_OK;
}

} // namespace

kv_device_code_t kv_cuda_step(int device, void *stream, kv_dtype_t dtype, kv_step_kind_t kind,
                              int num_jobs, const kv_device_step_t *jobs, char *sentence)
{
    kv_launch_t *launch = kind >= 0 && kind < KV_STEP_COUNT ? launch_of(kind, dtype) : NULL;
    if (launch == NULL)
        return kv_device_refuse(sentence, "there is no step of kind %d for type %d", (int)kind,
                                (int)dtype);
    for (int i = 0; i < num_jobs; i++)
        KV_DEVICE_TRY(check(kind, dtype, i, jobs + i, sentence));
    kv_packer packer;
    KV_DEVICE_TRY(kv_packer_start(&packer, device, stream, launch, sentence));
    for (int i = 0; i < num_jobs; i++)
        if (jobs[i].count > 0)
            KV_DEVICE_TRY(add(&packer, kind, dtype, jobs + i));
    return kv_packer_end(&packer);
}
