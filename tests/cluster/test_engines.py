"""Which engine has started a process, and what its variables say; nothing is started here."""

import pytest
from placing import NAMES, by_hand, mpich, open_mpi, slurm, torchrun, variables

import kvstore
from kvstore.cluster import companions, engines, settings

ENGINES = {
    torchrun: "torchrun",
    open_mpi: "Open MPI",
    mpich: "MPICH",
    slurm: "SLURM",
    by_hand: "KVSTORE_RANK",
}
of_engines = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)


def found(engine, *place, **more):
    return engines.find(variables(engine, *place, job="1", **more))


def refused(*texts):
    return pytest.raises(kvstore.InvalidArgumentError, match="(?s)" + ".*".join(texts))


@of_engines
def test_each_engine_tells_rank_and_size(engine):
    for rank in range(4):
        place = found(engine, rank, 4, 2)
        assert (place.engine.name, place.rank, place.size) == (ENGINES[engine], rank, 4)


@pytest.mark.parametrize("engine", [torchrun, open_mpi, mpich, slurm])
def test_one_node_is_seen_as_one(engine):
    for rank in range(3):
        place = found(engine, rank, 3)
        assert (place.node, place.nodes, place.local_rank) == (0, 1, rank)


@pytest.mark.parametrize("engine", [torchrun, slurm])
def test_several_nodes_are_told_apart(engine):
    places = [found(engine, rank, 6, 3) for rank in range(6)]
    assert [place.node for place in places] == [0, 0, 1, 1, 2, 2]
    assert {place.nodes for place in places} == {3}


@pytest.mark.parametrize("engine", [open_mpi, mpich])
def test_mpi_does_not_tell_several_nodes_apart(engine):
    place = found(engine, 3, 6, 3)
    assert (place.node, place.nodes, place.local_rank) == (None, None, 1)


def test_the_innermost_engine_has_started_the_process():
    job = variables(slurm, 1, 2, 2)
    mpi = variables(open_mpi, 3, 8, 2)
    torch = variables(torchrun, 5, 16, 2)
    assert engines.find({**job, **mpi}).rank == 3
    assert engines.find({**job, **mpi, **torch}).rank == 5
    assert engines.find({**job, **variables(mpich, 2, 8, 2)}).size == 8


def test_variables_of_pmi_that_srun_sets_change_nothing():
    place = found(slurm, 1, 4, 2, PMI_RANK=1, PMI_SIZE=4, PMI_FD=9)
    assert (place.engine.name, place.nodes) == ("SLURM", 2)


def test_a_process_manager_that_speaks_pmi_only_is_taken():
    place = engines.find({"PMI_RANK": "2", "PMI_SIZE": "3"})
    assert (place.engine.name, place.rank, place.size, place.nodes) == ("PMI", 2, 3, None)


