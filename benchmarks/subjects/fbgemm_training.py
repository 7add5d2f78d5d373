"""FBGEMM's table-batched embedding on the CPU: one table, a bag for each id, AdaGrad with a state
for each element in the backward pass."""

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from rows import IDS, SHAPE, gradients, in_turn, unsorted_ids
from worker import serve


def table():
    embedding = SplitTableBatchedEmbeddingBagsCodegen(
        [(*SHAPE, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ADAGRAD,
        learning_rate=0.01,
        eps=1e-7,
    )
    embedding.split_embedding_weights()[0].fill_(1)  # until written all pages are one
    return embedding


def batches():
    return [torch.from_numpy(ids) for ids in unsorted_ids()]


def rows_pull():
    embedding, offsets = table(), torch.arange(IDS + 1)

    def call(ids):
        with torch.no_grad():
            embedding(ids, offsets)

    return in_turn(call, batches()), 1


def rows_pull_adagrad():
    embedding, offsets = table(), torch.arange(IDS + 1)
    grads = [torch.from_numpy(data) for _, data in gradients()]

    def call(batch):
        ids, grad = batch
        embedding(ids, offsets).backward(grad)

    return in_turn(call, list(zip(batches(), grads, strict=True))), 1


if __name__ == "__main__":
    serve({"rows_pull": rows_pull, "rows_pull_adagrad": rows_pull_adagrad})
