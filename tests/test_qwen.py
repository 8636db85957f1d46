"""data/convert_qwen.py: a converted Qwen of random weights against a float64 forward pass by definition."""

import base64
import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from common import InputError
from data import convert_qwen as qwen
from data.models import made_once
from model import ModelSpec, load_tokenizer

CONFIG = dict(
    model_type="qwen", hidden_size=32, num_attention_heads=4, kv_channels=8, num_hidden_layers=3, intermediate_size=96,
    vocab_size=480, seq_length=2048, layer_norm_epsilon=1e-6, rotary_emb_base=10000, rotary_pct=1.0, no_bias=True,
    tie_word_embeddings=False, use_logn_attn=True, use_dynamic_ntk=True,
    auto_map={"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
)  # fmt: skip
SECOND = "model-00002-of-00003.safetensors"
WORDS = [b"th", b"he", b"the", b" the", b"in", b" in", b"\xc3\xa9"]


def weights() -> dict[str, torch.Tensor]:
    D, V, inner, g = 32, 480, 48, torch.Generator().manual_seed(0)
    block = {
        "ln_1.weight": [D], "ln_2.weight": [D], "attn.c_attn.weight": [3 * D, D], "attn.c_attn.bias": [3 * D],
        "attn.c_proj.weight": [D, D], "mlp.w1.weight": [inner, D], "mlp.w2.weight": [inner, D], "mlp.c_proj.weight": [D, inner],
    }  # fmt: skip
    shapes = {f"transformer.h.{n}.{k}": s for n in range(3) for k, s in block.items()}
    shapes |= {"transformer.wte.weight": [V, D], "transformer.ln_f.weight": [D], "lm_head.weight": [V, D]}
    return {n: torch.randn(s, generator=g, dtype=torch.float64) * (0.3 if len(s) > 1 else 1) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of three shards, with the remote code beside it that must not run."""
    folder = tmp_path_factory.mktemp("qwen") / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "modeling_qwen.py").write_text("raise SystemExit('remote code ran')")
    ranks = {bytes([b]): b for b in range(256)} | {w: 256 + i for i, w in enumerate(WORDS)}
    (folder / "qwen.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    for n in range(3):
        shard = dict(sorted(weights().items())[n::3])
        save_file(shard, folder / f"model-{n + 1:05d}-of-00003.safetensors")
    return folder


@pytest.fixture(scope="module")
def converted(source):
    return made_once(source.parent / "converted", lambda folder: qwen.convert(source, folder))


def definition(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of token ids [T], read off the first generation's architecture; float64 throughout."""
    D, H, T = CONFIG["hidden_size"], CONFIG["num_attention_heads"], len(ids)
    angle = torch.arange(T)[:, None] / CONFIG["rotary_emb_base"] ** (torch.arange(0, D // H, 2).double() / (D // H))
    cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angle.cos(), angle.sin()))

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + CONFIG["layer_norm_epsilon"]).rsqrt() * weight

    def rotated(x):  # [T, H, d]
        first, second = x.split(D // H // 2, dim=-1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = w["transformer.wte.weight"][ids]
    for n in range(CONFIG["num_hidden_layers"]):
        b = {k.split(".", 3)[3]: v for k, v in w.items() if k.startswith(f"transformer.h.{n}.")}
        mixed = norm(x, b["ln_1.weight"]) @ b["attn.c_attn.weight"].T + b["attn.c_attn.bias"]
        q, k, v = (m.view(T, H, -1) for m in mixed.split(D, dim=-1))
        scores = torch.einsum("thd,shd->hts", rotated(q), rotated(k)) / (D // H) ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)  # T <= seq_length: no log-n, no NTK
        x = x + torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(T, D) @ b["attn.c_proj.weight"].T
        y = norm(x, b["ln_2.weight"])
        x = x + ((y @ b["mlp.w1.weight"].T) * F.silu(y @ b["mlp.w2.weight"].T)) @ b["mlp.c_proj.weight"].T
    return norm(x, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("length", [1, 7, 300, 2048])
def test_logits_are_those_of_the_definition(length, converted, monkeypatch):
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen2 import modeling_qwen2 as m

    def norm(self, x):  # transformers computes norms and angles in float32, whatever the dtype
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def angles(self, x, position_ids, **_):
        base = self.config.rope_parameters["rope_theta"]
        d = self.config.hidden_size // self.config.num_attention_heads
        angle = position_ids[..., None] / base ** (torch.arange(0, d, 2).double() / d)
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()

    monkeypatch.setattr(m.Qwen2RMSNorm, "forward", norm)
    monkeypatch.setattr(m.Qwen2RotaryEmbedding, "forward", angles)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float64, attn_implementation="sdpa")
    ids = torch.randint(0, CONFIG["vocab_size"], (length,), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        got = model(ids[None]).logits[0]
    wanted = definition(weights(), ids)
    assert wanted.std() > 0.1
    assert_close(got, wanted, atol=1e-9, rtol=0)


def test_the_tokenizer_merges_by_rank(converted):
    tokenizer = load_tokenizer(ModelSpec(str(converted)))

    def pieces(text):
        return [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]

    assert pieces("the then in inn") == ["the", " the", "n", " in", " in", "n"]
    assert tokenizer("e\u0301")["input_ids"] == [256 + WORDS.index(b"\xc3\xa9")]  # composed before it is split
    assert tokenizer("<|endoftext|>")["input_ids"] == [256 + len(WORDS)] == [tokenizer.eos_token_id]
    text = "Naïve café, 12 34!\n\n  思考 it's"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and "12" not in pieces(text)


def change(folder, new) -> None:
    """Put what `new` makes of the tensors of the second shard in their place, or beside them."""
    tensors = load_file(folder / SECOND)
    save_file(tensors | new(tensors), folder / SECOND)


def reshaped(tensors) -> dict:
    name = next(n for n in tensors if n.endswith("c_attn.weight"))
    return {name: tensors[name][:-1].contiguous()}


def retyped(tensors) -> dict:
    return {n: t.float() for n, t in tensors.items()}


WITH_BIAS = json.dumps(CONFIG | {"no_bias": False})
STRANGER = {"transformer.h.9.ln_1.weight": torch.ones(32, dtype=torch.float64)}
SPOILED = {  # how a good one is spoiled, what is told
    "truncated": (lambda f: os.truncate(f / SECOND, 20_000), SECOND),
    "missing": (lambda f: (f / SECOND).unlink(), "weights are in no shard, the first is"),
    "there twice": (lambda f: shutil.copy(f / SECOND, f / "model-00004.safetensors"), f"is in {SECOND} too"),
    "reshaped": (lambda f: change(f, reshaped), "v_proj.weight has shape [31, 32], expected [32, 32]"),
    "of another dtype": (lambda f: change(f, retyped), "is torch.float32, others are torch.float64"),
    "with a stranger": (lambda f: change(f, lambda _: STRANGER), "is no weight of Qwen"),
    "another kind": (lambda f: (f / "config.json").write_text(WITH_BIAS), "no_bias is False"),
    "no ranks": (lambda f: (f / "qwen.tiktoken").write_text("not base64 at all"), "no tiktoken file"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_wrong_checkpoint_is_refused_by_name(how, source, tmp_path):
    spoil, told = SPOILED[how]
    spoil(shutil.copytree(source, tmp_path / "spoiled"))
    with pytest.raises(InputError) as e:
        made_once(tmp_path / "out", lambda folder: qwen.convert(tmp_path / "spoiled", folder))
    assert told in str(e.value) and "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["spoiled"]  # nothing half-written


def test_an_unconverted_folder_is_not_loaded(source):
    with pytest.raises(InputError, match="python -m data.convert_qwen"):
        load_tokenizer(ModelSpec(str(source)))
