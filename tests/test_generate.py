"""generate.py: keyed sampling, turns and their attention, chat models, vLLM."""

import math
import shutil
import sys
import types

import pytest
import torch
from test_debate import SETTINGS, literal_prompt, make_debater, naive_transcript, transcripts

import generate
from common import InputError, read_jsonl, stable_hash
from debate import run_protocol
from generate import ENGINES, DebateConfig, Debater, gumbel, sample, sample_dense, splitmix64
from model import ModelSpec

# ---- reading ----


@pytest.mark.parametrize("texts", [[[5, 6, 7], [8, 9]], [[5, 6, 7], [5, 6]], [[5], [5, 6]], [[4]]])
def test_openings_are_read_as_each_alone_whatever_they_begin_with(texts, tiny_model):
    debater = make_debater(tiny_model("llama"))
    session = debater.prefill(texts, copies=2)
    logits = session.forward(torch.full((2 * len(texts),), 3))
    with torch.no_grad():
        alone = [debater.model(torch.tensor([t + [3]])).logits[0, -1] for t in texts]
    torch.testing.assert_close(logits, torch.stack(alone).repeat_interleave(2, 0), atol=1e-5, rtol=1e-4)


# ---- keyed sampling ----


def published_splitmix64(state: int, n: int) -> list[int]:
    out = []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        out.append(z ^ (z >> 31))
    return out


def test_gumbel_is_splitmix64():
    assert published_splitmix64(0, 2) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # of the published generator
    tokens = torch.arange(300)
    for key in (0, 1, 2**62 + 12345, 2**63 - 1, stable_hash("noise", 3, "a", 1, 7)):
        uniform = [((z >> 40) + 0.5) / 2**24 for z in published_splitmix64(key, 300)]
        wanted = torch.tensor([-math.log(-math.log(u)) for u in uniform], dtype=torch.float64)
        torch.testing.assert_close(gumbel(torch.tensor(key), tokens), wanted, atol=1e-12, rtol=1e-12)


