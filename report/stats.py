"""Statistics of predictions: intervals, tests and calibration, in numpy.

`correct` [S, N] is boolean throughout: whether replicate s answers test item n correctly. All methods of a task have the
same items and the same seeds, so differences and ratios are paired.
"""

import numpy as np

BOUNDS = ("weak_floor", "strong_ceiling")
ZERO_SHOT = ("zero_shot_weak", "zero_shot_strong", "zero_shot_evidence")
REFERENCES = {*BOUNDS, *ZERO_SHOT}  # reported beside the methods: neither tested nor given a PGR


def bootstrap_means(correct: dict[str, np.ndarray], resamples: int = 2000) -> dict[str, np.ndarray]:
    """Resampled accuracies [resamples] of each method from its correct answers [S, N].

    Seeds and items are drawn with replacement, independently, the same draw for every method. With five seeds of
    the usual spread the intervals cover the truth in 95% of studies; with two or three that differ much, in fewer (LOG.md).
    """
    rng = np.random.default_rng(0)
    S, N = next(iter(correct.values())).shape
    items, seeds = drawn_items(rng, N, resamples), drawn(rng, S, resamples)
    return {name: (right(items, c) * seeds).sum(1) / (S * N) for name, c in correct.items()}


def drawn_items(rng: np.random.Generator, N: int, resamples: int) -> np.ndarray:
    """How often each item is drawn [R, N]."""
    return np.stack([np.bincount(rng.integers(N, size=N), minlength=N) for _ in range(resamples)], dtype=np.float32)


def drawn(rng: np.random.Generator, n: int, resamples: int) -> np.ndarray:
    """How often each of n is drawn [R, n], in as many draws with replacement."""
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples)


