"""Models of random weights at real shapes: what the benchmarks need where there is no hub.

    python -m bench.made_up FOLDER Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-7B

Writes FOLDER/<shape> for each shape, an ordinary Hugging Face folder. A word is a token: its tokenizer has as many words as
the model has rows, so that what a random model says is read again at its length.
"""

import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import sizes
from common import InputError, print0, run_script
from model import device, resolve_dtype
from sizes import Shape

SHAPES = sizes.SHAPES | {"Qwen/Qwen2.5-7B": Shape(3584, 28, 18944, 28, 4, 128, 152064)}


def write_model(shape: Shape, folder: Path) -> None:
    config = transformers.LlamaConfig(  # Qwen's but for biases; with a Qwen2Config its tokenizer class would take over
        head_dim=shape.d, vocab_size=shape.V, hidden_size=shape.D, intermediate_size=shape.F, num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied,
        max_position_embeddings=32768, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with device():
        transformers.AutoModelForCausalLM.from_config(config, dtype=resolve_dtype("auto")).save_pretrained(folder)
    vocab = {word: i for i, word in enumerate(["<eos>", "<unk>", *(f"word{i}" for i in range(2, shape.V))])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)


def main() -> None:
    folder, *names = sys.argv[1:] or [""]
    if not folder or set(names) - SHAPES.keys():
        raise InputError(f"usage: python -m bench.made_up FOLDER SHAPE ...; shapes: {', '.join(SHAPES)}")
    for name in names:
        write_model(SHAPES[name], Path(folder) / name.split("/")[-1])
        print0(f"{folder}/{name.split('/')[-1]}: random weights at the shape of {name}")


if __name__ == "__main__":
    run_script(main)
