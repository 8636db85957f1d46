"""Transcripts: two copies of one model debate every training sample; and the alternatives, consultancy and market-making.

    python debate.py --task sciq --samples train_a.jsonl --strong Qwen/Qwen2.5-1.5B --seed 0 1 2 3 --turns 3 --out DIR
    python debate.py --task facts --samples train_a.jsonl --protocol consultancy --out DIR --show 3
    torchrun --nproc-per-node 8 debate.py ...       one replica of the model a GPU, the same transcripts

Reads rows with id, text and, where only the debaters hold one, evidence; writes seed<k>.jsonl to --out: id, sides (what each turn argues for, 0 or 1), turns
(texts), n_tokens (generated, each turn). Finished samples are appended, so a killed run continues.

The sides are a function of the sample alone and the turn's instruction stands last in the prompt: the question is
computed once for all debate seeds, and what was said is kept from turn to turn. The noise of a token is a function of
(debate seed, sample id, turn, position), so a transcript does not depend on its batch, and an n-turn run is the
beginning of a longer one.
"""

import dataclasses
import functools
import glob
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common import (
    InputError,
    ModelSpec,
    Stage,
    barrier,
    broadcast,
    by_id,
    check_out,
    device,
    dump_row,
    flag,
    load_config,
    load_model,
    load_tokenizer,
    locked,
    parse_dataclass,
    print0,
    rank,
    read_jsonl,
    read_manifest,
    read_samples,
    resolve_dtype,
    run_script,
    stable_hash,
    world_size,
    write_jsonl,
)
from data.prepare import TASKS

PROTOCOLS = ("debate", "consultancy", "market_making")


@dataclasses.dataclass(frozen=True)
class DebateConfig:
    max_new_tokens: int = flag(200, "longest turn", int)
    temperature: float = flag(0.4, "of sampling; 0 takes the likeliest token", float)
    top_p: float = flag(1.0, "sample from the smallest set of tokens with this much probability", float)
    chat: bool = flag(
        False, "ask through the model's chat template (for a chat model); default: the plain prompt", bool
    )
    dtype: str = flag("auto", "of the model", choices=("auto", "float32", "bfloat16"))
    cache_tokens: int = flag(32768, "tokens of keys and values that a batch may fill", int)
    engine: str = flag("own", "what generates: own (a copy of the model a process), sharded (one for all), vllm",
                       choices=("own", "sharded", "vllm"))  # fmt: skip

    def batch_size(self, characters: int, seeds: int, turns: int) -> int:
        """Samples with so long a text that make a batch, each with all its seeds and turns: what surely fits, at least 1."""
        tokens = 60 + characters / 2.5 + turns * (self.max_new_tokens + 8)  # with opening, instruction, speakers' names
        return max(1, int(self.cache_tokens / (seeds * tokens)))


# ---- prompts (Tables 1 and 3; what they say of a task stands beside its formatter in data/prepare.py) ----


PROMPTS = {name: task.wording for name, task in TASKS.items()}
DEBATE_TURNS = (
    "Construct your argument for why {claim}.",
    "Construct your argument for why {claim} and list out flaws in your opponent's argument.",
    "Construct the counterargument to opponent's argument.",
)
CONSULT_TURN = "Construct your argument for why {claim}."


def introduction(task: str, protocol: str) -> str:
    w = PROMPTS[task]
    return f"{w.shown} Debate with another opponent for whether {w.debated}." if protocol == "debate" else w.shown


def instruction(task: str, protocol: str, turn: int, side: int) -> str:
    """What the speaker of `turn` (from 0) is told, arguing for class `side`."""
    template = DEBATE_TURNS[min(turn, 2)] if protocol == "debate" else CONSULT_TURN
    return template.format(claim=PROMPTS[task].claims(side))


def speaker(protocol: str, turn: int) -> str:
    return f"Debater {'AB'[turn % 2]}" if protocol == "debate" else "Consultant"


def debate_prompt(task: str, protocol: str, turn: int, side: int) -> str:
    """Introduction and instruction in one, as Tables 1 and 3 print them."""
    return f"{introduction(task, protocol)} {instruction(task, protocol, turn, side)}"


def assign_side(sample_id: str, turn: int) -> int:
    """The class a debater argues for: A (even turns) by a coin of the sample, B the other one."""
    return (stable_hash("side", sample_id) + turn) % 2


