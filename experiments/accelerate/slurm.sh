#!/usr/bin/env bash
# sbatch --nodes=2 experiments/accelerate/slurm.sh RECIPE [key=value ...], from the repository's folder
#SBATCH --job-name=sit
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120

set -uo pipefail

export CONFIG="${CONFIG:-experiments/accelerate/multinode_slurm.yaml}" # or fsdp2_8gpu.yaml
export GPUS="${GPUS:-8}" # of each machine
# Two minutes before the end slurm signals this shell, which passes it on; torchrun would kill after 30 seconds what is
# still saving.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100

HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export HEAD
export PORT=$((20000 + SLURM_JOB_ID % 10000))

stopped=""
stop() { # through scancel: srun itself answers SIGTERM with SIGKILL for its tasks
    stopped=yes
    scancel --signal=TERM "$SLURM_JOB_ID.0"
}

srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "$CONFIG" \
        --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$HEAD" --main_process_port "$PORT" \
        train_sit.py "$@"' launch "$@" &
step=$!
trap stop TERM

wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait` before the step ends
    wait "$step"
    status=$?
done

if [[ -n "$stopped" ]]; then
    scontrol requeue "$SLURM_JOB_ID" # the same command goes on from the checkpoint
    exit 0
fi
exit "$status"
