#!/usr/bin/env bash
# Every table and figure of the paper, from debates to report:   bash reproduce.sh [auto|PRESET] [flags]
#
#   preset      models                               machine                   aim        disk
#   smoke       random two-layer, bytes              any CPU                   2 min      20 MB
#   tiny        SmolLM2-135M and its first 6 layers  2 CPU cores, 12 GB        an hour    1 GB
#   small       Qwen2.5-0.5B -> 1.5B, adapters       one GPU, 24 GB            13 h       10 GB   (estimate: RTX 4090)
#   paper-lora  Qwen-7B -> Qwen-14B, adapters        one GPU, 80 GB            17 days    95 GB   (estimate: H100; 2.2 days on 8)
#   paper       Qwen-7B -> Qwen-14B                  8 GPUs, 80 GB             3 days     210 GB
#
# Hours from small on are estimates of `w2s.py plan`, for every table and figure; --tasks and --methods ask for fewer. auto
# takes the largest of paper, paper-lora, small and tiny that the plan finds to fit the GPUs that CUDA_VISIBLE_DEVICES leaves,
# with the flags that it needs for that. Flags go on to `python w2s.py run` (see its --help). Run it again after an
# interruption: what is finished is not computed again. It works in .venv, unless an environment is active or W2S_NO_VENV=1.
# One process per GPU; PROCESSES=8 makes eight, which may share one: small models leave most of it idle. `plan` and `auto` know
# nothing of that: each process holds a model, and debates as large as --cache-tokens.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ "${W2S_NO_VENV:-0}" != 1 ] && [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  . .venv/bin/activate
  for file in requirements.txt ${also:-}; do # each is installed again only when it has changed
    cmp -s "$file" ".venv/${file//\//-}.installed" && continue
    echo "installing $file into .venv"
    pip install --quiet --disable-pip-version-check --no-compile -r "$file" # Python compiles what is used, a fraction
    cp "$file" ".venv/${file//\//-}.installed"
  done
fi
[ "${BASH_SOURCE[0]}" = "$0" ] || return 0 # sourced by tests/run.sh, for the environment

preset=${1:-auto}
shift $(($# > 0))
if [[ ! ${PROCESSES:-1} =~ ^[1-9][0-9]*$ ]] || { [ "$preset" = auto ] && [ -n "${PROCESSES:-}" ]; }; then
  echo "error: PROCESSES=$PROCESSES: give a number from 1, and name a preset: auto plans for one process per GPU" >&2
  exit 2
fi
if [ "$preset" = auto ]; then
  chosen=$(python w2s.py plan --preset auto "$@")
  read -r preset more <<<"$chosen"
  set -- $more "$@"
  echo "preset $preset $more"
fi
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
processes=${PROCESSES:-$gpus}
if [ "$gpus" = 0 ]; then
  export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 # glibc keeps freed memory for the next step: 10% faster
  cores=$(env -u OMP_NUM_THREADS nproc)
  if [ "$preset" = tiny ] && [ "$cores" -gt 1 ]; then # two runs side by side are 1.3 times as fast
    processes=${PROCESSES:-2}
  fi
  [ "$processes" -gt 1 ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
fi
launch=python
[ "$processes" -gt 1 ] && launch="torchrun --standalone --nproc-per-node $processes"
$launch w2s.py run --preset "$preset" "$@"
