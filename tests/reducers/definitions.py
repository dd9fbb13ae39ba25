"""The papers' definitions in NumPy, image by image and token by token: no batch, no padding."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def evenly(places, count):
    """Element number i * n // count of n places."""
    return [places[i * len(places) // count] for i in range(count)]


def divprune(tokens, count):
    """Alvar et al. 2025, algorithm 1: greedy max-min on 1 - cosine."""
    distance = np.array([[1 - cosine(a, b) for b in tokens] for a in tokens])
    others = distance + np.diag([np.inf] * len(tokens))
    kept = [int(np.argmax(others.min(1)))]
    while len(kept) < count:
        rest = [i for i in range(len(tokens)) if i not in kept]
        kept.append(max(rest, key=lambda i: min(distance[i, j] for j in kept)))
    return sorted(kept)


def cdpruner(tokens, image, text, count):
    """Zhang et al. 2025 (CDPruner), section 3.3: greedily the largest determinant of the conditional kernel."""
    cosines = np.array([[cosine(a, b) for b in text] for a in image]).mean(1)
    relevance = (cosines.max() - cosines) / (cosines.max() - cosines.min())
    kernel = np.array([[cosine(a, b) for b in tokens] for a in tokens]) * np.outer(relevance, relevance)
    kept = []
    for _ in range(count):
        rest = [i for i in range(len(tokens)) if i not in kept]
        kept.append(max(rest, key=lambda i: np.linalg.det(kernel[np.ix_([*kept, i], [*kept, i])])))
    return sorted(kept)


def trim(tokens, image, text, count):
    """Song et al. 2024 (TRIM), section 3, with the release's sign; {place: token}."""
    order = np.argsort([np.mean([cosine(a, b) for b in text]) for a in image], kind="stable").tolist()
    kept, rest = order[: count - 1], order[count - 1 :]
    return {**{i: tokens[i] for i in kept}, rest[0]: tokens[rest].mean(0)}


def visionzip(tokens, saliency, keys, count, contextual):
    """Yang et al. 2024, sections 3.2 and 3.3; {place: token}."""
    metric = keys.mean(1)
    dominant = sorted(np.argsort(-saliency, kind="stable")[: count - contextual].tolist())
    rest = [i for i in range(len(tokens)) if i not in dominant]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    came = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            came[max(targets, key=lambda t: cosine(metric[i], metric[t]))].append(tokens[i])
    merged = {t: tokens[t] + (np.mean(came[t], axis=0) if came[t] else 0) for t in targets}
    return {**{i: tokens[i] for i in dominant}, **merged}


def prumerge(tokens, saliency, keys, count, neighbors, spatial=0):
    """Shang et al. 2024, algorithm 1, with `count` for the outliers; {place: token}."""
    flat = keys.reshape(len(tokens), -1)
    kept = np.argsort(-saliency, kind="stable")[: count - spatial].tolist()
    if spatial:
        kept += evenly([i for i in range(len(tokens)) if i not in kept], spatial)
    found = {}
    for i in kept:
        others = sorted((j for j in range(len(tokens)) if j != i), key=lambda j: -cosine(flat[i], flat[j]))
        found[i] = tokens[i] + sum(saliency[j] * tokens[j] for j in others[:neighbors])
    return found


def vispruner(tokens, saliency, count, important):
    """Zhang et al. 2025, section 3: alternating halves, of whose first the most similar leave, 8 at most."""
    order = np.argsort(-saliency, kind="stable").tolist()
    rest, wanted = order[important:], count - important
    while len(rest) > wanted:
        first, second = rest[::2], rest[1::2]
        first.sort(key=lambda i: -max(cosine(tokens[i], tokens[j]) for j in second))
        rest = first[min(8, len(rest) - wanted, len(first)) :] + second
    return sorted(order[:important] + rest)


def holov(tokens, saliency, count, num_crops, variety):
    """Zou et al. 2025, section 3: shares of crops by attention and variance; the most attended of each."""
    crops = [part.tolist() for part in np.array_split(np.arange(len(tokens)), num_crops) if len(part)]
    scores = []
    for crop in crops:
        variances = []
        for i in crop:
            cosines = [0 if i == j else cosine(tokens[i], tokens[j]) for j in crop]
            mean = sum(cosines) / max(len(crop) - 1, 1)
            variances.append(sum((x - mean) ** 2 for x in cosines) / max(len(crop) - 1, 1))
        attention = 1000 * saliency[crop]
        scaled = np.array(variances) * attention.mean() / (np.mean(variances) + 1e-6)
        scores.append((attention + variety * scaled).mean())
    shares = [int(score / (sum(scores) + 1e-6) * count) for score in scores]
    for crop in sorted(range(len(crops)), key=lambda crop: -scores[crop])[: count - sum(shares)]:
        shares[crop] += 1
    kept = {i for crop, share in zip(crops, shares, strict=True) for i in highest(saliency, crop, share)}
    return sorted(kept | set(highest(saliency, set(range(len(tokens))) - kept, count - len(kept))))


def dart(states, norms, tokens, text, count, pivots):
    """Wen et al. 2025, section 3: pivots by the norm of keys, and for each the least similar tokens."""
    kept = sorted(tokens, key=lambda place: -norms[place])[: pivots[0]][:count]
    every = kept + sorted(text, key=lambda place: -norms[place])[: pivots[1]]
    rest = count - len(kept)
    for turn, pivot in enumerate(every):
        others = sorted(set(tokens) - set(kept), key=lambda place: cosine(states[place], states[pivot]))
        kept = kept + others[: rest // len(every) + (turn < rest % len(every))]
    return sorted(kept)


def tome_merge(x, size, place, metric, count, prefix):
    """Bolya et al. 2023, section 3: every other token, its best edge, the best edges merged; none of the prefix."""
    first, second = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for a in (a for a in first if a >= prefix):
        b = max((b for b in second if b >= prefix), key=lambda b: cosine(metric[a], metric[b]))
        edges.append((cosine(metric[a], metric[b]), a, b))
    edges = sorted(edges, key=lambda edge: -edge[0])[:count]
    gone = {a for _, a, _ in edges}
    members = {b: [b, *[a for _, a, target in edges if target == b]] for b in second}
    groups = [[a] for a in first if a not in gone] + [members[b] for b in second]
    groups.sort(key=lambda group: min(place[group[0]], prefix))  # the prefix stays in front
    total = np.array([size[group].sum() for group in groups])
    merged = np.array([(x[group] * size[group, None]).sum(0) for group in groups]) / total[:, None]
    return merged, total, np.array([place[group[0]] for group in groups])


def highest(scores, places, count):
    """The `count` of `places` with the highest scores, ascending."""
    return sorted(sorted(places, key=lambda place: -scores[place])[:count])


def raters(embeddings, visual, text):
    """Zhang et al. 2024 (SparseVLM), section 3.2: text more like the image than the mean, from the decoder's input."""
    likeness = softmax(embeddings[visual] @ embeddings[text].T).mean(0)
    found = [place for place, share in zip(text, likeness, strict=True) if share > likeness.mean()]
    return found or text


def recycled(states, order, count):
    """({place: state}, places left) of `order`, which falls: the best stay, 30% of the others become a tenth.

    Together they are `count`; a cluster is at the place of its centre, by the density of Du et al. 2016.
    """

    def sizes(kept):
        candidates = int((len(order) - kept) * 0.3) + 1
        return candidates, candidates // 10 + 1

    kept = max(n for n in range(1, count) if n + sizes(n)[1] <= count)
    candidates, number = sizes(kept)
    best = order[kept : kept + candidates]
    far = np.array([[np.linalg.norm(states[a] - states[b]) / len(states[a]) ** 0.5 for b in best] for a in best])
    density = np.exp(-np.mean(np.sort(far, axis=1)[:, :number] ** 2, axis=1))
    apart = [
        min([far[i, j] for j in range(candidates) if density[j] > density[i]] or [far.max()]) for i in range(candidates)
    ]
    centers = sorted(range(candidates), key=lambda i: -apart[i] * density[i])[:number]
    joined = {center: [] for center in centers}
    for i in range(candidates):
        joined[i if i in joined else min(centers, key=lambda c: far[i, c])].append(states[best[i]])
    merged = {best[center]: np.mean(members, axis=0) for center, members in joined.items()}
    return merged, sorted([*order[:kept], *merged])
