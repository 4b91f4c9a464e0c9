"""fastgan's operations in place of those that other code bases bring along."""

from __future__ import annotations

from fastgan.drop_in.patch import Patch
from fastgan.drop_in.tables import TABLES

__all__ = ["patch_torch_utils"]


def patch_torch_utils() -> Patch:
    """Give StyleGAN's code bases fastgan's operations, under the signatures that their code calls.

    - StyleGAN2-ADA, StyleGAN3, R3GAN and their descendants: upfirdn2d, bias_act, filtered_lrelu, conv2d_gradfix,
      conv2d_resample, grid_sample_gradfix and fma of ``torch_utils.ops``
    - rosinality's stylegan2-pytorch and its descendants: upfirdn2d, fused_act and conv2d_gradfix of ``op``
    - BasicSR and what is made with it: upfirdn2d and fused_act of ``basicsr.ops``

    Modules of these names are patched whether they are imported already or later, also inside of another package
    (``stylegan3.torch_utils.ops.upfirdn2d``), and so are the modules that imported a function from one by name. Nothing
    is compiled by nvcc, and everything runs on a CPU. ``torch_utils.misc``, ``training.networks`` and everything else
    stay as they are. A function whose parameters are not the ones that fastgan knows stays too, with a warning in the
    log of the name "fastgan".

    Call it once, before training. Calling it again does nothing more.

    ```python
    import fastgan

    patch = fastgan.patch_torch_utils()
    print(patch.replaced)  # ["torch_utils.ops.upfirdn2d.upfirdn2d", ...] once these are imported
    patch.restore()
    ```

    Returns:
        An object with ``replaced``, the names of the functions that were replaced so far, and ``restore()``, which puts
        the original functions back.
    """
    return Patch.begin(TABLES)
