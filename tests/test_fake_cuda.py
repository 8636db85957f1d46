"""What runs on a GPU alone, without one: tensors of the meta device that say is_cuda, at the widths of real models.

They have no data, so nothing is computed: what fails is a wrong argument, shape, dtype or device. Arguments of kernels that
only a GPU has are held against what their CUDA code asks for. (torch's CPU build has no device guard for a FakeTensorMode of
cuda.) Not covered: values, what is read on the host once a turn, and the copy of the pretrained weights.
"""

import functools
import inspect
import sys
import types

import compile_kernels
import pytest
import torch
import torch.nn.attention.varlen
import transformers
from torch import Tensor
from torch.fx.experimental import _config as symbolic_config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
import heads
import model
import plan
import sizes
import train
from generate import DebateConfig, Debater, grouped_attention
from kernels import conf_loss, head
from model import Classifier, ModelSpec, packed_attention

QWENS = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen-14B")  # the first with 6 query heads a key head, the second with one
BLOCKS = 2  # of each model: the others are alike
LENGTHS = [700, 1, 64, 333]
TOKENS = [[1] * n for n in LENGTHS]
META = torch.device("meta")
pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")  # autocast, of a device that is not there


def config_of(name: str):
    s = sizes.SHAPES[name]
    return transformers.Qwen2Config(
        vocab_size=s.V, hidden_size=s.D, intermediate_size=s.F, num_hidden_layers=BLOCKS, num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads, tie_word_embeddings=s.tied, num_labels=2, pad_token_id=0, eos_token_id=0,
        bos_token_id=None,
    )  # fmt: skip


def load_model(spec, auto_class, dtype, attn_implementation, parallel=None, num_labels=2):
    """As of bfloat16 files."""
    dtype = torch.bfloat16 if dtype == "auto" else dtype
    with META:
        return auto_class.from_config(config_of(spec.name), dtype=dtype, attn_implementation=attn_implementation)


@pytest.fixture
def gpu(monkeypatch):
    """Models and batches go to the meta device, whose tensors pass for a GPU's."""
    for module in (model, train, heads, generate):
        monkeypatch.setattr(module, "to_device", lambda x, dev: x.to(dev))
    for module in (model, generate):
        monkeypatch.setattr(module, "device", lambda: META)
        monkeypatch.setattr(module, "load_model", load_model)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: x.device.type == "meta"), raising=False)
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    with symbolic_config.patch(meta_nonzero_assume_all_nonzero=True):
        yield


class AttentionCalls(TorchDispatchMode):
    """Calls of FlashAttention for unequal lengths, each held against the checks of mha_varlen_fwd."""

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torch_attn._varlen_attn.default:
            call = {a.name: a.default_value for a in func._schema.arguments}
            call |= dict(zip(call, args, strict=False)) | (kwargs or {})
            q, k, v, cu = (call[n] for n in ("query", "key", "value", "cu_seq_q"))
            assert {x.dtype for x in (q, k, v)} == {torch.bfloat16} and q.shape[2] % 8 == 0 and q.shape[2] <= 256
            assert all(x.is_cuda and x.stride(-1) == 1 for x in (q, k, v, cu))
            assert k.shape == v.shape and len(k) == len(q) and q.shape[1] % k.shape[1] == 0
            assert cu.dtype == torch.int32 and cu.is_contiguous() and call["cu_seq_k"] is cu
            assert call["max_q"] == call["max_k"] == max(LENGTHS) and len(cu) == len(LENGTHS) + 1
            assert call["is_causal"] and call["window_size"] == [-1, 0]
            self.calls.append(call)
        return func(*args, **(kwargs or {}))


class SdpaCalls(TorchFunctionMode):
    """Arguments of every call of torch's scaled_dot_product_attention."""

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls.append((args, kwargs))
        return func(*args, **(kwargs or {}))


class NoWaits(TorchDispatchMode):
    """Refuses what makes the CPU wait for a GPU: a value or a number of values that is read, a copy from one to the other."""

    READS = {"nonzero", "masked_select", "_local_scalar_dense", "is_nonzero", "unique_dim", "_unique2", "equal"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func._overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        assert name not in self.READS, name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype == torch.long for i in args[1]), f"{name} with a mask"
        if name in ("_to_copy", "copy_"):
            assert len({x.device for x in tensors}) == 1, name
        return out


