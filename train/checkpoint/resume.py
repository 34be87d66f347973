"""The choice of the checkpoint that a run continues from."""

import sys
from pathlib import Path

from stu.common.errors import UserError
from train.checkpoint.folder import CHECKPOINTS, LAST, CheckpointFolder


def choose_checkpoint(run_dir: Path, resume: str | None) -> Path | None:
    """Return the verified checkpoint that `resume` names (a path, `last` or `auto`), or None for a
    new run.

    Raises UserError if there is none, it is damaged, or it is not of the run in `run_dir`.
    """
    folder = run_dir / CHECKPOINTS
    has_checkpoints = any(folder.glob("*.ckpt"))
    if resume == "auto":
        resume = "last" if has_checkpoints else None
    elif resume is None and folder.exists():
        how = (
            "continue it with --resume last"
            if has_checkpoints
            else "start it anew with --resume auto"
        )
        message = f"--run-dir {run_dir}: a run is there already; {how}, "
        message += "choose another folder, or delete it"
        raise UserError("run_dir", run_dir, message=message)
    if resume is None:
        return None
    if resume == "last":
        return last_good_checkpoint(run_dir)
    path = Path(resume)
    if has_checkpoints and path.resolve().parent != folder.resolve():
        message = f"--resume {path}: --run-dir {run_dir} holds another run; choose another folder"
        raise UserError("resume", path, message=message)
    verified_checkpoint(path)
    return path


def last_good_checkpoint(run_dir: Path) -> Path:
    """Return the newest checkpoint in `run_dir` that is whole, and print which ones are not.

    Raises UserError if there is none.
    """
    last = last_checkpoint(run_dir)
    newest = last.resolve()
    older = sorted((run_dir / CHECKPOINTS).glob("step-*.ckpt"), reverse=True)
    problems = []
    # Checkpoints with a higher number than the last were left behind by an earlier resume.
    for path in [last, *(other for other in older if other.name < newest.name)]:
        try:
            verified_checkpoint(path)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            say(f"{problem}: goes back to {path.name}")
        return path
    raise UserError("run_dir", run_dir, message="; ".join(problems))


def verified_checkpoint(path: Path) -> CheckpointFolder:
    """Return a checkpoint that is complete, and whose checksums are right.

    Raises UserError if it is not.
    """
    folder = CheckpointFolder(path)
    folder.check()
    if not folder.has_checksums:
        say(f"checkpoint {path}: an older stu wrote it without checksums; it cannot be verified")
    folder.verify()
    return folder


def last_checkpoint(run_dir: Path) -> Path:
    """Return the newest checkpoint in `run_dir`, which may be damaged. Raises UserError if there is
    none."""
    folder = run_dir / CHECKPOINTS
    if (folder / LAST).exists():
        return folder / LAST
    # The run may have been killed before it linked its first checkpoint, which has its name only
    # when it is complete.
    if complete := sorted(folder.glob("step-*.ckpt")):
        return complete[-1]
    message = f"{run_dir}: no {CHECKPOINTS}/{LAST}; is it the folder of a run?"
    raise UserError("run_dir", run_dir, message=message)


def say(message: str) -> None:
    """Print a line for the user."""
    print(message, file=sys.stderr, flush=True)