def test_names_that_are_also_set_by_hand_count_only_with_their_engine():
    hand = {"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "1"}
    assert engines.find({**hand, **variables(slurm, 1, 4)}).rank == 1
    with refused("neither SLURM nor MPI nor torchrun"):
        engines.find(hand)


# ------------------------------------------------------------------------------------ what is wrong


def test_without_an_engine_it_is_said_what_there_could_be():
    with refused("TORCHELASTIC_RUN_ID", "srun, mpirun or torchrun", "kvrun", "KVSTORE_RANK"):
        engines.find({})


def test_a_batch_script_is_told_to_use_srun():
    with refused("SLURM job 17", "write srun before"):
        engines.find({"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})


def test_pmix_alone_does_not_tell_enough():
    with refused("PMIX_RANK", "KVSTORE_RANK, KVSTORE_NUM_WORKERS and KVSTORE_SCHEDULER"):
        engines.find({"PMIX_RANK": "0", "PMIX_NAMESPACE": "x"})


@pytest.mark.parametrize(
    ("engine", "more", "texts"),
    [
        (torchrun, {"RANK": 4}, ("RANK='4'", "from 0 to 3", "WORLD_SIZE")),
        (torchrun, {"RANK": -1}, ("RANK='-1'", "from 0 to 3")),
        (torchrun, {"RANK": "x" * 1000}, ("RANK='xxx", "torchrun sets it")),
        (torchrun, {"RANK": None}, ("TORCHELASTIC_RUN_ID but not RANK",)),
        (torchrun, {"WORLD_SIZE": 0}, ("WORLD_SIZE='0'", "from 1")),
        (torchrun, {"WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}, ("RANK='3'", "from 0 to 2")),
        (torchrun, {"WORLD_SIZE": 8}, ("GROUP_WORLD_SIZE=1", "LOCAL_WORLD_SIZE=4", "WORLD_SIZE=8")),
        (torchrun, {"GROUP_WORLD_SIZE": 5}, ("GROUP_WORLD_SIZE='5'", "from 1 to 4")),
        (torchrun, {"GROUP_RANK": 1}, ("GROUP_RANK='1'", "from 0 to 0")),
        (open_mpi, {"OMPI_COMM_WORLD_SIZE": ""}, ("but not OMPI_COMM_WORLD_SIZE",)),
        (open_mpi, {"OMPI_COMM_WORLD_LOCAL_SIZE": 5}, ("LOCAL_SIZE='5'", "from 1 to 4")),
        (open_mpi, {"OMPI_COMM_WORLD_LOCAL_RANK": 4}, ("LOCAL_RANK='4'", "from 0 to 3")),
        (mpich, {"PMI_SIZE": None}, ("MPICH has set MPI_LOCALRANKID but not PMI_SIZE",)),
        (slurm, {"SLURM_STEP_NUM_TASKS": "9" * 40}, ("SLURM_STEP_NUM_TASKS='999",)),
        (slurm, {"SLURM_PROCID": "٣"}, ("SLURM_PROCID=",)),
        (slurm, {"SLURM_NODEID": 1}, ("SLURM_NODEID='1'", "from 0 to 0")),
        (by_hand, {"KVSTORE_NUM_WORKERS": 3}, ("KVSTORE_RANK='3'", "from 0 to 2")),
        (by_hand, {"KVSTORE_NUM_WORKERS": None}, ("but not KVSTORE_NUM_WORKERS",)),
    ],
)
def test_variables_that_make_no_sense_are_named(engine, more, texts):
    with refused(*texts):
        found(engine, 3, 4, **more)


def test_two_mpis_that_disagree_are_named():
    with refused("Open MPI says that this is process 0 of 2", "MPICH that it is 1 of 2"):
        engines.find({**variables(open_mpi, 0, 2), **variables(mpich, 1, 2)})
    assert engines.find({**variables(open_mpi, 1, 2), **variables(mpich, 1, 2)}).rank == 1


def test_a_rank_of_the_user_must_be_the_engines():
    assert found(slurm, 1, 2, KVSTORE_RANK=1).engine.name == "SLURM"
    with refused("KVSTORE_RANK='0'", "rank 1 .SLURM_PROCID"):
        found(slurm, 1, 2, KVSTORE_RANK=0)


# -------------------------------------------------------------------------------- where servers are


@pytest.mark.parametrize(
    ("engine", "size", "nodes", "number", "started"),
    [
        (slurm, 4, 2, 2, {0: [0], 2: [1]}),
        (slurm, 4, 2, 1, {0: [0]}),
        (slurm, 4, 2, 5, {0: [0, 1, 2], 2: [3, 4]}),
        (torchrun, 6, 3, 2, {0: [0], 2: [1]}),
        (mpich, 4, 2, 2, {0: [0], 2: [1]}),
        (by_hand, 2, 2, 5, {0: [0, 1, 2], 1: [3, 4]}),
        (open_mpi, 3, 1, 2, {0: [0, 1]}),
    ],
)
def test_every_server_is_started_once_and_they_are_spread(engine, size, nodes, number, started):
    parts = {rank: found(engine, rank, size, nodes).servers(number) for rank in range(size)}
    assert {rank: servers for rank, servers in parts.items() if servers} == started


def test_no_server_is_left_out_whatever_the_numbers():
    for size in range(1, 9):
        for number in range(1, 12):
            for engine in (by_hand, open_mpi):
                parts = [found(engine, rank, size).servers(number) for rank in range(size)]
                started = [server for servers in parts for server in servers]
                assert sorted(started) == list(range(number))


# --------------------------------------------------------------------------- where the scheduler is


def address(engine, *place, **more):
    given = variables(engine, *place, **{"job": "1", **more})
    return engines.address(engines.find(given), given)


@pytest.mark.parametrize("engine", [torchrun, open_mpi, mpich, slurm])
def test_on_one_host_it_is_on_loopback_at_a_port_that_all_know(engine):
    places = {address(engine, rank, 3) for rank in range(3)}
    ((host, port),) = places
    assert host == "127.0.0.1"
    assert port in engines.PORTS


def test_other_jobs_and_other_tries_of_a_job_get_other_ports():
    ports = {address(slurm, 0, 2, job=str(job))[1] for job in range(50)}
    ports |= {address(torchrun, 0, 2, TORCHELASTIC_RESTART_COUNT=n)[1] for n in range(50)}
    ports |= {address(torchrun, 0, 2, MASTER_PORT=n)[1] for n in range(50)}
    assert len(ports) > 140


def test_on_several_hosts_it_is_where_the_engine_says_that_rank_0_is():
    assert address(slurm, 3, 4, 2)[0] == "n1"
    assert address(slurm, 3, 4, 2, SLURM_STEP_NODELIST=None, SLURM_JOB_NODELIST="m7,n1")[0] == "m7"
    assert address(torchrun, 3, 4, 2, MASTER_ADDR="head.example")[0] == "head.example"


@pytest.mark.parametrize("engine", [open_mpi, mpich, by_hand])
def test_where_no_engine_says_it_the_user_must(engine):
    with refused(ENGINES[engine], "KVSTORE_SCHEDULER", "host:port"):
        address(engine, 1, 4, 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("a[1-3,7],b2", "a1"),
        ("a[01-3]", "a01"),
        ("a[3,5]", "a3"),
        ("a,b[1-2]", "a"),
        ("r[1-2]n[04,06-9]-ib,x", "r1n04-ib"),
        ("node-7.example", "node-7.example"),
    ],
)
def test_the_first_host_of_a_list_of_slurm(nodes, first):
    assert engines.first_host(nodes) == first


# ------------------------------------------------------------------ what is checked before a start


@pytest.fixture
def call(monkeypatch):
    """`from_environment` in this process; what it would start is an error."""

    def forbidden(*arguments):
        raise AssertionError("something was started")

    monkeypatch.setattr(companions, "_Companions", forbidden)

    def run(engine, *place, options=None, **more):
        given = variables(engine, *place, **more)
        for name in [*settings.variables(), *NAMES]:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        kvstore.cluster.from_environment(**(options or {}))

    return run


def test_fewer_processes_than_asked_for_are_refused(call):
    for rank in range(2):
        with refused("8 workers were asked for", "SLURM has started 2", "SLURM_STEP_NUM_TASKS"):
            call(slurm, rank, 2, KVSTORE_NUM_WORKERS=8)
        with refused("3 workers were asked for", "Open MPI has started 2"):
            call(open_mpi, rank, 2, options={"num_workers": 3})


def test_several_hosts_need_a_secret(call):
    for rank in range(4):
        for engine in (slurm, torchrun):
            with refused("KVSTORE_TOKEN", "export it"):
                call(engine, rank, 4, 2, MASTER_ADDR="n1")
    with refused("10.0.0.1:9091", "KVSTORE_TOKEN", "mpirun -x"):
        call(open_mpi, 0, 4, 2, KVSTORE_SCHEDULER="10.0.0.1:9091", KVSTORE_NUM_SERVERS=1)


def test_where_nodes_are_not_told_the_number_of_servers_must_be(call):
    with refused("MPICH does not tell how many hosts", "KVSTORE_NUM_SERVERS"):
        call(mpich, 1, 4, 2, KVSTORE_SCHEDULER="127.0.0.1:9091")


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"num_servers": -1}, ("num_servers=-1", "from 0")),
        ({"num_servers": 1.5}, ("num_servers=1.5",)),
        ({"num_servers": True}, ("num_servers=True",)),
        ({"num_servers": 100_000}, ("num_servers=100000", "on one machine")),
        ({"num_workers": "x"}, ("num_workers=x|num_workers='x'",)),
        ({"controller": "no_such_module:f"}, ("controller='no_such_module:f'", "MODULE:FUNCTION")),
        ({"controller": "os"}, ("controller='os'",)),
        ({"controller": ""}, ("controller=''",)),
    ],
)
def test_bad_arguments_are_refused(call, options, texts):
    with refused(*texts):
        call(slurm, 0, 2, options=options)


