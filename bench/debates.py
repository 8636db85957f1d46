"""New tokens per second of whole debates: ours, transformers' generate in batches of several sizes, and vLLM if installed.

    python -m bench.debates --data-dir DIR --csv debates.csv

Same model, samples, prompts, temperature and number of new tokens for all: no token ends a turn. generate reads a turn's
prompt whole, in batches of like length; ours reads once what a sample's seeds share. In batches of one, a few debates are
enough. The order of the engines changes from round to round; the last table has medians. Alone on the machine only.

step_ms is a token step of ours at that batch size with contexts of half the debate, sampling included; floor_ms the time
to read the weights and the keys and values once at the measured copy bandwidth; floor_share their ratio.
"""

import copy
import dataclasses
import importlib.util
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import data.prepare
from bench.measure import copy_bandwidth, synchronise, write_rows
from common import InputError, flag, parse_dataclass, print0, run_script
from debate import assign_side, chunks, encode_instruction, encode_question, encode_turn, run_protocol
from generate import ENGINES, DebateConfig, Debater, aligned
from model import ModelSpec, device, load_model, resolve_dtype


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
    temperature: float = flag(0.7, "of sampling", float, zero=True)
    batches: tuple = flag((1, 16, 32, 64, 128), "batch sizes that are tried, of generate and of ours", int)
    rounds: int = flag(3, "runs of every engine", int)
    engines: tuple = flag(("ours", "generate", "vllm"), "what to run", choices=("ours", "generate", "vllm"))
    csv: str = flag("", "file for every run")


def in_batches(model: torch.nn.Module, prompts: list[list[int]], size: int) -> list[list[int]]:
    """New tokens of each prompt by `model.generate`, on prompts of like length, padded at the front."""
    order, said = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        ids, mask = aligned([prompts[i] for i in batch], model.device)
        said |= zip(batch, model.generate(ids, attention_mask=mask)[:, ids.shape[1] :].tolist(), strict=True)
    return [said[i] for i in range(len(prompts))]


def generated(debater: Debater, args: Args, samples: list[dict], model: torch.nn.Module, size: int) -> int:
    """Number of new tokens of debates in which every prompt is read whole."""
    n_tokens, contexts = 0, [encode_question(debater, args.task, "debate", s) for s in samples]
    for turn in range(args.turns):
        asked = [encode_instruction(debater, args.task, "debate", turn, assign_side(s["id"], turn)) for s in samples]
        said = in_batches(model, [c + a for c, a in zip(contexts, asked, strict=True)], size)
        n_tokens += sum(map(len, said))
        texts = [" ".join(debater.tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in said]
        contexts = [c + encode_turn(debater, "debate", turn, t) for c, t in zip(contexts, texts, strict=True)]
    return n_tokens


def ours(debater: Debater, args: Args, samples: list[dict], batch: int) -> int:
    """Number of new tokens of all debates."""
    seeds, parts = list(range(args.seeds)), chunks(samples, lambda _: max(1, batch // args.seeds))
    done = [run_protocol(debater, args.task, "debate", part, seeds, args.turns) for part in parts]
    return sum(sum(row["n_tokens"]) for part in done for rows in part for row in rows)


def decode_step(debater: Debater, rows: int, columns: int, bandwidth: float, n: int = 16) -> tuple[float, float]:
    """Milliseconds of a token step of `rows` debates that hold `columns` tokens each: a turn of n + 1 tokens less a turn
    of one, over n; and its floor, to read weights and cache once at `bandwidth`."""
    seconds, debater = [], copy.copy(debater)
    for new in (1, n + 1):
        debater.config, times = dataclasses.replace(debater.config, max_new_tokens=new), []
        for _ in range(3):
            session = debater.prefill([[1] * columns], rows)
            synchronise()
            start = time.perf_counter()
            debater.decode_turn(session, [], [[1]] * rows, [("step", r) for r in range(rows)])
            synchronise()
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
    floor = bytes_read(debater.model, session, columns + n // 2) / bandwidth
    return 1e3 * (seconds[1] - seconds[0]) / n, 1e3 * floor


def bytes_read(model: torch.nn.Module, session, columns: int) -> int:
    """Of a decode step: all weights, but of an untied embedding only a row per token; keys and values so far."""
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters() if p is output or p is not embedding)
    return weights + sum(b[:, :, :columns].nbytes for layer in session.cache.layers for b in layer.buffers)


def measured_rows(args: Args) -> Iterator[dict]:
    """One row per round, engine and batch size."""
    source = args.data_dir and Path(args.data_dir)
    samples = data.prepare.make_samples(args.task, data.prepare.load_rows(args.task, "train", source), 0)[0]
    if len(samples) < args.samples:
        raise InputError(f"--samples {args.samples}: task {args.task} has {len(samples)}")
    samples = sorted(samples[: args.samples], key=lambda s: len(s["text"]))
    spec, config = ModelSpec.parse(args.strong), DebateConfig(args.max_new_tokens, args.temperature, dtype=args.dtype)
    engines = [e for e in args.engines if e != "vllm" or importlib.util.find_spec("vllm")]
    debaters = {e: ENGINES["vllm" if e == "vllm" else "replicated"](spec, config) for e in {"ours", *engines}}
    for debater in debaters.values():
        debater.is_end[:] = False  # no token ends a turn
    debater, bandwidth = debaters["ours"], copy_bandwidth()
    if "generate" in engines:
        model = load_model(spec, AutoModelForCausalLM, resolve_dtype(args.dtype)).to(device()).eval()
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "pad_token_id": 0}
        model.generation_config = GenerationConfig(max_new_tokens=args.max_new_tokens, **sampling)
    ours(debater, args, samples[:1], args.seeds)  # unmeasured: libraries load their kernels
    opening = statistics.mean(len(encode_question(debater, args.task, "debate", s)) for s in samples)
    columns = round(opening + args.turns * args.max_new_tokens / 2)
    steps = {n: decode_step(debater, n, columns, bandwidth) for n in args.batches} if "ours" in engines else {}
    runs = [(e, n) for e in engines for n in args.batches]
    for r in range(args.rounds):
        for engine, batch in runs[r % len(runs) :] + runs[: r % len(runs)]:
            chosen = samples[:: max(1, len(samples) // 16)] if batch == 1 else samples
            torch.manual_seed(r)
            start = time.perf_counter()
            if engine == "generate":
                tokens = generated(debater, args, [s for s in chosen for _ in range(args.seeds)], model, batch)
            else:
                tokens = ours(debaters[engine], args, chosen, batch)
            seconds = time.perf_counter() - start
            if tokens != (wanted := len(chosen) * args.seeds * args.turns * args.max_new_tokens):
                raise RuntimeError(f"{engine} ({batch}): made {tokens} tokens of {wanted}")
            step, floor = steps[batch] if engine == "ours" else (None, None)
            yield {
                "round": r, "engine": engine, "batch": batch, "seeds": args.seeds, "debates": len(chosen) * args.seeds,
                "new_tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds,
                "step_ms": step, "floor_ms": floor, "floor_share": step and floor / step,
            }  # fmt: skip


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "bench.debates", __doc__)
    rates = defaultdict(list)
    for row in write_rows(measured_rows(args), args.csv, args.dtype):
        rates[row["engine"], row["batch"]].append(row["tokens_per_s"])
    for (engine, batch), values in rates.items():
        print0(f"{engine:10}{batch:6}{statistics.median(values):10.1f} tokens/s, median of {len(values)} rounds")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_script(main)
