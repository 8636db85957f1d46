"""First-generation Qwen (Qwen-7B, Qwen-14B) as Qwen2 folders: their own repositories ask for remote code, which is never run.

    python -m data.convert_qwen SOURCE OUT        SOURCE: Qwen/Qwen-7B, Qwen/Qwen-14B, or a folder as they have it

The architecture is Qwen2's under other names: one fused matrix with bias for queries, keys and values, an MLP that computes
c_proj(w1(x) * silu(w2(x))) at half of `intermediate_size`, RMSNorm, rotary positions in halves. Logarithmic attention scaling and
dynamic NTK act only beyond `seq_length`, which becomes the longest context. The tokenizer is made from qwen.tiktoken.
Weights are read and written shard by shard: memory holds one shard.
"""

import base64
import json
import sys
from functools import partial
from pathlib import Path

from common import InputError, print0, read_json, run_script
from data.models import cache_dir, made_once

FIRST_QWEN = {  # hub id -> revision
    "Qwen/Qwen-7B": "ef3c5c9c57b252f3149c1408daf4d649ec8b6c85",
    "Qwen/Qwen-14B": "5ea0d35feedf5bb275800b986244d4703dbab6ea",
}
RENAMED = {  # parts of Qwen's names -> of Qwen2's; c_attn is cut in three besides
    "transformer.h.": "model.layers.", "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm",
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]


def converted_folder(name: str, revision: str | None = None) -> Path:
    """The Qwen2 folder of a hub id, in the user's cache; downloaded and converted on first use."""
    revision = revision or FIRST_QWEN[name]
    folder = cache_dir() / f"{name.replace('/', '--')}@{revision[:12]}"
    return made_once(folder, lambda made: convert(downloaded(name, revision), made))


def downloaded(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    files = ["config.json", "qwen.tiktoken", "*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except OSError as e:
        raise InputError(f"model {name!r}: {str(e).splitlines()[0]}") from None


def convert(source: Path, folder: Path) -> None:
    """Write `source` as a Qwen2 folder. Raises InputError naming the shard and the tensor that are wrong."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2ForCausalLM

    config = qwen2_config(source)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in Qwen2ForCausalLM(config).state_dict().items()}
    file_of, dtypes, size = {}, set(), 0
    tokenizer(source / "qwen.tiktoken").save_pretrained(folder)
    for shard in sorted(source.glob("*.safetensors")):
        print0(f"converting {shard.name}")
        try:
            old = load_file(shard)
        except SafetensorError as e:
            raise InputError(f"{shard}: {e}") from None
        new = {k: v for name, x in old.items() for k, v in renamed(name, x).items()}
        for name, x in new.items():
            dtypes.add(x.dtype)
            if name not in shapes:
                raise InputError(f"{shard}: {name} is no weight of Qwen")
            if name in file_of:
                raise InputError(f"{shard}: {name} is in {file_of[name]} too")
            if x.shape != shapes[name]:
                raise InputError(f"{shard}: {name} has shape {list(x.shape)}, expected {list(shapes[name])}")
            if len(dtypes) > 1:
                raise InputError(f"{shard}: {name} is {x.dtype}, others are {(dtypes - {x.dtype}).pop()}")
        save_file(new, folder / shard.name, metadata={"format": "pt"})
        file_of |= dict.fromkeys(new, shard.name)
        size += sum(x.nbytes for x in new.values())
    if missing := sorted(shapes.keys() - file_of.keys()):
        raise InputError(f"{source}: {len(missing)} weights are in no shard, the first is {missing[0]}")
    index = {"metadata": {"total_size": size}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.dtype = dtypes.pop()
    config.save_pretrained(folder)


def qwen2_config(source: Path):
    """The configuration as a Qwen2Config. Raises InputError on another model's, or another kind of Qwen's."""
    from transformers import Qwen2Config

    c = read_json(source / "config.json") or {}
    needed = {
        "model_type": "qwen", "no_bias": True, "rotary_pct": 1.0, "tie_word_embeddings": False,
        "kv_channels": c.get("hidden_size", 0) // max(c.get("num_attention_heads", 1), 1),
    }  # fmt: skip
    for key, value in needed.items():
        if c.get(key) != value:
            raise InputError(f"{source}/config.json: {key} is {c.get(key)!r}, a first-generation Qwen has {value!r}")
    return Qwen2Config(
        vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"] // 2,
        num_hidden_layers=c["num_hidden_layers"], num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_attention_heads"], max_position_embeddings=c["seq_length"],
        rms_norm_eps=c["layer_norm_epsilon"], tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
        rope_parameters={"rope_type": "default", "rope_theta": float(c["rotary_emb_base"])},
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip


def renamed(name: str, x) -> dict:
    """The weights of Qwen2 that one of Qwen becomes: the fused matrix makes three, the rotary frequencies none."""
    if name.endswith("rotary_emb.inv_freq"):
        return {}  # a function of the configuration
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    if "attn.c_attn" not in name:
        return {name: x}
    thirds = zip("qkv", x.chunk(3), strict=False)
    return {name.replace("attn.c_attn", f"self_attn.{p}_proj"): part.clone() for p, part in thirds}


def tokenizer(file: Path):
    """A fast tokenizer from a tiktoken file: lines of a base64 token and its rank. Special tokens follow the last rank."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: no tiktoken file ({e})") from None
    converter = TikTokenConverter(pattern=SPLIT, extra_special_tokens=SPECIAL)
    converter.load_tiktoken_bpe = lambda _: ranks  # its own reader needs the package tiktoken
    fast = converter.converted()
    fast.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=SPECIAL[0], pad_token=SPECIAL[0])


def main() -> None:
    if len(sys.argv) != 3:
        raise InputError("usage: python -m data.convert_qwen SOURCE OUT")
    source, out = sys.argv[1], Path(sys.argv[2])
    if out.exists():
        raise InputError(f"OUT {str(out)!r} exists; name a folder that does not")
    folder = downloaded(source, FIRST_QWEN[source]) if source in FIRST_QWEN else Path(source)
    made_once(out, partial(convert, folder))
    print0(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
