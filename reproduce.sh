#!/usr/bin/env bash
# Every table and figure of the paper, from debates to report:   bash reproduce.sh [auto|smoke|tiny|small|paper] [flags]
#
#   preset  models                                   machine                   aim        disk
#   smoke   random two-layer, bytes                  any CPU                   2 min      20 MB
#   tiny    SmolLM2-135M and its first 6 layers      2 CPU cores, 12 GB        38 min     1 GB
#   small   Qwen2.5-0.5B -> Qwen2.5-1.5B             one GPU, 24 GB            4 h        10 GB
#   paper   Qwen-7B -> Qwen-14B                      8 GPUs, 80 GB             3 days     210 GB  (estimate: w2s.py plan)
#
# auto takes paper with at least 4 GPUs of 70 GB, small with any GPU, tiny without. Flags go on to `python w2s.py run`
# (see its --help). Run it again after an interruption: what is finished is not computed again.
set -euo pipefail
preset=${1:-auto}
[ $# -gt 0 ] && shift
case $preset in
auto | smoke | tiny | small | paper) ;;
*) echo "error: preset '$preset': choose from auto, smoke, tiny, small, paper" >&2; exit 2 ;;
esac
. "$(dirname "$0")/setup.sh"

if [ "$preset" = auto ]; then
  memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null || true) # MiB, a line per GPU
  if [ "$(awk '$1 >= 70000' <<<"$memory" | wc -l)" -ge 4 ]; then preset=paper why="at least 4 GPUs of 70 GB"
  elif [ -n "$memory" ]; then preset=small why="a GPU"
  else preset=tiny why="no GPU"; fi
  echo "preset $preset: this machine has $why"
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=$gpus
if [ "$gpus" -eq 0 ] && [ "$preset" = tiny ] && [ "$(nproc)" -gt 1 ]; then # two runs side by side are 1.3 times as fast
  processes=2
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / 2))}
fi
launch=python
[ "$processes" -gt 1 ] && launch="torchrun --standalone --nproc-per-node $processes"
$launch w2s.py run --preset "$preset" "$@"
