"""Parameters of an experiment: of its model, with adapters, in the dtypes in which stages train them."""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from vlm_jax.adapter import LORA, LoraSettings
from vlm_jax.config import ConfigError
from vlm_jax.layers.lora import draw_lora, lora_shapes
from vlm_jax.optim.patterns import StageRates, trained_in_stages
from vlm_jax.sharding.initial import in_float32
from vlm_jax.sharding.rules import placed
from vlm_jax.system import System
from vlm_jax.types import Params


@contextlib.contextmanager
def fitting(*more: type[Exception]) -> Iterator[None]:
    """Turns an error about sizes of a model's parts into a ConfigError: a plain ValueError, or one of `more`."""
    try:
        yield
    except (ValueError, *more) as error:
        if type(error) not in (ValueError, *more):
            raise  # a subclass says by itself what is wrong
        raise ConfigError(f"config.encoder, config.connector and config.decoder: {error}") from error


def shapes_of(system: System) -> Params:
    """The shapes of a system's parameters.

    Raises:
      ConfigError: sizes of its parts do not fit, as heads that do not divide a width.
    """
    with fitting(TypeError):
        return system.boxed_shapes()


class WithParameters:
    """Shapes and first values of the parameters of an experiment, a dataclass.

    Attributes:
      system: the model with its processor.
      learning_rates: by pattern, of every stage, by the config path of the stage.
      lora: adapters of the model's linear layers, which are the part `lora` of its parameters.
    """

    system: System
    learning_rates: StageRates
    lora: LoraSettings

    @functools.cached_property
    def trained(self) -> frozenset[str]:
        """Paths of the parameters that a stage trains.

        They are float32 for any `config.param_dtype`, since in bfloat16 most updates would be lost to rounding.
        """
        return trained_in_stages(self.drawn_shapes, self.learning_rates) if self.learning_rates else frozenset()

    @property
    def drawn_shapes(self) -> Params:
        """The boxed shapes before any is made float32."""
        shapes = shapes_of(self.system)
        return shapes | lora_shapes(shapes, self.lora)

    def boxed_shapes(self) -> Params:
        """Shapes of the boxed parameters {part: tree}."""
        return in_float32(self.drawn_shapes, self.trained)

    def initial(self, key: jax.Array, mesh: Mesh, *, without: Sequence[str] = ()) -> Params:
        """Parameters on their devices; see `System.initial`."""
        params = self.system.initial(key, mesh, without=without, masters=self.trained)
        if self.lora.rank:
            params |= draw_lora(key, placed({LORA: self.boxed_shapes()[LORA]}, mesh))
        return params
