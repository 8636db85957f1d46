"""Models: where they come from, how they are loaded, the packed forward, and the classifier that is finetuned.

Every batch is one padding-free forward: its samples are laid end to end, attention stays inside each sample, and only
the last token of each sample reaches the head. Shapes: B batch, T tokens of the batch, D width, K classes.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers  # its parts are imported when they are used: a plan needs none of them
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

import lora
from common import ALONE, InputError, Ranks, read_json, write_text
from data.convert_qwen import FIRST_QWEN, converted_folder
from data.models import BUILTIN, builtin_folder, save
from kernels import resolve
from kernels.head import head
from optim import MasterAdam
from stages import digest

# ---- where a model is, and how it is loaded ----


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """`ID_OR_DIR[@revision][:layers]`: a hub id, a local folder or a built-in model, whole or its first N blocks."""

    name: str
    revision: str | None = None
    layers: int | None = None

    @classmethod
    def parse(cls, spec: str) -> "ModelSpec":
        name, _, layers = spec.rpartition(":") if spec.rpartition(":")[2].isdecimal() else (spec, "", "")
        name, _, revision = name.partition("@") if not Path(name).exists() else (name, "", "")
        if not name:
            raise InputError(f"model {spec!r}: no name; give a hub id, a folder or one of the built-in models")
        if layers and int(layers) < 1:
            raise InputError(f"model {spec!r}: the number of layers must be at least 1")
        return cls(name, revision or None, int(layers) if layers else None)

    def source(self) -> dict:
        """Arguments that say to `from_pretrained` where the model is; built-in models are made on first use."""
        name = self.name
        if name in BUILTIN:
            name = str(builtin_folder(name))
        elif name in FIRST_QWEN:
            name = str(converted_folder(name, self.revision))
        elif Path(name).is_dir():
            check_folder(Path(name))
        elif name.count("/") != 1 or name.startswith((".", "/")):
            known = f"neither a hub id (owner/name) nor built in ({', '.join(BUILTIN)})"
            raise InputError(f"model {name!r}: no such folder, and {known}")
        return {"pretrained_model_name_or_path": name, "revision": self.revision or "main"}

    def identity(self) -> dict:
        """What a manifest records of the model: a local folder's digest, or the built-in's or hub's name and revision."""
        built_in = BUILTIN.get(self.name, "")[:16]
        local = digest(Path(self.name)) if not built_in and Path(self.name).is_dir() else ""
        revision = built_in or self.revision or FIRST_QWEN.get(self.name, "main")
        return {"weights": local or f"{self.name}@{revision}", "layers": self.layers}


def check_folder(folder: Path) -> None:
    """Raises InputError where a model's folder leads out of itself or could not be a model's. Nothing of it is loaded."""
    model = f"model {str(folder)!r}"
    roots = (folder.resolve(), folder.resolve().parent.parent / "blobs")  # where the hub's own cache keeps the files
    for file in folder.rglob("*"):
        if file.is_symlink() and not any(file.resolve().is_relative_to(r) for r in roots):
            raise InputError(f"{model}: {file.name} is a link out of the folder; copy the file into it")
        if file.suffix == ".json" and file.stat().st_size > 100 * 2**20:
            raise InputError(f"{model}: {file.name} has {file.stat().st_size} bytes, too many for JSON")
    config = read_json(folder / "config.json")
    if not config:
        what = "no" if config is None else "no readable"
        raise InputError(f"{model}: {what} config.json there; name a Hugging Face model's folder")
    if config.get("model_type") == "qwen":
        raise InputError(f"{model}: a first-generation Qwen; `python -m data.convert_qwen {folder} OUT` converts it")
    shards = (read_json(folder / "model.safetensors.index.json") or {}).get("weight_map", {})
    names = set(map(str, shards.values())) if isinstance(shards, dict) else {"weight_map"}
    for name in names or {"model.safetensors"}:
        if Path(name).name != name or not (folder / name).is_file():
            only = "of weights, only safetensors files in the folder itself are loaded, never pickles"
            raise InputError(f"{model}: no file {name!r} there; {only}")


