"""Tables of rules by model family, as functions that return `tuple[Rule, ...]`."""
