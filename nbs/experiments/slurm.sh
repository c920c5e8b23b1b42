#!/bin/bash
#SBATCH --job-name=itm
#SBATCH --array=1-4              # so many runs side by side; more may join at any time
#SBATCH --gres=gpu:1             # without accelerators leave this out, and `-p device auto` too
#SBATCH --cpus-per-task=4
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120      # two minutes to save
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=itm_%a.log
# Usage, in the clone: sbatch nbs/experiments/slurm.sh flickr30k DATA/f30k_precomp [further arguments of itm_sweep]
set -u
sweep=$1; data=$2; shift 2
itm_sweep "$sweep" -p folder "$data" -p device auto --jobs 1 "$@" &
driver=$!
trap 'kill -TERM $driver' TERM
wait $driver; code=$?
if kill -0 $driver 2>/dev/null; then wait $driver; code=$?; fi          # the signal ended the first wait; the driver still saves
# 75: stopped and resumable. Ask for another turn, unless somebody else has done the rest by then.
if [ $code -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"; fi
exit $code