@contextlib.contextmanager
def loading(spec: ModelSpec) -> Iterator[None]:
    """Turns what the libraries raise on a broken model into one line that names it; out-of-memory errors pass through."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        why = (str(e) or type(e).__name__).splitlines()[0]
        if "trust_remote_code" in str(e):
            why = "asks for code of its own, which is never run; choose a model that transformers itself knows"
        raise InputError(f"model {spec.name!r}: {why}") from None


def load_config(spec: ModelSpec, **changes):
    """The model's configuration with `changes`, cut to its first `layers` blocks where asked."""
    logging = transformers.utils.logging
    logging.set_verbosity_error()  # its notes on unused and new weights are what cutting and a new head must cause
    logging.disable_progress_bar()
    source = spec.source()
    with loading(spec):
        config = transformers.AutoConfig.from_pretrained(**source, **changes, trust_remote_code=False)
    for name in vars(config):
        if name.endswith(("dropout", "pdrop")):
            setattr(config, name, 0.0)  # also where activation checkpointing asks for training mode
    if spec.layers:
        if spec.layers > config.num_hidden_layers:
            raise InputError(f"model {spec.name!r} has {config.num_hidden_layers} layers, {spec.layers} were asked for")
        config.num_hidden_layers = spec.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: spec.layers]
    return config


def load_tokenizer(spec: ModelSpec):
    rows = load_config(spec).vocab_size  # says in one line what is wrong with the model's name
    with loading(spec):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**spec.source(), trust_remote_code=False)
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        why = f"its tokenizer has token {highest}, the model's vocabulary ends at {rows - 1}"
        raise InputError(f"model {spec.name!r}: {why}; give the model its own tokenizer")
    if tokenizer.eos_token_id is None:
        raise InputError(f"model {spec.name!r}: its tokenizer has no end-of-text token")
    tokenizer.model_max_length = int(1e9)  # length limits are ours, counted and recorded
    return tokenizer


def load_model(spec: ModelSpec, auto_class, dtype, attn_implementation: str = "sdpa", parallel=None, **changes):
    """`auto_class.from_pretrained` from safetensors only, never remote code, cut to the asked number of blocks.

    `dtype`: a torch.dtype, or "auto" for the model's own. `parallel`: a transformers DistributedConfig that spreads it over
    the processes. Raises InputError where the file lacks a weight (but a new head, `score`), which would be left random.
    """
    config = load_config(spec, **changes)
    with loading(spec):
        model, found = auto_class.from_pretrained(
            **spec.source(), config=config, dtype=dtype, attn_implementation=attn_implementation, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, distributed_config=parallel,
        )  # fmt: skip
    if lacking := sorted(name for name in found["missing_keys"] if not name.startswith("score.")):
        raise InputError(f"model {spec.name!r}: its files lack {len(lacking)} weights, the first is {lacking[0]}")
    return model


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str):
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    auto = "bfloat16" if device().type == "cuda" else "float32"
    return getattr(torch, auto if name == "auto" else name)


# ---- the packed forward ----

VARLEN_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 takes grouped heads unasked


@dataclasses.dataclass(frozen=True)
class Pack:
    """Layout of a packed batch: B sample lengths, their running sum, and each token's padded slot."""

    lengths: list[int]
    cu_seqlens: Tensor  # [B + 1] int32
    slots: Tensor  # [T] index into [B * longest]


def pack(samples: list[list[int]], dev: torch.device) -> tuple[Tensor, Tensor, Pack]:
    """Token ids [1, T], positions [1, T] that restart with every sample, and the Pack."""
    lengths = [len(s) for s in samples]
    positions = torch.cat([torch.arange(n) for n in lengths])
    row = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths))
    cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    ids = torch.tensor([t for s in samples for t in s])
    where = Pack(lengths, to_device(cu, dev), to_device(row * max(lengths) + positions, dev))
    return to_device(ids[None], dev), to_device(positions[None], dev), where


def to_device(x: Tensor, dev: torch.device) -> Tensor:
    """A copy that the CPU does not wait for."""
    return x if dev.type == "cpu" else x.pin_memory().to(dev, non_blocking=True)


def refuse_special_attention(module, longest: int, options: dict) -> None:
    """Raises InputError where a model asks for what is not computed: capped scores, sinks, a window of fewer tokens than there are."""
    window = options.get("sliding_window")
    if options.get("softcap") or options.get("s_aux") is not None or (window and window < longest):
        raise InputError(
            f"{type(module).__name__}: its attention has sinks, capped scores or a window of {window} tokens (the longest "
            f"text has {longest}), which is not computed here; choose another model, or shorter texts"
        )


