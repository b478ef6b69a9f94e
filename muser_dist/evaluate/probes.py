"""Probes: what a small classifier finds in frozen embeddings, and with how few labels.

Features are standardised by the training rows' mean and deviation. What must be chosen, the strength of the penalty of
the linear probe and the number of epochs of the MLP, is chosen by the likelihood of a held-out fifth of the training
rows; then the probe is fitted again on all of them. Rows that are scored are never looked at.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from muser_dist.errors import DataError
from muser_dist.evaluate.classification import multi_label, single_label

Kind = Literal["linear", "mlp"]

STRENGTHS = tuple(10.0**e for e in range(-5, 2))
"""C of the linear probe, scikit-learn's inverse penalty, from which one is chosen."""
SHARES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Of the labels, in few-shot curves."""

_HELD_OUT = 0.2
_EPOCHS, _PATIENCE, _HIDDEN = 100, 10, 256  # of the MLP: most epochs, those without gain before it stops, units

Scorer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    `score` maps (m, D) features to (m, classes) scores. `settings` are JSON values: what was chosen, the number of
    rows it was fitted on and of those that it was chosen on.
    """

    score: Scorer
    settings: dict[str, Any]


def fit_probe(kind: Kind, features: np.ndarray, labels: np.ndarray, classes: int, seed: int = 0) -> Probe:
    """Fits a probe.

    Args:
        kind: "linear", logistic regression with an L2 penalty, one against the rest for tags; or "mlp", one hidden
            layer of 256 units (Adam).
        features: (n, D) of the training rows.
        labels: (n,) int64 classes, or (n, tags) bool.
        classes: number of classes or tags. Those that no training row has get the lowest score of each row, tags
            that all have or none a constant one.
        seed: of the held-out rows, and of the MLP's weights and batches.

    Raises:
        DataError: features are not finite, or all rows have one class.
        ValueError: shapes do not fit together.
    """
    from sklearn.preprocessing import StandardScaler

    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if features.ndim != 2 or len(features) != len(labels):
        raise ValueError(f"features of shape {features.shape} for labels of shape {labels.shape}")
    if not np.isfinite(features).all():
        raise DataError("features of a probe are not finite; the weights have diverged, or the input is not finite")
    columns = labels.T if labels.ndim == 2 else [labels]
    if not any(len(np.unique(column)) > 1 for column in columns):
        raise DataError("a probe needs training rows that differ in their label; give more or other training rows")
    scaler = StandardScaler().fit(features)
    ready = scaler.transform(features)
    fit = _fit_linear if kind == "linear" else _fit_mlp
    rng = np.random.default_rng(seed)
    held = _held_out(labels, rng)
    score, chosen = fit(ready, labels, classes, held, seed)
    settings = {"kind": kind, **chosen, "train_rows": len(labels), "held_out": int(held.sum())}
    return Probe(lambda rows: score(scaler.transform(np.asarray(rows, np.float64))), settings)


def probe(
    kind: Kind,
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    classes: Sequence[str],
    seed: int = 0,
) -> tuple[dict[str, Any], np.ndarray]:
    """Fits a probe and scores it on other rows.

    Args:
        kind, seed: as of `fit_probe`.
        train: (n, D).
        train_labels: (n,) int64, or (n, tags) bool.
        test: (m, D).
        test_labels: (m,) int64, or (m, tags) bool.
        classes: names of the classes or tags.

    Returns:
        What `single_label` or `multi_label` returns and the probe's settings; and the (m, classes) scores.
    """
    if not np.isfinite(test).all():
        raise DataError("features of rows to score are not finite; the weights have diverged, or the input is not")
    fitted = fit_probe(kind, train, train_labels, len(classes), seed)
    scores = fitted.score(test)
    figures = multi_label if np.ndim(test_labels) == 2 else single_label
    return figures(scores, test_labels, classes) | {"probe": fitted.settings}, scores


