"""Analysis of a vision transformer as arrays, as figures, and as one HTML page."""

import base64
import dataclasses
import io
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from etils import epath
from flax import linen as nn
from jaxtyping import Float
from matplotlib.figure import Figure

from vlm_jax.analysis.attention_distance import draw_attention_distance, mean_attention_distance
from vlm_jax.analysis.filters import FilterComponents, draw_filters, filter_components
from vlm_jax.analysis.kept import Kept, draw_kept
from vlm_jax.analysis.position_similarity import draw_position_similarity, position_similarity
from vlm_jax.analysis.probe import attention_weights, first_filters, patch_size, position_embeddings
from vlm_jax.analysis.token_maps import Connect, draw_token_maps, token_maps
from vlm_jax.types import Array, Grid, Params, VisualFeatures

ARRAYS_FILE = "arrays.npz"
HTML_FILE = "report.html"
MOST_MAPS = 64  # token maps in a figure; evenly spaced ones where there are more tokens


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The arrays of a report.

    Attributes:
      name: class of the encoder, for the title.
      num_images: number of images over which attention distances are averaged.
      grid: rows and columns of patches.
      patch_size: in pixels.
      num_prefix: tokens before the patches, such as a class token.
      attention_distance: in pixels; attention to the tokens before the patches counts as distance 0.
      attention_distance_renormalised: the same, each patch's weights divided by their sum over patches.
      filters: principal components of the first layer's filters.
      similarity: cosines of the position embeddings; None where none are added.
      token_maps: maps of the tokens of the first image; None without a connector.
      page: the first image, for the token maps.
      kept: what reducers keep of the first image.
    """

    name: str
    num_images: int
    grid: Grid
    patch_size: int
    num_prefix: int
    attention_distance: Float[np.ndarray, "L heads"]
    attention_distance_renormalised: Float[np.ndarray, "L heads"]
    filters: FilterComponents
    similarity: Float[np.ndarray, "R C R C"] | None
    token_maps: Float[np.ndarray, "M N"] | None
    page: np.ndarray
    kept: tuple[Kept, ...] = ()

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of `arrays.npz`, by name."""
        named = {
            "attention_distance": self.attention_distance,
            "attention_distance_renormalised": self.attention_distance_renormalised,
            "position_similarity": self.similarity,
            **{f"filter_{name}": value for name, value in self.filters._asdict().items()},
            "token_maps": self.token_maps,
            **{f"kept_{one.reducer}": one.index for one in self.kept},
        }
        return {name: value for name, value in named.items() if value is not None}


def analyse(
    vit: nn.Module,
    params: Params,
    images: Float[Array, "B height width channels"],
    *,
    num_components: int = 28,
    batch_size: int = 8,
    connect: Connect | None = None,
    num_projections: int | None = None,
    kept: tuple[Kept, ...] = (),
) -> Analysis:
    """Computes every array of a report.

    Args:
      vit: an encoder that `probe` can read.
      params: its parameters, boxed or not.
      images: normalised pixels, at least one image.
      num_components: maximum number of filter components.
      batch_size: images whose attention weights are in memory at a time.
      connect: function from features to visual tokens, for token maps of the first image; see `token_maps`.
      num_projections: as in `token_maps`.
      kept: what reducers keep of the first image, to be drawn.

    Raises:
      ValueError: no image, or an unsupported encoder; see `probe`.
    """
    images = np.asarray(images)  # on the host; one batch at a time is put on the device
    if not len(images):
        raise ValueError("expected at least one image, got none")
    first = jnp.asarray(images[:1])
    kernel = np.asarray(first_filters(vit, params, first))
    grid, side = vit.grid(*images.shape[1:3]), patch_size(vit, *images.shape[1:3])

    distances, num_prefix = [], 0
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    for batch in batches:
        weights = np.asarray(attention_weights(vit, params, jnp.asarray(batch)))
        num_prefix = weights.shape[-1] - grid[0] * grid[1]
        distances.append([mean_attention_distance(weights, grid, side, renormalise=choice) for choice in (False, True)])
    # The last batch may be smaller, so batches are weighted by size.
    sizes = [len(batch) for batch in batches]
    plain, renormalised = np.average(distances, axis=0, weights=sizes).astype(np.float32)

    table = position_embeddings(vit, params, first)
    maps = None
    if connect is not None:
        unboxed = jax.tree.map(jnp.asarray, nn.meta.unbox(params))
        features = cast(VisualFeatures, vit.apply({"params": unboxed}, first))
        maps = np.asarray(token_maps(connect, features, num_projections=num_projections)[0])
    return Analysis(
        name=type(vit).__name__,
        num_images=len(images),
        grid=grid,
        patch_size=side,
        num_prefix=num_prefix,
        attention_distance=plain,
        attention_distance_renormalised=renormalised,
        filters=filter_components(kernel, min(num_components, kernel.shape[-1], kernel[..., 0].size)),
        similarity=None if table is None else position_similarity(table),
        token_maps=maps,
        page=_displayable(images[0]),
        kept=kept,
    )


