"""The command line: instant help, and mistakes that end in one paragraph, status 2, and nothing harmed."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

import aria_train
from aria_train.cli import main, parse
from aria_train.config import dump_config
from tests.distributed import run_distributed
from tests.tiny import MODEL, random_documents, read_steps, tiny_config, with_values, write_corpus

HEAVY = (
    "torch",
    "numpy",
    "pydantic",
    "yaml",
    "rich",
    "tokenizers",
    "pyarrow",
    "PIL",
    "av",
    "safetensors",
    "transformers",
)


# ---------------------------------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "prepare", "--help"], ["no-such"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """What takes time is importing: without it help is instant."""
    code = (
        "import sys\nfrom aria_train.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print('imported:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "imported: []", done.stderr
    assert "usage: aria-train" in done.stdout + done.stderr


def test_help_names_every_command() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    for command in ("train", "curriculum", "data", "import", "export", "eval", "generate"):
        assert re.search(rf"^ +{command}\b", out.getvalue(), re.MULTILINE), command


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["nonsense"], ["train", "a.yaml", "--nonsense"], ["export", "a", "b", "c"]]
)
def test_a_wrong_command_line_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "name", "words"),
    [
        (["train", "a.yaml", "x.a=1", "--replay-step", "3", "x.b=2", "x.c=3"], "overrides", "x.a=1 x.b=2 x.c=3"),
        (["plan", "a.yaml", "--gpus", "8", "x.a=1", "--json", "x.b=2"], "overrides", "x.a=1 x.b=2"),
        (["plan", "--gpus", "8", "a.yaml", "x.a=1"], "overrides", "x.a=1"),
        (["curriculum", "a.yaml", "--dry-run", "b.yaml", "x.a=1"], "arguments", "a.yaml b.yaml x.a=1"),
        (["launch", "a.yaml", "--dry-run", "x.a=1"], "arguments", "a.yaml x.a=1"),
        (["data", "prepare", "out", "a", "--tokenizer", "t", "b"], "inputs", "a b"),
    ],
)
def test_options_may_stand_amid_words(arguments: list[str], name: str, words: str) -> None:
    assert vars(parse(arguments))[name] == words.split()


def test_a_reader_that_ends_early_is_no_failure() -> None:
    stage = str(Path(__file__).resolve().parents[1] / "configs" / "small" / "stage1_lang.yaml")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "aria_train", "launch", stage, "--dry-run", "launch.ranks_per_node=2"]
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["train", "a.yaml"], "goes on from the last checkpoint"), (["data", "inspect", "a"], "begins anew")],
)
def test_an_interrupted_command_says_what_is_left_of_it(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aria_train.config.load_config", interrupt)
    monkeypatch.setattr("aria_train.data.prepare.inspection.inspect", interrupt)
    assert main(arguments) == 130
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes, each on a run directory that holds a finished run


class Case:
    """A configuration file on disk, a run that it made, and a way to run it again and compare."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = write_corpus(folder / "corpus", random_documents(30, 10, 33, seed=1))
        self.run_dir = folder / "run"
        config = tiny_config(self.run_dir, [{"name": "text", "path": self.corpus}])
        config = with_values(config, model={"num_layers": 1}, train={"max_steps": 2, "global_batch_size": 4})
        self.path = folder / "stage.yaml"
        self.path.write_text(dump_config(config))

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        data = yaml.safe_load(self.path.read_text())
        change(data)
        self.path.write_text(yaml.safe_dump(data))

    def contents(self) -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and ".packing" not in str(path)
        }


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture
def finished(case: Case, capsys: pytest.CaptureFixture[str]) -> Case:
    assert main(["train", str(case.path)]) == 0
    capsys.readouterr()
    return case


def assert_one_paragraph(err: str, parts: Sequence[str]) -> None:
    """One message, one line, no traceback."""
    assert "Traceback" not in err
    assert err.startswith("aria-train: error")
    assert err.count("aria-train: error") == 1
    assert len(err.strip().splitlines()) == 1, err
    for part in parts:
        assert part in err, err


