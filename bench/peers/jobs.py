"""What a trainer is given."""

import json
import os
from pathlib import Path

from bench.race_plan import Job
from fastppt.errors import UserError


class PeerJob(Job):
    """The job of a race, for a trainer with an environment of its own.

    `output` and `photos` are folders of the job's own: some trainers cache beside the photos, or
    take every file there for one.
    """

    checkout: Path
    """Folder with its sources."""
    python: Path
    """Interpreter of the environment that it is installed in."""
    extra: tuple[str, ...] = ()
    """What is typed behind the command."""

    @property
    def own_size(self) -> int:
        """Side of the pictures that the model's pipeline samples where nobody says other.

        Raises:
            UserError: the model's folder does not say it.
        """
        network = "transformer" if self.settings.family == "sd3" else "unet"
        files = [Path(self.model) / part / "config.json" for part in (network, "vae")]
        try:
            latents, vae = (json.loads(file.read_text()) for file in files)
            return int(latents["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--model {self.model}: {network}/config.json and vae/config.json do not say what "
                f"size of pictures it samples ({error!r}); is it a diffusers folder?"
            ) from None

    @property
    def variables(self) -> dict[str, str]:
        """Of the environment: as activated, and every step's bar is drawn, and at once."""
        variables = {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": str(self.settings.threads),
            "PYTHONUNBUFFERED": "1",
            "TQDM_MININTERVAL": "0",
            "TQDM_MINITERS": "1",
        }
        return variables | ({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {})
