#!/bin/bash
# One run on a Slurm allocation: a Ray node on each machine, the command on the first, and the end of both together.
#
#   sbatch deploy/slurm.sh bootstrap my.yaml --out /shared/runs/mine --rounds 2
#
# The same sbatch again goes on where the run was. Paths must be on a file system that every node sees, and so must
# capfilt: CAPFILT_VENV names the virtual environment that has it.
#SBATCH --job-name=capfilt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM two minutes before the time is up: what is committed stays, the lock on the run folder goes.
#SBATCH --signal=TERM@120
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch deploy/slurm.sh VERB ARGUMENTS, e.g. bootstrap my.yaml --out /shared/runs/mine" >&2
  exit 2
fi
# shellcheck disable=SC1091
source "${CAPFILT_VENV:?set CAPFILT_VENV to the virtual environment that has capfilt}/bin/activate"

# Other people's processes reach the same ports: only who has the token may start work. It lies in the shared home.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
[ -s ~/.ray/auth_token ] || ray get-auth-token --generate > /dev/null

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | awk '{print $1}')
# A port of the job's own, free of what an earlier one may have left; and patience with machines that start late.
port=$((20000 + SLURM_JOB_ID % 20000))
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

verb=$1
shift
# srun does not take --cpus-per-task over from sbatch: without it a node's Ray would be held to one core.
exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
  ray symmetric-run --address "$address:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --object-store-memory=1000000000 \
  -- capfilt "$verb" --address auto "$@"
