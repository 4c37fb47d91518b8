"""What a trainer is given."""

import os
from pathlib import Path

from bench.race_plan import Job


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
