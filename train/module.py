"""What one training step computes and logs."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer
from train.checkpoints import CHECKPOINT_KEY
from train.data import Batch, TokenData, ValidationBatch
from train.optimizer import OptimizerConfig, adamw, learning_rate_factor


class FlashSTUModule(L.LightningModule):
    """Next-token training of a Flash-STU model.

    Args:
        config: shape of the model; its vocabulary must be that of the token shards.
        optimizer: AdamW and its schedule.
    """

    def __init__(self, config: ModelConfig, optimizer: OptimizerConfig = OptimizerConfig()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.config, self.optimizer_config = config, optimizer
        self.model = FlashSTU(config)
        self.register_buffer("_val_sums", torch.zeros(3, dtype=torch.float64), persistent=False)
        """Nats, targets and bytes of text of one validation, in float64."""
        self._val_sums: Tensor

    @property
    def data(self) -> TokenData:
        """Where the batches come from."""
        data: TokenData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def check(self, data: TokenData, max_steps: int) -> None:
        """Raises ValueError for data or a trainer that this model cannot be trained with."""
        if data.vocab_size != self.config.vocab_size:
            raise ValueError(
                f"model.config.vocab_size={self.config.vocab_size}, but the token shards were made "
                f"with {data.vocab_size} tokens: set it to {data.vocab_size}"
            )
        if data.seq_len > self.config.max_seq_len:
            raise ValueError(
                f"data.seq_len={data.seq_len} exceeds model.config.max_seq_len="
                f"{self.config.max_seq_len}: lower the one or raise the other"
            )
        if max_steps < 1:
            raise ValueError(
                f"trainer.max_steps={max_steps} is not allowed: the schedule needs a number >= 1"
            )

    def setup(self, stage: str) -> None:
        tokenizer = Tokenizer(self.data.tokenizer_path)
        self._bytes_per_token = torch.from_numpy(tokenizer.bytes_per_token())

    def configure_optimizers(self) -> Any:
        # Not `estimated_stepping_batches`: reading it drops the loader's place on resume.
        total_steps = self.trainer.max_steps
        optimizer = adamw(self.model, self.optimizer_config)
        schedule = LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, total_steps, self.optimizer_config)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        """Mean loss of a micro-batch, in nats per token."""
        tokens = batch["tokens"]
        # Here and not in a hook after the step: checkpoints are written before those run.
        self.data.advance(len(tokens) * self.trainer.world_size)
        loss = self._losses(tokens).mean()
        self.log("train/loss", loss)
        self.log("train/lr", self._learning_rate())
        self.log("data/position", float(self.data.position))
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer is told to, and log the norm before."""
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters() if p.grad is not None]
        )
        self.log("train/grad_norm", norm)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_validation_epoch_start(self) -> None:
        self._val_sums.zero_()

    def validation_step(self, batch: ValidationBatch, _index: int) -> None:
        """Add the losses of the targets that count."""
        tokens, targets = batch["tokens"], batch["tokens"][:, 1:]
        counts = (
            torch.arange(targets.shape[1], device=tokens.device) < batch["num_targets"][:, None]
        )
        losses = self._losses(tokens).double()
        num_bytes = self._bytes_per_token.to(tokens.device)[targets]
        sums = [losses[counts].sum(), counts.sum(), num_bytes[counts].sum()]
        self._val_sums += torch.stack([value.double() for value in sums])

    def on_validation_epoch_end(self) -> None:
        """Means over the whole validation, all ranks together."""
        nats, targets, num_bytes = self.trainer.strategy.reduce(self._val_sums, reduce_op="sum")
        self.log("val/loss", nats / targets, prog_bar=True)
        self.log("val/bits_per_byte", nats / math.log(2) / num_bytes, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint all that `stu-export` needs, in plain values and tensors."""
        model_bytes = bytearray(self.data.tokenizer_path.read_bytes())
        checkpoint[CHECKPOINT_KEY] = {
            "model_config": self.config.to_dict(),
            "tokenizer": torch.frombuffer(model_bytes, dtype=torch.uint8),
        }

    def _losses(self, tokens: Tensor) -> Tensor:
        """Loss of each target, `[B, T + 1] -> [B, T]`; softmax and sum in float32 or wider."""
        logits = self.model(tokens[:, :-1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(len(tokens), -1)

    def _learning_rate(self) -> float:
        rate: float = self.trainer.optimizers[0].param_groups[0]["lr"]
        return rate