def right(items: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """How many [R, ...] of the drawn items [R, N] are right, from correct answers [..., N]. Whole numbers, which float32
    holds exactly: what is divided first is rounded, and two methods that are equally often right differ then."""
    counts = items @ correct.reshape(-1, items.shape[1]).astype(np.float32).T
    return counts.astype(float).reshape(-1, *correct.shape[:-1])


def judges(correct: dict[tuple[str, int], np.ndarray], resamples: int = 2000) -> dict[tuple[str, int], dict]:
    """By (protocol, turns), of judges that read D sets of its debates, their correct answers [D, S, N]: accuracy, and minus
    that of judges of debates with as many turns, with intervals.

    Sets are drawn with replacement too: the same for the turns of one protocol, for another protocol others. One set alone
    does not vary, and the interval leaves out what another would give.
    """
    rng = np.random.default_rng(0)
    S, N = next(iter(correct.values())).shape[1:]
    items, seeds = drawn_items(rng, N, resamples), drawn(rng, S, resamples)
    many = dict.fromkeys((protocol, len(c)) for (protocol, _), c in correct.items())
    sets = {one: drawn(rng, one[1], resamples) for one in many}
    draws = {
        name: np.einsum("rd,rs,rds->r", sets[name[0], len(c)], seeds, right(items, c)) / c.size
        for name, c in correct.items()
    }
    out = accuracies(correct, draws)
    for name, cell in out.items():
        debate = ("debate", name[1])
        if name != debate and debate in out:
            cell["diff_vs_debate"] = cell["accuracy"] - out[debate]["accuracy"]
            cell["diff_vs_debate_ci"] = interval(draws[name] - draws[debate])
    return out


def interval(draws: np.ndarray) -> tuple[float, float]:
    """95% percentile interval."""
    return tuple(np.percentile(draws, [2.5, 97.5]).tolist())


def pgr(weak: float, student: float, ceiling: float) -> float:
    """Performance gap recovered: 0 at the weak floor, 1 at the strong ceiling. Not clipped."""
    return (student - weak) / (ceiling - weak)


def two_sided_p(draws: np.ndarray) -> float:
    """p of a difference of zero, from resampled differences: below 0.05 where their 95% interval leaves zero out."""
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return min(1.0, 2 * (int(tail) + 1) / (len(draws) + 1))


def holm(ps: dict[str, float]) -> dict[str, float]:
    """p-values adjusted for their number by Holm's step-down rule."""
    adjusted, highest = {}, 0.0
    for i, (name, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        highest = adjusted[name] = max(highest, min(1.0, p * (len(ps) - i)))
    return adjusted


def brier(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared error of the probability of class 1, from probs [N, 2] and labels [N]; predicting 0.5 gives 0.25."""
    return float(np.mean((probs[:, 1] - labels) ** 2))


def reliability(probs: np.ndarray, labels: np.ndarray, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, count) of each filled bin of equal width of the likelier class's probability."""
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    filled = [index == b for b in np.unique(index)]
    return [(float(confidence[f].mean()), float(correct[f].mean()), int(f.sum())) for f in filled]


def ece(probs: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error: the mean distance of accuracy from confidence over the bins of `reliability`."""
    return sum(n * abs(accuracy - confidence) for confidence, accuracy, n in reliability(probs, labels)) / len(labels)


def accuracies(correct: dict, draws: dict) -> dict:
    """name -> accuracy of its correct answers, with the interval of its draws."""
    return {name: {"accuracy": float(c.mean()), "accuracy_ci": interval(draws[name])} for name, c in correct.items()}


def compared(correct: dict[str, np.ndarray], draws: dict[str, np.ndarray]) -> dict[str, dict]:
    """For each method accuracy and its differences from plain finetuning and from ours, with intervals."""
    out = accuracies(correct, draws)
    for other in [m for m in ("finetune", "ours") if m in correct]:
        for name in correct.keys() - {other}:
            out[name][f"diff_vs_{other}"] = float(correct[name].mean() - correct[other].mean())
            out[name][f"diff_vs_{other}_ci"] = interval(draws[name] - draws[other])
    return out


def difference_in_differences(own: dict[str, np.ndarray], other: dict[str, np.ndarray], method: str) -> dict:
    """By how much the lead of `method` over plain finetuning differs between two runs on the same seeds and items, paired."""
    leads = [c[method].mean() - c["finetune"].mean() for c in (own, other)]
    draws = [d[method] - d["finetune"] for d in map(bootstrap_means, (own, other))]  # the same seeds and items in both
    return {"lead_beyond": float(leads[0] - leads[1]), "lead_beyond_ci": interval(draws[0] - draws[1])}


def cells(correct: dict[str, np.ndarray], resamples: int = 2000) -> dict[str, dict]:
    """For each method accuracy, its differences from plain finetuning (with p, and p adjusted by Holm) and from ours, and
    PGR, with intervals.

    PGR is the ratio of means over seeds; floor, student and ceiling are resampled together. It is None where the interval
    of ceiling - floor reaches zero.
    """
    draws = bootstrap_means(correct, resamples)
    out, tested = compared(correct, draws), {}
    for name, c in correct.items():
        out[name] |= {"seeds": len(c), "pgr": None}
        if "diff_vs_finetune" in out[name]:
            out[name]["p"] = two_sided_p(draws[name] - draws["finetune"])
            if name not in REFERENCES:
                tested[name] = out[name]["p"]
    for name, p in holm(tested).items():
        out[name]["p_holm"] = p
    if correct.keys() >= set(BOUNDS):
        weak, ceiling = (draws[b] for b in BOUNDS)
        gap = out["strong_ceiling"]["accuracy"] - out["weak_floor"]["accuracy"]
        out["strong_ceiling"] |= {"gap": gap, "gap_ci": interval(ceiling - weak)}
        for name in correct.keys() - REFERENCES if out["strong_ceiling"]["gap_ci"][0] > 0 else ():
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = pgr(weak, draws[name], ceiling)
            accuracy = [out[n]["accuracy"] for n in ("weak_floor", name, "strong_ceiling")]
            out[name] |= {"pgr": pgr(*accuracy), "pgr_ci": interval(ratio[np.isfinite(ratio)])}
    return out
