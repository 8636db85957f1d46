#!/usr/bin/env bash
# Every test that this machine can run: lint, pytest, the smoke preset twice, the second time recomputing nothing, and the
# GPU benchmark's dry run.
set -euo pipefail
also=tests/requirements.txt
. "$(dirname "$0")/../setup.sh"
ruff check .
ruff format --check .
python -m pytest "$@"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
bash reproduce.sh smoke --out "$out/smoke"
bash reproduce.sh smoke --out "$out/smoke" | tee "$out/again.log" | tail -3
grep -q "^0 of " "$out/again.log" || { echo "error: the second smoke run computed something again" >&2; exit 1; }
bash bench/gpu.sh --dry "$out/gpu"