def test_a_controller_is_named_and_not_given(call):
    with pytest.raises(kvstore.ArrayTypeError, match="MODULE:FUNCTION as a str"):
        call(slurm, 0, 2, options={"controller": print})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KVSTORE_TIMEOUT", "soon"),
        ("KVSTORE_SCHEDULER", "host"),
        ("KVSTORE_SCHEDULER", "host:0"),
        ("KVSTORE_NUM_SERVERS", "none"),
    ],
)
def test_bad_settings_are_refused(call, variable, value):
    with refused(f"{variable}='{value}'"):
        call(slurm, 0, 2, **{variable: value})


def test_rank_0_must_be_where_the_others_look_for_it(call, monkeypatch):
    there = {"KVSTORE_TOKEN": "secret", "KVSTORE_SCHEDULER": "198.51.100.7:9091"}
    with refused("rank 0 runs on", "'198.51.100.7' means 198.51.100.7", "not this host's"):
        call(slurm, 0, 4, 2, **there)
    there["KVSTORE_SCHEDULER"] = "head.example:9091"
    loopback = [(2, 1, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(companions.socket, "getaddrinfo", lambda *_: loopback)
    with refused("'head.example' means 127.0.1.1", "other machines cannot reach"):
        call(slurm, 0, 4, 2, **there)


def test_a_process_with_a_role_keeps_it(call, monkeypatch):
    for name in ("KVSTORE_ROLE", "DMLC_ROLE"):
        call(slurm, 5, 2, **{name: "worker"})
