"""Paths, threads and tiny models that the test files share. Nothing here needs a network.

Tests run on the CPU, also where there is a GPU; test_gpu.py starts a process that sees it.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin starve each other on a busy machine
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("W2S_TEST_ON_GPU") != "1":  # test_gpu.py alone sets it, for a process of its own
    os.environ["W2S_HIDDEN_GPUS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # every other test is a CPU's
else:
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # poisoned memory is deterministic mode, which asks for it
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; `auto` still means the reference without a GPU

torch.set_num_threads(2)
os.environ.setdefault("OMP_NUM_THREADS", "2")  # of the scripts that the tests start


def tiny_config(family: str, n_layers: int):
    """A configuration of a few thousand weights over 257 bytes; grouped queries where the family has them."""
    import transformers as t

    common = dict(vocab_size=258, bos_token_id=None, eos_token_id=0)  # as many real models, without a pad token
    llama = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024,
    )  # fmt: skip
    one_head_a_key = {k: v for k, v in llama.items() if k != "num_key_value_heads"}
    return {
        "llama": lambda: t.LlamaConfig(**common, **llama),
        "qwen2": lambda: t.Qwen2Config(**common, **llama),
        "qwen3": lambda: t.Qwen3Config(**common, **llama, head_dim=8),
        "qwen2 of 16": lambda: t.Qwen2Config(
            **common, **llama | {"hidden_size": 64}
        ),  # a head's width that a GPU takes
        "gpt2": lambda: t.GPT2Config(**common, n_embd=16, n_layer=n_layers, n_head=4, n_positions=1024),
        "gpt_neox": lambda: t.GPTNeoXConfig(**common, **one_head_a_key),
    }[family]()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """(family, layers) -> folder of a random model in which every weight matters, with the byte tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data.models import builtin_folder

    made: dict[tuple[str, int], str] = {}

    def folder(family: str, n_layers: int = 2) -> str:
        if (family, n_layers) not in made:
            path = str(tmp_path_factory.mktemp(family) / "model")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(family, n_layers))
            with torch.no_grad():
                for p in model.parameters():  # biases and norms too, which start as zeros and ones
                    p.add_(0.2 * torch.randn_like(p))
            model.save_pretrained(path)
            AutoTokenizer.from_pretrained(builtin_folder("random-small")).save_pretrained(path)
            made[family, n_layers] = path
        return made[family, n_layers]

    return folder


@pytest.fixture(scope="session")
def samples() -> list[dict]:
    """Forty short samples of several lengths, with balanced labels."""
    return [{"id": f"s{i}", "text": f"Q: {'why ' * (i % 5)}{i * 37 % 101} A: {i}", "label": i % 2} for i in range(40)]
