"""What peft notes beside the tensors: the configuration of an adapter, as a table of JSON.

Source: peft's ``LoraConfig``; diffusers keeps the same table in a LoRA file's metadata.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastppt.errors import UserError
from fastppt.families.lora_keys import LayerName
from fastppt.outputs.adapters import Adapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# Where diffusers keeps the tables of all components in a file's metadata.
METADATA_KEY = "lora_adapter_metadata"
PLAIN_PATTERN = re.compile(r"\^?[\w.-]+")
# Settings that make another thing of an adapter than alpha / rank * up @ down.
OTHER_SETTINGS = ("use_rslora", "use_dora", "lora_bias", "modules_to_save", "layer_replication")


class PeftTables:
    """The tables of each component, and what they say of alphas.

    Args:
        path: Where they stand, for messages.
        tables: By component.

    Raises:
        UserError: a table is of something else than plain LoRA.
    """

    def __init__(self, path: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
        self.tables = tables
        self._patterns: dict[str, dict[str, tuple[int, float]]] = {}
        for component, table in tables.items():
            if table.get("peft_type", "LORA") != "LORA":
                raise UserError(f"LoRA {path}: {component} is {table['peft_type']}, not LoRA")
            for key in OTHER_SETTINGS:
                if table.get(key):
                    raise UserError(
                        f"LoRA {path}: {component} sets {key} in its configuration, which fastppt "
                        "does not read (plain LoRA only)"
                    )
            if not _is_number(table.get("lora_alpha")):
                raise UserError(f"LoRA {path}: {component} has no lora_alpha in its configuration")
            self._patterns[component] = _plain_patterns(path, component, table)

    @classmethod
    def from_metadata(cls, path: Path, text: str | None) -> PeftTables:
        """Read diffusers' entry in a file's metadata; None where there is none."""
        tables: dict[str, dict[str, Any]] = {}
        for key, value in ({} if text is None else read_json(path, METADATA_KEY, text)).items():
            component, _, setting = key.partition(".")
            tables.setdefault(component, {})[setting] = value
        return cls(path, tables)

    def alpha(self, layer: LayerName) -> float | None:
        """Return the alpha of a layer; None where no table says."""
        component, path = layer
        table = self.tables.get(component)
        if table is None:
            return None
        patterns = self._patterns[component]
        # A pattern may leave out what transformers 5 does.
        names = [path, path.removeprefix("text_model.")]
        fitting = [patterns[end] for name in names for end in _ends(name) if end in patterns]
        # The first that fits counts, as in peft's get_pattern_key.
        return min(fitting)[1] if fitting else float(table["lora_alpha"])


def _plain_patterns(
    path: Path, component: str, table: Mapping[str, Any]
) -> dict[str, tuple[int, float]]:
    r"""Return the place and alpha of each pattern of a table, by its text without escapes.

    To peft they are regular expressions; programs write names of layers, or their ends. No others
    are read: a regular expression from a file could take for ever.
    """
    given = table.get("alpha_pattern") or {}
    if not isinstance(given, dict):
        raise UserError(f"LoRA {path}: {component} has an alpha_pattern that is no JSON object")
    found: dict[str, tuple[int, float]] = {}
    for place, (pattern, alpha) in enumerate(given.items()):
        plain = pattern.replace("\\.", ".").removesuffix("$")
        if not PLAIN_PATTERN.fullmatch(plain):
            raise UserError(
                f"LoRA {path}: the alpha_pattern {pattern!r} of {component} is a regular "
                "expression; fastppt reads names of layers alone"
            )
        if not _is_number(alpha):
            raise UserError(f"LoRA {path}: the alpha of {pattern!r} of {component} is no number")
        found.setdefault(plain, (place, float(alpha)))
    return found


def _ends(name: str) -> list[str]:
    """Return the plain patterns that fit a name: ``a.b`` is fit by ``^a.b``, ``a.b`` and ``b``."""
    parts = name.split(".")
    return [f"^{name}", *(".".join(parts[start:]) for start in range(len(parts)))]


def _is_number(value: object) -> bool:
    """Say whether a value of JSON can be an alpha."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def peft_table(component: str, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Return the table that gives each adapter of a component its rank and its alpha.

    Args:
        component: Of the pipeline.
        adapters: By the path of their module inside it.
    """
    # In one order, whatever the file's: the same adapters give the same table.
    adapters = dict(sorted(adapters.items()))
    ((rank, _),) = Counter(one.rank for one in adapters.values()).most_common(1)
    ((alpha, _),) = Counter(one.alpha for one in adapters.values()).most_common(1)
    # Text encoders' modules have two names (with and without `text_model.`): a pattern without an
    # anchor at the front fits both.
    anchor = "" if component.startswith("text_encoder") else "^"
    return {
        "r": rank,
        "lora_alpha": _tidy(alpha),
        "rank_pattern": {
            f"{anchor}{path}": one.rank for path, one in adapters.items() if one.rank != rank
        },
        "alpha_pattern": {
            f"{anchor}{path}": _tidy(one.alpha)
            for path, one in adapters.items()
            if one.alpha != alpha
        },
        "target_modules": list(adapters),
    }


def config_file(component: str, adapters: Mapping[str, Adapter]) -> str:
    """Return the text of an adapter_config.json."""
    constant = {"peft_type": "LORA", "bias": "none", "lora_dropout": 0.0, "inference_mode": True}
    return json.dumps(constant | peft_table(component, adapters), indent=2) + "\n"


def metadata_entry(components: Mapping[str, Mapping[str, Adapter]]) -> str:
    """Return what diffusers reads ranks and alphas from in a file's metadata."""
    entry = {}
    for component, adapters in components.items():
        names = {path.removeprefix("text_model."): one for path, one in adapters.items()}
        for key, value in peft_table(component, names).items():
            entry[f"{component}.{key}"] = value
    return json.dumps(entry, indent=2, sort_keys=True)


def read_json(path: Path, what: str, text: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        UserError: the text is none.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"LoRA {path}: {what} is not JSON ({error})") from None
    except RecursionError:
        raise UserError(f"LoRA {path}: {what} is not JSON (too deeply nested)") from None
    if not isinstance(value, dict):
        raise UserError(f"LoRA {path}: {what} must be a JSON object")
    return value


def _tidy(alpha: float) -> float:
    """Return whole numbers as such, the way they were most often given."""
    return int(alpha) if alpha.is_integer() else alpha
