#!/usr/bin/env bash
# Trains on the GPUs (or CPU processes) of this machine, or of several machines: run the same line on each of them.
#
#   launch/torchrun.sh train CONFIG [section.key=value ...]
#   launch/torchrun.sh curriculum CONFIG... [section.key=value ...]
#
# Environment:
#   RANKS_PER_NODE   processes on this machine           (default: its GPUs; 1 without any)
#   NODES            machines                            (default: 1)
#   RENDEZVOUS       host:port of one of them            (needed for several)
#   RUN_NAME         the same on all of them             (default: aria-train)
#   MAX_RESTARTS     how often failed ranks start again  (default: 3), from the last complete checkpoint
#   PYTHON           the interpreter                     (default: python)
#
# Ctrl-C, SIGTERM and SIGUSR1 save and stop; a second one stops at once.
# Exit status: 0 done, 2 a mistake the message explains, 75 stopped with work left: start it again to go on.
set -euo pipefail

if [ "$#" -lt 2 ]; then
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0" >&2
    exit 2
fi

python=${PYTHON:-python}
nodes=${NODES:-1}
if [ -z "${RANKS_PER_NODE:-}" ]; then
    RANKS_PER_NODE=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi

options=(--nproc-per-node="$RANKS_PER_NODE" --max-restarts="${MAX_RESTARTS:-3}")
if [ "$nodes" -eq 1 ]; then
    options+=(--standalone)
else
    if [ -z "${RENDEZVOUS:-}" ]; then
        echo "NODES=$nodes needs RENDEZVOUS=host:port, one of the machines as the others reach it." >&2
        exit 2
    fi
    options+=(--nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="${RUN_NAME:-aria-train}")
fi

exec "$python" -m aria_train.elastic "${options[@]}" -m aria_train "$@"
