"""One step on a long sequence, as one of several ranks that divide it: `RANK SIZE FOLDER LENGTH`.

It writes the loss, the gradients, both averaged over the ranks, and the bytes of activations that
this rank has saved for the backward pass.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from stu.config import ModelConfig
from stu.model import FlashSTU
from train.loss import next_token_loss
from train.parallel.context import divide_sequences


def main(rank: int, size: int, folder: Path, length: int) -> None:
    """Take the step."""
    torch.set_num_threads(1)
    store = f"file://{folder / f'store-{size}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    torch.manual_seed(0)
    model = FlashSTU(
        ModelConfig(
            vocab_size=64,
            width=32,
            num_layers=2,
            num_heads=4,
            max_seq_len=length,
            window_tokens=512,
        )
    )
    sequences, own = divide_sequences(size, length)
    tokens = torch.randint(64, (1, length + 1))
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(tokens[:, own], sequences).flatten(0, 1)
        targets = tokens[:, own.start + 1 : own.stop + 1].flatten()
        loss, nats = next_token_loss(hidden, model.embedding.weight, targets)
    loss.backward()
    means = {"loss": nats, **{name: p.grad for name, p in model.named_parameters()}}
    for tensor in means.values():
        dist.all_reduce(tensor)
        tensor /= size
    torch.save({**means, "bytes": sum(saved.values())}, folder / f"{size}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