@pytest.fixture
def launches(monkeypatch):
    """Names of the Triton kernels launched. Arguments must fit the kernel's signature and be what is compiled for sm_90."""
    seen, names = [], {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
    compiled: dict[str, tuple] = {}  # kernel -> kernel, argument -> types
    for _, kernel, arguments, _ in compile_kernels.shipped():
        allowed = compiled.setdefault(kernel.fn.__name__, (kernel, {}))[1]
        for name, kind in arguments.items():
            allowed.setdefault(name, set()).add(kind)

    class Kernel:
        def __init__(self, kernel, allowed):
            self.kernel, self.allowed = kernel, allowed

        def __getitem__(self, grid):
            assert all(type(n) is int and n > 0 for n in grid)
            return self.launch

        def launch(self, *args, num_warps, enable_fp_fusion=None, **constants):
            for name, x in inspect.signature(self.kernel.fn).bind(*args, **constants).arguments.items():
                if isinstance(x, Tensor):
                    assert x.is_cuda and x.is_contiguous() and names[x.dtype] in self.allowed[name], name
                else:
                    assert not name.endswith("_ptr"), name
            assert num_warps > 0
            seen.append(self.kernel.fn.__name__)

    for module in (head, conf_loss):
        for name, (kernel, allowed) in compiled.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Kernel(kernel, allowed))
    return seen


@pytest.fixture
def fake_classifier(gpu, monkeypatch):
    monkeypatch.setattr(model, "load_tokenizer", lambda spec: types.SimpleNamespace(pad_token_id=0, eos_token_id=0))
    pretrained = property(lambda c: list(c.model.base_model.parameters()))
    monkeypatch.setattr(Classifier, "pretrained", pretrained)  # without a CPU
    return lambda name, **adapters: Classifier(ModelSpec(name), 2, torch.bfloat16, "triton", **adapters)


# ---- finetuning ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", QWENS)
def test_packed_attention_asks_for_what_its_kernel_takes(name, dtype, gpu):
    """bfloat16: FlashAttention. float32: padded SDPA with as many key heads as query heads."""
    s, T = sizes.SHAPES[name], sum(LENGTHS)
    _, _, where = model.pack(TOKENS, META)
    q, k, v = (
        torch.empty(1, T, h, s.d, dtype=dtype, device="meta", requires_grad=True)
        for h in (s.heads, s.kv_heads, s.kv_heads)
    )
    with AttentionCalls() as flash, SdpaCalls() as sdpa:
        out, _ = packed_attention(None, *(x.transpose(1, 2) for x in (q, k, v)), None, s.d**-0.5, where)
        gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    if dtype == torch.bfloat16:
        [call] = flash.calls
        assert call["scale"] == s.d**-0.5 and not sdpa.calls
        assert call.get("enable_gqa", s.heads != s.kv_heads) == (s.heads != s.kv_heads)
    else:
        [(padded, options)] = sdpa.calls
        assert [x.shape for x in padded] == [(len(LENGTHS), s.heads, max(LENGTHS), s.d)] * 3 and not flash.calls
        assert options["is_causal"] and not options["enable_gqa"]
    assert (out.shape, out.dtype, out.device.type) == ((1, T, s.heads, s.d), dtype, "meta")
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in (q, k, v)]


