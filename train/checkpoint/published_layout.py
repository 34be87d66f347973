"""Names of settings and tensors in the published Flash-STU code.

All tensors have the same layout as ours: matrices `M_*` multiply from the right, `c_attn` holds
queries, keys and values in this order, and the window counts the keys to the left of a token. The
two versions (hazan-lab/flash-stu and flash-stu-2 on GitHub) differ in ways that checkpoints do not
record:

- The MLP's gate is GELU-tanh here and in the second version, which also stores its filters. The
  first stores no filters, and gates with SiLU where liger-kernel is installed.
- RMSNorm's epsilon is PyTorch's default, 1.2e-7 in float32, or 1e-6 with liger-kernel. `norm_eps`
  in config.json, an addition of ours, overrides it.
"""

from collections.abc import Mapping
from typing import Any

from stu.common.errors import UserError
from stu.config import ModelConfig

NORM_EPS = 2.0**-23
"""PyTorch's default epsilon of RMSNorm in float32: `torch.finfo(torch.float32).eps`."""
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
"""Switches that must be off, and why."""

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
    """Return the published name of each weight of a model, and of its filters.

    The embedding's second name, `lm_head.weight`, is not included. Raises UserError for a model
    whose layers the published code does not have.
    """
    if config.layout not in ("hybrid", "stu"):
        raise UserError(
            message=f"layout={config.layout!r} cannot be exported to the published format, whose "
            "blocks mix with STU, or alternate with attention: export a model directory "
            "(--format stu)"
        )
    names = {"embedding.weight": EMBEDDING, "norm.weight": "norm.weight", "filters": FILTERS}
    stu = TENSORDOT if config.stu_form == "tensordot" else FULL
    for i, name in enumerate(config.mixers):
        block = ((ATTENTION if name == "attention" else stu) | MLP).items()
        names |= {f"blocks.{i}.{ours}": f"layers.{i}.{published}" for ours, published in block}
    return names


def published_config(config: ModelConfig, dtype_name: str) -> dict[str, Any]:
    """Return the published config.json of a model whose weights are stored as `dtype_name`."""
    return {
        "model_type": "FlashSTU",
        "architectures": ["FlashSTU"],
        **{published: getattr(config, ours) for published, ours in SIZES.items()},
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
    """Return the model that a published config.json describes, ignoring settings of training.

    Raises UserError, naming the key, for what is not supported.
    """
    for key, reason in REFUSED.items():
        if values.get(key, False) is not False:
            raise UserError(
                message=f"{key}={values[key]!r} is not allowed: it must be false, because "
                f"{reason}; import a checkpoint that was trained without it"
            )
    if missing := [key for key in (*SIZES, "softcap") if key not in values]:
        raise UserError(
            message=f"{', '.join(missing)} missing: add what the checkpoint was trained with, as "
            "config.json of hazan-lab/flash-stu has it"
        )
    for key in SIZES:
        value = values[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                message=f"{key}={value!r} is not allowed: it must be a whole number >= 1"
            )
    settings = {ours: values[published] for published, ours in SIZES.items()}
    settings["layout"] = "hybrid" if _switch(values, "use_attn") else "stu"
    settings["stu_form"] = "tensordot" if _switch(values, "use_approx") else "full"
    settings["softcap"] = values["softcap"]
    settings["norm_eps"] = values.get("norm_eps", NORM_EPS)
    try:
        return ModelConfig(**settings)
    except UserError as error:
        names = {ours: published for published, ours in SIZES.items()}
        allowed, fix = error.allowed, error.fix
        for ours, published in names.items():
            allowed, fix = allowed.replace(ours, published), fix.replace(ours, published)
        field = names.get(error.field, error.field)
        raise UserError(field, error.value, allowed, fix) from error


def _switch(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, True)  # as the published class has it
    if not isinstance(value, bool):
        raise UserError(message=f"{key}={value!r} is not allowed: it must be true or false")
    return value
