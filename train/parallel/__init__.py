"""Strategies of distributed training: DDP, DeepSpeed ZeRO and FSDP2."""
