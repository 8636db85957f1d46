#!/usr/bin/env bash
# The runs behind this folder, from the data to the tables:   bash results/study-2026-11-28/run.sh DATA OUT [PART ...]
#
#   sciq       SciQ with evidence: ours, one judge, fewer turns, other protocols, controls, the bound, other losses
#   seeds      the main rows with more seeds
#   paper      Tables 2, 4 and 5 where nobody holds a passage, as in the paper, beside where debaters do
#   knowledge  debaters who hold the passage, half of it, that of another question, or none
#   gap-N      the weak model is the strong one's first N blocks (here 3 and 12)
#   others     CosmosQA and BoolQ: what a judge gains that reads the passage itself
#
# DATA/sciq/{train,test}.jsonl.gz: rows of allenai/sciq in the hub's fields; for others also DATA/{cosmos_qa,boolq}/{train,
# validation}.jsonl.gz. Those behind this folder were 3,534 and 700 of SciQ, the training rows whose distractors are known,
# 3,578 and 2,089 of CosmosQA, 7,392 and 2,289 of BoolQ; with all of the hub's, other rows are drawn. A part lands in OUT/PART;
# sciq comes first, gap-N, seeds, paper and knowledge take over its debates and ceilings. What is finished is not made again.
# Kept beside the rows: the predictions of every model (predictions.txz) and the debates that judges read (*.tgz).
# A cell: one part, METHODS="finetune single" SEEDS=0. DTYPE is float32, as in the rows here. Then the figures across parts:
#   cp results/study-2026-11-28/study.json OUT && python w2s.py redraw --out OUT
set -euo pipefail
data=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

short() { # data set, the field of its passage, its splits: a 135M debater on a CPU reads passages of 60 to 700 characters
  mkdir -p "$out/data/$1"
  for split in "${@:3}"; do
    kept=$out/data/$1/$split.jsonl.gz
    [ -f "$kept" ] && continue
    zcat "$data/$1/$split.jsonl.gz" | python3 -c "
import json, sys
sys.stdout.writelines(line for line in sys.stdin if 60 <= len(json.loads(line)['$2'] or '') <= 700)" |
      gzip -n >"$kept.$$.tmp"
    mv "$kept.$$.tmp" "$kept"
  done
}

parts=${@:-sciq seeds paper knowledge gap-3 gap-12 others}
for part in $parts; do # what is wrong or missing is found before anything is computed
  case $part in
    sciq | seeds | paper | knowledge | gap-[1-9]*) short sciq support train test ;; # 1,725 and 478 rows
    others)
      short cosmos_qa context train validation # 3,566 and 2,083 rows
      short boolq passage train validation # 5,415 and 1,721
      ;;
    *) echo "error: part $part: choose from sciq, seeds, paper, knowledge, gap-3, gap-12, others" >&2 && exit 2 ;;
  esac
done

run() { # part, its methods, more flags
  bash reproduce.sh tiny --out "$out/$1" --methods ${METHODS:-$2} --seeds ${SEEDS:-0 1 2} --data-dir "$out/data" --limit-train 1600 \
    --batch-size 32 --lr 1e-4 --weak-lr 2e-4 --epochs 2 --max-new-tokens 24 --dtype "${DTYPE:-float32}" "${@:3}"
}

take() { # part, what it takes over of sciq's stages
  [ -d "$out/sciq/sciq_evidence/predictions" ] || { echo "error: $1 takes over stages of sciq: run that part first" >&2; exit 2; }
  mkdir -p "$out/$1/sciq_evidence/predictions"
  cp -ru "$out"/sciq/sciq_evidence/{data,transcripts} "$out/$1/sciq_evidence"
  for stage in "${@:2}"; do
    compgen -G "$out/sciq/sciq_evidence/predictions/$stage" >/dev/null || continue # METHODS may have left it out
    cp -ru "$out"/sciq/sciq_evidence/predictions/$stage "$out/$1/sciq_evidence/predictions"
  done
}

for part in $parts; do
  case $part in
    sciq)
      run sciq "finetune finetune_aux finetune_pro ours ours_aux ours_pro single turns_1 turns_2 consultancy consultancy_single \
        market_making independent independent_single other_debate_single finetune_ensembles naive_ensemble no_argument \
        evidence" --tasks sciq_evidence
      ;;
    seeds)
      take $part weak-{naive,debate-d?-t3,consultancy-d?-t3}-f0-s? strong-{ceiling,finetune,single,ours,consultancy}-s? \
        'zero-shot-*'
      SEEDS=${SEEDS:-0 1 2 3 4} run $part "finetune single ours consultancy" --tasks sciq_evidence
      ;;
    paper)
      rows="finetune finetune_aux finetune_pro ours single consultancy market_making finetune_ensembles naive_ensemble \
        no_argument"
      take $part 'zero-shot-*' weak-{naive,no_argument,{debate,consultancy,market_making}-d?-t3}-f?-s? strong-ceiling-s? \
        $(printf 'strong-%s-s? ' $rows)
      run $part "$rows" --tasks sciq_evidence sciq
      ;;
    knowledge)
      take $part 'weak-naive-f0-s?' 'weak-debate-d0-t3-f0-s?' 'strong-ceiling-s?' 'strong-finetune-s?' 'zero-shot-*'
      run $part "finetune single" --tasks sciq_evidence sciq_half_evidence sciq_other_evidence sciq
      ;;
    gap-*)
      take $part 'strong-ceiling-s?' zero-shot-strong zero-shot-evidence
      run $part "finetune single" --tasks sciq_evidence --weak "smollm2-135m:${part#gap-}"
      ;;
    others) run $part "finetune evidence" --tasks cosmos_qa_evidence boolq_evidence --limit-test 1000 ;;
  esac
done