def few_shot(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    classes: Sequence[str],
    *,
    shares: Sequence[float] = SHARES,
    seeds: int = 5,
    kind: Kind = "linear",
) -> dict[str, Any]:
    """A probe's scores by the share of labels it is fitted on.

    Args:
        train, train_labels, test, test_labels, classes: as of `probe`.
        shares: of the training rows. Each class or tag that they have keeps a row at least.
        seeds: draws of the rows, which the same seed and share repeat for any model. All rows are drawn once only.
        kind: of the probe.

    Returns:
        JSON values. "points", one for each share: `share`, `rows`, and for accuracy and macro_f1 (or roc_auc and
        pr_auc) {"mean", "interval", "values"}: the interval is Student's t over the draws, 95 %, and says how much
        the choice of labels matters, not that of the rows that are scored; None for a single draw. Where the rows
        are fewer than the classes: `impossible`, which says so. "kind", "seeds".
    """
    from scipy.stats import t

    train_labels = np.asarray(train_labels)
    tags = train_labels.ndim == 2
    names = ("roc_auc", "pr_auc") if tags else ("accuracy", "macro_f1")
    points: list[dict[str, Any]] = []
    for share in shares:
        rows = round(share * len(train_labels))
        point: dict[str, Any] = {"share": share, "rows": rows}
        found: dict[str, list[float]] = {name: [] for name in names}
        try:
            for seed in range(seeds if rows < len(train_labels) else 1):
                chosen = choose_rows(train_labels, rows, np.random.default_rng([seed, rows]))
                fitted = fit_probe(kind, train[chosen], train_labels[chosen], len(classes), seed)
                figures = (multi_label if tags else single_label)(fitted.score(test), test_labels, replicates=0)
                for name in names:
                    if figures[name] is not None:
                        found[name].append(figures[name])
        except DataError as error:
            points.append(point | {"impossible": str(error)})
            continue
        for name, values in found.items():
            mean, n = float(np.mean(values)) if values else None, len(values)
            half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None
            interval = None if mean is None or half is None else [mean - half, mean + half]
            point[name] = {"mean": mean, "interval": interval, "values": values}
        points.append(point)
    return {"points": points, "kind": kind, "seeds": seeds}


def choose_rows(labels: np.ndarray, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Draws rows at random so that every class (or tag) that any row has keeps one at least.

    Args:
        labels: (n,) int64, or (n, tags) bool.
        rows: how many, at most n.
        rng: draws.

    Returns:
        (rows,) int64, sorted. Single labels keep their shares as far as whole rows allow.

    Raises:
        DataError: there are more classes than rows.
    """
    order = rng.permutation(len(labels))
    if labels.ndim == 2:
        chosen: list[int] = []
        for tag in np.argsort(labels.sum(axis=0), kind="stable"):  # the rarest first: theirs bring others along
            having = order[labels[order, tag]]
            if len(having) and not labels[chosen, tag].any():
                chosen.append(int(having[0]))
    else:
        chosen = [int(order[labels[order] == value][0]) for value in np.unique(labels)]
    if len(chosen) > rows:
        what = "tags need" if labels.ndim == 2 else "classes need"
        raise DataError(f"{rows} rows are too few: the {what} {len(chosen)} to have one each")
    rest = order[~np.isin(order, chosen)]
    if labels.ndim == 1:
        # Places in a class's own order, as shares of it: taking the lowest takes the same share of each class.
        _, of, size = np.unique(labels[rest], return_inverse=True, return_counts=True)
        place = np.zeros(len(rest))
        for value in range(len(size)):
            place[of == value] = (np.arange(size[value]) + rng.random()) / size[value]
        rest = rest[np.argsort(place, kind="stable")]
    return np.sort(np.concatenate([chosen, rest[: rows - len(chosen)]]).astype(np.int64))


def _held_out(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) bool: a fifth of the rows, of each class where it has two at least."""
    held = np.zeros(len(labels), bool)
    if labels.ndim == 2:
        held[rng.permutation(len(labels))[: round(_HELD_OUT * len(labels))]] = True
        return held
    for value in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == value))
        held[rows[: max(1, round(_HELD_OUT * len(rows))) if len(rows) > 1 else 0]] = True
    return held


def _quality(scores: np.ndarray, labels: np.ndarray) -> float:
    """What a choice is made by: mean log-likelihood, smoother than accuracy or ROC-AUC on a few rows."""
    if labels.ndim == 2:
        return float(-np.logaddexp(0, np.where(labels, -scores, scores)).mean())
    return float((scores[np.arange(len(labels)), labels] - np.logaddexp.reduce(scores, axis=1)).mean())