def test_noise_of_neighbouring_keys_and_tokens_is_uncorrelated():
    n = 20_000
    i, zero = torch.arange(n), torch.zeros(n, dtype=torch.long)
    turns = [torch.tensor(stable_hash("noise", seed, "id", turn)) for seed, turn in ((0, 0), (1, 0), (0, 1))]
    seed, other_seed, other_turn = (gumbel(splitmix64(key, i), zero) for key in turns)
    pairs = {
        "key": (gumbel(i, zero), gumbel(i + 1, zero)),
        "token": (gumbel(i, zero + 5), gumbel(i, zero + 6)),
        "tokens of one key": (gumbel(zero, i), gumbel(zero, i + 1)),
        "position": (seed[:-1], seed[1:]),
        "position and token": (seed, gumbel(splitmix64(turns[0], i), zero + 1)),
        "a position's token and the next one's before": (seed[1:], gumbel(splitmix64(turns[0], i), zero + 1)[:-1]),
        "seed": (seed, other_seed),
        "turn": (seed, other_turn),
    }
    for name, pair in pairs.items():
        assert abs(torch.corrcoef(torch.stack(pair))[0, 1]) < 4 / math.sqrt(n), name
        assert abs(pair[0].mean() - 0.5772) < 4 * 1.2825 / math.sqrt(n), name  # mean and deviation of a Gumbel


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Probabilities [V] that sampling shall have: the smallest set of likeliest tokens with top_p, renormalised."""
    p = (logits.double() / temperature).softmax(-1)
    kept, total = [], 0.0
    for i in p.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept.append(i)
        total += p[i].item()
    out = torch.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.7])
def test_sampled_frequencies_are_the_probabilities(temperature, top_p):
    n = 20_000
    logits = torch.tensor([1.5, -0.5, 0.2, 0.9, -2.0, 0.0, 1.1, -1.0])
    keys = torch.tensor([stable_hash("noise", 0, f"s{i}", 0, 0) for i in range(n)])
    got = sample(logits.expand(n, -1), keys, temperature, top_p).bincount(minlength=8)
    wanted = n * nucleus(logits, temperature, top_p)
    assert got[wanted == 0].sum() == 0
    often = wanted >= 5
    chi2, df = ((got - wanted)[often] ** 2 / wanted[often]).sum().item(), int(often.sum()) - 1
    critical = df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3  # p = 0.001, Wilson and Hilferty
    assert df >= 1 and chi2 < critical


@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampling_is_the_argmax_over_noise_on_all_tokens(temperature, top_p):
    B, V = 200, 3000
    logits = 3 * torch.randn(B, V, generator=torch.Generator().manual_seed(0))
    keys = torch.tensor([stable_hash("key", i) for i in range(B)])
    inside = torch.stack([nucleus(row, temperature, top_p) > 0 for row in logits])
    noisy = (logits.double() / temperature).masked_fill(~inside, -torch.inf) + gumbel(keys[:, None], torch.arange(V))
    got = sample(logits, keys, temperature, top_p)
    assert got.tolist() == noisy.argmax(-1).tolist()
    assert sample_dense(logits.masked_fill(~inside, -torch.inf), keys, temperature).tolist() == got.tolist()
    assert temperature < 0.5 or (got != logits.argmax(-1)).float().mean() > 0.3


def test_temperature_zero_is_the_argmax():
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    assert sample(logits, torch.arange(50), 0).tolist() == logits.argmax(-1).tolist()


# ---- turns ----


@pytest.fixture(scope="module")
def debater(tiny_model):
    return make_debater(tiny_model("llama"))


def test_a_turn_may_outgrow_the_buffer_of_its_prompt(debater, samples, monkeypatch):
    monkeypatch.setattr(debater, "config", DebateConfig(max_new_tokens=100, temperature=0.7, top_p=0.9))
    monkeypatch.setattr(debater, "is_end", torch.zeros(258, dtype=torch.bool))
    [[got]] = run_protocol(debater, "sciq", "debate", samples[:1], [0], 2)
    assert got["n_tokens"] == [100, 100] and got == naive_transcript(debater, samples[0], "debate", 0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_one_new_token_is_sdpa_with_repeated_keys(dtype):
    """Both ways: two products, as on a CPU, and SDPA with the query heads of a key head as its rows, as on a GPU."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, h, n, 8, generator=g).to(dtype) for h, n in ((6, 1), (2, 20), (2, 20)))
    hidden = torch.arange(20)[None, None, None] >= torch.tensor([20, 7, 1])[:, None, None, None]
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    heads = [x.repeat_interleave(3, 1) for x in (k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(q, *heads, mask, scale=0.3).transpose(1, 2)
    got = generate.grouped_attention(None, q, k, v, mask, scaling=0.3)[0]
    packed = q.view(3, 2, 3, 8), k, v, mask
    on_gpu = torch.nn.functional.scaled_dot_product_attention(*packed, scale=0.3).reshape(3, 1, 6, 8)
    tolerance = dict(atol=1e-6, rtol=1e-5) if dtype == torch.float32 else dict(atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(got, want, **tolerance)
    torch.testing.assert_close(on_gpu, want, **tolerance)
    torch.testing.assert_close(generate.two_products(*packed, scale=0.3).reshape(3, 1, 6, 8), got)


def test_a_pretrained_model_ends_its_turn_with_the_line(tiny_model):
    debater = Debater(ModelSpec(tiny_model("llama")), SETTINGS)
    assert debater.is_end.nonzero().flatten().tolist() == sorted({0, debater.tokens("\n")[0]})


# ---- chat models ----


@pytest.fixture
def chat_model(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model("llama"), tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.chat_template = (
        "<system>Be brief.</system>{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    return ModelSpec(str(tmp_path / "chat"))


def test_a_chat_model_is_asked_through_its_template(chat_model, samples):
    debater = Debater(chat_model, DebateConfig(max_new_tokens=4, temperature=1.0, chat=True))
    assert debater.is_end.nonzero().flatten().tolist() == [debater.tokenizer.eos_token_id]
    [[row]] = run_protocol(debater, "sciq", "debate", samples[:1], [0], 3)
    shown = "<system>Be brief.</system><user>{}</user><assistant>"
    assert row == naive_transcript(debater, samples[0], "debate", 0, 3, shown=shown)


# ---- vLLM, by a stand-in ----


class StandIn(types.ModuleType):
    """As much of vLLM as is used: replies are a function of the seed alone, and end with the end token or the limit."""

    def __init__(self):
        super().__init__("vllm")
        self.asked: list[tuple] = []
        self.SamplingParams, self.LLM = types.SimpleNamespace, lambda **options: self

    def generate(self, prompts, sampling, use_tqdm):
        self.asked += [(tuple(p["prompt_token_ids"]), s.seed) for p, s in zip(prompts, sampling, strict=True)]
        replies = [[66 + s.seed // 7**i % 20 for i in range(s.seed % s.max_tokens)] + [0] for s in sampling]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(r))]) for r in replies]


def test_vllm_is_asked_with_the_same_prompts_and_seeds_whatever_the_batch(tiny_model, samples, tmp_path, monkeypatch):
    asked, got = [], []
    for chunk in (1, 7):
        monkeypatch.setitem(sys.modules, "vllm", StandIn())
        debater = ENGINES["vllm"](ModelSpec(tiny_model("llama")), DebateConfig(max_new_tokens=6))
        got.append(transcripts(debater, samples[:9], tmp_path / str(chunk), seeds=(0, 1), chunk=chunk))
        asked.append(sorted(debater.model.asked))
    assert got[0] == got[1] and asked[0] == asked[1]
    assert len({seed for _, seed in asked[0]}) == 9 * 2 * 3
    for sample_row, row in zip(samples[:9], read_jsonl(tmp_path / "7/seed1.jsonl"), strict=True):
        for turn in range(3):
            seed = stable_hash("noise", 1, sample_row["id"], turn)
            assert row["n_tokens"][turn] == max(1, seed % 6)
            prompt = literal_prompt(sample_row["text"], "debate", row["turns"][:turn], row["sides"][turn], "{}\n")
            assert (tuple(debater.tokenizer(prompt)["input_ids"]), seed) in asked[1]


def test_vllm_that_is_not_there_is_named(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="--engine vllm: vllm is not installed"):
        ENGINES["vllm"](ModelSpec(tiny_model("llama")), SETTINGS)