def figures(analysis: Analysis) -> dict[str, Figure]:
    """Every figure by its file name."""
    drawn = {
        "attention_distance": draw_attention_distance(
            analysis.attention_distance_renormalised, "Mean attention distance"
        )
    }
    if analysis.num_prefix:
        drawn["attention_distance_plain"] = draw_attention_distance(
            analysis.attention_distance, "Not renormalised over patches"
        )
    if analysis.similarity is not None:
        drawn["position_similarity"] = draw_position_similarity(analysis.similarity)
    drawn["filters"] = draw_filters(analysis.filters)
    if analysis.token_maps is not None:
        patches = analysis.grid[0] * analysis.grid[1]  # a class token's share is not plotted
        maps = analysis.token_maps[:, -patches:]
        shown = np.unique(np.linspace(0, len(maps) - 1, min(len(maps), MOST_MAPS)).round().astype(int))
        drawn["token_maps"] = draw_token_maps(
            analysis.page, maps, analysis.grid, patch_size=analysis.patch_size, tokens=shown.tolist()
        )
    if analysis.kept:
        drawn["kept"] = draw_kept(analysis.page, analysis.kept)
    return drawn


def write_report(analysis: Analysis, directory: epath.PathLike) -> epath.Path:
    """Writes `arrays.npz`, a PNG for every figure, and `report.html`, which needs no other file.

    Args:
      analysis: from `analyse`.
      directory: created if missing; may be `gs://…`.

    Returns:
      The path of the HTML file.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {name: _png(figure) for name, figure in figures(analysis).items()}
    for name, png in pictures.items():
        (directory / f"{name}.png").write_bytes(png)
    arrays = io.BytesIO()
    np.savez_compressed(arrays, allow_pickle=False, **analysis.arrays())
    (directory / ARRAYS_FILE).write_bytes(arrays.getvalue())
    path = directory / HTML_FILE
    path.write_text(_html(analysis, pictures))
    return path


def _displayable(image: np.ndarray) -> np.ndarray:
    """uint8 pixels of a normalised image, scaled from its minimum (black) to its maximum (white)."""
    low, high = float(image.min()), float(image.max())
    return np.round(255 * (image - low) / ((high - low) or 1.0)).astype(np.uint8)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return stream.getvalue()


_CAPTIONS = {
    "attention_distance": "Distance in pixels between a patch and the patches it attends to, weighted by "
    "attention and averaged over patches and images; each patch's weights are divided by their sum over "
    "the patches. Dosovitskiy et al. 2021, figure 11.",
    "attention_distance_plain": "The same without that division: attention to tokens that are "
    "not patches counts as distance 0.",
    "position_similarity": "The tile at row r and column c shows the cosine similarity of the embedding of "
    "the patch at (r, c) with those of all patches. Dosovitskiy et al. 2021, figure 7 (centre).",
    "filters": "Principal components of the filters of the first layer, after subtracting their mean; grey is 0. "
    "Dosovitskiy et al. 2021, figure 7 (left).",
    "token_maps": "Norms of the derivative of each visual token of the first image with respect to each patch feature, "
    f"as shares of their sum; {MOST_MAPS} tokens at even steps where there are more. After Luo et al. 2016, section 2.",
    "kept": "What training-free reducers keep of the first image; a merged token is at the place of one of its parts.",
}

_TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Analysis of {{ a.name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1.5rem 0 2.5rem; }
img { max-width: 100%; }
figcaption, .note { color: #555; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.1rem 0.6rem; text-align: right; }
.wide { overflow-x: auto; }
</style>
</head>
<body>
<h1>Analysis of {{ a.name }}</h1>
<p>Images: {{ a.num_images }}. Patches: {{ a.grid[0] }} rows and {{ a.grid[1] }} columns of
{{ a.patch_size }} pixels. Tokens before the patches: {{ a.num_prefix }}.</p>
{% for name, png in pictures.items() %}
<figure id="{{ name }}">
<img src="data:image/png;base64,{{ png }}" alt="{{ name }}">
<figcaption>{{ captions[name] }}</figcaption>
</figure>
{% endfor %}
{% if a.similarity is none %}
<p class="note">The encoder adds no position embeddings to its patches, so their similarity is not
shown.</p>
{% endif %}
<h2>Mean attention distance in pixels</h2>
<div class="wide"><table>
<tr><th>layer</th>{% for _ in distances[0] %}<th>head {{ loop.index }}</th>{% endfor %}<th>mean</th></tr>
{% for row in distances %}
<tr><th>{{ loop.index }}</th>
{%- for value in row %}<td>{{ "%.1f" % value }}</td>{% endfor %}<td>{{ "%.1f" % row.mean() }}</td></tr>
{% endfor %}
</table></div>
<h2>Arrays</h2>
<p>Every array is in <code>{{ arrays_file }}</code>.</p>
<table>
{% for name, array in arrays.items() %}
<tr><td>{{ name }}</td><td>{{ array.shape | join(" × ") }}</td><td>{{ array.dtype }}</td></tr>
{% endfor %}
</table>
</body>
</html>
""")


def _html(analysis: Analysis, pictures: Mapping[str, bytes]) -> str:
    return _TEMPLATE.render(
        a=analysis,
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        captions=_CAPTIONS,
        distances=analysis.attention_distance_renormalised,
        arrays=analysis.arrays(),
        arrays_file=ARRAYS_FILE,
    )
