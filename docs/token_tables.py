"""The page of the visual tokens that images take in each included release."""

from vlm_jax.pretrained.token_counts import count_all, markdown

BUDGET = 576  # of the second table
HEAD = """# Which system at how many tokens

Visual tokens of one image, by its width and height in pixels, as the release is: its own tiles, limits and resizing,
with learned rows such as newlines between rows of an image. Systems of several sizes that take the same are one row.
The same for your sizes, and for folders:

```bash
python -m vlm_jax.cli.tokens --releases=Qwen/Qwen2.5-VL-7B-Instruct,release --sizes=1280x720,448x448
```

What these tokens cost on a slice is [planned](../how-to/slice.md); how to take fewer is
[the budget](../how-to/budget.md).

## As released

"""
BUDGETED = f"""
## With at most {BUDGET} tokens

`--token_budget={BUDGET}` alone takes fewer tiles or pixels of an image, where a system can. Where it shows "-", the
smallest image takes more: such a system meets the budget by a reducer or by another connector. DeepSeek-OCR's modes are
named without their newlines and separator, which come in addition.

"""


def page() -> str:
    """The whole page as Markdown."""
    return HEAD + markdown(count_all()) + BUDGETED + markdown(count_all(token_budget=BUDGET))
