#!/bin/bash
# Slurm: four nodes of four GPUs; `ray symmetric-run` starts Ray on all of them, the study on the first, and stops Ray after it.
#
#   python -m grid.check experiments/full_ablation.yaml --profile cluster --launcher experiments/clusters/slurm.sh
#   sbatch experiments/clusters/slurm.sh           from the repository; again to go on where the last job ended
#
#SBATCH --job-name=finegrid
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --output=finegrid-%j.log

set -euo pipefail

SHARED=/shared/finegrid
OUT=$SHARED/runs/full_ablation
export FINEGRID_STORE=$SHARED/store FINEGRID_DATA=$SHARED/data HF_HOME=$SHARED/huggingface HF_HUB_OFFLINE=1

# A token of your own, kept in a file: whoever reaches a port of the cluster without it is turned away.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
  mkdir -p "$HOME/.ray"
  (umask 077 && head -c 32 /dev/urandom | sha256sum | cut -c 1-64 > "$RAY_AUTH_TOKEN_PATH")
fi

# A node that doesn't see the shared folder ends the job here, with its name in the log.
srun --ntasks-per-node=1 test -w "$SHARED"

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
ADDRESS=$(srun --nodes=1 --ntasks=1 --nodelist="$HEAD" hostname --ip-address | cut -d ' ' -f 1):6379
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

# Ten minutes before its time is up Slurm sends USR1 to this script: the study saves what it has and ends.
stop() { kill -TERM "$(cut -d ' ' -f 2 "$OUT/run.lock")"; }
trap stop USR1

srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  ray symmetric-run --address "$ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus=32 --num-gpus=4 -- \
  env RAY_ADDRESS="$ADDRESS" python -m grid.run experiments/full_ablation.yaml --profile cluster --out "$OUT" \
  --set resources.grace_seconds=540 &
study=$!
wait "$study" && code=0 || code=$?
while [ "$code" -gt 128 ] && kill -0 "$study" 2>/dev/null; do  # it was the signal that ended the waiting, not the study
  wait "$study" && code=0 || code=$?
done
exit "$code"
