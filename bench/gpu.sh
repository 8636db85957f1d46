#!/usr/bin/env bash
# Everything to be measured on one GPU, without a network, in under 9 minutes:   bash bench/gpu.sh OUT
# OUT gets tests.txt, debates_*.csv, steps_*.csv, steps_*_profile.csv, kernels.csv and log.txt; each part has a time
# limit of its own, and a CSV is written row by row, so that a run that is cut leaves what it has measured.
#   bash bench/gpu.sh --dry OUT    the same at toy sizes on a CPU within two minutes; each row begins with "dry"
# Models have random weights at the shapes of Qwen2.5-1.5B and 7B; of 7B, 8 blocks are finetuned, as a GPU cannot hold more.
set -uo pipefail
dry=0
if [ "${1:-}" = --dry ]; then dry=1; shift; fi
[ $# = 1 ] || { echo "usage: bash bench/gpu.sh [--dry] OUT" >&2; exit 2; }
[ ! -e "$1" ] || { echo "error: $1: name a folder that does not exist yet" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
if [ -f .venv/bin/activate ] && [ -z "${VIRTUAL_ENV:-}" ]; then . .venv/bin/activate; fi
made=$(mktemp -d)
making=
trap 'kill $making 2>/dev/null; rm -rf "$made"' EXIT
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
failed=0

part() { # seconds, name, command: in $out/name.csv or name.txt what it measured, in log.txt what it said
  local limit=$1 name=$2 start=$SECONDS code=0
  shift 2
  timeout -k 5 "$limit" "$@" >"$made/said" 2>&1 || code=$?
  { echo "== $name: exit code $code after $((SECONDS - start)) s of $limit"; cat "$made/said"; } >>"$out/log.txt"
  if [ "$dry" = 1 ] && [ -f "$out/$name.csv" ]; then sed -i 's/^/dry,/' "$out/$name"*.csv; fi
  echo "$name: exit code $code after $((SECONDS - start)) s of $limit"
  [ "$code" = 0 ] || failed=1
}

steps() { # seconds, name, model, more flags
  part "$1" "steps_$2" python3 -m bench.steps --model "$made/$3" --csv "$out/steps_$2.csv" "${@:4}"
}

debates() { # seconds, name, model, more flags
  part "$1" "debates_$2" python3 -m bench.debates --task facts --strong "$made/$3" --csv "$out/debates_$2.csv" \
    --engines ours generate --rounds 1 "${@:4}"
}

if [ "$dry" = 1 ]; then
  export CUDA_VISIBLE_DEVICES=""
  part 120 made_up python3 -m bench.made_up "$made" random-large
  part 120 kernels python3 -m bench.kernels --rows T4 H --seconds 0 --csv "$out/kernels.csv"
  steps 120 toy random-large --words 16 28 --steps 2 --rounds 1 --providers ours "openai 32"
  debates 120 toy random-large --samples 4 --seeds 2 --max-new-tokens 4 --batches 8
  exit $failed
fi

timeout 100 python3 -m bench.made_up "$made" Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-7B >"$out/made_up.txt" 2>&1 & # while the tests run
making=$!
W2S_TEST_ON_GPU=1 part 100 tests python3 -m pytest -rs tests/test_gpu.py
cp "$made/said" "$out/tests.txt"
wait $making || failed=1
debates 60 1.5b Qwen2.5-1.5B --batches 128 --max-new-tokens 100
steps 80 1.5b Qwen2.5-1.5B --words 540 700 --steps 4 --rounds 1 --providers ours "openai 32"
debates 110 7b Qwen2.5-7B --batches 128 256 64 --max-new-tokens 100
steps 80 7b_8_blocks Qwen2.5-7B:8 --words 540 700 --steps 4 --rounds 1 --providers ours "openai 32"
part 90 kernels python3 -m bench.kernels --rows T1 T4 H --seconds 0.2 --csv "$out/kernels.csv"
exit $failed
