"""Generation: keyed sampling, a KV cache that keeps what was said, and the engines that speak a turn.

It knows tokens, not prompts: debate.py writes those. The noise of a token is a function of the row's key and its
position, so what a row says does not depend on its batch. Inside a turn the CPU never waits for what a GPU is still
computing. Shapes: B rows, T columns, P positions of a turn, D width, H heads, V vocabulary.
"""

import copy
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common import ALONE, InputError, Ranks, flag, processes_per_gpu, stable_hash
from model import (
    ModelSpec,
    device,
    load_config,
    load_model,
    load_tokenizer,
    refuse_special_attention,
    resolve_dtype,
    to_device,
)
from sizes import CPU_CACHE_TOKENS, Shape, debate_tokens, fitting_tokens


@dataclasses.dataclass(frozen=True)
class DebateConfig:
    max_new_tokens: int = flag(200, "longest turn", int)
    temperature: float = flag(0.4, "of sampling; 0 takes the likeliest token", float, zero=True)
    top_p: float = flag(1.0, "sample from the smallest set of tokens with this much probability", float, most=1)
    chat: bool = flag(False, "ask through the model's chat template; default: the plain prompt", bool)
    dtype: str = flag("auto", "of the model", choices=("auto", "float32", "bfloat16"))
    cache_tokens: int | None = flag(None, "keys and values in a batch; default: what fits the GPU", int, speed=True)
    engine: str = flag("replicated", "replicated: a copy of the model per process; sharded: one copy over all; vllm",
                       choices=("replicated", "sharded", "vllm"))  # fmt: skip


def batch_size(cache_tokens: int, characters: int, seeds: int, turns: int, max_new_tokens: int) -> int:
    """Samples with so long a text that surely fit, each with all its seeds and turns; at least 1."""
    return max(1, int(cache_tokens / (seeds * debate_tokens(characters, turns, max_new_tokens))))


# ---- keyed sampling ----


def splitmix64(keys: Tensor, n: Tensor) -> Tensor:
    """Output number n (from 0) of the SplitMix64 generator (Steele et al. 2014) that starts at each key; int64, broadcast."""
    z = keys + (n + 1) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z ^= (z >> shift).bitwise_and_((1 << 64 - shift) - 1)
        z *= factor
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise, float64, from the upper 24 bits of SplitMix64's output number `tokens` for each key."""
    u = (splitmix64(keys, tokens) >> 40).bitwise_and_((1 << 24) - 1).double().add_(0.5).mul_(2.0**-24)
    return u.log_().neg_().log_().neg_()


MAX_GUMBEL = 17.33  # -log(-log(u)) of the largest u, 1 - 2^-25


