"""Switches each guard off in a copy of the repository, one at a time, and sees that its test fails: a table for LOG.md.

python tests/mutations.py [words]     all, or those whose name or test holds one of the words; not run by pytest
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUARDS = [  # guard, file, what stands there, what stands there instead, the test that must fail
    ("lock", "stages.py", "fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "test_robust.py -k another_run_holds"),
    ("digest check", "stages.py", "elif digest(self.folder / name) != recorded:", "elif False:", "test_robust.py -k broken_files"),
    ("rename into place", "common.py", 'path.with_name(path.name + ".tmp")', "path", "test_security.py -k write_that_fails"),
    ("NaN loss", "train.py", "if not math.isfinite(value):", "if False:", "test_train.py -k loss_that_is_not_finite"),
    ("NaN logits", "generate.py", "        if not finite:\n", "        if False:\n", "test_bad_input.py -k logits_that_are_not_finite"),
    ("NaN predictions", "train.py", "return check_finite(", "return (", "test_bad_input.py -k step_that_explodes"),
    ("stale check", "stages.py", 'for part in ("config", "inputs") for', 'for part in ("inputs",) for', "test_stale.py"),
    ("id matching", "common.py", "if len(table) != len(rows) or table.keys() != set(ids):", "if False:", "test_w2s.py -k do_not_match"),
    ("gold file", "w2s.py", 'labels = self.weak_labels(name, seed)\n        return self.finetune(', 'labels = self.folder / "data/train_b.gold.jsonl"\n        return self.finetune(', "test_w2s.py -k nothing_but_the_ceiling"),
    ("what ran before", "train.py", ', generator=torch.Generator().manual_seed(stable_hash("order", config.seed, epoch))', "", "test_distributed.py -k what_ran_before"),
    ("bad labels", "train.py", " or abs(sum(probs) - 1) > 1e-3", "", "test_bad_input.py -k labels_that_are_none"),
    ("missing weights", "model.py", "if lacking := sorted(", "if lacking := False and sorted(", "test_bad_input.py -k bad_models"),
    ("vocabulary", "model.py", ">= rows:", ">= 1e9:", "test_bad_input.py -k bad_models"),
    ("links out of a model's folder", "model.py", "if file.is_symlink() and", "if False and", "test_bad_input.py -k bad_models"),
    ("shard names", "model.py", "if Path(name).name != name or", "if", "test_bad_input.py -k bad_models"),
    ("remote code", "model.py", ", trust_remote_code=False)\n    if (highest", ")\n    if (highest", "test_security.py -k says_no_to_its_code"),
    ("half a line after a kill", "debate.py", "                drop_torn_lines(stem)\n", "                pass\n", "test_debate.py -k killed_run_continues"),
    ("others' transcripts", "debate.py", "    if state is State.STALE:\n        raise", "    if False:\n        raise", "test_debate.py -k and_no_others"),
    ("others' beginnings", "stages.py", 'read_json(self.folder / "started.json") == want', "True", "test_robust.py -k broken_files"),
    ("windows and sinks", "model.py", "(window and window < longest)", "False", "test_model.py -k attention_that_is_not_computed"),
    ("one token for all ranks", "generate.py", "        torch.distributed.broadcast(token, group_src=0, group=self.ranks.group)\n", "", "test_processes.py -k share_a_model"),
    ("no shutdown of a failed rank", "common.py", "        os._exit(code)\n", "        pass\n", "test_distributed.py -k fails_ends"),
    ("float32 from the files", "model.py", "list(self.load().base_model.parameters())", "[p.detach().clone() for p in self.model.base_model.parameters()]", "test_train.py -k starts_from_what"),
    ("constant answers", "report/tables.py", "        if constant := [", "        if constant := False and [", "test_report.py -k never_change"),
    ("embedding of the run before", "model.py", "            self.model.base_model.reshard()", "            pass", "test_distributed.py -k any_number"),
    ("adapters of all ranks", "model.py", "return [*self.adapters, self.model", "return [self.model", "test_lora.py -k two_ranks"),
    ("where adapters start", "lora.py", ", generator=generator)", ")", "test_lora.py -k any_history"),
    ("no room left", "common.py", '("OutOfMemoryError", "SafetensorError")', '("OutOfMemoryError",)', "test_robust.py -k no_room_left"),
]  # fmt: skip


def main() -> None:
    survived, words = 0, sys.argv[1:]
    print("| guard | switched off | test that failed |\n|---|---|---|")
    for guard, file, old, new, test in GUARDS:
        if words and not any(word in f"{guard} {test}" for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            ignored = shutil.ignore_patterns(".git", "out", ".venv")
            copy = Path(shutil.copytree(ROOT, Path(folder) / "copy", ignore=ignored))
            source = (copy / file).read_text()
            assert source.count(old) == 1, (guard, old)
            (copy / file).write_text(source.replace(old, new))
            command = [sys.executable, "-m", "pytest", "-x", "-rf", "-p", "no:cacheprovider", *test.split()]
            end = subprocess.run(command, cwd=copy / "tests", capture_output=True, text=True)
        failed = re.search(r"^FAILED (.*?)(?: - |$)", end.stdout, re.MULTILINE)
        survived += end.returncode != 1
        seen = failed[1] if failed else f"none (exit code {end.returncode})"
        print(f"| {guard} | {file}: `{' '.join(old.split())}` | {seen} |", flush=True)
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
