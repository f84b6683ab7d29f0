"""Process group and device meshes.

The world is three nested axes, outermost first:

    replicate   groups that hold copies of everything (hybrid sharding; 1 unless `zero_group_size` is set)
    zero        ranks that shard the optimizer state of the same experts
    expert      consecutive ranks, one NVLink domain, that hold different experts

Dense parameters are sharded over `zero x expert`, experts over `expert` first and then over `zero`. Every rank is a
data rank: it has its own windows.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from aria_train.config import ParallelConfig
from aria_train.errors import ConfigError
from aria_train.machine import num_cpus

_LEAST_PATIENCE = timedelta(minutes=30)
_MARGIN = timedelta(minutes=5)
"""What a hang may take to be seen and reported by all ranks, before the first stops waiting by itself."""
_NEVER = timedelta(days=20)
"""As good as for ever; from 25 days on a socket counts no more."""
_MOST_FILES = 1 << 16


@dataclass
class Meshes:
    """The meshes that `shard.py` lays parameters out on."""

    device: torch.device
    rank: int
    world_size: int
    expert: DeviceMesh
    """1-D: the ranks among which experts are spread."""
    expert_data: DeviceMesh
    """1-D (zero) or 2-D (replicate, zero): the ranks that hold the same experts."""
    dense_data: DeviceMesh
    """1-D (zero x expert) or 2-D (replicate, zero x expert): the ranks that hold the same dense parameters, all."""
    num_replicas: int
    axes: DeviceMesh
    """3-D: replicate, zero, expert. `expert` and `expert_data` are parts of it."""


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> this rank's device. Raises ConfigError where this rank has no such device."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "PyTorch finds no GPU" if torch.backends.cuda.is_built() else "this PyTorch is built for CPUs alone"
        raise ConfigError(
            f"train.device is cuda, but {why}. Mend the driver or the installation, or set train.device to auto or cpu."
        )
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    ranks = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if ranks > gpus:
        raise ConfigError(
            f"{ranks} ranks on this machine see {gpus} GPU(s), and each needs one of its own. Start at most {gpus} "
            "(--nproc-per-node, or launch.ranks_per_node), or train without GPUs: train.device=cpu."
        )
    return torch.device("cuda", local_rank)


def set_patience(hang_minutes: float) -> None:
    """Has ranks wait longer for each other than the watchdog does (`guard.hang_minutes`; 0 = for ever), whose report
    says more than a collective that gives up. Also where there is a process group already: of the default group, and of
    all groups and sockets made from now on."""
    longest = timedelta(minutes=hang_minutes) + _MARGIN if 0 < hang_minutes < _NEVER / timedelta(minutes=1) else _NEVER
    longest = max(longest, _LEAST_PATIENCE)
    # A new group takes these, and not what the default group has.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = longest
    if dist.is_initialized():
        distributed_c10d._set_pg_timeout(longest)


def patience() -> timedelta:
    """How long a rank waits for another: half an hour, unless `set_patience` was called."""
    return distributed_c10d.default_pg_timeout


def init_process_group(device: torch.device) -> None:
    """Joins the process group torchrun describes, or makes one of a single process. Does nothing if there is one."""
    if dist.is_initialized():
        return
    allow_many_sockets()
    # Remembers the last collectives, for the report of a hang.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1000")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            # What experts receive differs from step to step, and blocks of fixed sizes would fall into pieces.
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
    else:
        share_cores()
        keep_freed_memory()
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=patience())
    else:
        dist.init_process_group(backend, timeout=patience(), store=dist.HashStore(), rank=0, world_size=1)


def allow_many_sockets() -> None:
    """Raises this process's limit of open files, as far as the system lets it: over gloo a rank holds a socket to each
    other in every group, about two per rank of the job, and the usual limit is 1024."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # No further: some programs that we start go through all the numbers that files could have.
    wanted = _MOST_FILES if most == resource.RLIM_INFINITY else min(most, _MOST_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS may name a limit that it does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def share_cores() -> None:
    """Divides the machine's cores among its ranks: torchrun's default of one thread leaves cores idle."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_ranks > 1:
        torch.set_num_threads(max(1, num_cpus() // local_ranks))


def keep_freed_memory() -> None:
    """Has the C library keep memory that was freed, for the next tensor, where it would return every large block.

    A step allocates the same sizes as the one before it; fetching every page anew from the kernel takes about a tenth
    of the step. Does nothing where the C library is not glibc.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if not library.mallopt(mmap_threshold, 1 << 30):
            library.mallopt(mmap_threshold, 32 << 20)  # the most that older versions admit
        library.mallopt(trim_threshold, (1 << 31) - 1)


def build_meshes(config: ParallelConfig, device: torch.device) -> Meshes:
    """Lays the default process group out. The sizes have been checked by `config.check_world`."""
    world, expert = dist.get_world_size(), config.expert_parallel_size
    group = config.zero_group_size or world
    replicas, zero = world // group, group // expert
    mesh = init_device_mesh(device.type, (replicas, zero, expert), mesh_dim_names=("replicate", "zero", "expert"))
    if replicas == 1:
        expert_data = mesh["zero"]
        dense_data = init_device_mesh(device.type, (world,), mesh_dim_names=("dense",))
    else:
        expert_data = mesh["replicate", "zero"]
        dense_data = init_device_mesh(device.type, (replicas, group), mesh_dim_names=("replicate", "dense"))
    return Meshes(device, dist.get_rank(), world, mesh["expert"], expert_data, dense_data, replicas, mesh)


def release(meshes: Meshes) -> None:
    """Ends the process groups of meshes that are used no more; the default group lives on. Collective."""
    groups = [g for mesh in (meshes.axes, meshes.dense_data) for g in mesh.get_all_groups()]
    for group in dict.fromkeys(groups):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
