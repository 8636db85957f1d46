"""Transcripts: two copies of one model debate every training sample; and the alternatives: consultancy, market-making,
and two who argue for opposite sides without hearing each other.

    python debate.py --task sciq --samples train_a.jsonl --strong Qwen/Qwen2.5-1.5B --seed 0 1 2 3 --turns 3 --out DIR
    python debate.py --task facts --samples train_a.jsonl --protocol consultancy --out DIR --show 3
    torchrun --nproc-per-node 8 debate.py ...       one copy of the model per GPU, the same transcripts

Reads rows with id, text and, where only the debaters hold one, evidence; writes seed<k>.jsonl to --out: id, sides (what
each turn argues for, 0 or 1), turns (texts), n_tokens (generated, each turn). A killed run continues.

Sides depend on the sample alone and instructions stand last in a prompt, so that what all seeds read is computed once and
what was said is kept from turn to turn. A token's noise depends on (debate seed, sample id, turn, position): a transcript
is the same in any batch, and the beginning of a longer one.
"""

import copy
import dataclasses
import functools
import glob
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common import (
    ALONE,
    InputError,
    Progress,
    Ranks,
    align_by_id,
    check_out,
    dump_row,
    flag,
    parse_dataclass,
    picked,
    print0,
    read_jsonl,
    read_samples,
    refuse_shared_gpus,
    run_script,
    stable_hash,
    world,
    write_jsonl,
)
from data.prepare import TASKS
from generate import ENGINES, DebateConfig, Debater
from model import ModelSpec
from reach import reached
from stages import Stage, State, locked, read_manifest, settings_of
from train import soft_labels

# ---- prompts (Tables 1 and 3; what they say of a task stands beside its formatter in data/prepare.py) ----

DEBATE_TURNS = (
    "Construct your argument for why {claim}.",
    "Construct your argument for why {claim} and list out flaws in your opponent's argument.",
    "Construct the counterargument to opponent's argument.",
)


class Protocol(NamedTuple):
    """Who speaks, in turn, two of them for opposite sides; what each turn asks for, the last of `asked` ever after; whether
    speakers hear what was said; and how the sample is introduced."""

    speakers: tuple[str, ...]
    asked: tuple[str, ...]
    hears: bool = True
    introduction: str = "{shown}"


DEBATERS, CONSULTANT, FIRST = ("Debater A", "Debater B"), ("Consultant",), DEBATE_TURNS[:1]
PROTOCOLS = {
    "debate": Protocol(
        DEBATERS, DEBATE_TURNS, introduction="{shown} Debate with another opponent for whether {debated}."
    ),
    "consultancy": Protocol(CONSULTANT, FIRST),
    "market_making": Protocol(CONSULTANT, FIRST),  # for the side that the weak model does not choose
    "independent": Protocol(DEBATERS, FIRST, hears=False),  # a control that the paper lacks
}


def introduction(task: str, protocol: str) -> str:
    w = TASKS[task].wording
    return PROTOCOLS[protocol].introduction.format(shown=w.shown, debated=w.debated)


def instruction(task: str, protocol: str, turn: int, side: int) -> str:
    """What the speaker of `turn` (from 0) is told, arguing for class `side`."""
    asked, w = PROTOCOLS[protocol].asked, TASKS[task].wording
    return f"{asked[min(turn, len(asked) - 1)].format(claim=w.claims(side))} {w.begin}".rstrip()


def speaker(protocol: str, turn: int) -> str:
    speakers = PROTOCOLS[protocol].speakers
    return speakers[turn % len(speakers)]


def assign_side(sample_id: str, turn: int) -> int:
    """The class a debater argues for: A (even turns) by a coin of the sample, B the other one."""
    return (stable_hash("side", sample_id) + turn) % 2


def transcript_text(task: str, protocol: str, sides: list[int], turns: list[str]) -> str:
    """A line per turn: its speaker, the side it argues for, and what was said, which may be nothing."""
    names, said = TASKS[task].wording.sides, enumerate(zip(sides, turns, strict=True))
    return "\n".join(f"{speaker(protocol, t)} ({names[side]}): {text}".rstrip() for t, (side, text) in said)


def judge_input(question: str, transcript: str, order: str) -> str:
    """What the judge, a weak model, reads: the sample's question and the debate about it. Edit this for an ablation.
    `first`: the transcript in front, so that the head reads the verdict from the question's tokens; `last`: behind, the
    paper's wording. LOG.md (2026-11-25) has both measured."""
    return "\n".join([transcript, question] if order == "first" else [question, transcript])


def with_evidence(evidence: str, question: str) -> str:
    """The question as those see it who hold the evidence: the debaters, and the bound that has no debate."""
    return f"Passage: {evidence}\n{question}" if evidence else question


