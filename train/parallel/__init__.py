"""Distributed training strategies: DDP, DeepSpeed ZeRO and FSDP2."""
