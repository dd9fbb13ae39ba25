"""A connector, a reducer and a family for vlm_jax."""


def register() -> None:
    """Adds the kinds to the tables of vlm_jax, which calls this function by the entry point in pyproject.toml."""
    from vlm_jax import register_connector, register_family, register_reducer
    from vlm_jax_example import connector, family, reducer

    register_connector("middle", connector.Middle)
    register_reducer("central", reducer.Central)
    register_family("plain_vit", family.describe)
