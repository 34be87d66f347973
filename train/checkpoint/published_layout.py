"""How the published Flash-STU code names what a model has: its settings, and its tensors.

All tensors have the layout of ours: matrices `M_*` multiply from the right as ours do, `c_attn` is
queries, keys and values in this order, and its window is the keys to the left of a token. Its two
parts differ in what its checkpoints cannot tell (hazan-lab/flash-stu and flash-stu-2 on GitHub):

- The MLP's gate is GELU-tanh here and in the second part, which also stores its filters. The first
  part stores no filters, and gates with SiLU where liger-kernel is installed.
- RMSNorm's epsilon is torch's default, 1.2e-7 in float32. With liger-kernel installed it is that
  package's, 1e-6. `norm_eps` in config.json, which is ours, says otherwise.
"""

from collections.abc import Mapping
from typing import Any

from stu.config import ModelConfig

NORM_EPS = 2.0**-23
"""Torch's default of RMSNorm in float32: `torch.finfo(torch.float32).eps`."""
SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "width",
    "n_layers": "num_layers",
    "num_eigh": "num_filters",
    "seq_len": "max_seq_len",
    "mlp_scale": "mlp_ratio",
    "n_heads": "num_heads",
    "window_size": "window_tokens",
}
REFUSED = {
    "bias": "the layers here have no biases",
    "use_hankel_L": "the filters' minus branch is always computed here",
    "stu_enable_mlp_sandwich": "nothing stands between norm and STU here",
}
"""Switches that must be off."""

TENSORDOT = {
    "mixer_norm.weight": "stu_norm.weight",
    "mixer.input_matrix": "stu.M_inputs",
    "mixer.filter_matrix": "stu.M_filters",
}
FULL = {
    "mixer_norm.weight": "stu_norm.weight",
    "mixer.plus_matrices": "stu.M_phi_plus",
    "mixer.minus_matrices": "stu.M_phi_minus",
}
ATTENTION = {
    "mixer_norm.weight": "attn_norm.weight",
    "mixer.qkv.weight": "attn.c_attn.weight",
    "mixer.output.weight": "attn.c_proj.weight",
}
MLP = {
    "mlp_norm.weight": "mlp_norm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
EMBEDDING, HEAD, FILTERS = "tok_emb.weight", "lm_head.weight", "phi"


def published_names(config: ModelConfig) -> dict[str, str]:
    """The published name of each weight of a model, and of its filters.

    The embedding's other name, `lm_head.weight`, is not among them. Raises ValueError for a model
    that the published code has no layers for.
    """
    if config.layout not in ("hybrid", "stu"):
        raise ValueError(
            f"layout={config.layout!r} cannot be exported to the published format, whose blocks "
            "mix with STU, or alternate with attention: export a model directory (--format stu)"
        )
    names = {"embedding.weight": EMBEDDING, "norm.weight": "norm.weight", "filters": FILTERS}
    stu = TENSORDOT if config.stu_form == "tensordot" else FULL
    for i, name in enumerate(config.mixers):
        mixer = ATTENTION if name == "attention" else stu
        names |= {f"blocks.{i}.{ours}": f"layers.{i}.{its}" for ours, its in (mixer | MLP).items()}
    return names


def published_config(config: ModelConfig, dtype_name: str) -> dict[str, Any]:
    """The published config.json of a model whose weights are stored as `dtype_name`."""
    return {
        "model_type": "FlashSTU",
        "architectures": ["FlashSTU"],
        **{its: getattr(config, ours) for its, ours in SIZES.items()},
        "use_attn": config.layout == "hybrid",
        "use_approx": config.stu_form == "tensordot",
        **dict.fromkeys(REFUSED, False),
        "softcap": config.softcap,
        "dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": dtype_name,
        "norm_eps": config.norm_eps,
    }


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model that a published config.json describes. Settings of a training run are ignored.

    Raises ValueError, naming the key, for what no model here can be.
    """
    for key, reason in REFUSED.items():
        if values.get(key, False) is not False:
            raise ValueError(
                f"{key}={values[key]!r} is not allowed: it must be false, because {reason}; "
                "import a checkpoint that was trained without it"
            )
    if missing := [key for key in (*SIZES, "softcap") if key not in values]:
        raise ValueError(
            f"{', '.join(missing)} missing: add what the checkpoint was trained with, as "
            "config.json of hazan-lab/flash-stu has it"
        )
    for key in SIZES:
        value = values[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key}={value!r} is not allowed: it must be a whole number >= 1")
    settings = {ours: values[its] for its, ours in SIZES.items()}
    settings["layout"] = "hybrid" if _switch(values, "use_attn") else "stu"
    settings["stu_form"] = "tensordot" if _switch(values, "use_approx") else "full"
    settings["softcap"] = values["softcap"]
    settings["norm_eps"] = values.get("norm_eps", NORM_EPS)
    try:
        return ModelConfig(**settings)
    except ValueError as error:
        message = str(error)
        for its, ours in SIZES.items():
            message = message.replace(ours, its)
        raise ValueError(message) from error


def _switch(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, True)  # as the published class has it
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} is not allowed: it must be true or false")
    return value
