"""The last validation of a run, made after a resume if the previous job stopped before its end."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop

from train.callbacks.interruption import largest_of_ranks
from train.callbacks.progress import warned
from train.evaluation import RESULTS_FILE, validated_step


class FitLoop(_FitLoop):
    """Lightning's loop, which also makes the last validation of a resumed run without steps left.

    The last checkpoint is written before that validation, and a signal may cut it short. Whether it
    was made follows from the results in the run's folder, whatever the run logs to.
    """

    @classmethod
    def replace(cls, trainer: L.Trainer) -> None:
        """Replace the loop of `trainer`, before training."""
        former = trainer.fit_loop
        loop = cls(trainer, former.min_epochs, former.max_epochs)
        loop.epoch_loop = former.epoch_loop
        trainer.fit_loop = loop

    def run(self) -> None:
        self.setup_data()
        if not (self.skip and self._lacks_validation()):
            if not self.skip and self.trainer.is_global_zero:
                with warned(RESULTS_FILE):  # it may be of a step that this job repeats
                    (self._run_dir / RESULTS_FILE).unlink(missing_ok=True)
            super().run()
            return
        self.on_run_start()
        trainer, validation = self.trainer, self.epoch_loop.val_loop
        trainer.validating = True
        validation.restarting = False
        validation.run()
        trainer.training = True
        self.on_run_end()

    def _lacks_validation(self) -> bool:
        trainer = self.trainer
        if not trainer.enable_validation or trainer.global_step == 0:
            return False
        is_missing = trainer.is_global_zero and validated_step(self._run_dir) != trainer.global_step
        return bool(*largest_of_ranks(trainer, is_missing))

    @property
    def _run_dir(self) -> Path:
        return Path(self.trainer.default_root_dir)
