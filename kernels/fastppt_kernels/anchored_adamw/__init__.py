"""One step of AdamW with the anchor and the clip in it."""

from fastppt_kernels.anchored_adamw.batch import Batch
from fastppt_kernels.anchored_adamw.launcher import Launcher
from fastppt_kernels.anchored_adamw.op import anchored_adamw_

__all__ = ["Batch", "Launcher", "anchored_adamw_"]