@pytest.mark.parametrize("name", QWENS)
@pytest.mark.parametrize("loss", train.LOSSES)
def test_a_finetuning_step(name, loss, fake_classifier, launches):
    classifier, config = fake_classifier(name), train.TrainConfig(loss=loss)
    classifier.reset(config)
    y = torch.empty(len(LENGTHS), 2, device="meta")
    with AttentionCalls() as seen:
        value = train.backward_batch(classifier, TOKENS, y, 0.5, config, config.max_tokens_per_forward)
    assert (value.shape, value.dtype, value.device.type) == ((), torch.float32, "meta")
    assert launches == ["forward_kernel", "loss_kernel", "backward_kernel"] and len(seen.calls) == BLOCKS
    adam = classifier.optimizer
    assert all(m.is_cuda and m.dtype == torch.float32 for m in adam.masters)
    assert [(g.shape, g.dtype) for g in adam.sums] == [(m.shape, torch.float32) for m in adam.of_rounded]
    assert adam.rounded[0].grad is None and adam.params[-1].grad.shape == (2, sizes.SHAPES[name].D)
    assert {p.dtype for p in classifier.model.base_model.parameters()} == {torch.bfloat16}
    adam.step(1e-5)
    assert {x.device.type for state in adam.adam.state.values() for x in state.values()} == {"meta"}


def test_a_batch_in_several_forwards(fake_classifier, launches):
    classifier, config = fake_classifier(QWENS[0]), train.TrainConfig()
    classifier.reset(config)
    y = torch.empty(len(LENGTHS), 2, device="meta")
    train.backward_batch(classifier, TOKENS, y, 0.5, config, 800)
    assert launches == 2 * ["forward_kernel"] + ["loss_kernel"] + 2 * ["forward_kernel", "backward_kernel"]
    assert all(p.grad is None for p in classifier.optimizer.rounded)
    assert classifier.features([[1, 2], [3]]).shape == (2, sizes.SHAPES[QWENS[0]].D)


