"""Sizes that plan.py knows without a download: of the tasks, the models, the GPUs."""

from pathlib import Path
from typing import NamedTuple

from common import InputError
from model import ModelSpec, load_config

CPU_CACHE_TOKENS = 32768  # of keys and values that a batch of debates may fill on a CPU, where more rows gain nothing

SIZES = {  # rows: train after the cap of 20,000, test; tokens of a sample: mean, most; of its evidence: mean, most
    "sciq": (11_679, 1_000, 22, 100, 0, 0),
    "sciq_evidence": (10_481, 884, 22, 100, 100, 900),
    "sciq_half_evidence": (10_481, 884, 22, 100, 56, 560),
    "sciq_other_evidence": (10_481, 884, 22, 100, 100, 900),
    "boolq": (9_427, 3_270, 146, 1024, 0, 0),
    "boolq_evidence": (9_427, 3_270, 14, 40, 132, 984),
    "cosmos_qa": (20_000, 2_985, 102, 250, 0, 0),
    "cosmos_qa_evidence": (20_000, 2_985, 30, 80, 72, 170),
    "anthropic_hh": (20_000, 8_552, 153, 1024, 0, 0),
    "anthropic_hh_mixed": (20_000, 8_552, 153, 1024, 0, 0),
    "facts": (2_227, 1_076, 15, 30, 0, 0),
    "facts_evidence": (2_227, 1_076, 15, 30, 12, 30),
    "places": (791, 396, 15, 30, 0, 0),
    "places_evidence": (791, 396, 15, 30, 12, 30),
}


class Shape(NamedTuple):
    """A decoder of the Llama and Qwen families: width, blocks, MLP width, heads, heads of keys, head width, vocabulary."""

    D: int
    blocks: int
    F: int
    heads: int
    kv_heads: int
    d: int
    V: int
    tied: bool = False

    @classmethod
    def of(cls, c) -> "Shape":
        """From a model's configuration. Raises AttributeError where it is too unlike Llama's."""
        heads, D = c.num_attention_heads, c.hidden_size
        d, kv_heads = getattr(c, "head_dim", None) or D // heads, getattr(c, "num_key_value_heads", heads)
        F = getattr(c, "intermediate_size", None) or 4 * D
        return cls(D, c.num_hidden_layers, F, heads, kv_heads, d, c.vocab_size, c.tie_word_embeddings)

    @property
    def body(self) -> int:
        """Parameters of the blocks, without norms and biases."""
        return self.blocks * (2 * self.D * self.d * (self.heads + self.kv_heads) + 3 * self.D * self.F)

    def adapters(self, rank: int) -> int:
        """Parameters of adapters of this rank on the blocks' linear layers."""
        ends = 2 * (2 * self.D + self.d * (self.heads + self.kv_heads)) + 3 * (self.D + self.F)
        return rank * self.blocks * ends

    @property
    def kv(self) -> int:
        """Elements of a token's keys and values."""
        return 2 * self.blocks * self.kv_heads * self.d


SHAPES = {  # of the presets' models, so that a plan needs no download
    "Qwen/Qwen-7B": Shape(4096, 32, 11008, 32, 32, 128, 151936),
    "Qwen/Qwen-14B": Shape(5120, 40, 13696, 40, 40, 128, 152064),
    "Qwen/Qwen2.5-0.5B": Shape(896, 24, 4864, 14, 2, 64, 151936, True),
    "Qwen/Qwen2.5-1.5B": Shape(1536, 28, 8960, 12, 2, 128, 151936, True),
    "smollm2-135m": Shape(576, 30, 1536, 9, 3, 64, 49152, True),
    "random-small": Shape(32, 2, 64, 4, 2, 8, 257, True),
    "random-large": Shape(64, 2, 128, 4, 2, 16, 257, True),
}


def shape_of(spec: ModelSpec) -> Shape:
    """From the table, or a local folder's config.json."""
    if spec.name in SHAPES:
        return SHAPES[spec.name]._replace(blocks=spec.layers or SHAPES[spec.name].blocks)
    if not Path(spec.name).is_dir():
        raise InputError(f"model {spec.name!r}: plan knows {', '.join(SHAPES)}, and local folders")
    try:
        return Shape.of(load_config(spec))
    except AttributeError as e:
        raise InputError(f"model {spec.name!r}: plan needs a configuration like Llama's: {e}") from None


def decoding_memory(m: Shape, e: int, tokens: float, rows: float, read: float, shares=1, cpu=False) -> dict:
    """Bytes by part, beside the weights, of `rows` debates that hold `tokens` keys and values of e bytes each and read `read`
    tokens in one forward; `shares` processes share the keys."""
    parts = {"logits": (12 if cpu else 40) * rows * m.V}  # a GPU has float64 noise on all of them
    parts["KV"] = 1.5 * e * m.kv / shares * tokens  # half again: when half of the rows ended, the rest are copied
    copied = tokens * (m.kv_heads < m.heads)  # keys of grouped queries, in the forward that reads
    return parts | {"activations": e * (read * (2 * m.D + 3 * m.F) + copied * 2 * m.d * m.heads)}  # of one block


def debate_tokens(characters: int, turns: int, max_new_tokens: int) -> float:
    """Tokens that a debate about so long a text surely stays below: with opening, instruction, speakers' names."""
    return 60 + characters / 2.5 + turns * (max_new_tokens + 8)


def fitting_tokens(free: float, m: Shape, e: int, max_new_tokens: int, shares: int = 1) -> int:
    """Keys and values that a batch of debates may fill on a GPU with `free` bytes beside the weights, a tenth of them kept back.

    As if all were read in one forward, by debates of one turn and no question, which makes the most rows.
    """
    each = decoding_memory(m, e, 1, 1 / debate_tokens(0, 1, max_new_tokens), 1, shares)
    return max(1, int(0.9 * free / sum(each.values())))


class Gpu(NamedTuple):
    """Peaks of one device: dense bfloat16 TFLOP/s, memory in GB, its GB/s, GB/s to the others one way."""

    tflops: float
    gb: float
    gbps: float
    link: float
    cpu: bool = False


GPUS = {  # NVIDIA's data sheets of the SXM and PCIe boards; without sparsity; link: NVLink, or PCIe 4.0 x16
    "h100-80gb": Gpu(989, 80, 3350, 450),
    "h200-141gb": Gpu(989, 141, 4800, 450),
    "a100-80gb": Gpu(312, 80, 2039, 300),
    "l40s-48gb": Gpu(362, 48, 864, 32),
    "rtx4090-24gb": Gpu(165, 24, 1008, 32),
}
