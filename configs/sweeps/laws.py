"""How does the error fall with the size of the decoder and with visual tokens? One size of the four at a time.

    for points in digits_16 digits_32 digits_64 digits_128; do
        python -m vlm_jax.cli.sweep --config=configs/sweeps/laws.py:$points --workdir=workdir/laws/$points
    done

`experiments/laws` fits the law of Li et al. 2024 (arXiv 2411.03312) to the results. A connector that nests its budgets
is trained once with all tokens, so that its points differ in their tokens alone; they are what the law is fitted to.
"""

from ml_collections import ConfigDict

from configs.sweeps import digits_token_budget, document_reading

PAGES = ("digits", "documents")
WIDTHS = (16, 32, 64, 128)  # of the decoder; from one to the next it has about four times the parameters
BUDGETS = (1, 2, 4, 8, 16, 32, 64)
HEAD = 8  # dimensions, as of both sweeps
NAMES = tuple(f"{pages}_{width}" for pages in PAGES for width in WIDTHS)


def get_config(arg: str = "") -> ConfigDict:
    """One decoder at seven budgets.

    Args:
      arg: `digits_WIDTH` or `documents_WIDTH`, with the width of the decoder; "" for `digits_64`; `smoke` for a few
        steps of two budgets.
    """
    if arg not in ("", "smoke", *NAMES):
        raise ValueError(f"this config takes {', '.join(NAMES)} or smoke, not '{arg}'")
    smoke = arg == "smoke"
    pages, _, width = ("digits_16" if smoke else arg or "digits_64").partition("_")
    made = {"digits": digits_token_budget, "documents": document_reading}[pages]
    config = made.get_config("smoke" if smoke else "")
    config.unlock()
    _set_width(config.base, int(width))
    budgets = (4, 64) if smoke else BUDGETS
    connector = {"kind": "matryoshka", "budgets": budgets, "inner": {"kind": "pool"}}
    nested = {"budgets": budgets, "trained_at": 64, "connector": connector, "schedule": ("long_adaptation",)}
    # `mlp` is the system of the shared stages, which train its connector.
    config.candidates = ConfigDict({"mlp": {"budgets": (64,)}, "matryoshka": nested})
    config.sweep.controls = ()
    if not smoke:
        config.sweep.seeds = (0, 1)
    return config.lock()


def _set_width(base: ConfigDict, width: int) -> None:
    """Sets the decoder's width, in place, with heads of the same size and an MLP of the same shape.

    What learns with a wider decoder learns at a rate that falls with the width (Kaplan et al. 2020, appendix D.6:
    larger models need smaller rates); up to the width that the rates were chosen for they stay as they are.
    """
    decoder, before = base.decoder, base.decoder.width
    decoder.update({"width": width, "mlp_dim": decoder.mlp_dim * width // before})
    decoder.update({"num_heads": width // HEAD, "num_kv_heads": width // HEAD})
    for stage in base.stages.values():
        for part in ("connector", "decoder"):
            if part in stage.learning_rates:
                stage.learning_rates[part] *= min(1, before / width)
