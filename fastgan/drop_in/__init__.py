"""Replace the custom operations of other code bases by fastgan's."""

from __future__ import annotations

from fastgan import backends
from fastgan.drop_in.patch import Patch
from fastgan.drop_in.tables import TABLES

__all__ = ["patch_torch_utils"]


def patch_torch_utils() -> Patch:
    """Replace the custom CUDA operations of StyleGAN's code bases by fastgan's, with the same signatures.

    - StyleGAN2-ADA, StyleGAN3, R3GAN and their descendants: upfirdn2d, bias_act, filtered_lrelu, conv2d_gradfix,
      conv2d_resample, grid_sample_gradfix and fma of ``torch_utils.ops``, also in StudioGAN's ``style_ops`` and
      MMGeneration's ``stylegan3.ops``
    - rosinality's stylegan2-pytorch and its descendants: upfirdn2d, fused_act and conv2d_gradfix of ``op``
    - BasicSR and packages built on it: upfirdn2d and fused_act of ``basicsr.ops``

    Modules with these names are patched, whether they are already imported or are imported later, also inside another
    package (``stylegan3.torch_utils.ops.upfirdn2d``). Modules that imported one of the functions by name are patched
    too. Nothing is compiled by nvcc, and everything also runs on a CPU. Other modules, such as ``torch_utils.misc`` and
    ``training.networks``, do not change. A replacement has the name, the module and the defaults of the original, so
    pickles do not refer to fastgan. A function with parameters that fastgan does not know is not replaced, and the
    logger "fastgan" gets a warning.

    Functions that are stored elsewhere before this call, such as in a ``functools.partial``, a dictionary or a default
    argument, remain the originals. Import the modules after this call if they store functions. With ``FASTGAN=off`` in
    the environment, nothing is replaced.

    Call it once, before training. A further call also replaces functions in modules that were loaded without an import
    since then.

    ```python
    import fastgan

    patch = fastgan.patch_torch_utils()
    print(patch.replaced)  # such as ["torch_utils.ops.upfirdn2d.upfirdn2d"]
    patch.restore()
    ```

    Returns:
        An object with two members. ``replaced`` lists the names of the functions that were replaced so far.
        ``restore()`` restores the original functions.
    """
    return Patch({}) if backends.is_off() else Patch.begin(TABLES)
