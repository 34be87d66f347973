"""What one training step computes and logs."""

import math
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer
from train.checkpoints import training_record
from train.data import Batch, TokenData, ValidationBatch
from train.optimizer import OptimizerConfig, adamw, learning_rate_factor


class FlashSTUModule(L.LightningModule):
    """Next-token training of a Flash-STU model on `TokenData`.

    Args:
        config: shape of the model; its vocabulary must be that of the token shards.
        optimizer: AdamW and its schedule.
    """

    def __init__(self, config: ModelConfig, optimizer: OptimizerConfig = OptimizerConfig()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        self.optimizer_config = optimizer
        self.model = FlashSTU(config)
        self._losses: list[Tensor] = []  # of the micro-batches since the last logged step
        self._validation_sums = [0.0, 0, 0]  # nats, targets, bytes of the targets' text

    def check_data(self, data: TokenData) -> None:
        """Raise ValueError unless this model can read `data`."""
        if data.vocab_size != self.config.vocab_size:
            raise ValueError(
                f"model.config.vocab_size={self.config.vocab_size}, but the token shards were made "
                f"with {data.vocab_size} tokens: give --model.config.vocab_size {data.vocab_size}"
            )
        if data.seq_len > self.config.max_seq_len:
            raise ValueError(
                f"data.seq_len={data.seq_len} exceeds model.config.max_seq_len="
                f"{self.config.max_seq_len}: lower the one or raise the other"
            )

    def setup(self, stage: str) -> None:
        self.check_data(self._data)
        tokenizer = Tokenizer(self._data.tokenizer_path)
        self._bytes_per_token = torch.from_numpy(tokenizer.bytes_per_token())

    def configure_optimizers(self) -> Any:
        # Not `estimated_stepping_batches`: reading it drops the loader's place on resume.
        total_steps = self.trainer.max_steps
        if total_steps < 1:
            raise ValueError(
                "trainer.max_steps is not set: the schedule needs it, and the data has no end"
            )
        optimizer = adamw(self.model, self.optimizer_config)
        schedule = LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, total_steps, self.optimizer_config)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_start(self) -> None:
        self._start_clock()

    def training_step(self, batch: Batch) -> Tensor:
        """Mean loss of a micro-batch, in nats per token."""
        tokens = batch["tokens"]
        # Here and not in a hook after the step: checkpoints are written before those run.
        self._data.advance(len(tokens) * self.trainer.world_size)
        loss = self._token_losses(tokens).mean()
        self._losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log what this step, gradients not yet clipped, is about to do."""
        step = self.trainer.global_step + 1
        if step % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        tokens = (self._data.position - self._clock_position) * self._data.seq_len
        metrics = {
            "train/loss": torch.stack(self._losses).mean(),
            "train/grad_norm": torch.nn.utils.get_total_norm(gradients),
            "train/lr": optimizer.param_groups[0]["lr"],
            "train/tokens_per_second": tokens / (time.monotonic() - self._clock),
            "data/position": float(self._data.position),
        }
        self._log(metrics, step)
        self._start_clock()

    def on_validation_epoch_start(self) -> None:
        self._validation_sums = [0.0, 0, 0]
        self._validation_start = time.monotonic()

    def validation_step(self, batch: ValidationBatch) -> None:
        """Add the losses of the targets that count."""
        tokens, targets = batch["tokens"], batch["tokens"][:, 1:]
        places = torch.arange(targets.shape[1], device=tokens.device)
        counted = places < batch["num_targets"][:, None]  # [B, T]
        nats = self._token_losses(tokens)[counted].sum()
        num_bytes = self._bytes_per_token[targets[counted].cpu()].sum()
        # Python's floats are float64, which some accelerators lack.
        for i, value in enumerate((nats, counted.sum(), num_bytes)):
            self._validation_sums[i] += value.item()

    def on_validation_epoch_end(self) -> None:
        """Log means over the whole validation split, all ranks together."""
        sums = torch.tensor(self._validation_sums, dtype=torch.float64)
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        nats, targets, num_bytes = sums.tolist()
        metrics = {
            "val/loss": nats / targets,
            "val/bits_per_byte": nats / math.log(2) / num_bytes,
        }
        self._log(metrics, self.trainer.global_step)
        if not self.trainer.sanity_checking:
            self._clock += time.monotonic() - self._validation_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `stu-export` needs besides the weights, and what a resumed run must repeat."""
        checkpoint["stu"] = training_record(
            self.config, self.optimizer_config, self.trainer.max_steps, self._data.tokenizer_path
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # `trainer.max_time` limits one job, not the run: each job of a chain has its own.
        for name in [name for name in checkpoint["callbacks"] if name.startswith("Timer")]:
            del checkpoint["callbacks"][name]

    @property
    def _data(self) -> TokenData:
        data: TokenData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def _token_losses(self, tokens: Tensor) -> Tensor:
        """Nats of each target, `[B, T + 1] -> [B, T]`; softmax and sum in float32 or wider."""
        logits = self.model(tokens[:, :-1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(len(tokens), -1)

    def _log(self, metrics: dict[str, Any], step: int) -> None:
        """Log the mean of each metric over the ranks."""
        # Lightning's own count of steps is one behind on the loggers' axis; "step" replaces it.
        self.log_dict({**metrics, "step": float(step)}, sync_dist=True)

    def _start_clock(self) -> None:
        """Begin a stretch of training whose speed and loss are logged together."""
        self._clock, self._clock_position = time.monotonic(), self._data.position
        self._losses.clear()