def encode_question(debater: Debater, task: str, protocol: str, sample: dict) -> list[int]:
    """Tokens that every turn of a debate begins with: the introduction, the evidence if there is any, the question."""
    text = with_evidence(sample.get("evidence", ""), sample["text"])
    return debater.tokens(f"{debater.before}{introduction(task, protocol)}\n\n{text}\n\n", start=True)


def encode_turn(debater: Debater, protocol: str, turn: int, text: str) -> list[int]:
    """Tokens of what was said, with its speaker."""
    return debater.tokens(f"{speaker(protocol, turn)}: {text}\n")


def encode_instruction(debater: Debater, task: str, protocol: str, turn: int, side: int) -> list[int]:
    """Tokens that ask for a turn: the last of the prompt."""
    asked = instruction(task, protocol, turn, side)
    return debater.tokens(f"{asked}{debater.after or chr(10)}{speaker(protocol, turn)}:")


# ---- what a model knows before anyone argues ----


def zero_shot(debater: Debater, task: str, samples: list[dict], ranks: Ranks = ALONE) -> list[list[float]]:
    """Class probabilities [N][2] without training: how likely the names of the two sides are after the sample.

    The log-odds of class 1 are relative to their median over `samples`, as a language model prefers one of the two words
    whatever the sample is. That needs no labels (Zhao et al. 2021, arXiv 2102.09690, call it calibration).
    """
    odds: dict[str, float] = {}
    sides = [debater.tokens(f" {name}") for name in TASKS[task].wording.sides]
    claim = TASKS[task].wording.claim.format(side="").strip()
    question = f"Decide whether {TASKS[task].wording.debated}.{debater.after or chr(10)}{claim[0].upper()}{claim[1:]}"
    for chunk in list(chunks(samples, lambda n: debater.batch_size(n, seeds=1, turns=1)))[ranks.rank :: ranks.size]:
        prompts = [encode_question(debater, task, "consultancy", s) for s in chunk]  # no opponent is announced
        log_p = debater.log_likelihoods(prompts, debater.tokens(question), sides)
        odds |= {s["id"]: one - zero for s, (zero, one) in zip(chunk, log_p, strict=True)}
    odds = {id: x for of_rank in ranks.gather(odds) for id, x in of_rank.items()}
    middle = statistics.median(odds.values())
    p = [1 / (1 + math.exp(middle - odds[s["id"]])) for s in samples]
    return [[1 - x, x] for x in p]


# ---- protocols ----

Chooser = Callable[[list[dict], list[dict]], list[int]]  # samples, their transcripts so far -> the weak model's choice


def run_protocol(
    debater: Debater, task: str, protocol: str, samples: list[dict], seeds: list[int], turns: int,
    begun: list[list[dict]] | None = None, choose: Chooser | None = None,
) -> list[list[dict]]:  # fmt: skip
    """Transcripts of one chunk of samples for every debate seed: rows [seed][sample] {id, sides, turns, n_tokens}.
    `begun` holds transcripts with fewer turns to continue. Market-making asks `choose` before every turn which answer the
    weak model prefers, and argues for the other one."""
    K = len(seeds)
    pairs = [(s, k) for s in range(len(samples)) for k in range(K)]  # row order of the batch
    if begun is None:
        rows = [{"id": samples[s]["id"], "sides": [], "turns": [], "n_tokens": []} for s, _ in pairs]
    else:
        rows = [copy.deepcopy(begun[k][s]) for s, k in pairs]
    start, speakers, hears = len(rows[0]["turns"]), len(PROTOCOLS[protocol].speakers), PROTOCOLS[protocol].hears
    questions = [encode_question(debater, task, protocol, s) for s in samples]
    session = debater.prefill(questions, copies=K if start else 1)  # up to the first turn, all seeds read the same
    unheard = range(start)  # turns that the cache does not hold yet
    for turn in range(start, turns):
        if protocol == "market_making":
            sides = [1 - c for c in choose([samples[s] for s, _ in pairs], rows)]
        else:
            sides = [assign_side(r["id"], turn % speakers) for r in rows]
        keys = [("noise", seeds[k], samples[s]["id"], turn) for s, k in pairs]
        said = [[encode_turn(debater, protocol, t, r["turns"][t]) for r in rows] for t in unheard if hears]
        prompts = [encode_instruction(debater, task, protocol, turn, side) for side in sides]
        spoken = debater.decode_turn(session, said, prompts if turn else prompts[::K], keys)
        for row, side, ids in zip(rows, sides, spoken, strict=True):
            row["sides"].append(side)
            row["turns"].append(" ".join(debater.tokenizer.decode(ids, skip_special_tokens=True).split()))
            row["n_tokens"].append(len(ids))
        unheard = [turn]
    return [rows[k::K] for k in range(K)]


