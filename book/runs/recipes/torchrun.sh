#!/usr/bin/env bash
# One node of a job: run it on every node with the same HOST, e.g. HOST=node0 bash torchrun.sh job.py
# Nodes may die and come back: the job goes on with as many as there are.
set -euo pipefail

# Else restarted ranks find the addresses of dead ones in the store (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NODES:-1:4}" --nproc-per-node "${RANKS_PER_NODE:-2}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "${JOB:-job}" --rdzv-endpoint "$HOST:${PORT:-29400}" \
  --rdzv-conf "${RENDEZVOUS:-last_call_timeout=30}" "$@"
