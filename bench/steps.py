"""Whole finetuning steps of train.py against the loop of OpenAI's weak-to-strong code.

    python -m bench.steps --csv steps.csv
    python -m bench.steps --samples train.jsonl --model smollm2-135m      on the texts of a file

The other loop takes minibatches padded to their longest sample, logits stacked, one loss, one backward. Same model and
batches; every run in a process of its own, the providers in turns. step_share: FLOPs, as plan.py counts them, over the
rate of a matrix product measured here. peak_gb: of the process (on a CPU the resident set, libraries included);
planned_gb: plan.py's. Launches and waits: a run of two steps less a run of one; STEM_profile.csv lists them. error: the
largest difference of a step's loss from the first provider's.
"""

import dataclasses
import itertools
import multiprocessing
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

import plan
import train
from bench.measure import DEVICE, GPU, launched, matmul_rate, profiled, spread, synchronise, waited, write_rows
from common import InputError, flag, parse_dataclass, read_samples, run_script
from kernels import conf_loss
from model import Classifier, ModelSpec, load_model, load_tokenizer, resolve_dtype
from sizes import shape_of

PROVIDERS = ("ours", "ours, kernels off", "openai 1", "openai 32")


@dataclasses.dataclass(frozen=True)
class Args:
    csv: str = flag("", "file to write the rows to")
    model: str = flag("smollm2-135m", "hub id, folder or built-in model; `:N` keeps the first N blocks")
    samples: str = flag("", "JSON lines with text; default: made-up texts")
    words: tuple = flag((100, 500), "shortest and longest made-up text", int)
    steps: int = flag(4, "steps per round; the first is not counted", int)
    rounds: int = flag(2, "rounds, in each of which every provider has its turn on the same batches", int)
    providers: tuple = flag(PROVIDERS if GPU else ("ours", *PROVIDERS[2:]), "what to run", choices=PROVIDERS)


def texts_of(args: Args, n: int) -> list[str]:
    if not args.samples:
        common = "the a of to in is it that for was on are as with his they at be this from".split()
        r = random.Random(0)
        return [" ".join(r.choices(common, k=r.randint(*args.words))) for _ in range(n)]
    texts = [r["text"] for r in read_samples(Path(args.samples), "text")]
    if len(texts) < n:
        raise InputError(f"--samples {args.samples!r}: {len(texts)} rows, {n} are needed; lower --steps or --rounds")
    return texts[:n]


class OpenAILoop:
    def __init__(self, spec: ModelSpec, dtype: torch.dtype, minibatch: int):
        self.model = load_model(spec, AutoModelForSequenceClassification, dtype, num_labels=2).to(DEVICE).eval()
        self.tokenizer, self.minibatch = load_tokenizer(spec), minibatch
        torch.nn.init.zeros_(self.model.score.weight)

    def finetune(self, texts: list[str], labels: Tensor, config: train.TrainConfig) -> list[dict]:
        """As train.finetune, from the weights that it has; one row per step."""
        samples = [torch.tensor(ids[: config.max_tokens]) for ids in self.tokenizer(texts)["input_ids"]]
        optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        schedule, log, n_tokens = list(train.batches(len(samples), config)), [], 0
        for step, batch in enumerate(schedule):
            optimizer.param_groups[0]["lr"] = train.lr_at(step, len(schedule), config.lr)
            logits = []
            for i in range(0, len(batch), self.minibatch):
                chosen = [samples[j] for j in batch[i : i + self.minibatch]]
                ids = pad_sequence(chosen, batch_first=True).to(DEVICE)  # causal: padding behind changes nothing
                hidden = self.model.base_model(input_ids=ids, use_cache=False)[0]
                logits += [self.model.score(hidden[j, len(s) - 1]) for j, s in enumerate(chosen)]
            z, y = torch.stack(logits).float(), labels[batch].to(DEVICE)
            loss = conf_loss.cross_entropy(z, train.LOSSES[config.loss](z.detach(), y, step / len(schedule), config))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            n_tokens += sum(len(samples[j]) for j in batch)
            log.append({"loss": loss.item(), "tokens": n_tokens, "seconds": time.time()})
        return log