def chunks(samples: list[dict], size: Callable[[int], int]) -> Iterator[list[dict]]:
    """Samples of like length together, as many as `size` says of the longest's characters: a function of the list alone."""

    def characters(sample: dict) -> int:
        return len(sample["text"]) + len(sample.get("evidence", ""))

    chunk: list[dict] = []
    for sample in sorted(samples, key=lambda s: (characters(s), s["id"])):
        if len(chunk) >= size(characters(sample)):
            yield chunk
            chunk = []
        chunk.append(sample)
    if chunk:
        yield chunk


def make_transcripts(
    debater: Callable[[], Debater], task: str, protocol: str, samples: list[dict], files: dict[int, Path], turns: int,
    choose: Chooser | None = None, ranks: Ranks = ALONE,
) -> dict:  # fmt: skip
    """Fill `files` (debate seed -> path) with `turns`-turn transcripts of `samples`; returns new tokens and turns.

    A file that holds fewer turns is continued, one that holds enough is left alone; `debater` is called only when something
    is missing. Chunks are appended to part files as they finish, and joined at the end. Chunk i goes to rank i % size,
    unless all share one model; part files of a run with any number of ranks are used.
    """
    ids = [s["id"] for s in samples]
    groups: dict[int, list[int]] = {}  # turns there already -> seeds
    for seed, path in files.items():
        have = read_jsonl(path) if path.exists() else []
        n_turns = count_turns(align_by_id(have, ids, str(path)), path) if have else 0
        if n_turns < turns:
            groups.setdefault(n_turns, []).append(seed)
    cost = {"new_tokens": 0, "turns": 0}
    for n_turns, seeds in groups.items():
        begun = {k: {r["id"]: r for r in read_jsonl(files[k])} for k in seeds} if n_turns else None
        stems = {k: files[k].with_name(f"{files[k].name}.part{turns}") for k in seeds}  # one for each length
        if ranks.rank == 0:
            for stem in stems.values():
                drop_torn_lines(stem)
        ranks.barrier()
        done = {k: read_parts(stems[k]) for k in seeds}
        ranks.barrier()
        at_once = functools.partial(debater().batch_size, seeds=len(seeds), turns=turns)
        pending = [c for c in chunks(samples, at_once) if not all(s["id"] in done[k] for k in seeds for s in c)]
        me, copies = (0, 1) if debater().config.engine == "sharded" else (ranks.rank, ranks.size)
        mine, each = pending[me::copies], len(seeds) * (turns - n_turns)  # new turns of a sample
        name, total = f"{task} {protocol} seeds {seeds}", sum(map(len, mine)) * each
        bar = tqdm(desc=name, total=total, unit="turn", disable=ranks.rank > 0 or None)
        progress, start, n_done, n_new, n_tokens = Progress(name, "turn", ranks), time.time(), 0, 0, 0
        for c in mine:
            before = begun and [[begun[k][s["id"]] for s in c] for k in seeds]
            rows = run_protocol(debater(), task, protocol, c, seeds, turns, before, choose)
            for k, seed_rows in zip(seeds, rows, strict=True):
                fresh = [r for r in seed_rows if r["id"] not in done[k]]
                if ranks.rank == me:
                    append_rows(stems[k].with_name(f"{stems[k].name}.rank{me}of{copies}"), fresh)
                n_tokens += sum(sum(r["n_tokens"][n_turns:]) for r in fresh)
                n_new += len(fresh) * (turns - n_turns)
            n_done += len(c) * each
            seconds = time.time() - start
            rate = f"{n_tokens / seconds:.0f} tokens/s{f' x {copies} processes' * (copies > 1)}"
            bar.update(len(c) * each)
            bar.set_postfix_str(rate)
            progress.at(n_done, total, seconds, rate)
        bar.close()
        ranks.barrier()
        if ranks.rank == 0:
            for k in seeds:
                rows = align_by_id(list(read_parts(stems[k]).values()), ids, str(stems[k]))
                write_jsonl(files[k], rows)
                for part in part_files(stems[k]):
                    part.unlink()
        # new ones alone, as the seconds of what was there before a kill are not counted either
        made = ranks.gather((n_tokens, n_new))[:copies]
        cost = {what: cost[what] + sum(of_ranks) for what, of_ranks in zip(cost, zip(*made, strict=True), strict=True)}
    return cost


def count_turns(rows: list[dict], path: Path) -> int:
    """Turns of every transcript in a file. Raises InputError where they differ."""
    lists = [row.get(key) for row in rows for key in ("sides", "turns", "n_tokens")]
    if not all(isinstance(x, list) and len(x) == len(lists[0]) for x in lists):
        raise InputError(f"{path}: not transcripts of one length (sides, turns, n_tokens); move the file away")
    return len(lists[0])


