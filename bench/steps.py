"""Whole finetuning steps of train.py against the loop of OpenAI's weak-to-strong code.

    python -m bench.steps --csv steps.csv
    python -m bench.steps --samples train.jsonl --model smollm2-135m      on the texts of a file

The other loop takes minibatches padded to their longest sample, logits stacked, one loss, one backward. Same model and
batches: on a CPU in turns, on a GPU, whose memory holds one model, one after the other in processes of their own. Columns
as in bench/kernels.py; peak memory is that of the process, and above what it holds between steps; the error is the largest
difference of a step's loss from the first provider's.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import multiprocessing
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

import train
from bench.kernels import COLUMNS, DEVICE, GPU, spread, synchronise, write_rows
from common import InputError, flag, parse_dataclass, read_samples, run_script
from kernels import conf_loss
from model import Classifier, ModelSpec, load_model, load_tokenizer, resolve_dtype


@dataclasses.dataclass(frozen=True)
class Args:
    csv: str = flag("", "file to write the rows to")
    model: str = flag("smollm2-135m", "hub id, folder or built-in model; `:N` keeps the first N blocks")
    samples: str = flag("", "JSON lines with text; default: 16 to 28, and 100 to 500, common words")
    steps: int = flag(4, "steps per round; the first is not counted", int)
    rounds: int = flag(2, "rounds, in each of which every provider has its turn on the same batches", int)
    providers: tuple = flag(
        (), "only these; default: all", choices=("ours", "ours, kernels off", "openai 1", "openai 32")
    )


def common_words(low: int, high: int, n: int) -> list[str]:
    words, r = (
        "the a of to in is it that for was on are as with his they at be this from have or by one".split(),
        random.Random(0),
    )
    return [" ".join(r.choices(words, k=r.randint(low, high))) for _ in range(n)]


class OpenAILoop:
    """The other loop: plain model, minibatches padded to their longest sample, all logits of a batch stacked, one backward."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, minibatch: int):
        self.model = load_model(spec, AutoModelForSequenceClassification, dtype, num_labels=2).to(DEVICE).eval()
        self.pretrained = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.minibatch = minibatch

    def finetune(self, samples: list[list[int]], labels: Tensor, config: train.TrainConfig) -> list[dict]:
        """As train.finetune from a zero head; one row a step."""
        self.model.load_state_dict(self.pretrained)
        torch.nn.init.zeros_(self.model.score.weight)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        schedule, log, n_tokens = list(train.batches(len(samples), config)), [], 0
        for step, batch in enumerate(schedule):
            optimizer.param_groups[0]["lr"] = train.lr_at(step, len(schedule), config.lr)
            logits = []
            for i in range(0, len(batch), self.minibatch):
                chosen = [torch.tensor(samples[j]) for j in batch[i : i + self.minibatch]]
                ids = pad_sequence(chosen, batch_first=True).to(DEVICE)
                hidden = self.model.base_model(input_ids=ids, use_cache=False)[
                    0
                ]  # causal: padding behind changes nothing
                logits += [self.model.score(hidden[j, len(s) - 1]) for j, s in enumerate(chosen)]
            y = labels[batch].to(DEVICE)
            z = torch.stack(logits).float()
            target = train.LOSSES[config.loss](z.detach(), y, step / len(schedule), config)
            loss = conf_loss.cross_entropy(z, target)
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
    dtype = resolve_dtype("auto")
    if provider.startswith("openai"):
        return OpenAILoop(spec, dtype, int(provider.split()[1]))
    return OurLoop(spec, dtype, "triton" if provider == "ours" and GPU else "reference")


def peak_mb(provider: str, spec: ModelSpec, rounds: list[tuple]) -> tuple[float, float, list]:
    """In a process of its own: peak memory of a round after others, that above what is held between them, the others' logs."""
    loop = build(provider, spec)
    logs = [loop.finetune(*r) for r in (rounds if GPU else rounds[:1])]
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loop.finetune(*rounds[-1])
        peak = torch.cuda.max_memory_allocated()
        return peak / 2**20, (peak - before) / 2**20, logs

    def resident(what: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 2**10

    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # give freed pages back, so that the level between steps is what is held
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    loop.finetune(*rounds[-1])
    peak = resident("VmHWM")
    return peak, peak - before, logs


def encode(tokenizer, texts: list[str], config: train.TrainConfig) -> list[list[int]]:
    return [ids[: config.max_tokens] for ids in tokenizer(texts)["input_ids"]]


def step_rows(args: Args):
    """One row a text source and provider; every round gives each provider the same batches."""
    spec = ModelSpec.parse(args.model)
    config = train.TrainConfig(loss="logconf", epochs=1)
    n = config.batch_size * args.steps
    if args.samples:
        texts = [r["text"] for r in read_samples(Path(args.samples), "text")]
        if len(texts) < n * args.rounds:
            raise InputError(
                f"--samples {args.samples!r}: {len(texts)} rows, {n * args.rounds} are needed; lower --steps or --rounds"
            )
        sources = {Path(args.samples).stem: texts}
    else:
        sources = {
            f"{low}-{high} words": common_words(low, high, n * args.rounds) for low, high in ((16, 28), (100, 500))
        }
    every = ("ours", *(["ours, kernels off"] if GPU else []), "openai 1", f"openai {config.batch_size}")
    names = args.providers or every
    loops = {} if GPU else {name: build(name, spec) for name in names}
    tokenizer = load_tokenizer(spec)
    labels = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.cat([labels, 1 - labels], 1)
    for source, texts in sources.items():
        chunks = [texts[i : i + n] for i in range(0, n * args.rounds, n)]
        inputs = {
            name: [(encode(tokenizer, c, config) if "openai" in name else c, labels, config) for c in chunks]
            for name in names
        }
        logs: dict[str, list] = {name: [] for name in names}
        for i in range(0 if GPU else args.rounds):
            for name in names if i % 2 == 0 else names[::-1]:
                logs[name].append(loops[name].finetune(*inputs[name][i]))
        tokens = sum(map(len, encode(tokenizer, texts, config))) / len(texts)
        for name in names:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                peak, above, alone = pool.submit(peak_mb, name, spec, inputs[name]).result()
            logs[name] = logs[name] or alone
            steps = [
                (b["seconds"] - a["seconds"], b["tokens"] - a["tokens"])
                for log in logs[name]
                for a, b in itertools.pairwise(log)
            ]
            off = max(
                abs(a["loss"] - b["loss"])
                for x, y in zip(logs[name], logs[names[0]], strict=True)
                for a, b in zip(x, y, strict=True)
            )
            yield dict.fromkeys(COLUMNS) | {
                "row": "S", "shape": f"{args.model} {source}, {tokens:.0f} tokens a sample", "loss": config.loss, "provider": name,
                **spread([1e3 * seconds for seconds, _ in steps]),
                "tokens_per_s": sum(t for _, t in steps) / sum(s for s, _ in steps),
                "peak_mb": peak, "above_mb": above, "error": off,
            }  # fmt: skip


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "bench.steps", __doc__)
    for name, least in {"steps": 2, "rounds": 1}.items():
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: at least {least}")
    write_rows(step_rows(args), args.csv)


if __name__ == "__main__":
    run_script(main)
