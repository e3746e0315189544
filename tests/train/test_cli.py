"""The command line: exit codes, messages, and how little it imports before it must."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.train.runs import imported, longhaul, longhaul_here, small, write
from train.settings.config import load, validate

# runs a command line with the module that another part owns replaced, and prints its call
_STUBBED = """
import sys, types
module = types.ModuleType({name!r})
def run(*args, **options):
    options.pop("stop", None)
    print(*[getattr(a, "name", a) for a in args], sorted(options.items()))
    return 7
module.run = run
sys.modules[{name!r}] = module
from train.cli import main
main()
"""


COMMANDS: list[list[str]] = [
    [],
    ["prepare"],
    ["pretrain"],
    ["config"],
    ["evaluate"],
    ["check"],
    ["import"],
    ["export"],
    ["status"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches(command: list[str]) -> None:
    done = longhaul_here(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +longhaul \w+", done.stdout, re.M), "an example"
    assert not command or "Next: " in done.stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "yaml", "rich", "deepspeed", "mlflow"}
    found = imported(heavy, [[*command, "--help"] for command in COMMANDS])
    assert found == dict.fromkeys(found, [])


def test_every_command_is_listed_with_what_it_does() -> None:
    listed = longhaul_here("--help").stdout.split("Commands:")[1]
    assert re.findall(r"^  (\w+)  +\w", listed, re.M) == [
        "prepare",
        "pretrain",
        "config",
        "evaluate",
        "check",
        "generate",
        "import",
        "export",
        "miniature",
        "plan",
        "preflight",
        "submit",
        "status",
        "data",
        "checkpoint",
        "track",
    ]


WRONG = {"model__hiden_size": 4, "train__steps": 0, "train__bptt_len": 512}


@pytest.mark.parametrize("command", ["config", "pretrain"])
def test_bad_configuration_is_one_line_a_problem_and_exit_code_2(
    tmp_path: Path, command: str
) -> None:
    path = write(tmp_path, small(**WRONG))
    done = longhaul_here(command, path, "train.lr=fast")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"{path}: 4 problems",
        "  model.hiden_size: unknown key; did you mean 'hidden_size'?",
        "  train.steps: 0 is too small; the least is 1",
        "  train.lr: expected a number such as 0.1 or 3e-4, got 'fast'",
        "  train.bptt_len: 512 is longer than data.sample_len = 256, and gradients never reach"
        " into another sample; use 256 or a longer sample",
    ]


def test_bad_configuration_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    path = write(tmp_path, small(**WRONG))
    commands = [[command, path, "train.lr=fast"] for command in ("config", "pretrain")]
    found = imported({"torch"}, commands)
    assert found == dict.fromkeys(found, [])


def test_pretrain_checks_the_ranks_that_were_started_and_only_rank_0_says_so(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, small(parallel__cp=4))
    first = longhaul_here("pretrain", path, WORLD_SIZE="6", RANK="0")
    other = longhaul_here("pretrain", path, WORLD_SIZE="6", RANK="5")
    assert (first.returncode, other.returncode) == (2, 2)
    assert "world size 6 is not tp * cp * dp" in first.stderr
    assert (other.stdout, other.stderr) == ("", "")
    assert "world size 1 is not tp * cp * dp" in longhaul_here("pretrain", path).stderr


def test_pretrain_runs_the_checked_configuration(tmp_path: Path) -> None:
    path = write(tmp_path, small(run_dir=str(tmp_path / "run")))
    code = _STUBBED.format(name="train.pretrain")
    done = longhaul("pretrain", path, "name=other", "parallel.cp=2", code=code, WORLD_SIZE="2")
    assert done.stdout == "other [('fork', None), ('fresh', False)]\n", done.stderr
    assert done.returncode == 7


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ([], "runs/small"),
        (["name=other"], "runs/other"),
        (["run_dir=a/b", "run_dir=a/c", "name=other"], "a/c"),
        (["--fork", "child"], "runs/child"),
        (["--fork=child", "run_dir=a/b", "--fork", "other"], "a/other"),
    ],
)
def test_the_folder_that_a_command_writes_is_told_without_torch(
    tmp_path: Path, words: list[str], folder: str
) -> None:
    path = write(tmp_path, small(parallel__tp=2))  # on one rank, that of the asking script
    code = "import sys\nfrom train.cli import main\ntry:\n    main()\nfinally:\n"
    code += "    assert 'torch' not in sys.modules"
    told = longhaul("pretrain", "--print-run-dir", path, *words, code=code)
    assert told.stdout == f"{folder}\n", told.stderr
    assert told.returncode == 0


def test_a_requeued_job_is_not_fresh_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = write(tmp_path, small(run_dir=str(run)))
    code = _STUBBED.format(name="train.pretrain")
    run.mkdir()
    (run / "fresh.json").write_text('{"job": "7"}')

    restarted = longhaul(
        "pretrain", path, "--fresh", code=code, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1"
    )
    assert restarted.stdout == "small [('fork', None), ('fresh', False)]\n"


def test_fresh_leaves_the_old_run_in_place_when_something_is_wrong(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log").write_text("old")
    raw = small(run_dir=str(run), data__train=str(tmp_path / "nothing"))
    done = longhaul("pretrain", write(tmp_path, raw), "--fresh")
    assert done.returncode == 2
    assert (run / "log").read_text() == "old"


def test_config_prints_what_loads_to_the_same(tmp_path: Path) -> None:
    path = write(tmp_path, small(model__memory={"name": "fam", "slots": 8}))
    words = ["model.memory.name=none", "parallel.tp=2", "--world-size", 4]
    done = longhaul_here("config", path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "# a step: 8 lanes x 4 segments of 64 tokens = 2,048 tokens; 100 steps = 204,800 tokens",
        "# 4 ranks: tp 2 x cp 1 x dp 2",
    ]
    assert load(write(tmp_path, done.stdout)) == validate(small(parallel__tp=2))
    assert yaml.safe_load(done.stdout)["model"]["memory"] == {"name": "none"}


def test_config_prints_the_schema() -> None:
    done = longhaul("config", "--schema")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["title"] == "Config"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config"], "name a configuration FILE, or ask for --schema"),
        (["pretrain"], "Missing argument"),
        (["pretran"], "Did you mean 'pretrain'?"),
        (["evaluate", "x", "--memory", "maybe"], "'maybe'"),
        (["evaluate", "x", "--tokens", "1Q"], "--tokens: expected a number of tokens"),
        (["evaluate", "x", "--lengths", "1k,2Q"], "--lengths: expected a number of tokens"),
        (["prepare", "x"], "Missing option '--output'"),
        (["prepare", "x", "--output", "y", "--shard-tokens", "some"], "--shard-tokens: expected"),
        (
            ["prepare", "x", "--output", "y", "--tokenizer", "a.json", "--train-tokenizer", "9"],
            "exclude each other",
        ),
    ],
)
def test_a_wrong_command_line_is_a_message_and_exit_code_2(
    arguments: list[str], message: str
) -> None:
    done = longhaul_here(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_prepare_writes_shards_that_it_names(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"text number {number}\n" * 20)
    out = tmp_path / "shards"
    arguments = ["prepare", texts, "--output", out, "--valid-fraction", 0.3, "--workers", 1]
    done = longhaul(*arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{re.escape(str(out))}/train: \d documents?, ", done.stdout, re.M)
    assert re.search(rf"^{re.escape(str(out))}/valid: \d documents?, ", done.stdout, re.M)
    assert "--force writes it anew" in longhaul_here(*arguments).stdout


def test_prepares_complaints_have_no_traceback(tmp_path: Path) -> None:
    done = longhaul_here("prepare", tmp_path / "absent", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluate_passes_its_options_on() -> None:
    source = _STUBBED.replace("module.run = run", "module.run, module.Tasks = run, dict_of")
    source = source.replace("def run(", "def dict_of(*a, **o):\n    return (a, o)\ndef run(")
    code = source.format(name="train.evaluation.evaluate")
    words = [
        "--memory",
        "off",
        "--tokens",
        "1k",
        "--tasks",
        "passkey, recall",
        "--lengths",
        "1k,64",
    ]
    done = longhaul("evaluate", "runs/a", *words, "--prompts", "5", code=code)
    assert done.returncode == 7, done.stderr
    tasks = (
        (["passkey", "recall"], [1024, 64]),
        {"prompts": 5, "seed": 0, "pubmedqa": None},
    )
    assert done.stdout == (
        "a [('changes', ()), ('data', None), ('memory', False), ('output', None), "
        f"('tasks', {tasks}), ('tokens', 1024), ('track', False)]\n"
    )


_RAISING = """
import sys, types
module = types.ModuleType("train.pretrain")
code = compile({source!r}, {file!r}, "exec")
exec(code, module.__dict__)
sys.modules["train.pretrain"] = module
from train.cli import main
main()
"""


def _raising(file: Path) -> str:
    source = "def run(config, **options):\n    raise ValueError('17 is too much; use 3')\n"
    return _RAISING.format(source=source, file=str(file))


def test_our_own_value_errors_are_messages_and_name_their_rank(tmp_path: Path) -> None:
    import train

    path = write(tmp_path, small())
    code = _raising(Path(train.__file__).with_name("pretrain.py"))
    done = longhaul("pretrain", path, code=code)
    assert (done.returncode, done.stderr) == (2, "17 is too much; use 3\n")
    done = longhaul("pretrain", path, code=code, RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (2, "[rank 1] 17 is too much; use 3\n")


def test_a_librarys_value_error_keeps_its_traceback(tmp_path: Path) -> None:
    done = longhaul("pretrain", write(tmp_path, small()), code=_raising(tmp_path / "library.py"))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


def test_a_foreign_package_stops_every_command(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom train.cli import main; main()"
    done = longhaul("config", "--schema", code=code)
    assert done.returncode == 2
    assert f"but data from {tmp_path / 'data'}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
