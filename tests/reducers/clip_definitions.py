"""The video reducers' definitions at a budget in NumPy, clip by clip and token by token; {index: token}.

A clip is [frames, tokens of a frame, width]; `segments` are lists of neighbouring frames.
"""

import numpy as np

from .definitions import cosine, evenly


def peaks(x, neighbors):
    """Rodriguez and Laio 2014, Du et al. 2016: density times the distance to a denser vector."""
    distance = np.array([[np.linalg.norm(a - b) for b in x] for a in x]) / x.shape[1] ** 0.5
    near = np.sort(distance, axis=1)[:, : min(neighbors, len(x))]
    density = np.exp(-(near**2).mean(1))
    denser = [[distance[i, j] for j in range(len(x)) if density[j] > density[i]] for i in range(len(x))]
    return density * np.array([min(found) if found else distance.max() for found in denser])


def by_score(members, scores):
    return [members[i] for i in np.argsort(-np.asarray(scores), kind="stable")]


def in_proportion(groups, count):
    """Shares of Sainte-Lague: members of groups, best first, by (rank + 1/2) / size."""
    found = [((rank + 0.5) / len(group), i) for group in groups for rank, i in enumerate(group)]
    return [i for _, i in sorted(found)[:count]]


def split(clip, segments, is_static):
    """(tokens, static groups, groups of frames, the static tokens of later frames); is_static(frames, place)."""
    width = clip.shape[1]
    tokens = {i: token for i, token in enumerate(clip.reshape(-1, clip.shape[2]))}
    static, dynamic, later = [], [], []
    for frames in segments:
        places = [p for p in range(width) if len(frames) > 1 and is_static(frames, p)]
        for p in places:
            tokens[frames[0] * width + p] = clip[frames, p].mean(0)
        static.append([frames[0] * width + p for p in places])
        dynamic += [[f * width + p for p in range(width) if p not in places] for f in frames]
        later += [f * width + p for f in frames[1:] for p in places]
    return tokens, [group for group in static if group], [group for group in dynamic if group], later


def nearest(tokens, i, centers):
    return min(centers, key=lambda c: np.linalg.norm(tokens[i] - tokens[c]))


def dycoke(clip, count):
    """Tao et al. 2024, section 3.2, with the budget in place of the merging ratio."""
    width, items, whole = clip.shape[1], [], []
    for f, frame in enumerate(clip):
        if f % 4 == 0:
            whole += [f * width + p for p in range(width)]
            continue
        before = clip[f - 1 if f % 2 else f - 2]
        similar = [cosine(a, b) for a, b in zip(frame, before, strict=True)]
        items += [(rank, similar[p], f * width + p) for rank, p in enumerate(np.argsort(similar, kind="stable"))]
    kept = evenly(whole, count) if len(whole) > count else whole
    kept = kept + [i for _, _, i in sorted(items)[: count - len(kept)]]
    return {i: clip.reshape(-1, clip.shape[2])[i] for i in kept}


def prunevid(clip, segments, count, threshold):
    """Huang et al. 2024, section 3.2, with the budget in place of the ratio of clusters."""

    def similarity(frames, p):
        return np.mean([cosine(clip[a, p], clip[b, p]) for a in frames for b in frames if a != b])

    tokens, static, dynamic, later = split(clip, segments, lambda frames, p: similarity(frames, p) > threshold)
    groups = [by_score(g, peaks(np.stack([tokens[i] for i in g]), 7)) for g in static + dynamic]
    kept, found = in_proportion(groups, count), {}
    for group in groups:
        centers = [i for i in group if i in kept]
        for center in centers:
            joined = [i for i in group if i not in centers and nearest(tokens, i, centers) == center]
            found[center] = np.mean([tokens[i] for i in [center, *joined]], axis=0)
    own = {f: frames for frames in segments for f in frames}
    later = sorted(later, key=lambda i: (similarity(own[i // clip.shape[1]], i % clip.shape[1]), i))
    return {**found, **{i: tokens[i] for i in later[: count - len(found)]}}


def holitom(clip, saliency, segments, count, threshold, weight):
    """Shao et al. 2025, section 3.2, with the budget in place of the ratio."""

    def is_static(frames, p):
        return all(cosine(clip[f, p], clip[f + 1, p]) > threshold for f in frames[:-1])

    tokens, static, dynamic, later = split(clip, segments, is_static)
    left, flat = sum(map(len, static + dynamic)), saliency.reshape(-1)
    groups = [by_score(g, flat[g]) for g in dynamic]
    for group in static:
        clusters = max(1, round(len(group) * min(1, count / left)))
        groups.append(by_score(group, peaks(np.stack([tokens[i] for i in group]), min(7, clusters))))
    kept = in_proportion(groups, count)
    found = {i: tokens[i] for i in kept}
    for group in static:
        centers = [i for i in group if i in kept]
        for center in centers:
            joined = [tokens[i] for i in group if i not in centers and nearest(tokens, i, centers) == center]
            if joined:
                found[center] = weight * tokens[center] + (1 - weight) * np.mean(joined, axis=0)
    before = clip.shape[1]
    all_of = clip.reshape(-1, clip.shape[2])
    later = sorted(later, key=lambda i: cosine(all_of[i], all_of[i - before]))
    return {**found, **{i: all_of[i] for i in later[: count - len(found)]}}


def fastvid(clip, saliency, segments, count, share, step, least):
    """Shen et al. 2025, section 3, with the budget in place of the ratio."""
    width, tokens, flat = clip.shape[1], clip.reshape(-1, clip.shape[2]), saliency.reshape(-1)
    ranked = [np.argsort(-frame, kind="stable") + f * width for f, frame in enumerate(saliency)]
    order = sorted((rank, -flat[i], i) for frame in ranked for rank, i in enumerate(frame))
    salient = [i for _, _, i in order[: count - int(count * share)]]
    rest = [[i for i in range(f * width, (f + 1) * width) if i not in salient] for f in range(len(clip))]
    candidates = []
    for frames in segments:
        anchors = frames[::-1][::step]
        for f in anchors:
            if rest[f]:
                best = by_score(rest[f], peaks(tokens[rest[f]], 4))
                candidates += [((r + 0.5) / (len(frames) / len(anchors)), -flat[i], i) for r, i in enumerate(best)]
    context = [i for *_, i in sorted(candidates)[: count - len(salient)]]
    found = {i: tokens[i] for i in salient + context}
    for frames in segments:
        others = [i for f in frames for i in rest[f]]
        for f in frames:
            targets = [i for i in context if i // width == f]
            joins = {i: max(targets, key=lambda t: cosine(tokens[i], tokens[t])) for i in others} if targets else {}
            for target in targets:
                joined = [tokens[i] for i in others if joins[i] == target]
                part = max(1 / (len(joined) + 1), least)
                found[target] = part * tokens[target] + (1 - part) * np.mean(joined, axis=0)
    fill = sorted((i for frame in rest for i in frame if i not in context), key=lambda i: -flat[i])
    return {**found, **{i: tokens[i] for i in fill[: count - len(found)]}}
