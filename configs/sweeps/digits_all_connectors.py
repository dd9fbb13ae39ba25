"""All learned connectors at equal numbers of visual tokens, and one training for several budgets."""

from ml_collections import ConfigDict

from configs.sweeps import digits_token_budget

# Settings of the learned connectors for one grid of features. `hybrid_mlp`, which joins those of two
# encoders, needs another model.
CONNECTORS = {
    "pool": {},
    "concat": {},
    "block_mean": {},
    "pixel_shuffle": {},
    "visual_vocabulary": {"vocab_size": 256},
    "ldp": {},
    "ldp_v2": {},
    "resampler": {"num_heads": 4},
    "perceiver": {"depth": 2, "num_heads": 4},
    "qformer": {"width": 64, "depth": 2, "num_heads": 4, "mlp_dim": 192},
    "c_abstractor": {"depth": 1},
    "token_packer": {"num_heads": 4},
}
BUDGETS = {"ldp": (16,)}  # of the others (1, 4, 16)
NESTED = (1, 2, 4, 8, 16)


def get_config(arg: str = "") -> ConfigDict:
    """Each connector at 1, 4 and 16 tokens where feasible, and two matryoshkas at five budgets.

    Args:
      arg: "" for the sweep; `small` for average pooling and its matryoshka, after a shorter
        pre-training; `smoke` for a few steps of one connector and a matryoshka at two budgets.
    """
    config = digits_token_budget.get_config(arg)
    config.unlock()
    # The system that the shared stages train with all of its tokens; every other connector is adapted to it.
    candidates: dict[str, dict] = {"mlp": {"budgets": (64,)}}
    candidates |= {
        kind: {
            "budgets": BUDGETS.get(kind, (1, 4, 16)),
            "connector": {"kind": kind, **settings},
            "schedule": ("long_adaptation",),
        }
        for kind, settings in CONNECTORS.items()
    }
    for kind in ("pool", "resampler"):
        connector = {"kind": "matryoshka", "budgets": NESTED, "inner": {"kind": kind, **CONNECTORS[kind]}}
        candidates[f"matryoshka_{kind}"] = {
            "budgets": NESTED,
            "trained_at": NESTED[-1],
            "connector": connector,
            "schedule": ("long_adaptation",),
        }
    if arg == "small":
        candidates = {name: candidates[name] for name in ("mlp", "pool", "matryoshka_pool")}
    elif arg == "smoke":
        candidates = {
            "mlp": candidates["mlp"],
            **{name: {**candidates[name], "budgets": (1, 4)} for name in ("concat", "matryoshka_resampler")},
        }
    config.candidates = ConfigDict(candidates)
    config.sweep.controls = ()
    return config.lock()
