"""What a page offers for a release: the reducers that suit it, and the range of its token budgets."""

import dataclasses
import functools

from vlm_jax.budget import InfeasibleBudget, InfeasibleGrid
from vlm_jax.config import ConfigError, choose
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained.budgets import with_budget
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.processors.views import Tiles
from vlm_jax.reducers import REDUCERS
from vlm_jax.system import UnsupportedError

NONE = "none"
PREFERRED = ("visionzip", "uniform_stride", "random", NONE)  # the first that suits is chosen at first
# (height, width) of images of which one has the most visual tokens, whatever the release's tilings and limits.
SIZES = ((64, 64), (512, 2048), (2048, 512), (1024, 1024), (4096, 4096), (1024, 3072), (3072, 1024))


@dataclasses.dataclass(frozen=True)
class Choices:
    """The choices for a release.

    Attributes:
      model: the release.

    Raises:
      UnsupportedError: it does not answer questions about pictures.
      ChatTemplateError, TokenizerError: it lacks a file.
    """

    model: Pretrained

    def __post_init__(self):
        self.model.processor  # noqa: B018 (raises for a model without conversations)
        module = self.model.module
        if not isinstance(module, VLM) or module.encoder is None or module.decoder is None:
            raise UnsupportedError("--release: a language model without an encoder; pass a vision-language model")

    @functools.cached_property
    def reducers(self) -> tuple[str, ...]:
        """Kinds of reducers that suit the release, `none` first."""
        return tuple(kind for kind in REDUCERS if self._suits(kind))

    def initial_reducer(self, kind: str | None = None) -> str:
        """The reducer that the page starts with.

        Raises:
          ConfigError: there is no such kind, or it does not suit the release.
        """
        if kind is None:
            return next(kind for kind in PREFERRED if kind in self.reducers)
        choose(REDUCERS, kind, "--reducer")
        if kind not in self.reducers:
            told = f"--reducer: {kind} does not suit this release; choose one of {', '.join(self.reducers)}"
            raise ConfigError(told)
        return kind

    def most_tokens(self, reducer: str) -> int:
        """The largest budget with an effect: of a tile with a reducer, else of an image with all its tiles."""
        views = self.model.processor.views
        if reducer != NONE and isinstance(views, Tiles):
            return views.tile_tokens
        return max(self.model.count_visual_tokens([size])[0] for size in SIZES)

    def unit(self, reducer: str) -> str:
        """What a token budget counts."""
        if reducer == NONE:
            return "At most this many visual tokens of the picture, by fewer tiles or pixels."
        if isinstance(self.model.processor.views, Tiles) and self.most_tokens(reducer) < self.most_tokens(NONE):
            return "Visual tokens of each tile of the picture."
        return "Visual tokens of the picture."

    def _suits(self, kind: str) -> bool:
        """Whether the release can have a reducer at some budget."""
        if kind == NONE:
            return True
        try:
            with_budget(self.model.system, max(1, self.most_tokens(kind) // 2), reducer=kind)
        except (InfeasibleBudget, InfeasibleGrid):
            return True  # at other budgets, which the message names
        except ConfigError:
            return False
        return True
