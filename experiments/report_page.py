"""The HTML of report.html, which needs no other file, no network and no JavaScript."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import report_figures as figures
from experiments.report import MISTAKES, Examples, Story
from experiments.report_masks import MaskExamples, section
from experiments.run_folder import Epoch, best
from experiments.tasks import intersection_over_union

if TYPE_CHECKING:
    from experiments.deltas import Row
    from jaxcnn import Serial

MAX_LAYERS = 24
"""Number of layers whose activations and δ are shown."""
CHANNELS = 4
"""Number of channels shown of each layer."""

STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --text: #1f2328; --soft: #5c6570; --line: #d5dae0;
  --card: #ffffff; --accent: #1a5fb4; --faint: #a9b2bc; --good: #1a7f37; --bad: #c01c28; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --text: #e4e7ea; --soft: #9aa4af; --line: #3d454e;
  --card: #1d2126; --accent: #7ab4ff; --faint: #626c77; --good: #57c172; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 0 0 .5rem; } h3 { font-size: 1rem; margin: 0 0 .4rem; }
a { color: var(--accent); }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.end { border-radius: .4rem; padding: .1rem .5rem; font-size: .9rem; font-weight: 600; vertical-align: .2em;
  border: 1px solid; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
dl.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
dl.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .8rem; }
dl.numbers dt { color: var(--soft); font-size: .85rem; }
dl.numbers dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
dl.numbers dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
nav { margin: 0 0 1.2rem; font-size: .92rem; } nav a { margin-right: .9rem; white-space: nowrap; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem;
  margin: 0 0 1.2rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 1.5rem; }
.columns > * { min-width: 0; }
figure { margin: 0; } figcaption { margin-top: .3rem; }
figure > svg { display: block; width: 100%; max-width: 34rem; height: auto; font-family: inherit; }
figure > svg text { font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif !important; }
img { image-rendering: pixelated; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); gap: 1rem; }
.mistakes img { width: 100%; border: 1px solid var(--line); }
.mistakes figcaption { font-size: .85rem; line-height: 1.35; }
.masks { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
.masks img { width: 100%; border: 1px solid var(--line); }
.key { white-space: nowrap; margin-right: .9rem; }
.key span { display: inline-block; width: .9em; height: .9em; margin-right: .35em; border: 1px solid var(--line); }
.mosaic { display: block; width: 100%; max-width: 44rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; overflow-wrap: normal; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
.scroll th, .scroll td { white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
table.deltas td { width: 36%; } table.deltas th { font-weight: 400; overflow-wrap: anywhere; }
table.deltas img { display: block; width: 100%; } table.deltas img.strip { height: 1.6rem; }
table.deltas img.map { max-height: 5rem; object-fit: contain; object-position: left; }
.seen { display: flex; gap: .8rem; align-items: center; margin-bottom: .5rem; }
.seen img { width: 4.5rem; border: 1px solid var(--line); }
.seen p { margin: 0; }
pre { background: var(--ground); border-radius: .4rem; padding: .6rem .8rem; margin: .3rem 0 .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
summary { cursor: pointer; color: var(--accent); }
"""


def page(story: Story) -> str:
    """Return the HTML of a run's report."""
    title = f"{story.config['model']} on {story.trained.dataset.name}"
    masks = story.trained.inputs.task == "segmentation"
    sections = [
        ("curves", "Loss and accuracy", _curves(story)),
        ("confusion", "Confusion matrix", _confusion(story)),
        ("masks", "Masks", _masks(story)) if masks else ("mistakes", "Most confident mistakes", _mistakes(story)),
        ("filters", "First layer", _filters(story)),
        *([] if masks else [("deltas", "Activations and δ", _deltas(story))]),
        ("layers", "Layers", _layers(story)),
        ("norms", "Norms of δ and gradients", _norms(story)),
        ("timings", "Timings", _timings(story)),
        ("command", "Command and environment", _command(story)),
        ("config", "Config", _config(story)),
    ]
    links = " ".join(f'<a href="#{name}">{text}</a>' for name, text, _ in sections)
    body = "\n".join(f'<section id="{name}"><h2>{text}</h2>\n{html}\n</section>' for name, text, html in sections)
    good = "good" if story.end == "finished" else "bad"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{escape(title)}: {escape(story.end)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)} <span class="end {good}">{escape(story.end)}</span></h1>
