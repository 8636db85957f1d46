"""First-generation Qwen (Qwen-7B, Qwen-14B) as Qwen2 folders: their own repositories ask for remote code, which is never run.

    python -m data.convert_qwen SOURCE OUT        SOURCE: Qwen/Qwen-7B, Qwen/Qwen-14B, or a folder as they have it

The architecture is Qwen2's under other names: one fused matrix with bias for queries, keys and values, an MLP that computes
c_proj(w1(x) * silu(w2(x))) at half of `intermediate_size`, RMSNorm, rotary positions in halves. Logarithmic attention scaling and
dynamic NTK act only beyond `seq_length`, which becomes the longest context. The tokenizer is made from qwen.tiktoken.
Weights are read and written shard by shard: memory holds one shard.
"""

import base64
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import InputError, print0, run_script
from data.models import cache_dir

FIRST_QWEN = {  # hub id -> revision
    "Qwen/Qwen-7B": "ef3c5c9c57b252f3149c1408daf4d649ec8b6c85",
    "Qwen/Qwen-14B": "5ea0d35feedf5bb275800b986244d4703dbab6ea",
}
FILES = ("config.json", "qwen.tiktoken", "*.safetensors", "*.safetensors.index.json")
BLOCK = {  # name in Qwen's block -> name in Qwen2's
    "ln_1.weight": "input_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
OUTSIDE = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]


def converted_folder(name: str, revision: str | None = None) -> Path:
    """The Qwen2 folder of a hub id, in the user's cache; downloaded and converted on first use."""
    revision = revision or FIRST_QWEN[name]
    folder = cache_dir() / f"{name.replace('/', '--')}@{revision[:12]}"
    if not folder.exists():
        convert(downloaded(name, revision), folder)
    return folder


