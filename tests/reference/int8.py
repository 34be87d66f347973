"""Products of numbers that are rounded to 8 bits, one output after the other."""

from torch import Tensor


def int8_product(x: Tensor, weight: Tensor, levels: int) -> Tensor:
    """Return `x @ weight.T` in float64, with both rounded: `[.., in]`, `[out, in] -> [.., out]`.

    levels: Largest whole number of an input; that of a weight is 127.
    """
    # Numbers half-way between two are rounded as float32 sees them, without a sign.
    sizes = x.abs().amax(-1, keepdim=True) / levels
    rounded = (x / sizes.clamp_min(1e-37) + (levels + 1)).round().double() - (levels + 1)
    products = rounded.new_empty(*x.shape[:-1], len(weight))
    for output, own in enumerate(weight):
        scale = own.abs().max() / 127
        whole = (own / scale.clamp_min(1e-37)).round().double()
        products[..., output] = (rounded * whole).sum(-1) * sizes[..., 0].double() * scale.double()
    return products
