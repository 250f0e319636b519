"""Where an upcycled model comes from: kept in config.json, in the weights' metadata, in a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import moezoo
from moezoo.adapters.formats import Source
from moezoo.adapters.plan import Plan

_UNKNOWN = "0" * 64


@dataclass(frozen=True)
class Provenance:
    """What made a model: source files with their sha256, recipe, scale, moezoo's version.

    Holds nothing that depends on the time or the machine, so that equal work gives equal bytes.
    """

    source: str
    files: Mapping[str, str]
    recipe: Mapping[str, Any]
    scale: float
    operation: str = "upcycle"

    def to_dict(self) -> dict[str, Any]:
        return {
            "moezoo_version": moezoo.__version__,
            "operation": self.operation,
            "recipe": dict(self.recipe),
            "source": self.source,
            "source_sha256": dict(sorted(self.files.items())),
            "wo_scale": self.scale,
        }

    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        return {"format": "pt", "moezoo": json.dumps(self.to_dict(), sort_keys=True)}

    def with_hashes(self, hashes: Mapping[str, str]) -> Provenance:
        return replace(self, files=dict(hashes))


def unhashed(plan: Plan, source: Source) -> Provenance:
    """Provenance whose hashes are still to come, of the length that it will have."""
    return Provenance(
        source=source.directory.resolve().name,
        files={file.name: _UNKNOWN for file in source.files},
        recipe=plan.recipe.to_dict(),
        scale=plan.scale,
    )


def model_card(plan: Plan, provenance: Provenance, verification: str | None) -> str:
    """README.md of the output: what it is, what it costs, how it was made and checked."""
    config = plan.config
    recipe = json.dumps(provenance.to_dict()["recipe"], indent=2, sort_keys=True)
    hashes = "\n".join(f"- `{name}` sha256 `{value}`" for name, value in provenance.files.items())
    layout = "Hugging Face Switch" if plan.expressible else f"moezoo ({plan.layout_reason})"
    checked = verification or "not verified; run `moezoo verify OUT --against SRC`"
    return f"""---
library_name: moezoo
tags: [mixture-of-experts, switch-transformers, upcycled]
---

# {provenance.source}, upcycled to {config.num_experts} experts

| | |
|---|---|
| parameters | {plan.parameters:,} |
| active per token | {plan.active_parameters:,} |
| experts per sparse layer | {config.num_experts} |
| sparse encoder layers | {_listed(config.encoder_sparse)} |
| sparse decoder layers | {_listed(config.decoder_sparse)} |
| feed-forward | {config.feed_forward_proj} |
| layout | {layout} |
| factor on `wo` | {plan.scale:g} |
| verification | {checked} |

Made by moezoo {provenance.to_dict()["moezoo_version"]} from:

{hashes}

with this recipe (`moezoo upcycle SRC OUT --recipe recipe.json` makes the same bytes again):

```json
{recipe}
```
"""


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) or "none"
