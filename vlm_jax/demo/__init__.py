"""A page that asks a released model: its answer at a token budget beside that at the full one, and what was kept."""
