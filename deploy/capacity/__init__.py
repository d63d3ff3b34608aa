"""How much of everything a load takes: `figures` reads what was measured, `model` reckons with it, `report` tells it.

`scaleout plan` asks it for one load, and `deploy.terraform.costs` for the six of its table: there is one model.
"""

from __future__ import annotations


class ImpossibleError(ValueError):
    """What was asked for cannot be planned; the text is for a person and says what to change."""
