"""cluster/slurm.sbatch on two machines, with stand-ins for what Slurm itself does."""

import os
import re
import subprocess
import time

import pytest
from machines import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# Runs a command as one task on each node, and ends with the worst of their exit codes.
SRUN = """\
#!/usr/bin/env bash
nodes="node1 node2"
while [[ $1 == --* ]]; do
  [[ $1 == --nodelist=* ]] && nodes=${{1#*=}}
  shift
done
command="cd {root}; . .venv/bin/activate; export RAY_AUTH_MODE=token;"
command+=" export RAY_AUTH_TOKEN=$RAY_AUTH_TOKEN RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0;"
command+=" export RAY_gcs_rpc_server_reconnect_timeout_s=$RAY_gcs_rpc_server_reconnect_timeout_s;"
command+=$(printf ' %q' "$@")
tasks=()
for node in $nodes; do
  ssh -i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \\
    "root@$node" "$command" &
  tasks+=($!)
done
worst=0
for task in "${{tasks[@]}}"; do wait "$task" || worst=$?; done
exit $worst
"""
SCONTROL = """\
#!/usr/bin/env bash
[[ $1 == show ]] && printf '%s\\n' node1 node2 || echo "$@" >>{folder}/scontrol
"""


@pytest.fixture(scope="module")
def slurm(lan):
    lan.add(2)
    tools = lan.folder / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text.format(root=ROOT, key=lan.key, folder=lan.folder))
        (tools / name).chmod(0o755)
    return lan


def batch(lan, config):
    """Start the script as Slurm does on the job's first node."""
    (lan.folder / "scontrol").unlink(missing_ok=True)
    job = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "2",
        "PATH": f"{lan.folder}/tools:{os.environ['PATH']}",
    }
    told = " ".join(f"{key}='{value}'" for key, value in job.items())
    script = f"env {told} bash {ROOT}/cluster/slurm.sbatch {config}"
    log = (lan.folder / f"log{time.time_ns()}").open("w+")
    return subprocess.Popen([*lan.machines[0].ssh, script], stdout=log, stderr=log), log


def words(log):
    log.seek(0)
    return log.read()


def test_a_job_that_is_told_of_its_end_saves_and_is_queued_again(slurm):
    process, log = batch(slurm, slurm.config("long", epochs=4000))
    end = time.monotonic() + 150
    while slurm.step("long") < 5:
        assert process.poll() is None and time.monotonic() < end, words(log)
        time.sleep(0.5)
    slurm.machines[0].do("pkill -USR1 -f [s]lurm.sbatch")
    assert process.wait(timeout=120) == 143, words(log)
    assert (slurm.folder / "scontrol").read_text() == "requeue 7\n"
    assert slurm.checkpoints("long")
    # Which of the two has rank 0 is Ray's choice.
    placed = re.search(r"\(rank 0 on (node\d), 1 on (node\d)\)", words(log))
    assert placed and {*placed.groups()} == {"node1", "node2"}, words(log)
    assert "nothing is lost" in words(log), words(log)


def test_a_job_that_ends_by_itself_is_not_queued_again(slurm):
    process, log = batch(slurm, slurm.config("short", epochs=1))
    assert process.wait(timeout=240) == 0, words(log)
    assert "trained to step" in words(log) and not (slurm.folder / "scontrol").exists()
