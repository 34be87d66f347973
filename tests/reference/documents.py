"""Documents kept apart the slow way: each goes through the model in a row of its own."""

import torch


def alone(model, tokens, lengths):
    """`[B, T] -> [B, T, vocab_size]`; lengths: tokens of each document of each row."""
    rows = []
    for row, counts in zip(tokens, lengths, strict=True):
        logits, start = [], 0
        for count in counts:
            logits.append(model(row[None, start : start + count])[0])
            start += count
        rows.append(torch.cat(logits))
    return torch.stack(rows)
