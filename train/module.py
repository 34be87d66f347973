"""The training and validation steps of a model, and what they log."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.sequences.documents import Documents
from stu.tokenizer import read_tokenizer
from train.callbacks.bad_steps import GuardConfig, StepGuard
from train.callbacks.interruption import largest_of_ranks
from train.config import check_length, check_vocabulary
from train.data.batches import Batch, ValidationBatch
from train.data.loader import TokenData
from train.evaluation import ValidationSums, mixture_metrics, sample_texts, write_results
from train.gpus import peak_bytes, resident_bytes
from train.loggers.base import RunLogger, log_texts
from train.loss import next_token_loss, token_losses
from train.optimizer import (
    OptimizerConfig,
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
    replace_hyperparameters,
)
from train.parallel.context import divide_sequences
from train.parallel.fsdp import FsdpStrategy
from train.record import RecentLosses, nats_per_target, result_settings, training_record
from train.throughput import Throughput


class FlashSTUModule(L.LightningModule):
    """Next-token training of a Flash-STU model on `TokenData`.

    Args:
        config: Shape of the model; its vocabulary must be that of the token shards.
        optimizer: Optimizer and learning-rate schedule.
        z_loss: Weight of the z-loss, the mean squared log-normaliser of the logits; 0 for none.
        guard: Rules for skipping harmful updates.
    """

    def __init__(
        self,
        config: ModelConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        z_loss: float = 0.0,
        guard: GuardConfig = GuardConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self._resident_before = resident_bytes()
        self.z_loss = z_loss
        self.run_record: dict[str, Any] = {}
        """Provenance, schedule and changed settings of the run, for checkpoints."""
        self._guard = StepGuard(guard)
        self._samples: list[int] = []  # of the step in progress
        self.config, self.optimizer_config = config, optimizer
        self.model = FlashSTU(config)
        self._losses = RecentLosses()

    def result_settings(self, trainer: L.Trainer, data: TokenData) -> dict[str, Any]:
        """Return all settings that a run's results depend on, by name, except its length."""
        others = self.optimizer_config, self.z_loss, self._guard.config.loss_jump
        return result_settings(trainer, data, self.config, *others)

    def setup(self, stage: str) -> None:
        check_vocabulary(self.config.vocab_size, self._data.vocab_size)
        check_length(self._data.seq_len, self.config.max_seq_len)
        self._tokenizer = read_tokenizer(self._data.tokenizer_path, self.config.vocab_size)
        self._bytes_per_token = torch.from_numpy(self._tokenizer.bytes_per_token())
        self._slices, self._own = divide_sequences(self._data.ranks_per_sample, self._data.seq_len)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FsdpStrategy):
            self.trainer.strategy.divide(self.model)

    def configure_optimizers(self) -> Any:
        # Reading `estimated_stepping_batches` would drop the loader's position on resume.
        total_steps = self.trainer.max_steps
        if total_steps < 1:
            raise UserError(
                "trainer.max_steps", total_steps, fix="set it, as the schedule ends there"
            )
        optimizer = make_optimizer(self.model, self.optimizer_config)
        schedule = LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, total_steps, self.optimizer_config)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_start(self) -> None:
        self._losses.to(self.device)
        # The optimizer's settings, or the length of the run, may differ from the checkpoint's.
        step, total_steps = self.trainer.global_step, self.trainer.max_steps
        factor = learning_rate_factor(step, total_steps, self.optimizer_config)
        scheduler: Any = self.trainer.lr_scheduler_configs[0].scheduler
        replace_hyperparameters(scheduler, self.model, self.optimizer_config, factor)
        self.throughput = Throughput(self.config, self._data, self.trainer.world_size)

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of a micro-batch: its mean in nats per token, plus the z-loss."""
        # Not in a hook after the step: checkpoints are written before those run.
        groups = self.trainer.world_size // self._data.ranks_per_sample
        self._data.advance(len(batch["tokens"]) * groups)
        counted = self._counted(batch)
        loss, nats = next_token_loss(*self._predictions(batch), self.z_loss, counted)
        means = self._losses.add(nats, counted)
        if "mean_counted" in batch:  # the mean over answers, not over all targets
            mean = batch["mean_counted"]  # a step without any is skipped, as one with NaN
            loss = loss * (batch["counted"].numel() / mean if mean else math.nan)
        self._samples += batch["sample_ids"].tolist()
        if self._guard.config.loss_jump:
            means = self.trainer.strategy.reduce(means.clone(), reduce_op="mean")
            if self._guard.is_spike(nats_per_target(means)):
                return loss * math.nan  # steps whose gradients are not finite are skipped
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        strategy: Any = self.trainer.strategy
        is_deepspeed = isinstance(strategy, DeepSpeedStrategy)
        if is_deepspeed and not strategy.deepspeed_engine.is_gradient_accumulation_boundary():
            return  # DeepSpeed calls this after each micro-batch, when gradients are not summed yet
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not gradients:
            return  # DeepSpeed keeps its own, and reports their norm after the step
        norm = torch.nn.utils.get_total_norm(gradients)  # before clipping
        self._gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not self._gradient_norm.isfinite():
            for parameter in self.parameters():  # the optimizer skips these
                parameter.grad = None

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:  # type: ignore[override]
        """Take a step, count it if its update was skipped, and log it if it is due."""
        step = self.trainer.global_step + 1
        learning_rate = optimizer.param_groups[0]["lr"]
        is_last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if is_last and (timer := self._timer) is not None:
            learning_rate = self._learning_rate_by_time(timer)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        if not is_last:
            return
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            norm = strategy.deepspeed_engine.get_global_grad_norm()
            self._gradient_norm = self._gradient_norm if norm is None else torch.as_tensor(norm)
        if not self._gradient_norm.isfinite():
            file = f"rank-{self.trainer.global_rank:05d}.jsonl"
            folder = Path(self.trainer.default_root_dir) / "skipped"
            self._guard.count(step, self._losses.last, self._samples, folder / file)
        self._samples = []
        if step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_step(step, learning_rate)

    def _learning_rate_by_time(self, timer: Timer) -> float:
        """Set and return the learning rate of this step, in a run that has a time limit."""
        elapsed, left = timer.time_elapsed(), timer.time_remaining()
        assert left is not None
        # Ranks have different clocks, and need equal rates.
        (share,) = largest_of_ranks(self.trainer, min(1.0, elapsed / (elapsed + left)))
        step, total_steps = self.trainer.global_step, self.trainer.max_steps
        factor = learning_rate_factor(step, total_steps, self.optimizer_config, share)
        learning_rate = self.optimizer_config.learning_rate * factor
        for group in self.trainer.lr_scheduler_configs[0].scheduler.optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def _log_step(self, step: int, learning_rate: float) -> None:
        peak = peak_bytes(self.device, self._resident_before)
        metrics: dict[str, float | Tensor] = {
            "train/loss": self._losses.take(self.trainer),
            "train/grad_norm": self._gradient_norm,
            "train/lr": learning_rate,
            "train/skipped_updates": float(self._guard.num_bad_steps),
            **self.throughput.metrics(self.device),
            "train/memory_gib": largest_of_ranks(self.trainer, peak / 2**30)[0],
        }
        self._log(metrics, step)
        self.throughput.restart()

    def on_validation_epoch_start(self) -> None:
        sums = (self._data.seq_len, self._bytes_per_token, self._own)
        self._validations = [ValidationSums(*sums) for _ in self._data.validated]
        self._validation_start = time.monotonic()

    def validation_step(
        self, batch: ValidationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add the losses of the targets that count; log samples at the first batch of a source."""
        if self._is_validation_cut:
            return
        tokens, own = batch["tokens"], self._own
        places = torch.arange(own.start, own.stop, device=tokens.device)
        counted = places < batch["num_targets"][:, None]  # [B, T]
        if "counted" in batch:
            counted &= batch["counted"][:, own]
        hidden, output, targets = self._predictions(batch)
        nats, hits = token_losses(hidden, output, targets)
        nats, hits, targets = (values.view(counted.shape) for values in (nats, hits, targets))
        documents = self._documents(batch)
        self._validations[dataloader_idx].add(nats, hits, targets, counted, documents)
        if batch_idx == 0 and not self.trainer.sanity_checking:
            name = list(self._data.validated)[dataloader_idx]
            texts = sample_texts(self.model, tokens, self._tokenizer, len(self._validations))
            log_texts(self._loggers, f"sample/{name}", texts, self.trainer.global_step)

    def on_validation_epoch_end(self) -> None:
        """Log means over the validation splits; collective."""
        if self._is_validation_cut:
            return
        sums = torch.stack([sums.values for sums in self._validations])
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        metrics = mixture_metrics(sums.cpu(), self._data.validated)
        if not self.trainer.sanity_checking:
            self._log(metrics, self.trainer.global_step)
            if self.trainer.is_global_zero:
                write_results(metrics, self.trainer.global_step, self.trainer.default_root_dir)
            self.throughput.leave_out(time.monotonic() - self._validation_start)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `stu-export` and a resumed run need besides Lightning's state."""
        settings = self.result_settings(self.trainer, self._data)
        record = training_record(settings, self.config, self._data)
        checkpoint["stu"] = {**record, **self.run_record}
        groups = parameter_groups(self.model, self.optimizer_config)
        checkpoint["stu"]["parameter_groups"] = [group["params"] for group in groups]
        checkpoint["stu"]["since_log"] = self._losses.state(self.trainer)
        checkpoint["stu"]["guard"] = self._guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._guard.load_state_dict(checkpoint["stu"].get("guard", {}))
        self._losses.load(checkpoint["stu"].get("since_log", {}), self.trainer)
        # Lightning counts micro-batches, and a step may have another number of them than before.
        count = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, count))

    @property
    def _timer(self) -> Timer | None:
        """Timer of `trainer.max_time`, if that is set."""
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, Timer)), None)

    @property
    def _is_validation_cut(self) -> bool:
        return self.trainer.limit_val_batches == 0  # set by `Interruption`

    @property
    def _loggers(self) -> list[RunLogger]:
        loggers: list[Any] = self.trainer.loggers if self.trainer.is_global_zero else []
        return loggers

    @property
    def _data(self) -> TokenData:
        data: TokenData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def _predictions(self, batch: Batch | ValidationBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states `[B T, D]` of the T own positions of a batch, the output matrix
        `[V, D]`, and targets `[B T]`."""
        tokens, own = batch["tokens"], self._own
        hidden = self.model.hidden(tokens[:, own], self._documents(batch) or self._slices)
        targets = tokens[:, own.start + 1 : own.stop + 1]
        return hidden.flatten(0, 1), self.model.embedding.weight, targets.flatten()

    def _documents(self, batch: Batch | ValidationBatch) -> Documents | None:
        lengths = batch.get("document_lengths")
        return None if lengths is None else Documents(lengths, batch["tokens"].device)

    def _counted(self, batch: Batch | ValidationBatch) -> Tensor | None:
        """Return whether each target of the own positions counts, `[B T]`; None if all do."""
        counted = batch.get("counted")
        return None if counted is None else counted[:, self._own].flatten()

    def _log(self, metrics: Mapping[str, float | Tensor], step: int) -> None:
        """Log metrics that are equal on all ranks.

        They are logged now, before this step's checkpoint: a run that is killed after its
        checkpoint does not repeat the step.
        """
        self.log_dict(dict(metrics), logger=False, sync_dist=self.trainer.validating)
        for logger in self._loggers:
            logger.log_metrics({name: float(value) for name, value in metrics.items()}, step)
