"""lora.py: adapters against dense weights, on several ranks, run after run, and as a folder."""

import json

import pytest
import torch
from conftest import call, finetuned, finish, products, run, start
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

import train
from common import InputError, read_jsonl, write_jsonl
from kernels import conf_loss
from lora import PREFIX, LoraLinear
from model import Classifier, ModelSpec, load_kept, save_model
from train import TrainConfig

RANK, ALPHA = 3, 5


def adapted(spec: str, dtype=torch.float32, n_classes: int = 2) -> Classifier:
    return Classifier(ModelSpec.parse(spec), n_classes, dtype, lora_rank=RANK, lora_alpha=ALPHA)


# ---- against dense weights ----


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("settings", [{}, {"checkpointing": True}, {"max_tokens_per_forward": 40}])
def test_logits_and_gradients_are_those_of_dense_weights(family, settings, tiny_model, samples):
    """The reference is the ordinary model, sample by sample, with W + (alpha / r) B A in place of W."""
    classifier, config = adapted(tiny_model(family), n_classes=3), TrainConfig(**settings)
    classifier.reset(config)
    torch.manual_seed(1)
    for p in classifier.whole:
        torch.nn.init.normal_(p, std=0.3)
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_model(family), num_labels=3, dtype=torch.float32)
    layers = {name: m for name, m in classifier.model.named_modules() if isinstance(m, LoraLinear)}
    assert len(layers) == sum(isinstance(m, torch.nn.Linear) for m in plain.base_model.modules()) > 7
    factors = {name: [x.detach().clone().requires_grad_() for x in (m.lora_A, m.lora_B)] for name, m in layers.items()}
    weights, score = dict(plain.named_parameters()), classifier.model.score.weight.detach().clone().requires_grad_()
    dense = {f"{n}.weight": weights[f"{n}.weight"].detach() + ALPHA / RANK * b @ a for n, (a, b) in factors.items()}
    tokens, _ = classifier.encode([s["text"] for s in samples[:6]], 100)
    asked = [{"input_ids": torch.tensor([t]), "output_hidden_states": True} for t in tokens]
    hidden = [torch.func.functional_call(plain, dense, (), kwargs).hidden_states[-1][:, -1] for kwargs in asked]
    logits = torch.cat(hidden) @ score.T
    assert_close(classifier.logits(tokens), logits, atol=1e-5, rtol=1e-5)

    labels = torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    conf_loss.cross_entropy(logits, labels).backward()
    train.backward_batch(classifier, tokens, labels, 0.5, config, config.max_tokens_per_forward)
    wanted = [x for pair in factors.values() for x in pair] + [score]
    got = [p for m in layers.values() for p in (m.lora_A, m.lora_B)] + [classifier.model.score.weight]
    for p, w in zip(got, wanted, strict=True):
        assert w.grad.abs().max() > 1e-5
        assert_close(p.grad, w.grad, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in set(classifier.model.parameters()) - set(got))


def test_a_model_whose_blocks_have_other_layers_is_refused(tiny_model):
    with pytest.raises(InputError, match="gpt2 have no torch.nn.Linear.*choose rank 0"):
        adapted(tiny_model("gpt2"))


# ---- run after run ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_the_same_in_any_history_and_leaves_the_model_as_it_was(dtype, tiny_model, samples):
    classifier = adapted(tiny_model("qwen2"), dtype)
    base = {n: p.clone() for n, p in classifier.model.named_parameters() if not p.requires_grad}
    _, first = finetuned(classifier, samples)
    _, other = finetuned(classifier, samples, seed=1, loss="logconf")
    assert torch.equal(first, finetuned(classifier, samples)[1])
    assert torch.equal(first, finetuned(adapted(tiny_model("qwen2"), dtype), samples)[1])
    assert not torch.equal(first, other) and "pretrained" not in vars(classifier)
    now = dict(classifier.model.named_parameters())
    assert all(torch.equal(now[n], p) and p.dtype == dtype for n, p in base.items())
    state = classifier.optimizer.adam.state.values()
    assert {x.dtype for s in state for x in (s["exp_avg"], s["exp_avg_sq"])} == {torch.float32}
    assert {p.dtype for p in classifier.whole} == {torch.float32}


def test_adapters_start_by_the_seed_at_the_model_itself(tiny_model, samples):
    classifier = adapted(tiny_model("llama"))
    tokens, _ = classifier.encode([s["text"] for s in samples[:3]], 100)
    plain = Classifier(classifier.spec, 2, torch.float32).features(tokens)
    starts = []
    for seed in (0, 1):
        classifier.reset(TrainConfig(seed=seed))
        assert torch.equal(classifier.features(tokens), plain) and not classifier.model.score.weight.any()
        starts.append(torch.cat([a.detach().flatten() * a.shape[1] ** 0.5 for a in classifier.adapters[::2]]))
        assert starts[-1].abs().max() <= 1 and starts[-1].std().item() == pytest.approx(3**-0.5, rel=0.1)
    assert not torch.equal(*starts)


