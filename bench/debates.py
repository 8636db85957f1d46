"""New tokens a second of whole debates: generate one by one and in batches, continuous batching, ours, vLLM if installed.

    python -m bench.debates --data-dir DIR --csv results/bench_debate.csv

Debates of 64 samples with 4 seeds each, as the method has them. Same model, samples, prompts, temperature and number of
new tokens for all: no token ends a turn. Every engine goes turn by turn, each prompt being the question, what was said, the
instruction; the others read it whole every turn, in batches of like length; ours reads once what a sample's seeds share.
Engines take turns within a round and the order changes from round to round; the table has medians over rounds, and the
ratios are medians of the rounds' own. Alone on the machine only; sampling noise differs.
"""

import dataclasses
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import data.prepare
from common import InputError, flag, parse_dataclass, read_jsonl, run_script, write_text
from debate import assign_side, chunks, encode_instruction, encode_question, encode_turn, run_protocol
from generate import ENGINES, DebateConfig, Debater, aligned
from model import ModelSpec, device, load_model, resolve_dtype
from stages import provenance

ENGINE_NAMES = ("generate one by one", "generate in batches", "ours", "continuous batching", "vllm")
Engine = Callable[[list[list[int]]], list[list[int]]]  # prompts of one turn -> its tokens


@dataclasses.dataclass(frozen=True)
class Args:
    task: str = flag("sciq", "the task", choices=tuple(data.prepare.TASKS))
    data_dir: str | None = flag(None, "folder with <task>/<split>.jsonl[.gz] in the hub's schema; default: the hub")
    strong: str = flag("smollm2-135m", "the debating model: hub id, folder or built-in model")
    dtype: str = flag("auto", "of the model", choices=("auto", "float32", "bfloat16"))
    samples: int = flag(64, "samples of the task", int)
    seeds: int = flag(4, "debates of each sample", int)
    turns: int = flag(3, "turns of each debate", int)
    max_new_tokens: int = flag(48, "tokens of each turn, never fewer", int)
    temperature: float = flag(0.7, "of sampling", float)
    batches: tuple = flag((16, 32, 64, 128), "batch sizes that are tried, of generate and of ours", int)
    alone: int = flag(16, "samples that one by one gets: its rate does not depend on their number", int)
    rounds: int = flag(3, "runs of every engine", int)
    engines: tuple = flag((), "only these; default: all", choices=ENGINE_NAMES)
    csv: str = flag("", "file for every run")


def load_samples(args: Args) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        data.prepare.prepare(
            args.task, Path(folder), args.data_dir and Path(args.data_dir), limit_train=2 * args.samples
        )
        rows = [r for half in ("train_a", "train_b") for r in read_jsonl(Path(folder) / f"{half}.jsonl")]
    if len(rows) < args.samples:
        raise InputError(f"--samples {args.samples}: task {args.task} has {len(rows)}")
    return rows[: args.samples]