def transcript_text(task: str, protocol: str, sides: list[int], turns: list[str]) -> str:
    """A line per turn: its speaker, the side it argues for, and what was said. Turns that are empty leave the sides alone."""
    names = PROMPTS[task].sides
    lines = [
        f"{speaker(protocol, t)} ({names[s]}): {turn}".rstrip()
        for t, (s, turn) in enumerate(zip(sides, turns, strict=True))
    ]
    return "\n".join(lines)


def judge_input(question: str, transcript: str, order: str) -> str:
    """What the judge, a weak model, reads: the sample's question and the debate about it. Edit this for an ablation.

    `first` puts the transcript in front, so that the last tokens, from which the head reads the verdict, are the
    question's; `last` appends it, the paper's wording. LOG.md (2026-11-25) has both measured.
    """
    return "\n".join([transcript, question] if order == "first" else [question, transcript])


def with_evidence(evidence: str, question: str) -> str:
    """The question as those see it who hold the evidence: the debaters, and the bound that has no debate."""
    return f"Passage: {evidence}\n{question}" if evidence else question


# ---- keyed sampling ----


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise, float64: output number `tokens` of the SplitMix64 generator (Steele et al. 2014) started at `keys`."""
    z = keys + (tokens + 1) * -0x61C8864680B583EB
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    u = ((z ^ (z >> 31 & (1 << 33) - 1)) >> 40 & (1 << 24) - 1).double().add_(0.5).mul_(2.0**-24)
    return -(-u.log()).log()


MAX_GUMBEL = 17.33  # -log(-log(u)) of the largest u, 1 - 2^-25


def sample(logits: Tensor, keys: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """One token a row, the argmax of logits / temperature + Gumbel noise, noise being a function of (key, token).

    logits [B, V] float32, keys [B] int64 -> [B]. Only tokens that the noise can lift to the top are looked at; the
    result is that of noise on all of them.
    """
    if top_p < 1 and temperature > 0:
        p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
        outside = (p.cumsum(-1) - p) >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    top, token = logits.max(-1)
    if not top.isfinite().all():
        raise FloatingPointError("the debater's logits are not finite; choose another --dtype or check its weights")
    if temperature == 0:
        return token
    within_reach = top + temperature * (gumbel(keys, token) - MAX_GUMBEL).float()
    rows, tokens = (logits >= within_reach[:, None]).nonzero(as_tuple=True)
    noisy = logits[rows, tokens].double() / temperature + gumbel(keys[rows], tokens)
    best = torch.full_like(top, -torch.inf, dtype=torch.float64).scatter_reduce(0, rows, noisy, "amax")
    won = noisy == best[rows]
    return token.scatter(0, rows[won], tokens[won])


# ---- decoding ----


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """torch's SDPA; on a CPU, for one new token a row, two products of which the query heads of one key head are the rows.

    query [B, H, n, d], key and value [B, H_kv, T, d], mask [B, 1, n, T], true where a query may look -> [B, n, H, d].
    """
    if query.is_cuda or query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    (B, H, _, d), (G, T) = query.shape, key.shape[1:3]
    scores = torch.bmm(query.reshape(B * G, H // G, d), key.flatten(0, 1).mT).view(B, H, 1, T).float()
    scores *= d**-0.5 if scaling is None else scaling
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask, -torch.inf)
    weights = scores.softmax(-1).to(value.dtype).view(B * G, H // G, T)
    return torch.bmm(weights, value.flatten(0, 1)).view(B, 1, H, d), None


class SlotLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with room to grow: a new token is written in place, not concatenated.

    For one new token attention gets the whole buffer, which is contiguous; columns that hold nothing are masked out.
    """

    length = capacity = 0

    def get_seq_length(self) -> int:
        return self.length

    def room(self, columns: int) -> int:
        return max(self.capacity, -(-columns // 64) * 64)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        columns = self.length + query_length
        return columns if query_length > 1 else self.room(columns), 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.capacity:
            self.buffers, self.is_initialized = [key_states[:, :, :0], value_states[:, :, :0]], True
        seen, columns = self.get_mask_sizes(key_states.shape[2])[0], self.length + key_states.shape[2]
        more, self.capacity = self.room(columns) - self.capacity, self.room(columns)
        for i, new in enumerate((key_states, value_states)):
            if more:
                self.buffers[i] = F.pad(self.buffers[i], (0, 0, 0, more))
            self.buffers[i][:, :, self.length : columns] = new
        self.length = columns
        self.keys, self.values = (b[:, :, :seen] for b in self.buffers)
        return self.keys, self.values

    def select(self, rows: Tensor) -> "SlotLayer":
        other = SlotLayer()
        other.buffers, other.length, other.capacity = [b[rows] for b in self.buffers], self.length, self.capacity
        other.is_initialized = True
        return other


class Session:
    """A batch of growing contexts over one KV cache. Columns that a row does not use are masked out."""

    def __init__(self, model: torch.nn.Module, n_rows: int):
        self.model = model
        self.cache = Cache([SlotLayer() for _ in range(model.config.num_hidden_layers)])
        self.mask = torch.zeros(n_rows, 0, dtype=torch.long, device=model.device)  # [B, columns]

    @torch.no_grad()
    def feed(self, *blocks: list[list[int]] | Tensor) -> Tensor:
        """Append blocks of token lists (or one token a row, [B]), each block aligned at its end, in one forward.

        Returns the logits [B, V] after each row's last token.
        """
        ids, new = (torch.cat(parts, dim=1).to(self.mask.device) for parts in zip(*map(aligned, blocks), strict=True))
        positions = (self.mask.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp_min(0)
        self.mask = torch.cat([self.mask, new], dim=1)
        hidden = self.model.base_model(
            input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state[:, -1]
        return self.model.get_output_embeddings()(hidden).float()

    def columns(self) -> int:
        return self.mask.shape[1]

    def rewind(self, columns: int) -> None:
        """Forget everything after the first `columns` columns."""
        self.mask = self.mask[:, :columns]
        for layer in self.cache.layers:
            layer.length = columns

    def select(self, rows: Tensor) -> "Session":
        """A session of its own with these rows, an index of [B]; a row may be there several times."""
        other = Session(self.model, 0)
        other.mask = self.mask[rows]
        other.cache.layers = [layer.select(rows) for layer in self.cache.layers]
        return other


def aligned(block: list[list[int]] | Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, columns] of token lists, padded at the front."""
    if isinstance(block, Tensor):
        return block[:, None], torch.ones_like(block[:, None])
    width = max(map(len, block))
    ids = torch.tensor([[0] * (width - len(t)) + t for t in block])
    return ids, torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in block])


def check_chat(spec: ModelSpec, chat: bool, tokenizer) -> None:
    if chat and not tokenizer.chat_template:
        raise InputError(f"--chat: the tokenizer of {spec.name!r} has no chat template")


class Debater:
    """The strong model as a speaker: prompts in, arguments out."""

    def __init__(self, spec: ModelSpec, config: DebateConfig):
        self.spec, self.config = spec, config
        self.tokenizer = load_tokenizer(spec)
        check_chat(spec, config.chat, self.tokenizer)
        ends = {self.tokenizer.eos_token_id}
        if not config.chat:  # a pretrained model goes on for ever: one turn is one paragraph
            ends |= {
                i for t, i in self.tokenizer.get_vocab().items() if "\n" in self.tokenizer.convert_tokens_to_string([t])
            }
        self.is_end = torch.zeros(load_config(spec).vocab_size, dtype=torch.bool, device=device())
        self.is_end[[i for i in ends if i < len(self.is_end)]] = True
        self.before, self.after = "", ""
        if config.chat:
            message = [{"role": "user", "content": "\x00"}]
            prompt = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            self.before, self.after = prompt.split("\x00")
        self.load()

    def load(self, parallel=None) -> None:
        transformers.AttentionInterface.register("grouped", grouped_attention)
        transformers.AttentionMaskInterface.register("grouped", sdpa_mask)
        auto_class, dtype = transformers.AutoModelForCausalLM, resolve_dtype(self.config.dtype)
        self.model = load_model(self.spec, auto_class, dtype, "grouped", parallel).to(device()).eval()

    def tokens(self, text: str, start: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=start and not self.config.chat)["input_ids"]

    def opening(self, task: str, protocol: str, sample: dict) -> list[int]:
        text = with_evidence(sample.get("evidence", ""), sample["text"])
        return self.tokens(f"{self.before}{introduction(task, protocol)}\n\n{text}\n\n", start=True)

    def said(self, protocol: str, turn: int, text: str) -> list[int]:
        return self.tokens(f"{speaker(protocol, turn)}: {text}\n")

    def asked(self, task: str, protocol: str, turn: int, side: int) -> list[int]:
        return self.tokens(
            f"{instruction(task, protocol, turn, side)}{self.after or chr(10)}{speaker(protocol, turn)}:"
        )

    def listen(self, openings: list[list[int]], copies: int) -> Session:
        """A session with `copies` neighbouring rows for each opening. What all openings begin with is computed once."""
        rows = torch.arange(len(openings), device=self.is_end.device)
        common = min(len(os.path.commonprefix(openings)), min(map(len, openings)) - 1)
        session = Session(self.model, 1)
        session.feed([openings[0][:common]])
        session = session.select(torch.zeros_like(rows))
        session.feed([o[common:] for o in openings])
        return session.select(rows.repeat_interleave(copies))

    def speak(self, session: Session, before: list, prompts: list[list[int]], keys: list[tuple]) -> list[list[int]]:
        """One turn for every row: token ids. Feeds the blocks `before`, which stay, and the prompts, which are taken back.

        Samples until an end token or the limit. A turn has at least one token: the end is barred at position 0. Rows
        that ended leave the batch by halves.
        """
        config, turn = self.config, session
        logits = session.feed(*before, prompts).masked_fill(self.is_end, -torch.inf)
        columns = session.columns() - max(map(len, prompts))
        said: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # of the batch, as it shrinks
        open_rows = set(rows)
        for position in range(config.max_new_tokens):
            noise = torch.tensor([stable_hash(*keys[r], position) for r in rows], device=logits.device)
            token = sample(logits, noise, config.temperature, config.top_p)
            for r, t, end in zip(rows, token.tolist(), self.is_end[token].tolist(), strict=True):
                if end:
                    open_rows.discard(r)
                elif r in open_rows:
                    said[r].append(t)
            if not open_rows or position + 1 == config.max_new_tokens:
                break
            if 2 * len(open_rows) <= len(rows):
                keep = torch.tensor([i for i, r in enumerate(rows) if r in open_rows], device=token.device)
                turn, token, rows = turn.select(keep), token[keep], [rows[i] for i in keep.tolist()]
            logits = turn.feed(token)
        session.rewind(columns)
        return said


class ShardedDebater(Debater):
    """One copy of the model over all processes, by transformers' tensor parallel plan: for a model that fits no single GPU.

    All processes make the same batch and come to the same tokens; texts differ from the others' by rounding alone.
    """

    def load(self) -> None:
        if world_size() == 1:
            raise InputError("--engine sharded: spreads a model over processes, here is one; start with torchrun")
        heads = load_config(self.spec).num_key_value_heads
        if heads % world_size():
            raise InputError(
                f"--engine sharded: {world_size()} processes cannot share the {heads} key heads of {self.spec.name!r}"
            )
        super().load(transformers.distributed.DistributedConfig(tp_size=world_size(), tp_plan="auto"))


class VllmDebater(Debater):
    """The same prompts and end tokens through vLLM on one GPU: an extra that the user installs. Untested on a GPU so far.

    Its noise is vLLM's own, seeded for every turn of every debate by (debate seed, sample id, turn): other texts than
    the default engine's, and equal from run to run as far as vLLM's logits are.
    """

    def load(self) -> None:
        try:
            import vllm
        except ImportError:
            raise InputError("--engine vllm: vllm is not installed here; `pip install vllm`, or --engine own") from None
        if self.spec.layers or world_size() > 1:
            raise InputError("--engine vllm: takes a whole model, and one process (no torchrun)")
        source, config = self.spec.source(), self.config
        self.model = vllm.LLM(
            model=source["pretrained_model_name_or_path"], revision=source.get("revision"), enable_prefix_caching=True,
            dtype=str(resolve_dtype(config.dtype)).removeprefix("torch."),
        )  # fmt: skip
        self.sampling = functools.partial(
            vllm.SamplingParams, temperature=config.temperature, top_p=config.top_p, min_tokens=1,
            max_tokens=config.max_new_tokens, stop_token_ids=self.is_end.nonzero().flatten().tolist(),
        )  # fmt: skip

    def listen(self, openings: list[list[int]], copies: int) -> list[list[int]]:
        return [list(o) for o in openings for _ in range(copies)]

    def speak(self, session: list[list[int]], before: list, prompts: list, keys: list[tuple]) -> list[list[int]]:
        for block in before:
            for context, tokens in zip(session, block, strict=True):
                context += tokens
        asked = [{"prompt_token_ids": c + p} for c, p in zip(session, prompts, strict=True)]
        outputs = self.model.generate(asked, [self.sampling(seed=stable_hash(*k)) for k in keys], use_tqdm=False)
        said = [list(o.outputs[0].token_ids) for o in outputs]
        return [ids[:-1] if len(ids) > 1 and self.is_end[ids[-1]] else ids for ids in said]  # it keeps the end token


ENGINES = {"own": Debater, "sharded": ShardedDebater, "vllm": VllmDebater}


# ---- what a model knows before anyone argues ----


@torch.no_grad()
def zero_shot(debater: Debater, task: str, samples: list[dict]) -> Tensor:
    """Class probabilities [N, 2] without training: how likely the names of the two sides are after the sample.

    The log-odds of class 1 are taken relative to their median over `samples`, which needs no labels: a language model
    prefers one of the two words whatever the sample is (Zhao et al. 2021, arXiv 2102.09690, call it calibration).
    """
    odds: dict[str, float] = {}
    names = [debater.tokens(f" {name}") for name in PROMPTS[task].sides]
    claim = PROMPTS[task].claim.format(side="").strip()
    question = f"Decide whether {PROMPTS[task].debated}.{debater.after or chr(10)}{claim[0].upper()}{claim[1:]}"
    for chunk in chunks(samples, lambda n: debater.config.batch_size(n, seeds=1, turns=1)):
        session = debater.listen([debater.opening(task, "zero_shot", s) for s in chunk], 1)
        logits = session.feed([debater.tokens(question)] * len(chunk))
        columns, likelihood = session.columns(), []
        for name in names:
            after, total = logits, torch.zeros(len(chunk), device=logits.device)
            for position, token in enumerate(name):
                if position:
                    after = session.feed(torch.full((len(chunk),), name[position - 1], device=logits.device))
                total = total + after.log_softmax(-1)[:, token]
            session.rewind(columns)
            likelihood.append(total)
        odds |= zip((s["id"] for s in chunk), (likelihood[1] - likelihood[0]).tolist(), strict=True)
    x = torch.tensor([odds[s["id"]] for s in samples], dtype=torch.float64)
    p = (x - x.median()).sigmoid()
    return torch.stack([1 - p, p], dim=-1)


# ---- protocols ----


Chooser = Callable[[list[dict], list[dict]], list[int]]  # samples, their transcripts so far -> the weak model's choice


def run_protocol(
    debater: Debater, task: str, protocol: str, samples: list[dict], seeds: list[int], turns: int,
    begun: list[list[dict]] | None = None, choose: Chooser | None = None,
) -> list[list[dict]]:  # fmt: skip
    """Transcripts of one chunk of samples for every debate seed: rows [seed][sample] {id, sides, turns, n_tokens}.

    `begun` holds transcripts with fewer turns to continue. Market-making asks `choose` before every turn which answer
    the weak model prefers, and argues for the other one.
    """
    S, K = len(samples), len(seeds)
    pairs = [(s, k) for s in range(S) for k in range(K)]  # row order of the batch
    if begun is None:
        rows = [{"id": samples[s]["id"], "sides": [], "turns": [], "n_tokens": []} for s, _ in pairs]
    else:
        rows = [{key: list(v) if isinstance(v, list) else v for key, v in begun[k][s].items()} for s, k in pairs]
    session = debater.listen([debater.opening(task, protocol, s) for s in samples], K)
    start = len(rows[0]["turns"])
    said = [[debater.said(protocol, t, r["turns"][t]) for r in rows] for t in range(start)]  # not in the cache yet
    for turn in range(start, turns):
        if protocol == "market_making":
            sides = [1 - c for c in choose([samples[s] for s, _ in pairs], rows)]
        else:
            sides = [assign_side(r["id"], turn if protocol == "debate" else 0) for r in rows]
        keys = [("noise", seeds[k], samples[s]["id"], turn) for s, k in pairs]
        spoken = debater.speak(session, said, [debater.asked(task, protocol, turn, side) for side in sides], keys)
        for row, side, ids in zip(rows, sides, spoken, strict=True):
            row["sides"].append(side)
            row["turns"].append(" ".join(debater.tokenizer.decode(ids, skip_special_tokens=True).split()))
            row["n_tokens"].append(len(ids))
        said = [[debater.said(protocol, turn, r["turns"][turn]) for r in rows]]
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
    size: Callable[[int, int, int], int], choose: Chooser | None = None, together: bool = False,
) -> dict:  # fmt: skip
    """Fill `files` (debate seed -> path) with `turns`-turn transcripts of `samples`; returns tokens and seconds.

    `size` of characters, seeds and turns is how many samples are generated at once (DebateConfig.batch_size). These
    chunks are appended to part files as they finish and the whole is renamed at the end. A file that holds fewer turns
    is continued, one that holds enough is left alone. `debater` is called only when something is missing. Under several
    processes each takes every so-manieth chunk and has part files of its own, unless they make every chunk `together`;
    what a run with any number of them has left is used, and rank 0 joins the parts.
    """
    ids = [s["id"] for s in samples]
    groups: dict[int, list[int]] = {}  # turns there already -> seeds
    for seed, path in files.items():
        have = read_jsonl(path) if path.exists() else []
        n_turns = count_turns(by_id(have, ids, str(path)), path) if have else 0
        if n_turns < turns:
            groups.setdefault(n_turns, []).append(seed)
    cost = {"new_tokens": 0, "turns": 0}
    for n_turns, seeds in groups.items():
        begun = {k: {r["id"]: r for r in read_jsonl(files[k])} for k in seeds} if n_turns else None
        stems = {k: files[k].with_name(f"{files[k].name}.part{turns}") for k in seeds}  # one for each length
        if rank() == 0:
            for stem in stems.values():
                drop_torn_lines(stem)
        barrier()
        done = {k: read_parts(stems[k]) for k in seeds}
        barrier()
        at_once = functools.partial(size, seeds=len(seeds), turns=turns)
        pending = [c for c in chunks(samples, at_once) if not all(s["id"] in done[k] for k in seeds for s in c)]
        me, copies = (0, 1) if together else (rank(), world_size())
        mine = pending[me::copies]
        bar = tqdm(total=sum(map(len, mine)) * len(seeds) * (turns - n_turns), unit="turn", disable=rank() > 0 or None)
        bar.set_description(f"{task} {protocol} seeds {seeds}")
        start, new = time.time(), 0
        for c in mine:
            rows = run_protocol(
                debater(),
                task,
                protocol,
                c,
                seeds,
                turns,
                begun and [[begun[k][s["id"]] for s in c] for k in seeds],
                choose,
            )
            for k, seed_rows in zip(seeds, rows, strict=True):
                fresh = [r for r in seed_rows if r["id"] not in done[k]]
                if rank() == me:
                    append_rows(stems[k].with_name(f"{stems[k].name}.rank{me}of{copies}"), fresh)
                new += sum(sum(r["n_tokens"][n_turns:]) for r in fresh)
            bar.update(len(c) * len(seeds) * (turns - n_turns))
            each = f" x {copies} processes" if copies > 1 else ""
            bar.set_postfix_str(f"{new / (time.time() - start):.0f} tokens/s{each}")
        bar.close()
        barrier()
        if rank() == 0:
            for k in seeds:
                rows = by_id(list(read_parts(stems[k]).values()), ids, str(stems[k]))
                write_jsonl(files[k], rows)
                for part in part_files(stems[k]):
                    part.unlink()
                cost["new_tokens"] += sum(sum(r["n_tokens"][n_turns:]) for r in rows)
                cost["turns"] += len(rows) * (turns - n_turns)
    return broadcast(cost)


def count_turns(rows: list[dict], path: Path) -> int:
    """Turns of every transcript in a file. Raises InputError where they are no transcripts of one length."""
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
    """Take the line that a kill cut off from the end of every part."""
    for part in part_files(stem):
        text = part.read_bytes()
        os.truncate(part, text.rfind(b"\n") + 1)


def append_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write("".join(map(dump_row, rows)))
        f.flush()
        os.fsync(f.fileno())


def show(task: str, protocol: str, sample: dict, row: dict) -> str:
    """A transcript for people."""
    said = [
        f"  {speaker(protocol, t)}, for «{PROMPTS[task].claims(side)}»:\n    {text}"
        for t, (side, text) in enumerate(zip(row["sides"], row["turns"], strict=True))
    ]
    return "\n".join([f"[{row['id']}] {sample['text'].strip()}", *said, ""])


# ---- command line ----


@dataclasses.dataclass(frozen=True)
class Args(DebateConfig):
    task: str = flag("sciq", "whose wording the prompts have", choices=tuple(PROMPTS))
    protocol: str = flag("debate", "who argues for what", choices=PROTOCOLS)
    samples: str = flag("", "JSON lines with id, text and, if the debaters hold any, evidence")
    strong: str = flag("smollm2-135m", "the debating model: hub id, folder or built-in model")
    choices: str = flag("", "market-making: the weak model's predictions (id, probs), whose choice is argued against")
    seed: tuple = flag((0,), "debate seeds", int)
    turns: int = flag(3, "turns of each debate", int)
    out: str = flag("", "folder to write; transcripts there are continued")
    show: int = flag(0, "print so many transcripts at the end", int)


def main() -> None:
    args = parse_dataclass(Args, sys.argv[1:], "debate.py", __doc__)
    for name, ok in {"turns": args.turns >= 1, "cache_tokens": args.cache_tokens >= 1, "max_new_tokens": args.max_new_tokens >= 1,
                     "temperature": 0 <= args.temperature < float("inf"), "top_p": 0 < args.top_p <= 1,
                     "show": args.show >= 0}.items():  # fmt: skip
        if not ok:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: out of range")
    for name in ("samples", "choices"):
        if (path := getattr(args, name)) and not Path(path).is_file() or name == "samples" and not path:
            raise InputError(f"--{name} {path!r}: no such file")
    check_out(args.out)
    if (args.protocol == "market_making") != bool(args.choices):
        raise InputError(
            f"--protocol {args.protocol} --choices {args.choices!r}: market_making needs the file, no other does"
        )
    samples, out = read_samples(Path(args.samples), "text"), Path(args.out)
    for number, s in enumerate(samples, 1):
        if not isinstance(s.get("evidence", ""), str):
            raise InputError(f"{args.samples}: evidence {str(s['evidence'])[:40]} of row {number} must be a string")
    from train import soft_labels

    weak = read_samples(Path(args.choices), "probs") if args.choices else []
    chosen = {r["id"]: y for r, y in zip(weak, soft_labels(weak, 2).argmax(-1).tolist(), strict=True)}
    if args.choices and not {s["id"] for s in samples} <= chosen.keys():
        raise InputError(f"--choices {args.choices}: not every sample has a prediction there")

    def choose(asked: list[dict], rows: list[dict]) -> list[int]:
        return [chosen[s["id"]] for s in asked]

    config = DebateConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(DebateConfig)})
    files = {k: out / f"seed{k}.jsonl" for k in args.seed}
    loaded: list[Debater] = []

    def debater() -> Debater:
        loaded[:] = loaded or [ENGINES[config.engine](ModelSpec.parse(args.strong), config)]
        return loaded[0]

    def make(folder: Path) -> dict:
        return make_transcripts(
            debater, args.task, args.protocol, samples, files, args.turns, config.batch_size, choose,
            config.engine == "sharded",
        )  # fmt: skip

    asked = {"task": args.task, "protocol": args.protocol, "model": ModelSpec.parse(args.strong).identity()}
    inputs = {name: Path(path) for name in ("samples", "choices") if (path := getattr(args, name))}
    turns = {str(k): args.turns for k in args.seed}
    stage = Stage(out, asked | dataclasses.asdict(config), inputs, make, at_least=turns, shared=True)
    if why := stage.in_the_way():
        raise InputError(f"--out {args.out!r} holds something else ({why}); name another folder")
    if stage.difference() != []:
        debater()  # a model that cannot be loaded ends here, before anything is written
    with locked(out):
        made = stage.run()
    cost = {k: v for k, v in read_manifest(out).items() if k in ("new_tokens", "turns", "seconds")}
    print0(json.dumps(cost) if made else f"nothing to do: {out} holds all of it")
    first = {r["id"]: r for r in read_jsonl(files[args.seed[0]])}
    for sample_row in samples[: args.show]:
        print0(show(args.task, args.protocol, sample_row, first[sample_row["id"]]))


if __name__ == "__main__":
    run_script(main)
