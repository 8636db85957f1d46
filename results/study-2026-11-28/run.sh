#!/usr/bin/env bash
# The runs behind this folder, from the data to the tables:   bash results/study-2026-11-28/run.sh DATA OUT [PART ...]
#
#   main       every row of Tables 2, 4 and 5, both figures and the controls, on SciQ with evidence    five seeds
#   none       the same on SciQ without evidence, the paper's setting                                  five seeds
#   knowledge  debaters who hold half of the passage, or that of another question                      five seeds
#   gap-N      the weak model is the strong one's first N blocks (here 3, 12, 20); needs main          five seeds
#   others     BoolQ and CosmosQA with evidence, 800 + 800 rows                                        three seeds
#   all        SciQ with evidence, every row whose passage is known: 1,073 + 1,074, 615 test            five seeds
#
# DATA/<task>/<split>.jsonl.gz: the sources in the hub's fields. A part lands in OUT/PART; what is finished is not computed
# again. One cell: one part, with METHODS="finetune ours" SEEDS=0. On one GPU PROCESSES=6 is fastest; DTYPE=float32.
set -euo pipefail
data=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

short=$out/data/sciq # a 135M debater reads short passages: 1,725 training and 478 test rows
mkdir -p "$short"
for split in train test; do
  [ -f "$short/$split.jsonl.gz" ] && continue
  zcat "$data/sciq/$split.jsonl.gz" | python3 -c "
import json, sys
sys.stdout.writelines(line for line in sys.stdin if 60 <= len(json.loads(line)['support'] or '') <= 700)" |
    gzip -n >"$short/$split.tmp"
  mv "$short/$split.tmp" "$short/$split.jsonl.gz"
done

tables="finetune finetune_aux finetune_pro consultancy market_making independent other_debate single finetune_ensembles
  ours ours_aux ours_pro naive_ensemble no_argument evidence"

run() { # part, methods, seeds, more flags
  bash reproduce.sh tiny --out "$out/$1" --methods ${METHODS:-$2} --seeds ${SEEDS:-$3} --data-dir "$out/data" \
    --limit-train 1600 --batch-size 32 --lr 1e-4 --weak-lr 2e-4 --epochs 2 --max-new-tokens 24 --dtype "${DTYPE:-auto}" "${@:4}"
}

for part in ${@:-main none knowledge gap-3 gap-12 gap-20 others all}; do
  case $part in
    main | none)
      task=sciq$([ $part = none ] || echo _evidence)
      run $part "$tables ensemble_2 ensemble_3 turns_1 turns_2 turns_6" "0 1 2 3 4" --tasks $task
      ;;
    knowledge) run $part "finetune single ours" "0 1 2 3 4" --tasks sciq_half_evidence sciq_other_evidence ;;
    gap-*) # the same debates and the same ceiling
      mkdir -p "$out/$part/sciq_evidence/predictions"
      cp -ru "$out"/main/sciq_evidence/{data,transcripts} "$out/$part/sciq_evidence"
      cp -ru "$out"/main/sciq_evidence/predictions/{strong-ceiling-s?,zero-shot-strong,zero-shot-evidence} \
        "$out/$part/sciq_evidence/predictions"
      run $part "finetune single ours" "0 1 2 3 4" --tasks sciq_evidence --weak "smollm2-135m:${part#gap-}"
      ;;
    others)
      run $part "finetune single ours naive_ensemble no_argument evidence" "0 1 2" --data-dir "$data" \
        --tasks boolq_evidence cosmos_qa_evidence --limit-test 1000
      ;;
    all)
      run $part "finetune single ours naive_ensemble no_argument evidence turns_1" "0 1 2 3 4" --data-dir "$data" \
        --tasks sciq_evidence --limit-train 20000
      ;;
    *) echo "$part: choose from main, none, knowledge, gap-3, gap-12, gap-20, others, all" >&2 && exit 2 ;;
  esac
done
