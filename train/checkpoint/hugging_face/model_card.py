"""The model card of a folder for transformers: the README.md that a hub shows."""

from collections.abc import Mapping

from stu.model import FlashSTU

METADATA = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- stu
- custom_code
---
"""
CODE = """\
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
"""
CODE_WITHOUT_TOKENIZER = """\
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
    print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=64))
"""


def model_card(
    model: FlashSTU,
    training: Mapping[str, str],
    validation: Mapping[str, str],
    has_tokenizer: bool,
) -> str:
    """Return the card in Markdown. What is not known is left to be filled in.

    Args:
        model: The model.
        training: Facts of its training by name; may be empty.
        validation: Results on the validation split by name; may be empty.
        has_tokenizer: Whether the folder has a tokenizer for transformers.
    """
    config = model.config
    shape = {
        "parameters": f"{model.num_parameters():,}",
        "layout": config.layout
        if "stu" not in config.mixers
        else f"{config.layout}, {config.stu_form}",
        "layers, width": f"{config.num_layers}, {config.width}",
        "vocabulary": f"{config.vocab_size:,}",
        "longest context": f"{config.max_seq_len:,} tokens",
    }
    unknown = "Not recorded with these weights: to be filled in."
    parts = [
        METADATA,
        "# A Stu language model",
        "Blocks mix tokens by long convolutions (Flash-STU, arXiv:2409.10489), windowed attention, "
        "or both. The code is in this folder: transformers runs it with `trust_remote_code=True`.",
        CODE if has_tokenizer else CODE_WITHOUT_TOKENIZER,
        "Generation keeps a state of constant size for an STU layer. Prompts of a batch are padded "
        "on the left.",
        _table(shape),
        "## Licence\n\nTo be filled in, also as `license:` at the top of this file.",
        "## Data\n\nTo be filled in.",
        f"## Training\n\n{_table(training) if training else unknown}",
        f"## Evaluation\n\n{_table(validation) if validation else unknown}",
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _table(values: Mapping[str, str]) -> str:
    lines = ["| | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in values.items())])