def part_files(stem: Path) -> list[Path]:
    """The unfinished files of a run, one for each process that there was."""
    return sorted(stem.parent.glob(f"{glob.escape(stem.name)}.rank*of*"))


def read_parts(stem: Path) -> dict[str, dict]:
    """Finished rows by id."""
    return {r["id"]: r for part in part_files(stem) for r in read_jsonl(part)}


def drop_torn_lines(stem: Path) -> None:
    """Remove the line that a kill cut off from the end of every part."""
    for part in part_files(stem):
        os.truncate(part, part.read_bytes().rfind(b"\n") + 1)


def append_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write("".join(map(dump_row, rows)))
        f.flush()
        os.fsync(f.fileno())


def show(task: str, protocol: str, sample: dict, row: dict) -> str:
    """A transcript for people."""
    lines = [f"[{row['id']}] {sample['text'].strip()}"]
    for t, (side, text) in enumerate(zip(row["sides"], row["turns"], strict=True)):
        lines.append(f"  {speaker(protocol, t)}, for «{TASKS[task].wording.claims(side)}»:\n    {text}")
    return "\n".join([*lines, ""])


# ---- command line ----


@dataclasses.dataclass(frozen=True)
class Args(DebateConfig):
    task: str = flag("sciq", "whose wording the prompts have", choices=tuple(TASKS))
    protocol: str = flag("debate", "who argues for what", choices=tuple(PROTOCOLS))
    samples: str = flag("", "JSON lines with id, text and, if the debaters hold any, evidence")
    strong: str = flag("smollm2-135m", "the debating model: hub id, folder or built-in model")
    choices: str = flag("", "market-making: the weak model's predictions (id, probs), whose choice is argued against")
    seed: tuple = flag((0,), "debate seeds", int, zero=True)
    turns: int = flag(3, "turns of each debate", int)
    out: str = flag("", "folder to write; transcripts there are continued")
    show: int = flag(0, "print so many transcripts at the end", int, zero=True)


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "debate.py", __doc__)
    inputs = {"samples": Path(args.samples)} | ({"choices": Path(args.choices)} if args.choices else {})
    for name, path in inputs.items():
        if not path.is_file():
            raise InputError(f"--{name} {getattr(args, name)!r}: no such file")
    out = check_out(args.out)
    if (args.protocol == "market_making") != bool(args.choices):
        why = "market_making needs the file, no other does"
        raise InputError(f"--protocol {args.protocol} --choices {args.choices!r}: {why}")
    samples = read_samples(inputs["samples"], "text")
    for number, s in enumerate(samples, 1):
        if not isinstance(s.get("evidence", ""), str):
            raise InputError(f"{args.samples}: evidence {str(s['evidence'])[:40]} of row {number} must be a string")
    weak = read_samples(inputs["choices"], "probs") if args.choices else []
    chosen = {r["id"]: y for r, y in zip(weak, soft_labels(weak, 2).argmax(-1).tolist(), strict=True)}
    if args.choices and not {s["id"] for s in samples} <= chosen.keys():
        raise InputError(f"--choices {args.choices}: not every sample has a prediction there")

    def choose(asked: list[dict], rows: list[dict]) -> list[int]:
        return [chosen[s["id"]] for s in asked]

    config = picked(DebateConfig, args)
    if config.engine == "sharded":
        refuse_shared_gpus("--engine replicated")
    spec = ModelSpec.parse(args.strong)
    files = {k: out / f"seed{k}.jsonl" for k in args.seed}

    @functools.cache
    def debater() -> Debater:
        return ENGINES[config.engine](spec, config, world())

    def make(folder: Path, ranks: Ranks) -> dict:
        return make_transcripts(debater, args.task, args.protocol, samples, files, args.turns, choose, ranks)

    wording = TASKS[args.task].wording.parts()
    asked = {"task": args.task, "protocol": args.protocol, "model": spec.identity(), "wording": wording}
    turns = {str(k): args.turns for k in args.seed}
    code = reached([make_transcripts, ENGINES[config.engine]])
    stage = Stage(
        out, inputs=inputs, make=make, minimum=turns, code=code, on_all_ranks=True, **settings_of(config, **asked)
    )
    state, why = stage.state()
    if state is State.STALE:
        raise InputError(f"--out {args.out!r} holds something else ({'; '.join(why)}); name another folder")
    if state is not State.DONE:
        debater()  # a model that cannot be loaded ends here, before anything is written
    with locked(out):
        made = stage.run(world())
    cost = {k: v for k, v in read_manifest(out).items() if k in ("new_tokens", "turns", "seconds")}
    print0(json.dumps(cost) if made else f"nothing to do: {out} holds all of it")
    for sample, row in zip(samples[: args.show], read_jsonl(files[args.seed[0]]), strict=False):
        print0(show(args.task, args.protocol, sample, row))


if __name__ == "__main__":
    run_script(main)