def test_adapters_learn_their_samples(tiny_model, samples):
    cost, probs = finetuned(adapted(tiny_model("qwen2")), samples, epochs=15)
    labels = torch.tensor([s["label"] for s in samples])
    assert (probs.argmax(-1) == labels).float().mean() > 0.9 and cost["log"][-1]["loss"] < cost["log"][0]["loss"] / 3


# ---- on several ranks ----


def test_two_ranks_train_what_one_does(tiny_model, samples, tmp_path):
    """Losses, probabilities and adapters; the last batch has one sample, fewer than there are ranks."""
    rows = [{"id": s["id"], "text": s["text"], "probs": [p / 31, 1 - p / 31]} for p, s in enumerate(samples[:25])]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ["--model", tiny_model("qwen2"), "--train", tmp_path / "rows.jsonl", "--test", tmp_path / "rows.jsonl"]
    flags += "--dtype float32 --loss logconf --lr 1e-3 --batch-size 6 --max-tokens-per-forward 64".split()
    flags += ["--lora-rank", 4, "--keep-model", "--out"]
    for size in (1, 2):
        finish(start(size, call, ("train", *flags, tmp_path / str(size))))
    one, two = tmp_path / "1", tmp_path / "2"
    for file, field in (("predictions.jsonl", "probs"), ("steps.jsonl", "loss")):
        got, wanted = (torch.tensor([r[field] for r in read_jsonl(out / file)]) for out in (two, one))
        assert_close(got, wanted, atol=1e-6, rtol=0)
        assert wanted.std() > 1e-3
    got, wanted = (load_file(out / "model/adapter_model.safetensors") for out in (two, one))
    for name in wanted:
        assert_close(got[name], wanted[name], atol=1e-5, rtol=0)


# ---- as a folder ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_folder_gives_the_recorded_probabilities(dtype, tiny_model, samples, tmp_path):
    spec, config = tiny_model("llama", 4) + ":3", TrainConfig(lora_rank=RANK, lora_alpha=ALPHA)
    classifier = adapted(spec, dtype)
    _, probs = finetuned(classifier, samples)
    save_model(classifier, tmp_path, config, "these samples")
    again = train.predict(load_kept(tmp_path, 2, dtype), [s["text"] for s in samples], config)
    assert torch.equal(again, probs) and probs.std() > 1e-3

    told = json.loads((tmp_path / "adapter_config.json").read_text())
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert told["target_modules"] == names and told["modules_to_save"] == ["score"]
    wanted = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": RANK, "lora_alpha": ALPHA}
    assert wanted.items() <= told.items() and told["base_model_name_or_path"] == spec
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 3 * 7 * 2 + 1 and {w.dtype for w in weights.values()} == {torch.float32}
    assert weights[f"{PREFIX}model.layers.2.mlp.down_proj.lora_A.weight"].shape == (RANK, 24)
    assert weights[f"{PREFIX}model.layers.0.self_attn.k_proj.lora_B.weight"].shape == (8, RANK)
    assert weights[f"{PREFIX}score.weight"].any() and not (tmp_path / "model.safetensors").exists()
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


def test_a_pipeline_runs_with_adapters_once(tmp_path, capsys):
    """Market-making asks the kept adapters of the weak floor."""
    flags = "run --preset smoke --tasks sciq --seeds 0 --limit-train 18 --limit-test 8 --lora-rank 4 --methods".split()
    flags += ["finetune", "ours", "market_making", "--out", tmp_path]
    assert run("w2s", *flags) == 0
    made, floor = products(tmp_path), tmp_path / "sciq/predictions/weak-naive-f0-s0"
    assert {p.name for p in (floor / "model").glob("*.safetensors")} == {"adapter_model.safetensors"}
    rows = read_jsonl(tmp_path / "results.jsonl")
    assert {r["method"] for r in rows} >= {"finetune", "ours", "market_making"}
    texts = [s["text"] for s in read_jsonl(tmp_path / "sciq/data/test.jsonl")]
    probs = train.predict(load_kept(floor / "model", 2, torch.float32), texts, TrainConfig())
    recorded = torch.tensor([r["probs"] for r in read_jsonl(floor / "test.jsonl")])
    assert_close(probs, recorded, atol=1e-6, rtol=0)

    capsys.readouterr()
    assert run("w2s", *flags) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert products(tmp_path) == made