def sample(logits: Tensor, keys: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """The argmax of logits / temperature + Gumbel noise of (key, token): logits [B, V] float32, keys [B] int64 -> [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_p < 1:
        p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
        outside = (p.cumsum(-1) - p) >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return (sample_dense if logits.is_cuda else sample_sparse)(logits, keys, temperature)


def sample_dense(logits: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """With noise on all tokens: shapes do not depend on the logits, so nobody waits for a GPU."""
    noise = gumbel(keys[:, None], torch.arange(logits.shape[1], device=logits.device))
    return noise.add_(logits.double().div_(temperature)).argmax(-1)


def sample_sparse(logits: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """The same token, with noise only on those that it can lift to the top: much faster on a CPU."""
    top, token = logits.max(-1)
    within_reach = top + temperature * (gumbel(keys, token) - MAX_GUMBEL).float()
    rows, tokens = (logits >= within_reach[:, None]).nonzero(as_tuple=True)
    noisy = logits[rows, tokens].double() / temperature + gumbel(keys[rows], tokens)
    best = torch.full_like(top, -torch.inf, dtype=torch.float64).scatter_reduce(0, rows, noisy, "amax")
    won = noisy == best[rows]
    return token.scatter(0, rows[won], tokens[won])


def start_reading(x: Tensor) -> Callable[[], int]:
    """Begins to copy a number to the host; what is returned waits for it, and for nothing asked of a GPU later."""
    if not x.is_cuda:
        return x.item
    number, there = x.to("cpu", non_blocking=True), torch.cuda.Event()
    there.record()

    def read() -> int:
        there.synchronize()
        return number.item()

    return read


# ---- decoding ----


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """torch's SDPA; for one new token per row the query heads of one key head are its rows, so that no key is copied.
    query [B, H, n, d], key and value [B, H_kv, T, d], mask [B, 1, n, T], which is added to the scores -> [B, n, H, d]."""
    refuse_special_attention(module, key.shape[2], options)
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    (B, H, _, d), G = query.shape, key.shape[1]
    attend = F.scaled_dot_product_attention if query.is_cuda else two_products
    out = attend(query.reshape(B, G, H // G, d), key, value, attention_mask, scale=scaling)
    return out.reshape(B, 1, H, d), None


def two_products(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float | None = None) -> Tensor:
    """F.scaled_dot_product_attention for few queries on a CPU: [B, G, R, d], [B, G, T, d], mask [B, 1, 1, T] -> [B, G, R, d]."""
    (B, G, R, d), T = query.shape, key.shape[2]
    scores = torch.bmm(query.reshape(B * G, R, d), key.flatten(0, 1).mT).view(B, G, R, T).float()
    scores *= d**-0.5 if scale is None else scale
    scores += attn_mask
    weights = scores.softmax(-1).to(value.dtype).view(B * G, R, T)
    return torch.bmm(weights, value.flatten(0, 1)).view(B, G, R, d)


def rounded(columns: int) -> int:
    """Up to a multiple of 64, as room is made."""
    return -(-columns // 64) * 64


def seen(columns: int, new: int) -> int:
    """Columns that attention sees: rounded where a row has one new token, so that shapes change seldom."""
    return rounded(columns) if new == 1 else columns


class KVLayer(DynamicLayer):
    """Keys and values of one layer in buffers [B, H_kv, capacity, d]: a new token is written in place, not concatenated."""

    length = capacity = 0
    buffers: list[Tensor] = []

    def get_seq_length(self) -> int:
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.buffers:
            self.buffers, self.is_initialized = [key_states[:, :, :0], value_states[:, :, :0]], True
        n, start = key_states.shape[2], self.length
        self.length += n
        for i, new in enumerate((key_states, value_states)):
            if more := self.capacity - self.buffers[i].shape[2]:
                self.buffers[i] = F.pad(self.buffers[i], (0, 0, 0, more))
            self.buffers[i][:, :, start : self.length] = new
        return tuple(b[:, :, : seen(self.length, n)] for b in self.buffers)

    def select(self, rows: Tensor) -> "KVLayer":
        other = copy.copy(self)
        other.buffers = [b[rows] for b in self.buffers]
        return other


class Session:
    """A batch of growing contexts over one KV cache, at first one. `mask` [B, capacity]: where a column holds a row's token."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.columns = model, 0
        self.cache = Cache([KVLayer() for _ in range(model.config.num_hidden_layers)])
        self.mask = torch.zeros(1, 0, dtype=torch.bool, device=model.device)

    @torch.no_grad()
    def forward(self, *blocks: list[list[int]] | Tensor, room: int = 0) -> Tensor:
        """Append blocks of token lists (or one token a row, [B]), each aligned at its end; logits [B, V] after the last.
        Makes `room` for so many columns more, which are masked out until they are used."""
        ids, new = (torch.cat(x, 1) for x in zip(*(aligned(b, self.mask.device) for b in blocks), strict=True))
        n, start = ids.shape[1], self.columns
        self.columns += n
        if (more := rounded(self.columns + room) - self.mask.shape[1]) > 0:
            self.mask = F.pad(self.mask, (0, more))
            for layer in self.cache.layers:
                layer.capacity = self.mask.shape[1]
        self.mask[:, start : self.columns] = new
        positions = (self.mask[:, :start].sum(1, keepdim=True) + new.cumsum(1) - 1).clamp_min(0)
        open_to = self.mask[:, None, None, : seen(self.columns, n)]
        if n > 1:
            open_to = open_to & open_to.new_ones(n, self.columns).tril(start)
        # added to the scores, and of four dimensions: transformers takes it as it is, without a look at its values
        mask = torch.zeros_like(open_to, dtype=self.model.dtype)
        mask.masked_fill_(~open_to, torch.finfo(mask.dtype).min)
        hidden = self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state[:, -1]
        return self.model.get_output_embeddings()(hidden).float()

    def truncate(self, columns: int) -> None:
        """Forget everything after the first `columns` columns."""
        self.columns, self.mask[:, columns:] = columns, False
        for layer in self.cache.layers:
            layer.length = columns

    def select(self, rows: Tensor) -> "Session":
        """A session of its own with these rows, an index of [B]; a row may be there several times."""
        other = copy.copy(self)
        other.mask, other.cache = self.mask[rows], Cache([layer.select(rows) for layer in self.cache.layers])
        return other


def aligned(block: list[list[int]] | Tensor, dev: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, columns] of token lists, padded at the front."""
    if isinstance(block, Tensor):
        return block[:, None], torch.ones_like(block[:, None])
    width = max(map(len, block))
    ids = torch.tensor([[0] * (width - len(t)) + t for t in block])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in block])
    return to_device(ids, dev), to_device(mask, dev)


# ---- engines ----


def check_chat(spec: ModelSpec, chat: bool, tokenizer) -> None:
    if chat and not tokenizer.chat_template:
        raise InputError(f"--chat: the tokenizer of {spec.name!r} has no chat template")


class Debater:
    """The strong model as a speaker: prompts in, arguments out."""

    def __init__(self, spec: ModelSpec, config: DebateConfig, ranks: Ranks = ALONE):
        self.check(spec, ranks)
        self.spec, self.config, self.ranks = spec, config, ranks
        self.tokenizer = load_tokenizer(spec)
        check_chat(spec, config.chat, self.tokenizer)
        ends = [self.tokenizer.eos_token_id]
        self.before = self.after = ""  # what a chat template puts around a prompt
        if config.chat:
            message = [{"role": "user", "content": "\x00"}]
            prompt = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            self.before, self.after = prompt.split("\x00")
        else:  # a base model rarely stops: a newline ends the turn
            text_of = self.tokenizer.convert_tokens_to_string
            ends += [i for token, i in self.tokenizer.get_vocab().items() if "\n" in text_of([token])]
        self.is_end = torch.zeros(load_config(spec).vocab_size, dtype=torch.bool, device=device())
        self.is_end[[i for i in ends if i < len(self.is_end)]] = True
        self.load()

    @classmethod
    def check(cls, spec: ModelSpec, ranks: Ranks) -> None:
        """Raises InputError where so many processes cannot debate with this model; loads no weights."""

    def load(self, parallel=None) -> None:
        transformers.AttentionInterface.register("grouped", grouped_attention)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan, slowly, for every new shape
        auto_class, dtype = transformers.AutoModelForCausalLM, resolve_dtype(self.config.dtype)
        self.model = load_model(self.spec, auto_class, dtype, "grouped", parallel).to(device()).eval()

    @functools.cached_property
    def cache_tokens(self) -> int:
        """Keys and values in a batch: as many as asked, or this process's share of the fullest GPU. Every rank must ask."""
        if self.config.cache_tokens or device().type == "cpu":
            return self.config.cache_tokens or CPU_CACHE_TOKENS
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free /= processes_per_gpu()
        shares = self.ranks.size if self.config.engine == "sharded" else 1
        m, e = Shape.of(self.model.config), self.model.dtype.itemsize
        return min(self.ranks.gather(fitting_tokens(free, m, e, self.config.max_new_tokens, shares)))

    def batch_size(self, characters: int, seeds: int, turns: int) -> int:
        return batch_size(self.cache_tokens, characters, seeds, turns, self.config.max_new_tokens)

    def tokens(self, text: str, start: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=start and not self.config.chat)["input_ids"]

    def prefill(self, openings: list[list[int]], copies: int) -> Session:
        """A session with `copies` neighbouring rows for each opening. What all openings begin with is computed once."""
        rows = torch.arange(len(openings), device=self.is_end.device)
        common = min(len(os.path.commonprefix(openings)), min(map(len, openings)) - 1)
        session = Session(self.model)
        if common:
            session.forward([openings[0][:common]])
        session = session.select(torch.zeros_like(rows))
        session.forward([o[common:] for o in openings])
        return session.select(rows.repeat_interleave(copies))

    def sample(self, logits: Tensor, keys: Tensor) -> Tensor:
        return sample(logits, keys, self.config.temperature, self.config.top_p)

    def decode_turn(self, session: Session, before: list, prompts: list, keys: list[tuple]) -> list[list[int]]:
        """Token ids of a turn per key, up to an end token or the limit; at least one, as the end is barred at position 0.
        Feeds the blocks `before`, which stay, and the prompts, which are taken back. With more keys than prompts each row
        is read once and continued by so many neighbouring copies. Raises FloatingPointError."""
        P = self.config.max_new_tokens
        logits = session.forward(*before, prompts, room=P).masked_fill(self.is_end, -torch.inf)
        columns = session.columns - max(map(len, prompts))
        if len(keys) > len(prompts):  # the session itself gets the copies, for the turns to come
            each = torch.arange(len(prompts), device=logits.device).repeat_interleave(len(keys) // len(prompts))
            logits = logits[each]
            vars(session).update(vars(session.select(each)))
        of_rows = to_device(torch.tensor([stable_hash(*k) for k in keys]), logits.device)
        of_positions = splitmix64(of_rows, torch.arange(P, device=logits.device)[:, None])
        said, finite = self.decode(session, logits, of_positions)
        session.truncate(columns)
        if not finite:
            raise FloatingPointError("the debater's logits are not finite; choose another --dtype or check its weights")
        return [[token for token in row if token >= 0] for row in said.T.tolist()]

    def decode(self, session: Session, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [P, B] that continue `logits` [B, V] with the noise of `keys` [P, B], -1 from a row's end on; all finite?
        Rows that ended are dropped once they are half. A GPU says how many are open a step late, not to be waited for."""
        said, finite = torch.full_like(keys, -1), torch.ones((), dtype=torch.bool, device=keys.device)
        rows = torch.arange(keys.shape[1], device=keys.device)  # of `said`, as the batch shrinks
        is_open, n_open, late = torch.ones_like(rows, dtype=torch.bool), [], int(keys.is_cuda)
        for position, row_keys in enumerate(keys):
            token = self.sample(logits, row_keys[rows])
            finite &= logits.gather(1, token[:, None]).isfinite().all()  # the token of a row with a NaN is one, or +inf
            is_open &= ~self.is_end[token]
            said[position, rows] = token.masked_fill(~is_open, -1)
            n_open.append(start_reading(is_open.sum()))
            n = n_open[-1 - late]() if position >= late else len(rows)
            if not n or position + 1 == len(keys):
                break
            if 2 * n <= len(rows):
                keep = is_open.int().argsort(descending=True, stable=True)[:n]
                session, token, rows, is_open = session.select(keep), token[keep], rows[keep], is_open[keep]
            logits = session.forward(token)
        return said, finite

    def log_likelihoods(self, prompts: list[list[int]], asked: list[int], words: list[list[int]]) -> list[list[float]]:
        """Log probability [B][W] of each of the W words (token lists) after each prompt and what is asked."""
        session = self.prefill(prompts, 1)
        after_prompt, columns = session.forward([asked] * len(prompts)), session.columns
        table = []
        for word in words:
            log_p = after_prompt.log_softmax(-1)[:, word[0]]
            for said, token in itertools.pairwise(word):
                log_p = log_p + session.forward([[said]] * len(prompts)).log_softmax(-1)[:, token]
            session.truncate(columns)
            table.append(log_p.tolist())
        return [list(row) for row in zip(*table, strict=True)]


class ShardedDebater(Debater):
    """One copy of the model over all processes, by transformers' tensor parallel plan: for one that fits no single GPU.
    All processes make the same batch; texts differ from the other engines' by rounding alone."""

    @classmethod
    def check(cls, spec: ModelSpec, ranks: Ranks) -> None:
        if ranks.size == 1:
            raise InputError("--engine sharded: spreads a model over processes, here is one; start with torchrun")
        heads, n = load_config(spec).num_key_value_heads, ranks.size
        if heads % n:
            raise InputError(f"--engine sharded: {n} processes cannot share {heads} key heads of {spec.name!r}")

    def load(self) -> None:
        super().load(transformers.distributed.DistributedConfig(tp_size=self.ranks.size, tp_plan="auto"))

    def sample(self, logits: Tensor, keys: Tensor) -> Tensor:
        """Rank 0's tokens on every rank: one bit that differs in the logits would end in caches that differ."""
        token = super().sample(logits, keys)
        torch.distributed.broadcast(token, group_src=0, group=self.ranks.group)
        return token


class VllmDebater(Debater):
    """The same prompts and end tokens through vLLM, which the user installs, on one GPU. Untested on a GPU so far. Its noise
    is vLLM's own, seeded by (debate seed, sample id, turn): other texts, equal from run to run as far as its logits are."""

    @classmethod
    def check(cls, spec: ModelSpec, ranks: Ranks) -> None:
        try:
            import vllm  # noqa: F401
        except ImportError:
            raise InputError("--engine vllm: vllm is not installed; install it, or --engine replicated") from None
        if spec.layers or ranks.size > 1:
            raise InputError("--engine vllm: takes a whole model, and one process (no torchrun)")

    def load(self) -> None:
        import vllm

        source, config = self.spec.source(), self.config
        self.model = vllm.LLM(
            model=source["pretrained_model_name_or_path"], revision=source.get("revision"), enable_prefix_caching=True,
            dtype=str(resolve_dtype(config.dtype)).removeprefix("torch."),
        )  # fmt: skip
        self.sampling = functools.partial(
            vllm.SamplingParams, temperature=config.temperature, top_p=config.top_p, min_tokens=1,
            max_tokens=config.max_new_tokens, stop_token_ids=self.is_end.nonzero().flatten().tolist(),
        )  # fmt: skip

    @property
    def cache_tokens(self) -> int:
        """vLLM makes batches that fit its memory out of what it is given at once."""
        return self.config.cache_tokens or 2**20

    def prefill(self, openings: list[list[int]], copies: int) -> list[list[int]]:
        return [list(o) for o in openings for _ in range(copies)]

    def decode_turn(self, session: list[list[int]], before: list, prompts: list, keys: list[tuple]) -> list[list[int]]:
        session[:] = [list(context) for context in session for _ in range(len(keys) // len(prompts))]
        prompts = [p for p in prompts for _ in range(len(keys) // len(prompts))]
        for block in before:
            for context, tokens in zip(session, block, strict=True):
                context += tokens
        asked = [{"prompt_token_ids": c + p} for c, p in zip(session, prompts, strict=True)]
        outputs = self.model.generate(asked, [self.sampling(seed=stable_hash(*k)) for k in keys], use_tqdm=False)
        said = [list(o.outputs[0].token_ids) for o in outputs]  # with the stop token
        return [ids[:-1] if len(ids) > 1 and self.is_end[ids[-1]] else ids for ids in said]


ENGINES = {"replicated": Debater, "sharded": ShardedDebater, "vllm": VllmDebater}