def turn_by_turn(debater: Debater, args: Args, samples: list[dict], engine: Engine) -> list[list[list[int]]]:
    """Tokens [turn][sample] of debates in which `engine` reads every prompt whole."""
    said: list[list[list[int]]] = []
    contexts = [encode_question(debater, args.task, "debate", s) for s in samples]
    for turn in range(args.turns):
        asked = [encode_instruction(debater, args.task, "debate", turn, assign_side(s["id"], turn)) for s in samples]
        said.append(engine([c + a for c, a in zip(contexts, asked, strict=True)]))
        texts = [" ".join(debater.tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in said[-1]]
        contexts = [c + encode_turn(debater, "debate", turn, t) for c, t in zip(contexts, texts, strict=True)]
    return said


def in_batches(model: torch.nn.Module, size: int) -> Engine:
    """`model.generate` on prompts of like length, padded at the front."""

    def engine(prompts: list[list[int]]) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        said: list[list[int]] = [[]] * len(prompts)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            ids, mask = (t.to(model.device) for t in aligned([prompts[i] for i in batch]))
            out = model.generate(ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
            for i, tokens in zip(batch, out, strict=True):
                said[i] = tokens
        return said

    return engine


def continuous(model: torch.nn.Module, requests: int) -> Engine:
    """transformers' continuous batching, at most `requests` at once, with a cache that holds them all."""
    from transformers import ContinuousBatchingConfig

    def engine(prompts: list[list[int]]) -> list[list[int]]:
        config = None  # on a GPU it sizes itself
        if model.device.type == "cpu":
            longest = max(map(len, prompts)) + model.generation_config.max_new_tokens
            pages = requests * -(-longest // 64) + 16
            config = ContinuousBatchingConfig(
                page_size=64, num_blocks=pages, max_batch_tokens=1024, max_requests_per_batch=requests
            )
        out = model.generate_batch(prompts, model.generation_config, config, warmup=False)
        return [r.generated_tokens for r in out.values()]

    return engine


def ours(debater: Debater, args: Args, samples: list[dict], chunk: int) -> list[list[int]]:
    """Number of new tokens by turn, of every debate."""
    at_once, seeds = max(1, chunk // args.seeds), list(range(args.seeds))
    parts = [
        run_protocol(debater, args.task, "debate", c, seeds, args.turns) for c in chunks(samples, lambda _: at_once)
    ]
    return [r["n_tokens"] for part in parts for rows in part for r in rows]


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "bench.debates", __doc__)
    spec, config = ModelSpec.parse(args.strong), DebateConfig(args.max_new_tokens, args.temperature, dtype=args.dtype)
    samples = sorted(load_samples(args), key=lambda s: len(s["text"]))
    debates = [s for s in samples for _ in range(args.seeds)]
    few = debates[:: max(1, len(debates) // args.alone)]

    def endless(debater: Debater) -> Debater:
        debater.is_end[:] = False
        return debater

    debater = endless(Debater(spec, config))
    wanted = args.engines or ENGINE_NAMES

    def plain_model(*engines: str) -> torch.nn.Module | None:
        if not set(engines) & set(wanted):
            return None
        model = load_model(spec, AutoModelForCausalLM, resolve_dtype(args.dtype)).to(device()).eval()
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=args.temperature, top_k=0, max_new_tokens=args.max_new_tokens, pad_token_id=0
        )
        return model

    models = [plain_model("generate one by one", "generate in batches"), plain_model("continuous batching")]
    ours(debater, args, samples[:1], args.seeds)  # unmeasured: libraries load their kernels

    def others(engine: Engine, chosen: list[dict]) -> int:
        return sum(len(ids) for turn in turn_by_turn(debater, args, chosen, engine) for ids in turn)

    def own(debater: Debater, chunk: int) -> int:
        return sum(map(sum, ours(debater, args, samples, chunk)))

    runs: dict[tuple[str, int], Callable[[], int]] = {
        ("generate one by one", 1): lambda: others(in_batches(models[0], 1), few)
    }
    for n in args.batches:
        runs["ours", n] = lambda n=n: own(debater, n)
        runs["generate in batches", n] = lambda n=n: others(in_batches(models[0], n), debates)
    runs["continuous batching", max(args.batches)] = lambda: others(continuous(models[1], max(args.batches)), debates)
    if "vllm" in wanted and importlib.util.find_spec("vllm"):
        vllm = endless(ENGINES["vllm"](spec, config))
        runs["vllm", len(debates)] = lambda: own(vllm, len(debates))
    else:
        print("vllm: not installed here")

    runs = {run: work for run, work in runs.items() if run[0] in wanted}
    facts = provenance() | {
        "dtype": str(resolve_dtype(args.dtype)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    print(facts)
    lines = ["round,engine,batch,seeds,debates,new_tokens,seconds,tokens_per_second," + ",".join(facts)]
    rates: dict[tuple[str, int], list[float]] = {}
    for r in range(args.rounds):
        order = list(runs)[r % len(runs) :] + list(runs)[: r % len(runs)]
        for name, batch in order:
            n_debates = len(few) if batch == 1 else len(debates)
            torch.manual_seed(r)
            start = time.perf_counter()
            tokens = runs[name, batch]()
            seconds = time.perf_counter() - start
            if tokens != n_debates * args.turns * args.max_new_tokens:
                print(
                    f"{name} ({batch}): made {tokens} tokens of {n_debates * args.turns * args.max_new_tokens}; left out"
                )
                continue
            rates.setdefault((name, batch), []).append(tokens / seconds)
            measured = [tokens, f"{seconds:.2f}", f"{tokens / seconds:.2f}"]
            row = [r, name, batch, args.seeds, n_debates, *measured, *facts.values()]
            lines.append(",".join(f'"{v}"' if "," in str(v) else str(v) for v in row))
            print(f"round {r} {name:20} batch {batch:4}: {tokens / seconds:8.1f} tokens/s", flush=True)
            if args.csv:
                write_text(Path(args.csv), "\n".join(lines) + "\n")
    report(rates)


def report(rates: dict[tuple[str, int], list[float]]) -> None:
    """Medians; each engine at its best batch size; ratios of ours to it, by rounds."""
    best: dict[str, list[float]] = {}
    print(f"\n{'engine':22}{'batch':>6}{'tokens/s':>10}   median of {max(map(len, rates.values()))} rounds")
    for (name, batch), values in rates.items():
        print(f"{name:22}{batch:6}{statistics.median(values):10.1f}")
        best[name] = max(best.get(name, values), values, key=statistics.median)
    for name, values in best.items():
        if name == "ours":
            continue
        ratios = [o / v for o, v in zip(best["ours"], values, strict=False)]
        print(f"ours / {name}, each at its best batch: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_script(main)
