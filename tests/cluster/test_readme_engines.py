"""The README's recipes for engines: its program, run by its commands; files that are well formed.

A stand-in is `srun` where there is no SLURM. Of the lines for several hosts, which nothing here can
be, only the form is checked; test_from_environment.py has the processes.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import KVRUN, LONG, Marked
from placing import NAMES, free_address

HERE = Path(__file__).parent
README = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## On SLURM, MPI, torchrun and Kubernetes\n")[2].partition("\n## ")[0]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)


(PROGRAM,) = blocks("py")
(ON_ONE_HOST,) = blocks("sh")
SBATCH, ON_TWO_HOSTS, TORCHRUN_ON_TWO_HOSTS = blocks("bash")
(MANIFEST,) = blocks("yaml")

# What srun does with a command: here all tasks run on this machine, whatever number of nodes.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
sys.path.insert(0, {str(HERE)!r})
from placing import slurm, variables
words = sys.argv[1:]
size, nodes = int(os.environ.get("SLURM_NTASKS", 1)), int(os.environ.get("SLURM_NNODES", 1))
while words[0].startswith("-"):
    if words.pop(0) == "-n":
        size = int(words.pop(0))
tasks = []
for rank in range(size):
    own = variables(slurm, rank, size, nodes, "1234", SLURM_STEP_NODELIST="localhost")
    tasks.append(subprocess.Popen(words, env={{**os.environ, **own}}))
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def marked(tmp_path):
    """Runs what is told in a folder with the program, and this Python as `python`."""
    made = Marked(stand_in=False)
    for name in NAMES:
        made.env.pop(name, None)
    (tmp_path / "job.py").write_text(PROGRAM)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "srun").write_text(SRUN)
    for program in programs.iterdir():
        program.chmod(0o755)
    made.env["PATH"] = f"{programs}{os.pathsep}{made.env['PATH']}"
    yield made
    made.close()


def assert_sum(done, size):
    assert done.returncode == 0, done.stderr
    values = "[3. 3. 3.]" if size == 2 else "[10. 10. 10.]"
    found = re.findall(r"(\d) of (\d) has (\[.*?\])", done.stdout)
    assert sorted(found) == [(str(rank), str(size), values) for rank in range(size)]


@pytest.mark.parametrize("line", ON_ONE_HOST.splitlines(), ids=lambda line: line.split()[0])
@pytest.mark.ucx
def test_the_program_runs_on_one_host(marked, tmp_path, line):
    program, *words = line.partition("#")[0].split()
    if program == "kvrun":
        command = [*KVRUN, *words]
    elif program == "torchrun":
        pytest.importorskip("torch", reason="torch is not installed, and so torchrun is not")
        command = [sys.executable, "-m", "torch.distributed.run", *words]
    else:
        if shutil.which(program, path=marked.env["PATH"]) is None:
            pytest.skip(f"there is no {program} on this machine")
        marked.env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        marked.env["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
        command = [program, *words]
    assert_sum(marked.run(*command, cwd=tmp_path), 2)


@pytest.mark.ucx
def test_the_batch_script_runs_with_what_it_asks_for(marked, tmp_path):
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", SBATCH, re.MULTILINE))
    assert SBATCH.startswith("#!/bin/bash\n#SBATCH ")
    nodes = int(asked["nodes"])
    size = nodes * int(asked["ntasks-per-node"])
    marked.env.update(SLURM_JOB_ID="1234", SLURM_NTASKS=str(size), SLURM_NNODES=str(nodes))
    (tmp_path / "job.sh").write_text(SBATCH)
    assert_sum(marked.run("bash", "job.sh", cwd=tmp_path), size)


def test_the_lines_for_several_hosts_are_well_formed():
    for text in (ON_TWO_HOSTS, TORCHRUN_ON_TWO_HOSTS):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=LONG)
    for variable in ("KVSTORE_TOKEN", "KVSTORE_SCHEDULER", "KVSTORE_NUM_SERVERS"):
        assert f" -x {variable} " in ON_TWO_HOSTS
        assert f"{variable}=" in ON_TWO_HOSTS
    assert "KVSTORE_TOKEN=" in TORCHRUN_ON_TWO_HOSTS


# --------------------------------------------------------------------------------------- Kubernetes


@pytest.fixture
def manifest():
    """The objects by kind; each has a name and the version of the interface that has its kind."""
    yaml = pytest.importorskip("yaml", reason="PyYAML, of mlkvstore[test], is not installed")
    objects = list(yaml.safe_load_all(MANIFEST))
    found = {one["kind"]: one for one in objects}
    assert len(found) == len(objects)
    assert {kind: one["apiVersion"] for kind, one in found.items()} == {
        "Service": "v1",
        "NetworkPolicy": "networking.k8s.io/v1",
        "Job": "batch/v1",
    }
    for one in objects:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", one["metadata"]["name"])
        assert set(one) == {"apiVersion", "kind", "metadata", "spec"}
    return found


def environment(container):
    """Variables of a container: those with a value, and those that come from elsewhere."""
    values, others = {}, {}
    for variable in container["env"]:
        name = variable["name"]
        assert name not in {**values, **others}
        if "value" in variable:
            assert isinstance(variable["value"], str)  # a number would be refused
            values[name] = variable["value"]
        else:
            ((kind, others[name]),) = variable["valueFrom"].items()
            assert kind in ("fieldRef", "secretKeyRef")
    return values, others


def test_the_parts_of_the_manifest_refer_to_each_other(manifest):
    job, service, policy = manifest["Job"], manifest["Service"], manifest["NetworkPolicy"]
    pods = {"job-name": job["metadata"]["name"]}  # the label that each pod of a Job has
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values, others = environment(container)

    assert service["spec"]["selector"] == pods
    assert (
        service["spec"]["clusterIP"] == "None"
    )  # the name and not the null: no address of its own
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert pod["subdomain"] == service["metadata"]["name"]
    host, port = values["KVSTORE_SCHEDULER"].split(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert 0 < int(port) < 65536

    assert policy["spec"]["podSelector"]["matchLabels"] == pods
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    (ingress,) = policy["spec"]["ingress"]
    assert ingress == {"from": [{"podSelector": {"matchLabels": pods}}]}

    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert job["spec"]["completions"] == int(values["KVSTORE_NUM_WORKERS"])
    assert (job["spec"]["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert others["KVSTORE_RANK"] == {"fieldPath": index}

    secret = others["KVSTORE_TOKEN"]
    made = f"kubectl create secret generic {secret['name']} --from-literal={secret['key']}="
    assert made in SECTION
    assert container["command"] == ["python", "job.py"]


@pytest.mark.ucx
def test_the_variables_of_the_manifest_make_a_cluster(manifest, marked, tmp_path):
    """With what Kubernetes puts in for references, and pod 0 on this machine."""
    job = manifest["Job"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    values, others = environment(container)
    marked.env.update(values, KVSTORE_TOKEN="of the secret", KVSTORE_SCHEDULER=free_address())
    assert set(others) == {"KVSTORE_RANK", "KVSTORE_TOKEN"}
    pods = []
    for index in range(job["completions"]):
        marked.env["KVSTORE_RANK"] = str(index)
        pods.append(marked.start(*container["command"], cwd=tmp_path))
    said = [pod.communicate(timeout=2 * LONG) for pod in pods]
    assert marked.alive() == {}
    out, err = ("".join(texts) for texts in zip(*said, strict=True))
    status = max(abs(pod.returncode) for pod in pods)
    assert_sum(subprocess.CompletedProcess((), status, out, err), job["completions"])