def downloaded(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except OSError as e:
        raise InputError(f"model {name!r}: {str(e).splitlines()[0]}") from None


def convert(source: Path, folder: Path) -> None:
    """Write `source` as a Qwen2 folder, whole or not at all. Raises InputError naming the shard and the tensor that are wrong."""
    from safetensors.torch import save_file
    from transformers import Qwen2Config

    config = read_config(source)
    shapes, kept = expected_shapes(config), {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        made, size = Path(tmp) / "model", 0
        made.mkdir()
        shards = sorted(source.glob("*.safetensors"))
        for n, shard in enumerate(shards, 1):
            print0(f"converting {shard.name}, {n} of {len(shards)}")
            tensors = {}
            for name, tensor in tensors_of(shard):
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # a function of the configuration
                if name not in shapes or name in kept:
                    raise InputError(
                        f"{shard}: {name} is {'in another shard too' if name in kept else 'no weight of Qwen'}"
                    )
                if list(tensor.shape) != shapes[name]:
                    raise InputError(f"{shard}: {name} has shape {list(tensor.shape)}, expected {shapes[name]}")
                if kept and str(tensor.dtype) not in kept.values():
                    raise InputError(f"{shard}: {name} is {tensor.dtype}, the shards before are {min(kept.values())}")
                kept[name] = str(tensor.dtype)
                tensors |= renamed(name, tensor)
            file = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
            save_file(tensors, made / file, metadata={"format": "pt"})
            size += sum(t.nbytes for t in tensors.values())
            index = made / "model.safetensors.index.json"
            before = json.loads(index.read_text())["weight_map"] if index.exists() else {}
            index.write_text(
                json.dumps({"metadata": {"total_size": size}, "weight_map": before | dict.fromkeys(tensors, file)})
            )
        if missing := sorted(shapes.keys() - kept.keys()):
            raise InputError(f"{source}: {len(missing)} weights are in no shard, the first is {missing[0]}")
        Qwen2Config(
            vocab_size=config["vocab_size"], hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"] // 2, num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"], num_key_value_heads=config["num_attention_heads"],
            max_position_embeddings=config["seq_length"], rms_norm_eps=config["layer_norm_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": float(config["rotary_emb_base"])},
            tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"], dtype=next(iter(kept.values()))[6:],
            eos_token_id=None, bos_token_id=None,
        ).save_pretrained(made)  # fmt: skip
        tokenizer(source / "qwen.tiktoken").save_pretrained(made)
        os.replace(made, folder)


def read_config(source: Path) -> dict:
    """The configuration of a first-generation Qwen. Raises InputError on another model's, or another kind of Qwen's."""
    try:
        config = json.loads((source / "config.json").read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{source}: no readable config.json ({e})") from None
    needed = {
        "model_type": "qwen", "no_bias": True, "rotary_pct": 1.0, "tie_word_embeddings": False,
        "kv_channels": config.get("hidden_size", 0) // max(config.get("num_attention_heads", 1), 1),
    }  # fmt: skip
    for key, value in needed.items():
        if config.get(key) != value:
            raise InputError(
                f"{source}/config.json: {key} is {config.get(key)!r}, a first-generation Qwen has {value!r}"
            )
    return config


def expected_shapes(config: dict) -> dict[str, list[int]]:
    D, V, inner = config["hidden_size"], config["vocab_size"], config["intermediate_size"] // 2
    block = {
        "ln_1.weight": [D], "ln_2.weight": [D], "attn.c_attn.weight": [3 * D, D], "attn.c_attn.bias": [3 * D],
        "attn.c_proj.weight": [D, D], "mlp.w1.weight": [inner, D], "mlp.w2.weight": [inner, D],
        "mlp.c_proj.weight": [D, inner],
    }  # fmt: skip
    blocks = {f"transformer.h.{n}.{k}": s for n in range(config["num_hidden_layers"]) for k, s in block.items()}
    return blocks | {"transformer.wte.weight": [V, D], "transformer.ln_f.weight": [D], "lm_head.weight": [V, D]}


def tensors_of(shard: Path) -> Iterator[tuple]:
    """Name and tensor, one by one. Raises InputError on a file that is truncated or no safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    except SafetensorError as e:
        raise InputError(f"{shard}: {e}") from None


def renamed(name: str, tensor) -> dict:
    """The tensors of Qwen2 that one of Qwen becomes: the fused matrix makes three, all others one."""
    if name in OUTSIDE:
        return {OUTSIDE[name]: tensor}
    _, _, n, part = name.split(".", 3)
    if part in BLOCK:
        return {f"model.layers.{n}.{BLOCK[part]}": tensor}
    kind = part.rpartition(".")[2]  # weight or bias of c_attn
    thirds = zip("qkv", tensor.chunk(3), strict=True)
    return {f"model.layers.{n}.self_attn.{x}_proj.{kind}": t.contiguous() for x, t in thirds}


# ---- the tokenizer: byte pairs in the order of their ranks ----


def tokenizer(file: Path):
    """A fast tokenizer from a tiktoken file: lines of a base64 token and its rank. Special tokens follow the last rank."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: no tiktoken file ({e})") from None
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # ByteLevel's alphabet: the rest moves up from 256
    hidden = [b for b in range(256) if b not in visible]
    letter = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}

    def spelled(token: bytes) -> str:
        return "".join(letter[b] for b in token)

    pairs = (halves(ranks, token) for token in sorted(ranks, key=ranks.get) if len(token) > 1)
    merges = [(spelled(a), spelled(b)) for a, b in filter(None, pairs)]
    fast = Tokenizer(models.BPE(vocab={spelled(t): r for t, r in ranks.items()}, merges=merges, ignore_merges=True))
    fast.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=SPECIAL[0], pad_token=SPECIAL[0])


def halves(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes] | None:
    """The two tokens that `token` is merged from by pairs of lower rank; None where it is not reached that way."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, ranks[token]) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(joined)
        if best >= ranks[token]:
            return None
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def main() -> None:
    if len(sys.argv) != 3:
        raise InputError("usage: python -m data.convert_qwen SOURCE OUT")
    source, out = sys.argv[1], Path(sys.argv[2])
    if out.exists():
        raise InputError(f"OUT {str(out)!r} exists; name a folder that does not")
    convert(downloaded(source, FIRST_QWEN[source]) if source in FIRST_QWEN else Path(source), out)
    print0(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
