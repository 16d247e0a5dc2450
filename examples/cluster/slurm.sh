#!/usr/bin/env bash
# Slurm: sbatch examples/cluster/slurm.sh [RECIPE]. Two minutes before the time is up, the run saves a checkpoint and
# asks for another turn. The same happens if a machine goes down. Submit it again by hand, and it goes on too.
#SBATCH --job-name=veneer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=veneer-%j.log
set -u

srun --kill-on-bad-exit=0 veneer train "${1:-examples/cluster/recipe.yaml}" --resume auto
status=$?
# 143: stopped by SIGTERM, with a checkpoint. Anything else that is not 0 would fail again.
[ "$status" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
