"""The variables by which engines tell processes their place, as the engines of today set them."""

import socket
import uuid


def torchrun(rank, size, nodes, job):
    each = size // nodes
    return {
        "TORCHELASTIC_RUN_ID": job,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank % each,
        "LOCAL_WORLD_SIZE": each,
        "GROUP_RANK": rank // each,
        "GROUP_WORLD_SIZE": nodes,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 29500,
    }


def open_mpi(rank, size, nodes, job):
    each = size // nodes
    return {
        "OMPI_COMM_WORLD_RANK": rank,
        "OMPI_COMM_WORLD_SIZE": size,
        "OMPI_COMM_WORLD_LOCAL_RANK": rank % each,
        "OMPI_COMM_WORLD_LOCAL_SIZE": each,
        "PMIX_NAMESPACE": job,
        "PMIX_RANK": rank,
    }


def mpich(rank, size, nodes, job):
    each = size // nodes
    return {
        "PMI_RANK": rank,
        "PMI_SIZE": size,
        "PMI_FD": 6,
        "MPI_LOCALRANKID": rank % each,
        "MPI_LOCALNRANKS": each,
    }


def slurm(rank, size, nodes, job):
    each = size // nodes
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": 0,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank % each,
        "SLURM_NODEID": rank // each,
        "SLURM_NTASKS": size,
        "SLURM_STEP_NUM_TASKS": size,
        "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_NODELIST": "n1" if nodes == 1 else f"n[1-{nodes}]",
    }


def by_hand(rank, size, nodes, job):
    return {"KVSTORE_RANK": rank, "KVSTORE_NUM_WORKERS": size}


# Every one, to begin a test without.
NAMES = [
    name
    for engine in (torchrun, open_mpi, mpich, slurm, by_hand)
    for name in (*engine(0, 1, 1, ""), "SLURM_JOB_NODELIST")
]


def variables(engine, rank, size, nodes=1, job=None, **more):
    """The environment of one process; None takes a variable out."""
    found = {**engine(rank, size, nodes, job or uuid.uuid4().hex), **more}
    return {name: str(value) for name, value in found.items() if value is not None}


def free_address():
    """Where a scheduler may listen on this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"
