"""train.py and optim.py: whole batches, whole runs, memory."""

import dataclasses
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, finetuned, finish, run, start
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import heads
import train
from common import InputError, read_jsonl, world, write_jsonl
from kernels import conf_loss
from model import Classifier, ModelSpec, save_model
from optim import MasterAdam, shard_of
from train import TrainConfig

# ---- the whole batch, whatever the micro-batches ----


@pytest.fixture(scope="module")
def classifier():
    return Classifier(ModelSpec("random-small"), 2, torch.float32)


@pytest.mark.parametrize("loss", ["xent", "product", "logconf"])
def test_micro_batches_change_nothing(classifier, loss):
    texts = [f"sample {i:02d}" for i in range(96)]  # of 9 tokens each
    labels = torch.rand(96, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.cat([labels, 1 - labels], 1)
    config = TrainConfig(loss=loss, lr=3e-3, epochs=1, batch_size=32, warmup_frac=0.3)
    assert [len(train.micro_batches(range(32), [9] * 32, 9 * n)) for n in (1, 2, 8)] == [32, 16, 4]

    def outcome(config):
        """Losses, predictions, and at the trained weights the gradients of one batch."""
        losses = [row["loss"] for row in train.finetune(classifier, texts, labels, config)["log"]]
        probs = train.predict(classifier, texts, config)
        tokens, _ = classifier.encode(texts[:32], 100)
        train.backward_batch(classifier, tokens, labels[:32], 0.5, config, config.max_tokens_per_forward)
        return torch.tensor(losses), probs, torch.cat([p.grad.flatten() for p in classifier.optimizer.params])

    whole = outcome(config)
    assert whole[1].std() > 1e-3 and whole[2].abs().max() > 1e-3
    for n in (1, 2, 8):
        got = outcome(dataclasses.replace(config, max_tokens_per_forward=9 * n))
        for a, b, atol in zip(got, whole, (1e-6, 1e-5, 1e-5), strict=True):
            assert_close(a, b, atol=atol, rtol=0)


# ---- the loop ----


def test_lr_is_a_cosine_from_peak_to_zero():
    assert [train.lr_at(s, 8, 2.0) for s in (0, 4, 8)] == pytest.approx([2, 1, 0])
    assert train.lr_at(2, 8, 2.0) == pytest.approx(1 + math.sqrt(0.5))


def test_batches_hold_each_sample_once_an_epoch_in_an_order_of_the_seed():
    def order(seed):
        return list(train.batches(70, TrainConfig(batch_size=32, epochs=2, seed=seed)))

    got = order(0)
    assert list(map(len, got)) == [32, 32, 6] * 2
    first, second = sum(got[:3], []), sum(got[3:], [])
    assert sorted(first) == sorted(second) == list(range(70))
    assert first != second and first != list(range(70))
    assert order(0) == got != order(1)


def test_the_same_run_twice_gives_the_same_bits(classifier, samples):
    _, first = finetuned(classifier, samples)
    assert torch.equal(first, finetuned(classifier, samples)[1])
    assert torch.equal(first, finetuned(Classifier(classifier.spec, 2, torch.float32), samples)[1])
    assert not torch.equal(first, finetuned(classifier, samples, seed=1)[1])


def test_training_learns_its_samples(classifier, samples):
    cost, probs = finetuned(classifier, samples, epochs=12)
    assert cost["log"][0]["loss"] == pytest.approx(math.log(2))  # zero head
    assert (probs.argmax(-1).tolist() == np.array([s["label"] for s in samples])).mean() >= 0.9
    assert cost["steps"] == 60 and cost["train_tokens"] == 12 * sum(len(s["text"].encode()) for s in samples)


def test_reset_restores_the_pretrained_weights(classifier, samples):
    fresh = {k: v.clone() for k, v in Classifier(classifier.spec, 2, torch.float32).model.state_dict().items()}
    finetuned(classifier, samples)
    changed = [k for k, v in classifier.model.state_dict().items() if not torch.equal(v, fresh[k])]
    assert len(changed) == len(fresh)
    classifier.reset(TrainConfig())
    assert not classifier.model.score.weight.any()
    now = classifier.model.state_dict()
    assert [k for k in fresh if k != "score.weight" and not torch.equal(now[k], fresh[k])] == []


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activation_checkpointing_recomputes_and_changes_nothing(family, tiny_model, samples):
    classifier = Classifier(ModelSpec(tiny_model(family)), 2, torch.float32)
    calls = []
    body = classifier.model.base_model
    mlp = (body.h if family == "gpt2" else body.layers)[0].mlp  # inside what is checkpointed
    mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    outcomes, seen = [], [0]
    for checkpointing in (False, True, False):
        outcomes.append(finetuned(classifier, samples, checkpointing=checkpointing)[1])
        seen.append(len(calls))
    once, recomputed, again = np.diff(seen)
    assert recomputed == once + 5 and again == once  # 5 steps ran the block again (GPT-2's default dropout stays off)
    assert_close(outcomes[1], outcomes[0], atol=1e-6, rtol=0)


def test_longer_inputs_are_cut_and_counted(classifier, samples):
    cost, _ = finetuned(classifier, samples, max_tokens=12)
    lengths = [len(s["text"]) for s in samples]
    assert 0 < cost["cut_inputs"] == sum(n > 12 for n in lengths) < 40
    assert cost["train_tokens"] == sum(min(n, 12) for n in lengths)
    whole, n_cut = classifier.encode(["abcdefghij"], 99)
    assert n_cut == 0 and classifier.encode(["abcdefghij"], 5)[0] == [[*whole[0][:3], *whole[0][-2:]]]  # both ends stay


def test_bfloat16_weights_follow_float32_masters():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    adam = MasterAdam([p])
    for _ in range(100):  # each step is far below bfloat16's spacing of 1/256 under 1
        p.grad = torch.ones_like(p)
        adam.accumulate_grads(first=True)
        adam.step(1e-4)
    assert_close(p.float(), torch.full((4,), 0.99), atol=1 / 512, rtol=0)
    for gradient in (1, 2.0**-12):
        p.grad = torch.full_like(p, gradient)
        adam.accumulate_grads(first=gradient == 1)
    assert adam.sums[0].tolist() == [1 + 2.0**-12] * 4  # a sum that bfloat16 would round away


class Counted(TorchDispatchMode):
    """How many operations torch was asked for: each is at least one launch on a GPU."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += "detach" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_asks_for_as_many_operations_for_many_weights_as_for_few(dtype):
    counts = []
    for n_weights in (2, 200):
        params = [torch.nn.Parameter(torch.ones(4, dtype=dtype)) for _ in range(n_weights)]
        adam = MasterAdam(params)
        for _ in range(2):  # the first step makes the moments
            for p in params:
                p.grad = torch.ones_like(p)
            with Counted() as counted:
                adam.accumulate_grads(first=True)
                adam.step(1e-4)
        counts.append(counted.n)
    assert counts[0] == counts[1] < 10


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_a_run_starts_from_what_the_files_hold_and_predictions_read_them_once(own, tiny_model, tmp_path):
    """`own`: dtype of the files. In bfloat16 the masters begin with the float32 weights, not with rounded ones."""
    whole = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).to(own)
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(tmp_path)
    classifier = Classifier(ModelSpec(str(tmp_path)), 2, torch.bfloat16)
    train.predict(classifier, ["why", "a"], TrainConfig())
    assert "pretrained" not in vars(classifier)
    classifier.reset(TrainConfig())
    for master, want in zip(classifier.optimizer.masters, whole.base_model.parameters(), strict=False):
        assert torch.equal(master, want.float())


@pytest.mark.parametrize("rows, ranks", [(8, 4), (258, 4), (5, 4), (3, 4), (7, 1)])
def test_the_shards_are_those_of_torch_chunk(rows, ranks):
    whole = torch.arange(2 * rows).view(rows, 2)
    chunks = [*whole.chunk(ranks), *[whole[:0]] * ranks][:ranks]
    for r in range(ranks):
        mesh = SimpleNamespace(size=lambda: ranks, get_local_rank=lambda r=r: r)
        assert torch.equal(shard_of(whole, SimpleNamespace(device_mesh=mesh)), chunks[r])


def private_mb() -> float:
    """Memory of this process alone; a mapped file's pages are the system's, and shared."""
    return next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith("RssAnon"))


def load_and_watch(model: Path, told: Path) -> None:
    """One of several ranks: the most memory that each takes to load the model, and whether it has the files' weights."""
    Classifier(ModelSpec("random-small"), 2, torch.float32, ranks=world()).reset(TrainConfig())  # imports
    before, most = private_mb(), [0]

    def watch() -> None:
        while True:
            most[0] = max(most[0], private_mb())
            time.sleep(0.001)

    threading.Thread(target=watch, daemon=True).start()
    classifier = Classifier(ModelSpec(str(model)), 2, torch.float32, ranks=world())
    classifier.reset(TrainConfig())
    used = world().gather(most[0] - before)
    wholes = zip(classifier.model.base_model.parameters(), classifier.pretrained, strict=True)
    same = all([torch.equal(p.full_tensor(), w) for p, w in wholes])  # every rank must ask
    if world().rank == 0:
        write_jsonl(told, [{"used": used, "same": same}])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("own, share", [(torch.float32, 0.3), (torch.bfloat16, 0.7)])
def test_none_of_four_ranks_ever_holds_all_weights(own, share, tiny_model, tmp_path):
    """A quarter; of bfloat16 files also the block that becomes float32, and what the allocator keeps of those before it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=258, hidden_size=768, intermediate_size=1024, num_hidden_layers=10, eos_token_id=0)
    model = LlamaForCausalLM(config).to(own)
    megabytes = 4 * sum(p.numel() for p in model.model.parameters()) / 1e6  # as float32
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(tmp_path / "model")
    finish(start(4, load_and_watch, tmp_path / "model", tmp_path / "told"))
    [told] = read_jsonl(tmp_path / "told")
    assert told["same"] and 180 < megabytes < 220 and max(told["used"]) < share * megabytes, told


def test_steps_are_in_the_file_while_training_goes_on(classifier, samples, tmp_path):
    """Whoever reads the file between two steps finds all steps before."""
    file, seen = tmp_path / "new/steps.jsonl", []
    texts, labels = [s["text"] for s in samples], train.soft_labels(samples, 2)
    config = TrainConfig(epochs=1, batch_size=8)
    cost = train.finetune(classifier, texts, labels, config, file, lambda row: seen.append(read_jsonl(file)))
    assert seen == [cost["log"][: n + 1] for n in range(5)]


@pytest.mark.parametrize("seconds, lines", [(10, 0), (400, 20)])
def test_a_long_run_prints_a_line_per_twentieth_and_a_short_one_none(seconds, lines, monkeypatch, capsys):
    clock = iter(np.linspace(0, seconds, 101))
    monkeypatch.setattr(train.time, "time", lambda: next(clock))
    log = train.StepLog("finetune it", 100)
    for step in range(100):
        log.add(torch.tensor(0.7), step=step, lr=1e-5, tokens=1000 * (step + 1))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == lines
    if told:
        assert told[4] == "finetune it: step 25 of 100 (25%), loss 0.7000, lr 1.00e-05, 250 tokens/s, 5.0 min left"


BAD = [  # texts, labels, told
    ("ab", [[1.5, -0.5], [0, 1]], "label of sample 0"),
    ("ab", [[0.5, 0.4], [0, 1]], "label of sample 0"),
    ("ab", [[math.nan, 1], [0, 1]], "label of sample 0"),
    ("ab", [[0, 1]], "labels of shape"),
    ("ab", [0, 1], "labels of shape"),
    ("", [], "0 samples"),
    (["a", ""], [[0, 1], [1, 0]], "token"),  # it has no last token for the head to read
]


@pytest.mark.parametrize("texts, labels, told", BAD)
def test_what_cannot_be_learned_raises(texts, labels, told, classifier):
    with pytest.raises(ValueError, match=told):
        train.finetune(classifier, list(texts), torch.tensor(labels), TrainConfig())


def test_a_loss_that_is_not_finite_stops_the_run(classifier, samples):
    with pytest.raises(FloatingPointError, match="step 1 of 5"):
        finetuned(classifier, samples, lr=math.inf)


def test_a_saved_model_gives_the_recorded_probabilities(tmp_path, tiny_model, samples):
    classifier = Classifier(ModelSpec.parse(tiny_model("qwen2", 4) + ":3"), 2, torch.float32)
    _, probs = finetuned(classifier, samples)
    save_model(classifier, tmp_path / "model", TrainConfig(lr=0.5), "these <samples>")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [s["text"] for s in samples]
    with torch.no_grad():
        alone = torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in texts]).softmax(-1)
        padded = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.softmax(-1)
    assert probs.std() > 1e-3 and model.config.num_hidden_layers == 3
    card = (tmp_path / "model/README.md").read_text()
    assert "library_name: transformers" in card and "its first 3 blocks" in card and "| lr | 0.5 |" in card
    recorded = torch.tensor([r["probs"] for r in train.prediction_rows(samples, probs)])
    assert_close(recorded, alone, atol=1e-6, rtol=0)
    assert_close(recorded, padded, atol=1e-5, rtol=0)


# ---- as a script ----


def test_the_script_trains_predicts_and_does_not_overwrite(tmp_path, tiny_model, samples, capsys):
    soft = [{"id": s["id"], "text": s["text"], "probs": ([0.9, 0.1], [0.1, 0.9])[s["label"]]} for s in samples]
    write_jsonl(tmp_path / "train.jsonl", soft)
    write_jsonl(tmp_path / "test.jsonl", samples[:10])
    flags = ["--model", tiny_model("llama"), "--train", tmp_path / "train.jsonl", "--test", tmp_path / "test.jsonl"]
    flags += ["--out", tmp_path / "run", "--loss", "logconf", "--epochs", "1", "--lr", "0.01"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "run/predictions.jsonl")
    assert [r["id"] for r in rows] == [s["id"] for s in samples[:10]]
    assert all(len(r["probs"]) == 2 and sum(r["probs"]) == pytest.approx(1, abs=1e-6) for r in rows)
    correct = sum(np.argmax(r["probs"]) == s["label"] for r, s in zip(rows, samples, strict=False))
    assert f"accuracy {correct / 10:.4f} on 10" in done.stdout
    steps = read_jsonl(tmp_path / "run/steps.jsonl")
    assert [s["step"] for s in steps] == [0, 1] and steps[0]["lr"] == 0.01

    before = (tmp_path / "run/predictions.jsonl").read_bytes()
    assert run("train", *flags) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(tmp_path / "run") in told
    assert (tmp_path / "run/predictions.jsonl").read_bytes() == before


# ---- heads alone ----


def head_alone(x, y, config):
    """One head on frozen features, by torch's own layer, loss on the whole batch and optimizer."""
    head = torch.nn.Linear(x.shape[1], y.shape[1], bias=False)
    torch.nn.init.zeros_(head.weight)
    adam = torch.optim.Adam(head.parameters())
    schedule = list(train.batches(len(x), config))
    for step, batch in enumerate(schedule):
        adam.zero_grad()
        z = head(x[batch])
        target = train.LOSSES[config.loss](z.detach(), y[batch], step / len(schedule), config)
        conf_loss.cross_entropy(z, target).backward()
        adam.param_groups[0]["lr"] = train.lr_at(step, len(schedule), config.lr)
        adam.step()
    return head.weight.detach()


@pytest.mark.parametrize("n", [1, 2, 8])
def test_heads_trained_at_once_are_those_trained_alone(n):
    torch.manual_seed(0)
    x = torch.randn(45, 16)
    kinds = [(seed, loss) for seed in range(3) for loss in train.LOSSES][-n:]
    configs = [TrainConfig(loss=loss, lr=0.01, seed=seed, epochs=3, batch_size=8) for seed, loss in kinds]
    labels = [(4 * torch.randn(45, 2)).softmax(-1) for _ in configs]
    weights = heads.finetune_heads(x, labels, configs)
    for e, config in enumerate(configs):
        assert_close(weights[e], head_alone(x, labels[e], config), atol=1e-5, rtol=0)
    assert weights.abs().mean() > 0.01 and (n == 1 or weights.flatten(1).std(0).mean() > 0.01)


def test_a_loss_that_was_edited_is_not_computed_by_the_kernel_of_the_old_one(monkeypatch):
    train.check_kernel(TrainConfig(loss="product"), "triton", torch.device("cpu"))
    monkeypatch.setitem(train.LOSSES, "product", lambda z, y, step_frac, c: conf_loss.product_target(z, y, 2.0, c.beta))
    with pytest.raises(InputError, match="choose --kernels reference"):
        train.check_kernel(TrainConfig(loss="product"), "triton", torch.device("cpu"))
    train.check_kernel(TrainConfig(loss="product"), "reference", torch.device("cpu"))


def test_out_of_memory_halves_the_budget_and_changes_nothing(classifier, samples, monkeypatch, capsys):
    samples, settings, logits = samples[:16], {"loss": "logconf", "lr": 1e-3, "epochs": 2}, Classifier.logits
    plain, wanted = finetuned(classifier, samples, **settings)

    def small_memory(self, tokens):
        if torch.is_grad_enabled() and sum(map(len, tokens)) > 60:
            raise torch.OutOfMemoryError("out of memory")
        return logits(self, tokens)

    monkeypatch.setattr(Classifier, "logits", small_memory)
    cost, probs = finetuned(classifier, samples, **settings)
    assert cost["max_tokens_per_forward"] <= 60 and "out of memory: again" in capsys.readouterr().out
    assert_close([r["loss"] for r in cost["log"]], [r["loss"] for r in plain["log"]], atol=1e-5, rtol=0)
    assert_close(probs, wanted, atol=1e-5, rtol=0)
    monkeypatch.setattr(Classifier, "logits", lambda self, tokens: small_memory(self, tokens * 100))
    with pytest.raises(torch.OutOfMemoryError):
        finetuned(classifier, samples, **settings)