def packed_attention(module, query, key, value, attention_mask, scaling=None, pack: Pack = None, **options):
    """Causal attention inside each sample of a packed batch: query [1, H, T, d], key, value [1, H_kv, T, d] -> [1, T, H, d]."""
    B, L, groups = len(pack.lengths), max(pack.lengths), query.shape[1] // key.shape[1]
    refuse_special_attention(module, L, options)
    if query.is_cuda and query.dtype == torch.bfloat16 and query.shape[3] % 8 == 0:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        gqa = {"enable_gqa": groups > 1} if VARLEN_TAKES_GQA else {}
        cu = pack.cu_seqlens
        return varlen_attn(q, k, v, cu, cu, L, L, scale=scaling, window_size=(-1, 0), **gqa)[None], None

    def padded(x: Tensor) -> Tensor:  # [1, H, T, d] -> [B, H, L, d]
        H, d = x.shape[1], x.shape[3]
        return x.new_zeros(B * L, H, d).index_copy(0, pack.slots, x[0].transpose(0, 1)).view(B, L, H, d).transpose(1, 2)

    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if query.is_cuda:  # EFFICIENT stores no scores, and takes no grouped heads
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    elif query.dtype == torch.float32:  # of bfloat16 a CPU's FlashAttention goes back more slowly than MATH
        backends.append(SDPBackend.FLASH_ATTENTION)
    q, k, v, grouped = padded(query), padded(key), padded(value), query.shape[1] != key.shape[1]
    with sdpa_kernel(backends):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)[pack.slots][None], None


# ---- the classifier ----


