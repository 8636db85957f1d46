"""model.py: the packed forward against plain ones, the head, the cut."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import train
from common import InputError
from kernels import conf_loss
from model import Classifier, ModelSpec, load_model
from train import TrainConfig

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox")
TEXTS = ["why", "a", "the longest sample of them all, by far", "so be it", "ab", "Q: what? A: that"]


def padded_features(model, samples: list[list[int]]) -> torch.Tensor:
    """The hidden state of each sample's last token, from one padded batch through a plain model."""
    lengths = torch.tensor([len(s) for s in samples])
    ids = torch.tensor([s + [7] * (max(lengths) - len(s)) for s in samples]).to(model.device)
    mask = (torch.arange(max(lengths)) < lengths[:, None]).long().to(model.device)
    return model(ids, attention_mask=mask).last_hidden_state[range(len(samples)), lengths - 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_and_gradients_are_those_of_each_sample_alone_and_of_a_padded_batch(family, tiny_model):
    classifier = Classifier(ModelSpec(tiny_model(family)), 3, torch.float32)
    assert [name for name, _ in classifier.model.score.named_parameters()] == ["weight"]  # and no bias
    torch.nn.init.normal_(classifier.model.score.weight, generator=torch.Generator().manual_seed(0))
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_model(family), num_labels=3, dtype=torch.float32)
    plain.score.weight.data.copy_(classifier.model.score.weight)
    samples, _ = classifier.encode(TEXTS, 100)
    with torch.no_grad():
        padded = plain.score(padded_features(plain.base_model, samples))
    packed = classifier.logits(samples)
    alone = torch.cat([plain.score(plain.base_model(torch.tensor([s])).last_hidden_state[:, -1]) for s in samples])
    for got in (packed, alone):
        assert_close(got, padded, atol=1e-5, rtol=1e-5)
        conf_loss.cross_entropy(got, torch.eye(3)[[0, 1, 2, 0, 1, 2]]).backward()
    assert packed.std() > 0.1
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in classifier.model.named_parameters():
        assert wanted[name].abs().max() > 1e-5
        assert_close(p.grad, wanted[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_keeps_exactly_the_first_blocks(family, tiny_model):
    folder = tiny_model(family, 4)
    whole = load_model(ModelSpec.parse(folder), AutoModelForCausalLM, torch.float32).state_dict()
    cut = load_model(ModelSpec.parse(f"{folder}:2"), AutoModelForCausalLM, torch.float32).state_dict()
    assert cut.keys() <= whole.keys() and all(torch.equal(v, whole[k]) for k, v in cut.items())
    dropped = {k for k in whole if any(part in ("2", "3") for part in k.split("."))}
    assert whole.keys() - cut.keys() == dropped != set()


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_attention_that_is_not_computed_is_refused_not_left_out(family, tmp_path, tiny_model):
    import transformers as t

    sizes = dict(vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=4, bos_token_id=None, eos_token_id=0, pad_token_id=0)  # fmt: skip
    config = {"mistral": t.MistralConfig, "gemma2": t.Gemma2Config}[family](**sizes, sliding_window=12)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(tmp_path)
    classifier = Classifier(ModelSpec(str(tmp_path)), 2, torch.float32)
    with pytest.raises(InputError, match="window of 12 tokens"):
        train.predict(classifier, ["as long as this is"], TrainConfig())
    if family == "mistral":  # a window that no sample reaches over changes nothing
        assert train.predict(classifier, ["short"], TrainConfig()).shape == (1, 2)
    else:
        with pytest.raises(InputError, match="capped scores"):
            train.predict(classifier, ["short"], TrainConfig())


def test_rotary_frequencies_of_a_bfloat16_model_are_float32(tiny_model):
    """Rounded, they would turn the keys of late tokens by whole radians."""
    classifier = Classifier(ModelSpec(tiny_model("qwen2")), 2, torch.bfloat16)
    plain = AutoModel.from_pretrained(tiny_model("qwen2"), dtype=torch.bfloat16)
    assert {p.dtype for p in classifier.model.base_model.parameters()} == {torch.bfloat16}
    for got, want in zip(classifier.model.base_model.buffers(), plain.buffers(), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, want)
