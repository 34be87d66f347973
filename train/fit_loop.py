"""The last validation of a run, made after a resume if the previous job stopped before its end."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop

from train.callbacks.interruption import largest_of_ranks
from train.report import read_curves


class FitLoop(_FitLoop):
    """Lightning's loop, which also makes the last validation of a resumed run without steps left.

    It does so if the log lacks that validation: the last checkpoint is written before it, and a
    signal may cut it short.
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
        is_logged = True
        if trainer.is_global_zero:
            steps, _ = read_curves(Path(trainer.default_root_dir)).get("val/loss", ([], []))
            is_logged = trainer.global_step in steps
        (is_missing,) = largest_of_ranks(trainer, not is_logged)
        return bool(is_missing)
