#!/usr/bin/env bash
# The runs behind this folder, from the data to the tables:   bash results/study-2026-11-28/run.sh DATA OUT [sciq gap-3]
#
# DATA/sciq/{train,test}.jsonl.gz: all of allenai/sciq in the hub's fields. The runs land in OUT/sciq, OUT/gap-3, ...; one
# cell is one --methods and one --seeds, which `run` below takes too. What is finished is not computed again.
set -euo pipefail
data=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

mkdir -p "$out/data/sciq"
for split in train test; do # a 135M debater on a CPU reads short passages: 1,725 training and 478 test rows
  zcat "$data/sciq/$split.jsonl.gz" | python3 -c "
import json, sys
sys.stdout.writelines(line for line in sys.stdin if 60 <= len(json.loads(line)['support'] or '') <= 700)" |
    gzip -n >"$out/data/sciq/$split.jsonl.gz"
done

run() { # OUT's subfolder, and more flags
  bash reproduce.sh tiny --out "$out/$1" --data-dir "$out/data" --tasks sciq_evidence --limit-train 1600 --batch-size 32 --lr 1e-4 \
    --weak-lr 2e-4 --epochs 2 --max-new-tokens 24 --dtype float32 --seeds 0 1 2 "${@:2}"
}

for part in ${@:-sciq gap-3}; do
  case $part in
    sciq) run sciq --methods finetune ours single no_argument naive_ensemble turns_1 evidence ;;
    gap-*) # the same debates and the same ceiling, a weak model of other depth
      mkdir -p "$out/$part/sciq_evidence/predictions"
      cp -ru "$out"/sciq/sciq_evidence/{data,transcripts} "$out/$part/sciq_evidence"
      cp -ru "$out"/sciq/sciq_evidence/predictions/{strong-ceiling-s?,zero-shot-strong,zero-shot-evidence} \
        "$out/$part/sciq_evidence/predictions"
      run "$part" --weak "smollm2-135m:${part#gap-}" --methods finetune single
      ;;
    *) echo "$part: choose from sciq, gap-3, gap-12, ... (number of blocks)" >&2 && exit 2 ;;
  esac
done
