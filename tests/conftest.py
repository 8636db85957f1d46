"""Paths, threads, tiny models, and ways to run the scripts that the test files share. Nothing here needs a network.

Tests run on the CPU, also where there is a GPU; test_gpu.py starts a process that sees it.
"""

import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin starve each other on a busy machine
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("W2S_TEST_ON_GPU") != "1":  # test_gpu.py alone sets it, for a process of its own
    os.environ["W2S_HIDDEN_GPUS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # every other test is a CPU's
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode, which poisons memory, asks for it
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))  # of the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; `auto` still means the reference without a GPU

torch.set_num_threads(1)  # the last bit of a sum depends on how many there are
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

from common import run_script  # noqa: E402


def tiny_config(family: str, n_layers: int):
    """A configuration of a few thousand weights over 257 bytes; grouped queries where the family has them."""
    import transformers as t

    common = dict(vocab_size=258, bos_token_id=None, eos_token_id=0)  # as many real models, without a pad token
    llama = common | dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024,
    )  # fmt: skip
    cls, sizes = {
        "llama": (t.LlamaConfig, llama),
        "qwen2": (t.Qwen2Config, llama),
        "qwen3": (t.Qwen3Config, llama | {"head_dim": 8}),
        "qwen2 of 16": (t.Qwen2Config, llama | {"hidden_size": 64}),  # a head's width that a GPU takes
        "gemma3": (t.Gemma3TextConfig, llama | {"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 512}),
        "gpt2": (t.GPT2Config, common | dict(n_embd=16, n_layer=n_layers, n_head=4, n_positions=1024)),
        "gpt_neox": (t.GPTNeoXConfig, {k: v for k, v in llama.items() if k != "num_key_value_heads"}),
    }[family]
    return cls(**sizes)


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


# ---- the scripts, in this process or as ranks ----


def call(*commands) -> None:
    """Scripts one after another in this process: each command is a module and its flags."""
    for script, *flags in commands:
        sys.argv = [f"{script}.py", *map(str, flags)]
        importlib.import_module(script).main()


def run(script: str, *flags) -> int:
    """Exit code of a script that runs in this process."""
    argv = sys.argv
    try:
        run_script(functools.partial(call, (script, *flags)))
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = argv
    return 0


processes = multiprocessing.get_context("forkserver")  # its children have the imports already
processes.set_forkserver_preload(["w2s", "conftest"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank: int, size: int, port: int, stderr: Path | None, target, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr = open(stderr, "w") if stderr else sys.stderr
    run_script(functools.partial(target, *args))


def start(size: int, target, *args, stderr: Path | None = None) -> list:
    """`size` processes that run target(*args) as ranks of one group, by the variables that torchrun sets."""
    port = free_port()
    ranks = [processes.Process(target=as_rank, args=(r, size, port, stderr, target, args)) for r in range(size)]
    for p in ranks:
        p.start()
    return ranks


def finish(ranks: list) -> None:
    """Wait for them; all must end well."""
    for p in ranks:
        p.join(300)
    assert [p.exitcode for p in ranks] == [0] * len(ranks)


# ---- a finished run of one task, made once for all tests ----

METHODS = ("finetune", "finetune_aux", "single", "ours", "market_making", "no_argument", "independent", "other_debate")
SMOKE = ["run", "--preset", "smoke", "--tasks", "sciq", "--seeds", 0, "--limit-train", 18, "--limit-test", 8]
SMOKE += ["--methods", *METHODS, "--out"]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """The folder of a run by a process of its own, and beside it what that printed."""
    out = tmp_path_factory.mktemp("smoke") / "out"
    command = [sys.executable, ROOT / "w2s.py", *SMOKE, out]
    end = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    (out.parent / "printed.txt").write_text(end.stdout)
    return out


@pytest.fixture
def copied(smoke, tmp_path) -> Path:
    """A copy of that run, to be spoiled."""
    return Path(shutil.copytree(smoke, tmp_path / "copy"))


def products(out: Path) -> dict[str, bytes]:
    """Every file of a run, but for what says when and where it was made."""
    timed = ("steps.jsonl", "results.jsonl", "debates.jsonl", "cost.md", "report.html", ".lock")
    paths = [p for p in sorted(out.rglob("*")) if p.is_file() and not p.name.endswith(timed)]
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in paths}
    for name in files:
        if name.endswith("manifest.json"):
            m = json.loads(files[name])
            files[name] = json.dumps([m[part] for part in ("config", "inputs", "outputs", "minimum")]).encode()
    return files


def record(file: Path) -> None:
    """Put the digest of a changed file into its stage's manifest: the stage counts as done, what reads it is stale."""
    path = next(p / "manifest.json" for p in file.parents if (p / "manifest.json").exists())
    manifest = json.loads(path.read_text())
    name = file.relative_to(path.parent).as_posix()
    manifest["outputs"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))


@pytest.fixture
def status(capsys):
    """Folder and further flags -> stage -> its row of `w2s.py status --json`."""

    def rows(out: Path, *flags) -> dict[str, dict]:
        capsys.readouterr()
        assert run("w2s", "status", "--json", *SMOKE[1:], out, *flags) == 0
        return {row["stage"]: row for row in json.loads(capsys.readouterr().out)}

    return rows


# ---- one finetuning in this process ----


def finetuned(classifier, samples: list[dict], **settings):
    """What finetuning on the samples' labels costs, and what the classifier then predicts of them."""
    import train

    config = train.TrainConfig(**({"lr": 1e-2, "epochs": 1, "batch_size": 8} | settings))
    texts = [s["text"] for s in samples]
    cost = train.finetune(classifier, texts, train.soft_labels(samples, classifier.n_classes), config)
    return cost, train.predict(classifier, texts, config)