class OurLoop:
    def __init__(self, spec: ModelSpec, dtype: torch.dtype, kernels: str):
        self.classifier = Classifier(spec, 2, dtype, kernels)

    def finetune(self, texts: list[str], labels: Tensor, config: train.TrainConfig) -> list[dict]:
        """train.finetune, with a clock that waits for the GPU at the end of every step, as the other loop does."""
        optimizer, ends = self.classifier.optimizer, []

        def timed_step(lr: float) -> None:
            type(optimizer).step(optimizer, lr)
            synchronise()
            ends.append(time.time())

        optimizer.step = timed_step
        log = train.finetune(self.classifier, texts, labels, config)["log"]
        del optimizer.step
        return [row | {"seconds": end} for row, end in zip(log, ends, strict=True)]


def build(provider: str, spec: ModelSpec) -> OpenAILoop | OurLoop:
    if provider.startswith("openai"):
        return OpenAILoop(spec, resolve_dtype("auto"), int(provider.split()[1]))
    return OurLoop(spec, resolve_dtype("auto"), "triton" if provider == "ours" and GPU else "reference")


def measure(provider: str, spec: ModelSpec, texts: list[str], labels: Tensor, config) -> tuple[list, float, Counter]:
    """In a process of its own: the log of a run, peak memory in GB, and what a step calls."""
    loop = build(provider, spec)
    log = loop.finetune(texts, labels, config)
    peak = torch.cuda.max_memory_allocated() if GPU else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n = config.batch_size
    one, two = (profiled(lambda k=k: loop.finetune(texts[: k * n], labels[: k * n], config)) for k in (1, 2))
    return log, peak / 1e9, two - one


def planned(spec: ModelSpec, config: train.TrainConfig, tokens: int, longest: int) -> tuple[float, float]:
    """FLOPs per trained token, and GB at the peak of a step of so many tokens on one GPU, by plan.py."""
    shape, e = shape_of(spec), resolve_dtype("auto").itemsize
    tokens = max(longest, min(tokens, config.max_tokens_per_forward))
    parts = plan.finetuning_memory(shape, 1, tokens, longest, config.checkpointing, e, not GPU, 0)
    return 6 * shape.body, sum(parts.values()) / 1e9


def step_rows(args: Args, profile: list[dict]) -> Iterator[dict]:
    """One row per provider; every round gives each the same batches. Appends to `profile` what a step of each calls."""
    spec, config = ModelSpec.parse(args.model), train.TrainConfig(loss="logconf", epochs=1)
    n, names = config.batch_size * args.steps, args.providers
    texts, y = texts_of(args, n * args.rounds), torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    labels, rate = torch.cat([y, 1 - y], 1), matmul_rate()
    lengths = [min(len(ids), config.max_tokens) for ids in load_tokenizer(spec)(texts)["input_ids"]]
    source = Path(args.samples).stem if args.samples else f"{args.words[0]}-{args.words[1]} words"
    mean = sum(lengths) / len(lengths)
    about = {"model": args.model, "texts": f"{source}, {mean:.0f} tokens each", "loss": config.loss}
    runs: dict[str, list] = {name: [] for name in names}
    for i in range(args.rounds):
        for name in names if i % 2 == 0 else names[::-1]:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                batch = texts[i * n : (i + 1) * n]
                runs[name].append(pool.submit(measure, name, spec, batch, labels, config).result())
    first = [row for log, _, _ in runs[names[0]] for row in log]
    for name in names:
        logs, peaks, (calls, *_) = zip(*runs[name], strict=True)
        pairs = [pair for log in logs for pair in itertools.pairwise(log)]
        seconds, tokens = ([b[k] - a[k] for a, b in pairs] for k in ("seconds", "tokens"))
        flops, gb = planned(spec, config, max(tokens), max(lengths))
        yield about | {
            "provider": name, **spread([1e3 * s for s in seconds]), "tokens_per_s": sum(tokens) / sum(seconds),
            "matmul_tflops": rate / 1e12, "step_share": flops * sum(tokens) / sum(seconds) / rate,
            "peak_gb": max(peaks), "planned_gb": gb if name.startswith("ours") else None,
            "launches": launched(calls) if GPU else None, "host_waits": waited(calls) if GPU else None,
            "error": max(abs(a["loss"] - b["loss"]) for a, b in zip(itertools.chain(*logs), first, strict=True)),
        }  # fmt: skip
        for (where, called), k in calls.most_common(30):
            profile.append(about | {"provider": name, "where": where, "name": called[:80], "per_step": k})


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "bench.steps", __doc__)
    if args.steps < 2:
        raise InputError(f"--steps {args.steps}: at least 2, the first is not counted")
    profile: list[dict] = []
    write_rows(step_rows(args, profile), args.csv)
    write_rows(profile, args.csv and str(Path(args.csv).with_suffix("")) + "_profile.csv")


if __name__ == "__main__":
    run_script(main)
