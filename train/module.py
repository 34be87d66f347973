"""What one training step computes and logs."""

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

from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer
from train.callbacks.bad_steps import GuardConfig, StepGuard
from train.callbacks.interruption import largest_of_ranks
from train.callbacks.progress import warned
from train.config import check_length, check_vocabulary
from train.data.loader import Batch, TokenData, ValidationBatch
from train.evaluation import ValidationSums, plot_accuracy, sample_texts, validation_metrics
from train.flops import token_flops
from train.gpus import GPUS, known_gpu, peak_bytes, resident_bytes
from train.loss import next_token_loss, token_losses
from train.optimizer import (
    OptimizerConfig,
    learning_rate_factor,
    make_optimizer,
    optimizer_kind,
    parameter_groups,
)
from train.parallel.fsdp import FsdpStrategy
from train.start.same_run import result_settings, training_record


class FlashSTUModule(L.LightningModule):
    """Next-token training of a Flash-STU model on `TokenData`.

    Args:
        config: shape of the model; its vocabulary must be that of the token shards.
        optimizer: AdamW and its schedule.
        z_loss: weight of the mean squared log-normaliser in what is minimised; 0: none.
        guard: which updates are skipped.
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
        if not 0 <= z_loss < math.inf:
            raise ValueError(f"model.z_loss={z_loss!r} is not allowed: it must be a number >= 0")
        self.z_loss = z_loss
        self.guard_config = guard
        self.run_record: dict[str, Any] = {}
        """Record that goes into checkpoints: where the run comes from, what was changed in it."""
        self.is_optimizer_changed = False
        """Whether `optimizer` is not what the checkpoint to go on from was trained with."""
        self._guard = StepGuard(guard)
        self._samples: list[int] = []  # of the step that is being made
        self.config = config
        self.optimizer_config = optimizer
        self.optimizer_kind = optimizer_kind(optimizer)
        self.model = FlashSTU(config)
        self._losses: list[Tensor] = []  # of the micro-batches since the last logged step

    def check_data(self, data: TokenData) -> None:
        """Raise ValueError unless this model can read `data`."""
        check_vocabulary(self.config.vocab_size, data.vocab_size)
        check_length(data.seq_len, self.config.max_seq_len)

    def setup(self, stage: str) -> None:
        self.check_data(self._data)
        self._tokenizer = Tokenizer(self._data.tokenizer_path)
        self._bytes_per_token = torch.from_numpy(self._tokenizer.bytes_per_token())

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FsdpStrategy):
            self.trainer.strategy.divide(self.model)

    def configure_optimizers(self) -> Any:
        # Not `estimated_stepping_batches`: reading it drops the loader's place on resume.
        total_steps = self.trainer.max_steps
        if total_steps < 1:
            raise ValueError(
                "trainer.max_steps is not set: the schedule needs it, and the data has no end"
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
        self._losses = [loss.to(self.device) for loss in self._losses]
        if self.is_optimizer_changed:
            self._change_optimizer()
        self._start_clock()

    def training_step(self, batch: Batch) -> Tensor:
        """What a micro-batch is to minimise: its mean loss in nats per token, and the z-loss."""
        tokens = batch["tokens"]
        # Here and not in a hook after the step: checkpoints are written before those run.
        self._data.advance(len(tokens) * self.trainer.world_size)
        loss, nats = next_token_loss(*self._predictions(tokens), self.z_loss)
        self._losses.append(nats)
        self._samples += batch["sample_ids"].tolist()
        if self._guard.config.loss_jump:
            of_all_ranks = self.trainer.strategy.reduce(nats.clone(), reduce_op="mean")
            if self._guard.is_spike(float(of_all_ranks)):
                return loss * math.nan  # as steps whose gradients are not finite are skipped
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        strategy: Any = self.trainer.strategy
        is_deepspeed = isinstance(strategy, DeepSpeedStrategy)
        if is_deepspeed and not strategy.deepspeed_engine.is_gradient_accumulation_boundary():
            return  # called after each micro-batch: they are this rank's alone as yet
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not gradients:
            return  # DeepSpeed has its own, and tells their norm after the step
        norm = torch.nn.utils.get_total_norm(gradients)  # not yet clipped
        self._gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not self._gradient_norm.isfinite():
            for parameter in self.parameters():  # the optimizer leaves these alone
                parameter.grad = None

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:  # type: ignore[override]
        """Count the step if its update was skipped, and log what it did if it is one to log."""
        is_logged, step = self._logs_next_step, self.trainer.global_step + 1
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
            self._guard.count(step, float(self._losses[-1]), self._samples, folder / file)
        self._samples = []
        if is_logged:
            self._log_step(step, learning_rate)

    def _change_optimizer(self) -> None:
        """Put `optimizer` in the place of what came with the checkpoint."""
        config, scheduler = self.optimizer_config, self.trainer.lr_scheduler_configs[0].scheduler
        step, total_steps = self.trainer.global_step, self.trainer.max_steps
        factor = learning_rate_factor(step, total_steps, config)
        scheduler.base_lrs = [config.learning_rate] * len(scheduler.base_lrs)
        decays = (config.weight_decay, 0.0)
        for group, decay in zip(scheduler.optimizer.param_groups, decays, strict=True):
            group |= {
                **self.optimizer_kind.hyperparameters(config),
                "lr": config.learning_rate * factor,
                "initial_lr": config.learning_rate,
                "weight_decay": decay,
            }

    def _learning_rate_by_time(self, timer: Timer) -> float:
        """Set the rate of the step at hand, in a run that also ends when its time is up."""
        elapsed, left = timer.time_elapsed(), timer.time_remaining()
        assert left is not None
        # The ranks' clocks differ, and their rates must not.
        (share,) = largest_of_ranks(self.trainer, min(1.0, elapsed / (elapsed + left)))
        step, total_steps = self.trainer.global_step, self.trainer.max_steps
        factor = learning_rate_factor(step, total_steps, self.optimizer_config, share)
        learning_rate = self.optimizer_config.learning_rate * factor
        for group in self.trainer.lr_scheduler_configs[0].scheduler.optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def _log_step(self, step: int, learning_rate: float) -> None:
        tokens = (self._data.position - self._clock_position) * self._data.seq_len
        tokens_per_second = tokens / (time.monotonic() - self._clock)
        loss = torch.stack(self._losses).mean()
        if self.trainer.world_size > 1:
            loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
        gib = peak_bytes(self.device, self._resident_before) / 2**30
        (gib,) = largest_of_ranks(self.trainer, gib)
        metrics: dict[str, float | Tensor] = {
            "train/loss": loss,
            "train/grad_norm": self._gradient_norm,
            "train/lr": learning_rate,
            "train/skipped_updates": float(self._guard.num_bad_steps),
            "train/tokens_per_second": tokens_per_second,
            "data/position": float(self._data.position),
            **self._utilization(tokens_per_second / self.trainer.world_size),
            "train/memory_gib": gib,
        }
        self._log(metrics, step)
        self._losses.clear()
        self._start_clock()

    def on_validation_epoch_start(self) -> None:
        self._validation = ValidationSums(self._data.seq_len, self._bytes_per_token)
        self._validation_start = time.monotonic()

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> None:
        """Add the losses of the targets that count; at the first one, see how the model writes."""
        if self._is_validation_cut:
            return
        tokens, targets = batch["tokens"], batch["tokens"][:, 1:]
        places = torch.arange(targets.shape[1], device=tokens.device)
        counted = places < batch["num_targets"][:, None]  # [B, T]
        nats, hits = token_losses(*self._predictions(tokens))
        self._validation.add(nats.view(counted.shape), hits.view(counted.shape), targets, counted)
        if batch_idx == 0 and not self.trainer.sanity_checking:
            texts = sample_texts(self.model, tokens, self._tokenizer)
            for number, text in enumerate(texts if self.trainer.is_global_zero else []):
                self._board.add_text(f"sample/{number}", text, self.trainer.global_step)

    def on_validation_epoch_end(self) -> None:
        """Log means over the whole validation split, all ranks together."""
        if self._is_validation_cut:
            return
        sums = self._validation.values
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        metrics = validation_metrics(sums.cpu())
        if not self.trainer.sanity_checking:
            self._log(metrics, self.trainer.global_step)
            if self.trainer.is_global_zero:
                folder = Path(self.trainer.default_root_dir)
                with warned("the accuracy's picture"):
                    plot_accuracy(metrics, folder / "accuracy-by-context.png")
            self._clock += time.monotonic() - self._validation_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `stu-export` needs besides the weights, and what a resumed run must repeat."""
        settings = result_settings(self.trainer, self, self._data)
        record = training_record(settings, self._data.tokenizer_path)
        checkpoint["stu"] = {**record, **self.run_record}
        checkpoint["stu"]["parameter_groups"] = parameter_groups(self.model)
        checkpoint["stu"]["state_tensors"] = list(self.optimizer_kind.state_tensors)
        checkpoint["stu"]["since_log"] = {
            "losses": self.trainer.strategy.all_gather(torch.stack(self._losses)).cpu()
            if self._losses
            else torch.zeros(0),
            "micro_batches": self.trainer.accumulate_grad_batches,
        }
        checkpoint["stu"]["guard"] = self._guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._guard.load_state_dict(checkpoint["stu"].get("guard", {}))
        self._losses = self._losses_since_log(checkpoint["stu"].get("since_log", {}))
        # Micro-batches count from the last step, of however many its own were.
        count = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, count))

    def _utilization(self, tokens_per_second: float) -> dict[str, float | Tensor]:
        """Of a rank that computes so many. Blocks computed again count once, and convolutions
        apart: their FFTs are not what a device's peak, in bfloat16, is stated for."""
        data = self._data
        flops = token_flops(self.config, data.seq_len, data.micro_batch_size, recomputes=False)
        products = tokens_per_second * (flops.dense + flops.attention)
        metrics: dict[str, float | Tensor] = {
            "train/product_teraflops": products / 1e12,
            "train/convolution_teraflops": tokens_per_second * flops.convolution / 1e12,
        }
        gpu = known_gpu(self.device)
        return {**metrics, "train/mfu": products / GPUS[gpu].flops} if gpu else metrics

    def _losses_since_log(self, saved: Mapping[str, Any]) -> list[Tensor]:
        """This rank's losses of the steps after the last logged one, from a checkpoint."""
        if not saved or not saved["losses"].numel():
            return []
        losses = saved["losses"].view(-1, saved["losses"].shape[-1])  # [ranks, n]
        now, then = self.trainer.accumulate_grad_batches, saved["micro_batches"]
        if len(losses) == self.trainer.world_size and now == then:
            return list(losses[self.trainer.global_rank])
        # Steps weigh the same, whatever they are divided into.
        by_step = losses.mean(0).view(-1, then).mean(1)
        return list(by_step.repeat_interleave(now))

    @property
    def _timer(self) -> Timer | None:
        """The clock of `trainer.max_time`, if it is set."""
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, Timer)), None)

    @property
    def _is_validation_cut(self) -> bool:
        """Whether the run is to stop and has no time left for a validation."""
        return self.trainer.limit_val_batches == 0

    @property
    def _board(self) -> Any:
        """TensorBoard's writer."""
        logger: Any = self.logger
        return logger.experiment

    @property
    def _logs_next_step(self) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (self.trainer.global_step + 1) % every == 0

    @property
    def _data(self) -> TokenData:
        data: TokenData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def _predictions(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states `[B T, D]`, the matrix that makes logits of them, and targets `[B T]`."""
        hidden = self.model.hidden(tokens[:, :-1])
        return hidden.flatten(0, 1), self.model.embedding.weight, tokens[:, 1:].flatten()

    def _log(self, metrics: Mapping[str, float | Tensor], step: int) -> None:
        """Log metrics, which all ranks have alike, at once: before a checkpoint of this step is
        written, after which a run that is killed would not come back to it."""
        self.log_dict(dict(metrics), logger=False, sync_dist=self.trainer.validating)
        if self.trainer.is_global_zero and self.logger is not None:
            self.logger.log_metrics({name: float(value) for name, value in metrics.items()}, step)
            self._board.flush()

    def _start_clock(self) -> None:
        """Begin a stretch of training whose speed is logged."""
        self._clock, self._clock_position = time.monotonic(), self._data.position
