"""A SLURM cluster of this machine alone: slurmctld, and as many virtual nodes as asked for, under a folder.

    with cluster(folder, nodes=2) as slurm:
        slurm("sbatch", "--partition=low", "script.sh")

Jobs of partition `high` preempt those of `low`, which are warned by the signal they asked for and then requeued. It
needs Debian's `slurm-wlm`, no configuration, and no rights beyond those of the user.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")


class Slurm(Protocol):
    """Runs a command of SLURM against the cluster; returns what it printed."""

    def __call__(self, *command: str) -> str: ...


def is_installed() -> bool:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return all(shutil.which(program, path=path) for program in _PROGRAMS)


@contextmanager
def cluster(folder: Path, nodes: int, grace_seconds: int = 60) -> Iterator[Slurm]:
    """Starts the daemons, waits until all nodes are idle, and ends what it started."""
    names = [f"node{number}" for number in range(nodes)]
    config = folder / "slurm.conf"
    config.write_text(_config(folder, names, grace_seconds))
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    os.environ.update(environment)  # for `aria-train launch`, and the jobs it submits

    def slurm(*command: str) -> str:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    daemons = []
    try:
        for name, command in [("slurmctld", ["slurmctld", "-D"]), *((n, ["slurmd", "-D", "-N", n]) for n in names)]:
            if name != "slurmctld":
                (folder / f"spool-{name}").mkdir()
            log = (folder / f"{name}.out").open("w")
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        _wait_for_nodes(slurm, nodes, folder)
        yield slurm
        slurm("scancel", "--user", getpass.getuser())
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        del os.environ["SLURM_CONF"]


def _wait_for_nodes(slurm: Slurm, nodes: int, folder: Path) -> None:
    for _ in range(60):
        try:
            states = slurm("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T").split()
        except AssertionError:
            states = []
        if states == ["idle"] * nodes:
            return
        time.sleep(1)
    logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in folder.glob("*.out"))
    raise AssertionError(f"the nodes do not come up: {states}\n{logs}")


def _config(folder: Path, names: list[str], grace_seconds: int) -> str:
    controller, *ports = _free_ports(len(names) + 1)
    host = socket.gethostname()
    lines = [
        "ClusterName=loopback",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        f"SlurmUser={getpass.getuser()}",
        f"SlurmdUser={getpass.getuser()}",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        "AuthType=auth/none",
        "CredType=cred/none",
        # A requeued job waits until its credentials have expired.
        "AuthInfo=cred_expire=5",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SwitchType=switch/none",
        "MpiDefault=none",
        "SelectType=select/linear",
        "SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1,preempt_send_user_signal",
        "ReturnToService=2",
        "KillWait=10",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        *(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
            for name, port in zip(names, ports, strict=True)
        ),
        f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace_seconds} MaxTime=INFINITE State=UP",
        "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP",
    ]
    (folder / "state").mkdir()
    return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