<p id="verdict">{_verdict(story)}</p>
{_numbers(story)}
</header>
<nav aria-label="Sections">{links}</nav>
<main>
{body}
</main>
<p class="soft">Written by <code>python -m experiments.report</code> from the files of {escape(story.folder.name)}.</p>
</body>
</html>
"""


def _verdict(story: Story) -> str:
    """Return a few sentences: how far the run went, how good the net is, and where it fails."""
    config, epochs = story.config, story.epochs
    row = best(story.epochs)
    steps = int(config.get("steps", epochs[-1].step if epochs else 0))
    done = f"{len(epochs)} of {config.get('epochs', len(epochs))} epochs" if epochs else "no epoch"
    parts = [f"The run {_ENDS.get(story.end, 'was killed')} after {steps:,} steps ({done})."]
    if row is not None:
        parts.append(f"Epoch {row.epoch} is the best, with a validation {row.score_name} of {_percent(row.score)}.")
    test = config.get("test_accuracy")
    if test is not None and story.examples is not None:
        weights = "its weights" if row is not None else "the last weights"
        parts.append(f"With {weights}, {story.examples.result(config)}")
    elif test is None:
        parts.append("The test set was not evaluated, because the run has not finished.")
    if story.examples is not None and (worst := _most_frequent(story.examples, story.trained.dataset.class_names)):
        parts.append(worst)
    return " ".join(parts)


_ENDS = {
    "finished": "finished",
    "interrupted": "was interrupted",
    "diverged": "diverged: a number was not finite, and it ended",
}


def _most_frequent(examples: Examples | MaskExamples, names: Sequence[str]) -> str:
    counts = examples.confusion()
    wrong = counts - np.diag(np.diag(counts))
    if not wrong.any():
        return ""
    true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
    what = examples.what if examples.unit == "images" else f"pixels of {examples.what}"
    return (
        f"The most frequent mistake: {wrong[true, predicted]} of {counts[true].sum()} {what} of the class "
        f"{escape(names[true])} are taken for {escape(names[predicted])}."
    )


def _numbers(story: Story) -> str:
    config, epochs, row = story.config, story.epochs, best(story.epochs)
    cards: list[tuple[str, str, str]] = []
    if "test_accuracy" in config:
        cards.append(("test accuracy", _percent(config["test_accuracy"]), f"loss {_number(config.get('test_loss'))}"))
    if "test_mean_iou" in config:
        cards.append(("test mean IoU", _percent(config["test_mean_iou"]), "of the classes"))
    if row is not None:
        note = f"epoch {row.epoch} of {len(epochs)}, loss {_number(row.validation_loss)}"
        cards.append((f"validation {row.score_name}", _percent(row.score), note))
    if epochs:
        last = epochs[-1]
        cards.append(("training accuracy", _percent(last.train_accuracy), f"loss {_number(last.train_loss)}"))
        seconds = sum(row.seconds for row in epochs)
        images = sum(row.seconds * row.images_per_second for row in epochs)
        rate = f"{images / seconds:,.0f} images/s" if seconds else ""
        cards.append(("training time", duration(seconds), rate))
    if "privacy" in config:
        spent = config["privacy"]
        note = f"δ = {spent['delta']:.3g}, {spent['steps']:,} steps, noise multiplier {spent['noise_multiplier']:g}"
        cards.append(("privacy", f"ε = {spent['epsilon']:.3f}", note))
    cards.append(("parameters", f"{_count(story.trained.params):,}", str(config["model"])))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in cards
    )
    return f'<dl class="numbers" id="numbers">{items}</dl>'


def _curves(story: Story) -> str:
    if not story.epochs and not story.steps:
        return "<p>No step was taken.</p>"
    row = best(story.epochs)
    step = None if row is None else row.step
    parts = []
    measured = ("mean_iou",) if row is not None and row.of_masks else ()
    for quantity in ("loss", "accuracy", *measured):
        chart = figures.curve(quantity, story.steps, story.epochs, step)
        alt = f"Chart of the {figures.title(quantity)} over the steps, by batch, epoch, and validation. "
        alt += " ".join(
            f"Epoch {row.epoch}: training {_number(getattr(row, f'train_{quantity}', None))}, "
            f"validation {_number(getattr(row, f'validation_{quantity}'))}."
            for row in _ends(story.epochs)
        )
        parts.append(_svg(figures.svg(chart, quantity, alt), ""))
    note = (
        "Training numbers are means over batches, with dropout and changing weights. Validation numbers are measured "
        "at the end of each epoch."
    )
    return f'<div class="columns">{"".join(parts)}</div><p class="soft">{note}</p>'


def _confusion(story: Story) -> str:
    if story.examples is None:
        return _NO_EXAMPLES
    names, counts = story.trained.dataset.class_names, story.examples.confusion()
    right, total, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    unit, iou, either = story.examples.unit, intersection_over_union(counts), total + predicted
    rows = []
    for n in np.argsort(right / np.maximum(total, 1), kind="stable"):
        others = counts[n].copy()
        others[n] = 0
        other = f"{escape(names[others.argmax()])} ({others.max()})" if others.any() else ""
        rows.append(
            f'<tr><td>{escape(names[n])}</td><td class="n">{total[n]}</td>'
            f'<td class="n">{_percent(right[n] / max(total[n], 1), 1)}</td>'
            f'<td class="n">{_percent(right[n] / max(predicted[n], 1), 1)}</td>'
            + (f'<td class="n">{_percent(iou[n], 1) if either[n] else "–"}</td>' if unit == "pixels" else "")
            + f"<td>{other}</td></tr>"
        )
    alt = f"Confusion matrix of the {len(names)} classes; the table next to it has the shares by class."
    chart = figures.svg(figures.confusion(counts, names), "confusion", alt)
    caption = f"Rows: true classes of the {story.examples.counted}. Columns: predicted ones."
    table = (
        '<div class="scroll"><table><thead><tr><th>class</th><th class="n">'
        f'{unit}</th><th class="n">recall</th><th class="n">precision</th>'
        + ('<th class="n">IoU</th>' if unit == "pixels" else "")
        + "<th>most often taken for</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return f'<div class="columns">{_svg(chart, caption)}{table}</div>'


_NO_EXAMPLES = "<p>Not measured: the run has not finished, and it has no validation images.</p>"


def _mistakes(story: Story) -> str:
    if not isinstance(story.examples, Examples):
        return _NO_EXAMPLES
    examples, names = story.examples, story.trained.dataset.class_names
    wrong = examples.mistakes()
    if not len(wrong):
        return f"<p>All {len(examples.labels):,} {examples.what} are classified correctly.</p>"
    cards = []
    for n in wrong[:MISTAKES]:
        true, predicted = escape(names[examples.labels[n]]), escape(names[examples.predicted[n]])
        pixels = figures.png(figures.image(examples.images([n])[0]))
        share = _percent(float(examples.probabilities[n].max()), 1)
        cards.append(
            f'<figure><img src="{pixels}" alt="Image {n}: {true}, predicted {predicted}">'
            f'<figcaption><strong class="bad">{predicted}</strong> {share}<br>true: {true} '
            f'<span class="soft">#{n}</span></figcaption></figure>'
        )
    intro = (
        f"The predictions of {len(wrong):,} of {len(examples.labels):,} {examples.what} are wrong. In these the wrong "
        "class has the highest probability."
    )
    return f'<p>{intro}</p><div class="mistakes">{"".join(cards)}</div>'


def _masks(story: Story) -> str:
    if not isinstance(story.examples, MaskExamples):
        return _NO_EXAMPLES
    return section(story.examples, story.trained.dataset.class_names)


def _filters(story: Story) -> str:
    for weight in weights_in_order(story.trained.net, story.trained.params):
        drawn = figures.filters(weight, story.trained.dataset.image_shape)
        if drawn is not None:
            tiles, caption = drawn
            mosaic = figures.mosaic(tiles, 8 if len(tiles) > 6 else len(tiles))
            alt = f"First layer: {caption}"
            return (
                f'<figure><img class="mosaic" src="{figures.png(mosaic)}" alt="{escape(alt, quote=True)}">'
                f"<figcaption>{escape(caption)}.</figcaption></figure>"
            )
    return "<p>The first layer has no weights that can be drawn as images.</p>"


def weights_in_order(net: "Serial", params: Any) -> list[np.ndarray]:
    """Return the arrays with at least two dims, in the order in which the layers are executed.

    Args:
        net: The net.
        params: Its parameters in any order; safetensors files have them in alphabetical order.
    """
    import jax

    groups: dict[str, list[np.ndarray]] = {}
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        layer = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        groups.setdefault(layer, []).append(np.asarray(array))
    return [a for layer in _in_order(net, groups) for a in groups[layer] if a.ndim >= 2]


def _count(params: Any) -> int:
    import jax

    return sum(math.prod(np.shape(a)) for a in jax.tree.leaves(params))


def _deltas(story: Story) -> str:
    net, examples = story.trained.net, story.examples
    if not isinstance(examples, Examples):
        return _NO_EXAMPLES
    wrong = examples.mistakes()[:1]
    correct = np.flatnonzero(examples.predicted == examples.labels)[: 2 - len(wrong)]
    chosen = [*correct, *wrong]
    blocks = "".join(_layers_of_image(net, story, int(n), rows) for n, rows in _rows(net, story, chosen))
    intro = (
        f"δ = ∂E/∂a, where E is the cross-entropy with the true class. Shown are the {CHANNELS} channels with the "
        "largest Σ |a∘δ|. Red is positive, blue is negative, white is 0. Each row has its own scale ±."
    )
    return f'<p>{intro}</p><div class="columns">{blocks}</div>'


def _rows(net: "Serial", story: Story, chosen: Sequence[int]) -> "list[tuple[int, list[Row]]]":
    from experiments import deltas

    assert isinstance(story.examples, Examples)
    x, labels = story.examples.images(chosen), story.examples.labels[list(chosen)]
    result = deltas.backprop(net, story.trained.params, x, labels)
    names = deltas.evaluated(net, result)
    if len(names) > MAX_LAYERS:
        names = [names[round(n * (len(names) - 1) / (MAX_LAYERS - 1))] for n in range(MAX_LAYERS)]
    return [(n, [deltas.row(net, result, name, i, CHANNELS) for name in names]) for i, n in enumerate(chosen)]


def _layers_of_image(net: "Serial", story: Story, n: int, rows: "Sequence[Row]") -> str:
    examples, names = story.examples, story.trained.dataset.class_names
    assert isinstance(examples, Examples)
    true, predicted = names[examples.labels[n]], names[examples.predicted[n]]
    kind = "good" if true == predicted else "bad"
    share = _percent(float(examples.probabilities[n].max()), 1)
    lines = []
    for row in rows:
        cells = []
        for values, what in ((row.activation, "activation"), (row.delta, "δ")):
            limit = float(np.abs(values).max())
            alt = escape(f"{what} of {row.name}, image {n}", quote=True)
            if values.ndim == 3:
                tiles = [figures.signed(channel, limit) for channel in np.moveaxis(values, -1, 0)]
                pixels, kind_of = figures.mosaic(tiles, CHANNELS), "map"
            else:
                pixels, kind_of = figures.signed(values.reshape(1, -1), limit), "strip"
            cells.append(
                f'<td><img class="{kind_of}" src="{figures.png(pixels)}" alt="{alt}">'
                f'<span class="soft">±{limit:.2g}</span></td>'
            )
        shape = "×".join(map(str, row.shape))
        lines.append(f'<tr><th>{escape(row.name)}<br><span class="soft">{shape}</span></th>{"".join(cells)}</tr>')
    return (
        f'<div><div class="seen"><img src="{figures.png(figures.image(examples.images([n])[0]))}" alt="Image {n}">'
        f'<p><strong class="{kind}">{escape(predicted)}</strong> {share}<br>true: {escape(true)} '
        f'<span class="soft">#{n}</span></p></div>'
        f'<table class="deltas"><thead><tr><th>layer</th><th>activation a</th><th>δ</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _layers(story: Story) -> str:
    summary = story.trained.net.summary(story.trained.dataset.image_shape)
    lines = [
        f"<tr><td>{escape(row.name)}</td><td>{escape(row.op)}</td><td>{row.shapes}</td>"
        f'<td class="n">{row.parameters:,}</td><td class="n">{row.flops:,}</td></tr>'
        for row in summary.rows
    ]
    shape = "×".join(map(str, story.trained.dataset.image_shape))
    return (
        '<div class="scroll"><table><thead><tr><th>layer</th><th>op</th><th>output</th><th class="n">parameters</th>'
        '<th class="n">FLOPs</th></tr></thead><tbody>'
        f"<tr><td>input</td><td></td><td>{shape}</td><td></td><td></td></tr>"
        f'{"".join(lines)}<tr><th>total</th><td></td><td></td><td class="n">{summary.parameters:,}</td>'
        f'<td class="n">{summary.flops:,}</td></tr></tbody></table></div>'
    )


def _norms(story: Story) -> str:
    measured = [step for step in story.steps if "delta_norms" in step]
    charts = []
    if measured:
        layers = _in_order(story.trained.net, measured[0]["delta_norms"])
        deltas = {name: _line(measured, "delta_norms", [name]) for name in layers}
        charts.append((figures.norms(deltas, "‖δ‖"), "delta-norms", "2-norms of δ of a batch, by layer"))
        groups: dict[str, list[str]] = {}
        for name in measured[0]["gradient_norms"]:
            groups.setdefault(name.rpartition("/")[0] or name, []).append(name)
        groups = {layer: groups[layer] for layer in _in_order(story.trained.net, groups)}
        gradients = {layer: _line(measured, "gradient_norms", names) for layer, names in groups.items()}
        charts.append((figures.norms(gradients, "‖∂E/∂w‖"), "gradient-norms", "2-norms of the gradients, by layer"))
    every = [step for step in story.steps if "gradient_norm" in step]
    if every:
        lines = {
            name.replace("_norm", ""): ([step["step"] for step in every], [step[name] for step in every])
            for name in ("gradient_norm", "update_norm")
            if name in every[0]
        }
        alt = "2-norms of gradient and update over all parameters"
        charts.append((figures.norms(lines, "2-norm"), "update-norms", alt))
    if not charts:
        return "<p>Not measured: metrics.jsonl has no norms.</p>"
    drawn = "".join(_svg(figures.svg(chart, name, f"Chart of the {alt}."), f"{alt}.") for chart, name, alt in charts)
    missing = "" if measured else "<p>Not measured by layer: choose <code>--norms-every</code>.</p>"
    return f'<div class="columns">{drawn}</div>{missing}'


def _in_order(net: "Serial", names: Iterable[str]) -> list[str]:
    """Return names of layers in the order of execution. metrics.jsonl has them in alphabetical order."""
    order = [name for name, _ in net.walk()]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _line(steps: Sequence[Mapping[str, Any]], kind: str, names: Sequence[str]) -> tuple[list[float], list[float]]:
    norms = [math.sqrt(sum(step[kind].get(name, math.nan) ** 2 for name in names)) for step in steps]
    return [step["step"] for step in steps], norms


def _timings(story: Story) -> str:
    epochs = story.epochs
    if not epochs:
        return "<p>No epoch was finished.</p>"
    alt = "Chart of the images per second. " + " ".join(
        f"Epoch {row.epoch}: {row.images_per_second:,.0f}." for row in _ends(epochs)
    )
    chart = _svg(figures.svg(figures.speed(epochs), "speed", alt), "Time of the training steps only.")
    columns = ("epoch", "step", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "seconds")
    head = "".join(f'<th class="n">{name.replace("_", " ")}</th>' for name in columns)
    cells = [[f'<td class="n">{_number(getattr(row, name))}</td>' for name in columns] for row in epochs]
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    if len(epochs) > 20:
        table = f"<details><summary>All {len(epochs)} epochs</summary>{table}</details>"
    return f"{table}{chart}"


def _command(story: Story) -> str:
    first = story.environment
    parts = []
    for title, entry in [("Started", first), *(("Resumed", more) for more in first.get("resumed", []))]:
        if "command" in entry:
            when, folder = escape(str(entry.get("started", ""))), escape(str(entry.get("folder", "")))
            parts.append(f'<p class="soft">{title} {when} in {folder}</p><pre>{escape(entry["command"])}</pre>')
    facts = {key: value for key, value in first.items() if key not in ("command", "folder", "started", "resumed")}
    return "".join(parts) + _table(facts) if parts or facts else "<p>environment.json is missing.</p>"


def _config(story: Story) -> str:
    return _table({key: value for key, value in story.config.items() if key != "versions"})


def _table(values: Mapping[str, Any]) -> str:
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            text = ", ".join(f"{name} {item}" for name, item in value.items()) or "none"
        else:
            text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
        rows.append(f"<tr><th>{escape(key.replace('_', ' '))}</th><td>{escape(text)}</td></tr>")
    return f'<table class="facts">{"".join(rows)}</table>'


def _svg(svg: str, caption: str) -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{below}</figure>"


def _ends(rows: Sequence[Epoch]) -> list[Epoch]:
    """Return the first and the last row."""
    return [rows[0], rows[-1]] if len(rows) > 1 else list(rows)


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a duration in words, such as "1 min 5 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
