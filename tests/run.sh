#!/usr/bin/env bash
# Every test that this machine can run: lint, pytest, the smoke preset twice, the second time recomputing nothing, and the
# GPU benchmark's dry run.
set -euo pipefail
also=tests/requirements.txt
. "$(dirname "$0")/../reproduce.sh"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium chromium-browser google-chrome >/dev/null; then
  echo "installing chromium, in which report.html is tested"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null \
    || echo "chromium cannot be installed: its tests are skipped"
fi
ruff check .
ruff format --check .
python -m pytest -n 2 --dist loadfile "$@" # 2 files at a time; tests are single-threaded
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
bash reproduce.sh smoke --out "$out/smoke"
bash reproduce.sh smoke --out "$out/smoke" | tee "$out/again.log" | tail -3
grep -q "^0 of " "$out/again.log" || { echo "error: the second smoke run computed something again" >&2; exit 1; }
bash bench/gpu.sh --dry "$out/gpu"