def kept_for_backward(classifier) -> int:
    """Bytes of what autograd saves of a forward, weights left out."""
    weights = {p.untyped_storage()._cdata for p in classifier.model.parameters()}
    saved = {}  # the storages themselves: a freed one's number would be given out again

    def save(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        classifier.logits(TOKENS)
    return sum(s.nbytes() for key, s in saved.items() if key not in weights)


@pytest.mark.parametrize("how", ["full", "checkpointing", "lora"])
@pytest.mark.parametrize("name", QWENS)
def test_a_block_keeps_the_activations_that_plan_counts(name, how, fake_classifier, launches, monkeypatch):
    """Of the kernels that a GPU takes; so --preset paper is planned with all that its forward keeps."""
    rank, kept, planned = 16 * (how == "lora"), {}, {}
    for blocks in (2, 4):
        monkeypatch.setitem(globals(), "BLOCKS", blocks)
        classifier = fake_classifier(name, lora_rank=rank)
        classifier.reset(train.TrainConfig(checkpointing=how == "checkpointing"))
        kept[blocks], shape = kept_for_backward(classifier), sizes.SHAPES[name]._replace(blocks=blocks)
        memory = plan.finetuning_memory(shape, 1, sum(LENGTHS), max(LENGTHS), how == "checkpointing", 2, False, rank)
        planned[blocks] = memory["activations"]
    of_plan = (kept[4] - kept[2]) / (planned[4] - planned[2])
    assert 0.9 < of_plan < 1 if rank else abs(of_plan - 1) < 0.01  # frozen norms keep less than plan counts


def test_a_step_of_many_heads(gpu, launches, monkeypatch):
    D, N, B = 5120, 200, 32
    monkeypatch.setattr(heads, "batches", lambda n, config: [list(range(B))])
    monkeypatch.setattr(heads, "resolve", lambda choice: "triton")
    configs = [train.TrainConfig(loss=loss, seed=seed) for seed in (0, 1) for loss in train.LOSSES]
    x, y = torch.empty(N, D, device="meta"), [torch.empty(N, 2, device="meta") for _ in configs]
    weights = heads.finetune_heads(x, y, configs)
    assert (weights.shape, weights.device.type) == ((len(configs), 2, D), "meta")
    assert launches == ["loss_kernel"] * len(train.LOSSES)


# ---- debates ----


@pytest.mark.parametrize("name", QWENS)
def test_a_batch_of_debates_is_what_fits_the_fullest_gpu(name, gpu, monkeypatch):
    shape, debater = sizes.SHAPES[name]._replace(blocks=BLOCKS), Debater.__new__(Debater)
    for function, value in {"mem_get_info": (50e9, 80e9), "memory_reserved": 7e9, "memory_allocated": 3e9}.items():
        monkeypatch.setattr(torch.cuda, function, lambda value=value: value)
    debater.model = types.SimpleNamespace(config=config_of(name), dtype=torch.bfloat16)
    debater.config, debater.ranks = DebateConfig(), generate.ALONE
    tokens = debater.cache_tokens
    seeds, turns = 4, 3
    rows = seeds * debater.batch_size(400, seeds, turns)
    assert 0.8 * tokens < rows * sizes.debate_tokens(400, turns, 200) <= tokens
    used = sum(sizes.decoding_memory(shape, 2, tokens, rows, tokens).values())
    assert 0.5 * 54e9 < used < 0.9 * 54e9  # free on the card, and what torch holds and does not use
    for config, others, found in ((DebateConfig(), 1234, 1234), (DebateConfig(cache_tokens=99), 1234, 99)):
        debater.config, debater.ranks = config, types.SimpleNamespace(size=2, gather=lambda x, n=others: [x, n])
        del debater.cache_tokens
        assert debater.cache_tokens == found
    debater.config, debater.ranks = DebateConfig(), generate.ALONE
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    del debater.cache_tokens
    assert 3 * debater.cache_tokens == pytest.approx(tokens, rel=1e-3)  # three processes share a GPU


@pytest.mark.parametrize("name", QWENS)
def test_attention_of_a_new_token_copies_no_key(name, gpu):
    s, B, T = sizes.SHAPES[name], 128, 704
    q = torch.empty(B, s.heads, 1, s.d, dtype=torch.bfloat16, device="meta")
    k, v = (torch.empty(B, s.kv_heads, T, s.d, dtype=torch.bfloat16, device="meta") for _ in range(2))
    mask = torch.empty(B, 1, 1, T, dtype=torch.bfloat16, device="meta")
    with SdpaCalls() as sdpa:
        out, _ = grouped_attention(None, q, k, v, mask, scaling=s.d**-0.5)
    [(args, options)] = sdpa.calls
    assert args[0].shape == (B, s.kv_heads, s.heads // s.kv_heads, s.d)
    assert args[1] is k and args[2] is v and args[3] is mask and options == {"scale": s.d**-0.5}
    assert (out.shape, out.dtype) == ((B, 1, s.heads, s.d), torch.bfloat16)


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (0.4, 1.0), (0.4, 0.9)])
@pytest.mark.parametrize("name", QWENS)
def test_prefill_and_a_turn_that_never_waits(name, temperature, top_p, gpu, monkeypatch):
    s, debater = sizes.SHAPES[name], Debater.__new__(Debater)
    debater.spec, debater.config = ModelSpec(name), DebateConfig(30, temperature, top_p, dtype="bfloat16")
    debater.is_end = torch.empty(s.V, dtype=torch.bool, device="meta")
    debater.load()
    session = debater.prefill([[1] * 40 + [2] * n for n in (5, 9, 1)], copies=4)
    logits = session.forward([[3] * 3] * 12, [[4] * 7, [5]] * 6, room=30).masked_fill(debater.is_end, -torch.inf)
    before = session.columns
    assert (logits.shape, logits.dtype, logits.device.type) == ((12, s.V), torch.float32, "meta")
    open_rows = iter([12] * 20 + [6] * 9 + [3])  # after each step; a GPU's are known one step later
    monkeypatch.setattr(generate, "start_reading", lambda x: functools.partial(int, next(open_rows)))
    buffers = session.cache.layers[0].buffers
    shapes = [b.shape for b in buffers]
    with NoWaits():
        said, finite = debater.decode(session, logits, torch.empty(30, 12, dtype=torch.long, device="meta"))
    assert (said.shape, said.dtype, finite.shape) == ((30, 12), torch.int64, ()) and said.is_cuda and finite.is_cuda
    # then half of the rows went on without the others
    assert session.columns == before + 21 and len(session.mask) == 12
    assert [b.shape for b in buffers] == shapes == [(12, s.kv_heads, 128, s.d)] * 2 and session.mask.shape[1] == 128
    assert {b.dtype for b in buffers} == {torch.bfloat16} and all(b.is_cuda for b in buffers)
