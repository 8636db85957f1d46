"""What a stage's code is: an edit of anything that its result can depend on makes it stale, and nothing else does."""

import ast
import shutil
import sys
import traceback
from pathlib import Path

import pytest

import reach
from common import ALONE, ROOT, InputError
from reach import APART
from steps import Held
from w2s import Config, Experiment

METHODS = ("finetune", "finetune_aux", "ours", "market_making", "no_argument", "evidence")
PRODUCT = [p for folder in (".", "data", "kernels", "bench", "report") for p in (ROOT / folder).glob("*.py")]


def test_a_digest_is_the_same_under_a_python_with_more_fields():
    node = ast.parse("def f(x: int = 0): return x").body[0]
    before = reach.written(node)
    node._fields, node.type_params = (*node._fields, "type_params"), []
    assert ("type_params", []) in ast.iter_fields(node) and reach.written(node) == before


def experiment(out: Path) -> Experiment:
    given = {"preset": "smoke", "tasks": ("sciq_evidence",), "methods": METHODS, "seeds": (0,), "limit_train": 24}
    return Experiment(Config.of("sciq_evidence", **given, limit_test=8, out=str(out)), "sciq_evidence")


def kind_of(name: str) -> str:
    """The kind of a stage by its folder: all of one kind have the same code."""
    starts = {
        "strong-finetune_aux": "student aux", "strong-": "student", "weak-naive": "student", "weak-no_argument": "sides",
        "weak-evidence": "passage", "weak-": "reader", "zero-shot": "zero-shot", "seed": "labels",
    }  # fmt: skip
    return next((kind for start, kind in starts.items() if name.startswith(start)), name)


def codes(out: Path) -> dict[str, dict[str, str]]:
    reach.parse.cache_clear()
    reach.definition.cache_clear()
    found: dict[str, dict[str, str]] = {}
    for stage in experiment(out).stages():
        code = found.setdefault(kind_of(stage.folder.name), stage.code)
        assert code == stage.code, stage.folder
    return found


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A copy of the sources to edit; returns which kinds of stages an edit makes stale."""
    for path in PRODUCT:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    before = codes(tmp_path / "out")
    monkeypatch.setattr(reach, "ROOT", tmp_path)

    def stale(file: str, old: str, new: str) -> set[str]:
        path = tmp_path / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file}: {old!r} stands there {text.count(old)} times"
        path.write_text(text.replace(old, new))
        after = codes(tmp_path / "out")
        path.write_text(text)
        return {kind for kind in before if before[kind] != after[kind]}

    yield stale
    monkeypatch.undo()
    codes(tmp_path / "out")


def mutated(text: str, name: str) -> str:
    """The source with one more statement at the beginning of the first function or method of that name."""
    tree = ast.parse(text)
    function, *_ = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    function.body.insert(0, ast.parse("edited = 1").body[0])
    return ast.unparse(tree)


DEBATES = {"debate", "market_making"}
TRAINED = {"student", "student aux", "sides", "passage", "reader"}
RUNS_A_MODEL = TRAINED | {"market_making"}  # which asks a trained judge
BY_FUNCTION = {  # written by hand, from the paper's steps
    "data/prepare.py split_in_half": {"data"},
    "data/prepare.py sciq": {"data"},
    "data/prepare.py boolq": set(),
    "debate.py speaker": {*DEBATES, "reader", "sides"},
    "debate.py assign_side": {*DEBATES, "sides"},
    "debate.py judge_input": {"market_making", "reader", "sides"},
    "debate.py zero_shot": {"zero-shot"},
    "debate.py run_protocol": DEBATES,
    "generate.py sample": {*DEBATES, "zero-shot"},
    "train.py lr_at": TRAINED,
    "train.py batches": TRAINED,
    "train.py logconf": {"student aux"},
    "train.py product": set(),
    "kernels/conf_loss.py quantile": {"student aux"},
    "kernels/conf_loss.py select_quantile": TRAINED,
    "model.py packed_attention": RUNS_A_MODEL,
    "steps.py average_labels": {"labels"},
    "steps.py read_sides": {"sides"},
    "steps.py read_transcript": {"reader"},
    "stages.py finish": set(),
    "plan.py show": set(),
    "status.py show": set(),
}


def test_edit_of_a_function_makes_exactly_its_stages_stale(edited):
    for place, kinds in BY_FUNCTION.items():
        file, name = place.split()
        text = (ROOT / file).read_text()
        assert edited(file, text, mutated(text, name)) == kinds, place


def test_what_changes_no_result_makes_nothing_stale(edited):
    text = (ROOT / "train.py").read_text()
    assert edited("train.py", '    """Cosine from the peak', '    """A cosine from the peak') == set()
    assert edited("train.py", "    return peak * 0.5", "    # half a cosine\n\n    return (peak) * 0.5") == set()
    assert edited("train.py", text, "# a comment\n" + text) == set()
    new_field = '    new: float = flag(1.0, "a new field", float)\n'
    assert edited("train.py", "    compile: bool =", f"{new_field}    compile: bool =") == set()
    raised = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Raise))
    error = ast.get_source_segment(text, raised)
    assert edited("train.py", error, 'raise InputError("another text")') == set()
    assert edited("train.py", "    return peak * 0.5", "    return peak * 0.6") == TRAINED


def test_all_that_runs_is_in_the_code_of_the_stage(tmp_path):
    """The proof that reach.py overlooks nothing: every function of ours that runs while a stage is made."""
    files = {str(p): ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in PRODUCT}
    ran: set[str] = set()

    def name_of(frame) -> str:
        module = files.get(frame.f_code.co_filename)
        return f"{module}.{frame.f_code.co_qualname.split('.')[0]}" if module else ""

    def note(frame, event, argument):
        if event == "call" and (name := name_of(frame)):
            callers = {name_of(f).rpartition(".")[2] for f, _ in traceback.walk_stack(frame)}
            if not callers & set(APART):
                ran.add(name)

    held = Held()
    for stage in experiment(tmp_path).stages():
        ran.clear()
        begun = stage.begin()
        sys.setprofile(note)
        cost = stage.make(stage.folder, ALONE, held)
        sys.setprofile(None)
        stage.finish(*begun, {"seconds": 0, **cost})
        assert ran <= stage.code.keys(), stage.folder


def test_a_function_without_a_name_is_refused():
    with pytest.raises(InputError, match="give the function a name"):
        reach.reached([lambda row: row])