def assert_refused(case: Case, capsys: pytest.CaptureFixture[str], *parts: str, overrides: Sequence[str] = ()) -> None:
    before = case.contents()
    assert main(["train", str(case.path), *overrides]) == 2
    assert_one_paragraph(capsys.readouterr().err, parts)
    after = case.contents()
    assert {path: after.get(path) for path in before} == before, "something on disk has changed"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.max_step=5", ["train.max_step", "unknown key", "max_steps"]),
        ("train.max_steps=soon", ["train.max_steps", "'soon' given", "integer"]),
        ("parallel.tensor_parallel=2", ["tensor parallelism is not built"]),
        ("parallel.pipeline_parallel_size=2", ["pipeline parallelism is not built"]),
        ("parallel.expert_parallel_size=2", ["parallel.expert_parallel_size 2 does not fit 1 rank"]),
        ("train.global_batch_size=8", ["train.global_batch_size: 4 in the checkpoint, 8 now"]),
        ("model.num_experts=4", ["model.num_experts: 8 in the checkpoint, 4 now"]),
        ("train.max_steps", ["is not an override"]),
    ],
)
def test_wrong_values(override: str, parts: list[str], finished: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(finished, capsys, *parts, overrides=[override])


def test_a_missing_configuration(finished: Case, capsys: pytest.CaptureFixture[str]) -> None:
    finished.path = finished.folder / "absent.yaml"
    assert_refused(finished, capsys, "absent.yaml: no such configuration file")


def test_a_configuration_that_is_not_yaml(finished: Case, capsys: pytest.CaptureFixture[str]) -> None:
    finished.path.write_text("stage: [1,\nmodel: {")
    assert_refused(finished, capsys, "not valid YAML", "line 2")


def test_a_missing_corpus(finished: Case, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = f"data.train.0.path={finished.folder / 'corpse'}"
    assert_refused(finished, capsys, "corpse", "did you mean", "corpus", overrides=[wrong])
    assert_refused(finished, capsys, "data.train: no source given", overrides=["data.train=[]"])


def corrupt(name: str, path: Path) -> None:
    content = bytearray(path.read_bytes())
    if name == "empty":
        content = bytearray()
    elif name == "shortened":
        content = content[:-9]
    elif name == "not an index":
        content[:9] = b"PARQUET!!"
    elif name == "wild lengths":
        content[34:38] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["empty", "shortened", "not an index", "wild lengths"])
def test_a_corrupt_index(damage: str, finished: Case, capsys: pytest.CaptureFixture[str]) -> None:
    corrupt(damage, Path(finished.corpus + ".idx"))
    assert_refused(finished, capsys, "corpus.idx", "text", overrides=["train.max_steps=3"])


def test_a_shortened_corpus(finished: Case, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = Path(finished.corpus + ".bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert_refused(finished, capsys, "corpus.bin", overrides=["train.max_steps=3"])


def test_a_token_past_the_vocabulary(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """Found while training, when a thread reads the window."""
    documents = random_documents(30, 10, 33, seed=1)
    documents[17][3] = MODEL["vocab_size"]
    write_corpus(case.folder / "corpus", documents)
    assert_refused(case, capsys, "document 17", "token id 96", "0 to 95", overrides=["train.max_steps=9"])


def test_empty_documents_are_skipped(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    documents = random_documents(30, 10, 33, seed=1)
    write_corpus(case.folder / "with", [[], documents[0], [], [5], *documents[1:], []])
    for name in ("corpus", "with"):
        override = [f"data.train.0.path={case.folder / name}", f"train.run_dir={case.folder / ('run_' + name)}"]
        assert main(["train", str(case.path), *override]) == 0
    assert len(read_steps(case.folder / "run_with")) == len(read_steps(case.folder / "run_corpus")) == 2


def test_a_corpus_of_nothing_but_empty_documents(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(case.folder / "corpus", [[], [], [7]])
    assert_refused(case, capsys, "nothing to train on")


def test_weights_of_another_model(finished: Case, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"train.run_dir={finished.folder / 'new'}", f"checkpoint.init_from={finished.run_dir}"]
    assert_refused(finished, capsys, "of another model", overrides=[*overrides, "model.expert_size=8"])
    assert_refused(finished, capsys, "nowhere", overrides=[*overrides[:1], "checkpoint.init_from=nowhere"])


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_a_run_directory_that_cannot_be(where: str, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    (case.folder / "file").write_text("mine")
    run_dir = case.folder / ("file" if where == "a file" else "file/run")
    assert_refused(case, capsys, str(case.folder / "file"), "train.run_dir", overrides=[f"train.run_dir={run_dir}"])


@pytest.mark.distributed
def test_a_run_directory_that_is_read_only(case: Case) -> None:
    case.run_dir.mkdir(mode=0o555)
    for folder in (case.folder, *case.folder.parents):
        if folder.owner() == case.folder.owner() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    before = case.contents()
    ((status, err),) = run_distributed(command_of_a_plain_user, 1, ["train", str(case.path)])
    assert status == 2
    assert_one_paragraph(err, [str(case.run_dir), "Permission denied", "train.run_dir"])
    assert case.contents() == before


def command_of_a_plain_user(arguments: list[str]) -> tuple[int, str]:
    """Alone, and without an administrator's rights, whom permissions do not hold back."""
    dist.destroy_process_group()
    del os.environ["RANK"]
    if os.geteuid() == 0:
        os.seteuid(65534)
    return command(arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes on several ranks: one of them speaks, none stays behind


def command(arguments: list[str]) -> tuple[int, str]:
    """The status and the standard error of this rank."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, err.getvalue()


def assert_refused_by_ranks(case: Case, ranks: int, parts: Sequence[str], overrides: Sequence[str]) -> None:
    before = case.contents()
    outcomes = run_distributed(command, ranks, ["train", str(case.path), *overrides])
    assert {status for status, _ in outcomes} == {2}
    assert_one_paragraph("".join(err for _, err in outcomes), parts)
    after = case.contents()
    assert {path: after.get(path) for path in before} == before


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "override", "parts"),
    [
        (3, "parallel.expert_parallel_size=2", ["expert_parallel_size 2 does not fit 3 rank", "Start 4 ranks"]),
        (2, "train.max_step=3", ["unknown key"]),
        (2, "data.train.0.path=nowhere/corpus", ["nowhere/corpus", "no such corpus"]),
        (2, "train.run_dir=/dev/null/run", ["/dev/null"]),
    ],
)
def test_several_ranks_report_once(ranks: int, override: str, parts: list[str], case: Case) -> None:
    assert_refused_by_ranks(case, ranks, parts, [override])


@pytest.mark.distributed
def test_a_mistake_that_one_rank_alone_meets(case: Case) -> None:
    """The wrong token is in a window of the second rank, whichever step it comes at."""
    from aria_train.config import load_config
    from aria_train.data.loader import Loader

    config = load_config(case.path)
    with Loader(config, rank=1, world_size=2) as loader:
        unlucky = next(loader)[0].token_ids[:5].tolist()
    documents = random_documents(30, 10, 33, seed=1)
    (index,) = [n for n, document in enumerate(documents) if document[:5] == unlucky]
    documents[index][2] = 90_000 % 2**16
    write_corpus(case.folder / "corpus", documents)
    assert_refused_by_ranks(case, 2, [f"document {index}", "(rank 1)"], ["parallel.expert_parallel_size=2"])


# ---------------------------------------------------------------------------------------------------------------------
# The real thing


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_trains_and_refuses(case: Case) -> None:
    """`python -m aria_train` under torchrun: two ranks train; three, for two expert ranks, do not."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}

    def torchrun(ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        arguments = ["-m", "aria_train", "train", str(case.path), "parallel.expert_parallel_size=2", *overrides]
        return subprocess.run(
            [*launcher, *arguments], capture_output=True, text=True, timeout=240, env=environment, cwd=Path.cwd()
        )

    trained = torchrun(2)
    assert trained.returncode == 0, trained.stderr
    assert len(read_steps(case.run_dir)) == 2
    refused = torchrun(3, "train.max_steps=3")
    assert refused.returncode != 0
    ours = [line for line in refused.stderr.splitlines() if "aria-train" in line]
    assert len(ours) == 1
    assert "parallel.expert_parallel_size 2 does not fit 3 rank(s)" in ours[0]
    # torchrun's own report follows; there is no traceback of ours.
    assert f"{Path(aria_train.__file__).parent}/" not in refused.stderr
    assert re.search(r"exitcode *: 2", refused.stderr)
    assert len(read_steps(case.run_dir)) == 2


def test_the_module_and_the_command_are_the_same(case: Case) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aria_train", "train", str(case.path), "train.max_step=1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert_one_paragraph(done.stderr, ["train.max_step"])