class Classifier:
    """A Hugging Face decoder with a bias-free head on the last token; `reset` brings back the pretrained weights.

    With a `lora_rank` all of it but the head is frozen, whole on every rank in `dtype`, and adapters learn in its place.
    """

    def __init__(
        self, spec: ModelSpec, n_classes: int, dtype: torch.dtype, kernels: str = "auto", ranks: Ranks = ALONE,
        lora_rank: int = 0, lora_alpha: int = 0,
    ):  # fmt: skip
        self.kernels, self.ranks, self.sharded = resolve(kernels), ranks, ranks.size > 1 and not lora_rank
        self.spec, self.dtype, self.n_classes, self.tokenizer = spec, dtype, n_classes, load_tokenizer(spec)
        eager = torch.compiler.disable(packed_attention)  # lengths differ: every batch would compile a graph of its own
        transformers.AttentionInterface.register("packed", eager)
        self.model = self.load()
        if not hasattr(self.model, "score"):
            raise InputError(f"model {spec.name!r}: a {self.model.config.model_type} is no decoder-only language model")
        self.model.config.pad_token_id = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
        n_blocks = self.model.config.num_hidden_layers
        self.blocks = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_blocks)
        if self.sharded:
            self.shard()
        else:
            for p in self.model.base_model.parameters():
                p.data = p.data.to(device(), dtype)  # weights alone: rotary frequencies, buffers, stay float32
        self.adapters = lora.attach(self.model.base_model, self.blocks, lora_rank, lora_alpha) if lora_rank else []
        if lora_rank and not self.adapters:
            why = f"the blocks of a {self.model.config.model_type} have no torch.nn.Linear to adapt"
            raise InputError(f"model {spec.name!r} with --lora-rank {lora_rank}: {why}; choose rank 0")
        self.model.score.float()
        self.model.to(device())

    def load(self):
        """The model in the dtype of its files, which are mapped, not read: all ranks share one copy, the system's."""
        auto_class = transformers.AutoModelForSequenceClassification
        return load_model(self.spec, auto_class, "auto", num_labels=self.n_classes, attn_implementation="packed")

    def shard(self) -> None:
        """Spread float32 weights, gradients and moments over the ranks (FSDP2). A block is whole only while it computes."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = DeviceMesh.from_group(self.ranks.group or torch.distributed.group.WORLD, device().type)
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        for module in (*self.blocks, self.model.base_model):  # float32 one after the other; the head stays whole
            fully_shard(module.to(device(), torch.float32), mesh=mesh, mp_policy=policy)

    @functools.cached_property
    def pretrained(self) -> list[Tensor]:
        """Weights of the base model before any training, mapped as `load` says: not rounded, and no memory of this rank's."""
        return list(self.load().base_model.parameters())

    @functools.cached_property
    def optimizer(self) -> MasterAdam:
        return MasterAdam([*(self.adapters or self.model.base_model.parameters()), self.model.score.weight])

    @property
    def whole(self) -> list[Tensor]:
        """What every rank trains a copy of, so that its gradients have to be added up: the head, and adapters."""
        return [*self.adapters, self.model.score.weight]

    def reset(self, config) -> None:
        """Ready for a run with this TrainConfig: pretrained weights, head and adapters as at the start, no moments."""
        toggle = f"activation_checkpointing_{'enable' if config.checkpointing else 'disable'}"
        if not hasattr(self.model, toggle):  # transformers 5.17
            toggle = toggle.replace("activation", "gradient")
        getattr(self.model, toggle)()
        self.model.train(config.checkpointing)  # transformers checkpoints in training mode only; dropout is zero anyway
        for block in self.blocks:
            if config.compile and not block._compiled_call_impl:
                block.compile()
        if self.sharded:
            self.model.base_model.reshard()  # a prediction leaves the root's weights gathered, and they would stay the old ones
        body = lora.starts(self.adapters, config.seed) if self.adapters else self.pretrained
        self.optimizer.reset([*body, torch.zeros_like(self.model.score.weight)])

    def hidden(self, samples: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Hidden states [T, D] after the final norm, of one packed forward, and which rows of them are last tokens [B]."""
        ids, positions, where = pack(samples, self.model.device)
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": None, "pack": where}
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state[0], where.cu_seqlens[1:] - 1

    def features(self, samples: list[list[int]]) -> Tensor:
        """What the head reads, float32 [B, D]."""
        hidden, rows = self.hidden(samples)
        return hidden[rows.long()].float()

    def logits(self, samples: list[list[int]]) -> Tensor:
        """Class logits, float32 [B, K]."""
        return head(*self.hidden(samples), self.model.score.weight, self.kernels)

    def encode(self, texts: list[str], max_tokens: int) -> tuple[list[list[int]], int]:
        """Token ids of each text, and how many texts were cut to `max_tokens`: these lose their middle, which belongs to the
        transcript, as the question stands at one end."""
        ids = self.tokenizer(texts, add_special_tokens=True)["input_ids"]
        if not all(ids):
            raise ValueError(f"text {ids.index([])} has no token for the head to read: {texts[ids.index([])]!r}")
        last = max_tokens // 2
        whole = [i if len(i) <= max_tokens else i[: max_tokens - last] + i[len(i) - last :] for i in ids]
        return whole, sum(len(i) > max_tokens for i in ids)


# ---- as an ordinary folder ----


def save_model(classifier: Classifier, folder: Path, settings, trained_on: str) -> None:
    """A folder with a model card, by rank 0 of the group: for AutoModelForSequenceClassification, or adapters for peft."""
    spec, model = classifier.spec, classifier.model
    weights, state = {}, {} if classifier.adapters else model.state_dict()
    for name, x in state.items():
        whole = x.full_tensor() if hasattr(x, "full_tensor") else x  # the shards of all ranks, one weight at a time
        if classifier.ranks.rank == 0:
            weights[name] = whole.to("cpu", copy=True)  # not the view of a padded buffer that it may be
    if classifier.ranks.rank:  # rank 0 of the group; a model's own save_pretrained writes on global rank 0 alone
        return
    if classifier.adapters:
        cut = f":{spec.layers}" if spec.layers else ""  # no hub has that name: nobody takes the model for the whole one
        lora.save(model, folder, spec.name + cut, spec.revision)
        classifier.tokenizer.save_pretrained(folder)
    else:
        save(model, weights, classifier.tokenizer, folder)
    write_text(folder / "README.md", model_card(spec, settings, trained_on))


def load_kept(folder: Path, n_classes: int, dtype: torch.dtype) -> Classifier:
    """What `save_model` wrote, to predict with: a whole model, or adapters on the model that they name."""
    adapter = read_json(folder / "adapter_config.json")
    if not adapter:
        return Classifier(ModelSpec(str(folder)), n_classes, dtype)
    spec = dataclasses.replace(ModelSpec.parse(adapter["base_model_name_or_path"]), revision=adapter["revision"])
    classifier = Classifier(spec, n_classes, dtype, lora_rank=adapter["r"], lora_alpha=adapter["lora_alpha"])
    lora.load(classifier.model, folder)
    return classifier


def model_card(spec: ModelSpec, config, trained_on: str) -> str:
    name = Path(spec.name).name + (f", its first {spec.layers} blocks" if spec.layers else "")
    settings = "\n".join(f"| {name} | {value} |" for name, value in dataclasses.asdict(config).items())
    what = f"LoRA adapters of rank {config.lora_rank} for {name}, and" if config.lora_rank else f"{name}, with"
    return f"""---
library_name: {"peft" if config.lora_rank else "transformers"}
pipeline_tag: text-classification
---
# Finetuned on {trained_on}

{what} a bias-free head on the last token; class 1 is the probability that the text shown is right, or
preferred. Loaded with `dtype=torch.float32` it gives the recorded probabilities, to the rounding of {config.dtype}. Made by an
experiment in weak-to-strong generalization: its labels may be a weak model's.

| setting | value |
|---|---|
{settings}
"""
