"""One table of rules a model family: `rules(config) -> tuple[Rule, ...]`."""