def _fit_linear(
    features: np.ndarray, labels: np.ndarray, classes: int, held: np.ndarray, seed: int
) -> tuple[Scorer, dict[str, Any]]:
    """Logistic regression; of equally likely strengths the strongest penalty is chosen."""
    qualities = []
    if held.any():
        for strength, score in zip(STRENGTHS, _path(features[~held], labels[~held], classes, STRENGTHS), strict=True):
            qualities.append((_quality(score(features[held]), labels[held]), -strength))
    chosen = -max(qualities)[1] if qualities else 1.0
    return _path(features, labels, classes, (chosen,))[0], {"C": chosen}


def _path(features: np.ndarray, labels: np.ndarray, classes: int, strengths: Sequence[float]) -> list[Scorer]:
    """A logistic regression for each strength, each started from the last."""
    from sklearn.linear_model import LogisticRegression

    targets = labels.T if labels.ndim == 2 else labels[None]
    weights = np.zeros((len(strengths), classes, features.shape[1]))
    offsets = np.zeros((len(strengths), classes))
    present = np.unique(labels) if labels.ndim == 1 else np.arange(classes)
    if labels.ndim == 1:
        offsets[:, np.setdiff1d(np.arange(classes), present)] = -np.inf
    for tag, target in enumerate(targets):
        if len(np.unique(target)) < 2:  # a tag that all have, or none: 0 for every row
            continue
        model = LogisticRegression(warm_start=True, max_iter=1000)
        for i, strength in enumerate(strengths):
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of many classes, or near convergence
                model.set_params(C=strength).fit(features, target)
            coefficients, intercept = model.coef_, model.intercept_
            if labels.ndim == 2:
                weights[i, tag], offsets[i, tag] = coefficients[0], intercept[0]
            elif len(present) == 2:  # scikit-learn keeps the difference of two classes alone
                weights[i, present[1]], offsets[i, present[1]] = coefficients[0], intercept[0]
            else:
                weights[i, present], offsets[i, present] = coefficients, intercept

    def scorer(i: int) -> Scorer:
        return lambda rows: _lowest_where_absent(rows @ weights[i].T + offsets[i])

    return [scorer(i) for i in range(len(strengths))]


def _fit_mlp(
    features: np.ndarray, labels: np.ndarray, classes: int, held: np.ndarray, seed: int
) -> tuple[Scorer, dict[str, Any]]:
    best, epochs = -np.inf, 20
    if held.any() and (~held).any():
        for epoch, score in enumerate(_epochs(features[~held], labels[~held], classes, _EPOCHS, seed), 1):
            quality = _quality(score(features[held]), labels[held])
            if quality > best:
                best, epochs = quality, epoch
            elif epoch >= epochs + _PATIENCE:
                break
    *_, last = _epochs(features, labels, classes, epochs, seed)
    return last, {"epochs": epochs}


def _epochs(features: np.ndarray, labels: np.ndarray, classes: int, epochs: int, seed: int) -> Any:
    """Yields a scorer of the state after each epoch; it changes with the next."""
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier((_HIDDEN,), batch_size=min(64, len(features)), random_state=seed)
    # scikit-learn takes one column for a single label; twice the same is the same problem.
    targets = labels[:, [0, 0]] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    present = np.unique(labels) if labels.ndim == 1 else np.arange(classes)

    def score(rows: np.ndarray) -> np.ndarray:
        scores = np.full((len(rows), classes), -np.inf)
        likely = np.clip(model.predict_proba(rows)[:, : len(present)], 1e-15, 1 - 1e-15)
        scores[:, present] = np.log(likely) - (np.log1p(-likely) if labels.ndim == 2 else 0)
        return _lowest_where_absent(scores)

    for _ in range(epochs):
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of many classes
            model.partial_fit(features, targets, classes=present if labels.ndim == 1 else np.arange(targets.shape[1]))
        yield score


def _lowest_where_absent(scores: np.ndarray) -> np.ndarray:
    """-inf, of classes that training did not have, becomes a little less than the row's lowest score."""
    absent = np.isneginf(scores)
    lowest = scores.min(axis=1, where=~absent, initial=np.inf, keepdims=True)
    return np.where(absent, lowest - 1, scores)
