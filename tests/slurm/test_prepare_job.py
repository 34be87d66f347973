"""slurm/prepare.sbatch: an array makes what one process makes alone, though a task is killed."""

import json
import time

import psutil

from tests.slurm.conftest import ROOT
from train.data.config import PrepareConfig
from train.data.prepare import prepare
from train.data.shards import TokenShards

COUNT = 3
SECONDS = 240


def until(holds, message):
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, message()
        time.sleep(0.01)


def processes(*words):
    """On this machine, of stu-prepare, whose command has all of the words."""
    commands = ((its, its.info["cmdline"] or []) for its in psutil.process_iter(["cmdline"]))
    wanted = {"stu-prepare", *words}
    return [
        its for its, command in commands if wanted <= {part.split("/bin/")[-1] for part in command}
    ]


def tokens(folder):
    splits = {split: TokenShards(folder, split) for split in ("train", "validation")}
    return {split: its.read(0, len(its)).tolist() for split, its in splits.items()}


def test_an_array_one_task_of_which_is_killed(cluster, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in range(COUNT):  # of some seconds each
        texts = (f"def function_{name}_{i}(x):\n\treturn x + {i}\n" * 400 for i in range(400))
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (corpus / f"{name}.jsonl").write_text("".join(lines))
    output, unfinished = tmp_path / "out" / "data", "data.parts/.1-of-3.*.tmp"
    job = cluster.submit(
        *("--array=0-2", "--cpus-per-task=2", "--mem=1G", "--time=10", f"--chdir={tmp_path}"),
        *(ROOT / "slurm" / "prepare.sbatch", corpus, "--output", output),
        *("--vocab-size=320", "--validation-fraction=0.2"),
    )

    def log():
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))

    until(lambda: list(output.parent.glob(f"{unfinished}/*.bin")), log)
    killed = processes(str(output), "1/3")
    for process in killed:
        process.kill()
    assert len(killed) == 1
    assert list(output.parent.glob(unfinished)), "it was done before it could be killed"
    for task in range(COUNT):
        assert cluster.wait(f"{job}_{task}", SECONDS) == "COMPLETED", log()
    assert [cluster.restarts(f"{job}_{task}") for task in range(COUNT)] == [0, 1, 0]
    assert {path.name for path in output.parent.iterdir()} == {"data", "data.lock"}
    assert log().count("training the tokenizer") == 1
    alone = tmp_path / "alone"
    prepare(PrepareConfig([str(corpus)], alone, vocab_size=320, validation_fraction=0.2, workers=1))
    assert tokens(output) == tokens(alone)
