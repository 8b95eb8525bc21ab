"""The sections of the demo's report, each a function from the report's data to HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from goku.demo import plots
from goku.demo.contents import Item, Report
from goku.demo.document import (
    banner,
    card,
    embed,
    media_table,
    other_pages,
    reproduction,
    time_table,
)
from goku.demo.training import TrainingLog, throughput_rows

__all__ = [
    "attribution",
    "evolution",
    "gallery",
    "lead",
    "packing",
    "reproduce",
    "timings",
    "verdict",
]


def lead(report: Report, log: TrainingLog) -> str:
    """What was done, in one paragraph."""
    images = sum(item.modality == "image" for item in report.items)
    clips = len(report.items) - images
    steps = f" for {log.last_step:,} steps" if log.last_step else ""
    return (
        '<p class="lead">A small rectified-flow transformer learned '
        f"{images} photographs and {clips} clips together, images and video in the same packed "
        f"batch{steps}, and then painted them again from pure noise and their captions alone. "
        "It memorises these few items; that shows that the whole path works, not quality.</p>"
        f"{other_pages(report.also)}"
    )


def verdict(report: Report, log: TrainingLog) -> str:
    """The criteria as cards, what is told without being judged, and the PSNR ruler."""
    result = report.verdict
    passed = bool(result["passed"])
    cards = []
    shown = {
        "nearest": lambda value: f"{value:.0%}",
        "above_mean_image": lambda value: f"{value - result['mean_image_psnr']:+.1f} dB",
        "near_vae": lambda value: f"{value - result['vae_psnr']:+.1f} dB",
    }
    for criterion in result["criteria"]:
        if criterion["key"] == "captions" and criterion["passed"]:
            continue  # the banner says it
        value = criterion["value"]
        number = shown.get(criterion["key"], lambda value: f"{value:.3f}")(value)
        if criterion["key"] == "loss" and value > 0:
            number = f"÷ {result['loss_first'] / value:.1f}"
        cards.append(
            card(
                number.replace("-", "−"),
                criterion["label"],
                criterion["text"],
                passed=criterion["passed"],
            )
        )
    if log.unseen:
        first, last = log.unseen[0][1], log.unseen[-1][1]
        what = "Loss on media never trained on"
        cards.append(card(f"{last:.3f}", what, f"{first:.3f} before training", passed=None))
    if log.interruptions:
        where = ", ".join(f"{died:,}" for died, _ in log.interruptions)
        cards.append(
            card(
                f"{len(log.interruptions)} ×",
                "Killed and resumed",
                f"at step {where}{log.replay_text()}",
                passed=None,
                note="shown below",
            )
        )
    ruler = plots.psnr_ruler(
        [row["psnr"] for row in result["per_sample"]],
        median=result["psnr"],
        mean_image=result["mean_image_psnr"],
        vae=result["vae_psnr"],
        bars=(
            next(c["limit"] for c in result["criteria"] if c["key"] == "above_mean_image"),
            next(c["limit"] for c in result["criteria"] if c["key"] == "near_vae"),
        ),
    )
    missed = [c["label"].lower() for c in result["criteria"] if not c["passed"]]
    said = (
        f"{result['samples']} samples over {result['captions']} captions, seeds that training "
        f"never used{'' if passed else '. Missed: ' + '; '.join(missed)}."
    )
    return (
        f"{banner(passed, said)}"
        f'<div class="cards">{"".join(cards)}</div>'
        "<h3>PSNR of every sample to the item its caption names, in dB</h3>"
        f"{ruler}<p class='note'>Dots are samples, the thick line their median. The mean image is "
        "the best guess that ignores the caption; VAE is what decoding the training item's own "
        "latent gives. The shaded range passes.</p>"
    )


def gallery(report: Report) -> str:
    """Per caption: the training item, the VAE's reconstruction, the samples."""
    rows = []
    for item in report.items:
        t, h, w = item.grid
        figures = [f"<figure>{embed(item.training, item.caption)}<figcaption>training"]
        if item.reconstruction is not None:
            decibel = item.reconstruction_psnr
            note = "" if decibel is None else f" {decibel:.1f} dB"
            figures.append(
                f"<figure>{embed(item.reconstruction, 'reconstruction')}<figcaption>VAE alone{note}"
            )
        for sample in item.samples:
            note = "" if sample.psnr is None else f", {sample.psnr:.1f} dB"
            if sample.nearest is not None:
                hit = sample.nearest == item.name
                mark = "✓" if hit else f"✗ nearest: {escape(sample.nearest)}"
                note += f' <span class="{"hit" if hit else "miss"}">{mark}</span>'
            figures.append(
                f"<figure>{embed(sample.picture, f'generated: {item.caption}')}"
                f"<figcaption><b>generated</b>, seed {sample.seed}{note}"
            )
        strip = "".join(f"{figure}</figcaption></figure>" for figure in figures)
        rows.append(
            f'<article class="item"><div><h3>{escape(item.name)}</h3>'
            f'<p class="said">“{escape(item.caption)}”</p><span class="tag">{escape(item.modality)}'
            f'</span><span class="tag">{t}×{h}×{w} = {item.tokens} tokens</span></div>'
            f'<div class="figures">{strip}</div></article>'
        )
    intro = (
        "<p>Each row: the training item as the model saw it, what the VAE alone makes of it, and "
        "samples from pure noise. A tick says that of all training items the captioned one is the "
        "nearest.</p>"
    )
    return intro + "".join(rows)


def evolution(report: Report) -> str:
    """Captions down, training steps across."""
    shown = [item for item in report.items if item.evolution]
    steps = sorted({step for item in shown for step, _ in item.evolution})
    if not steps:
        return '<p class="none">No samples were taken during training.</p>'
    head = "".join(f'<th scope="col">step {step:,}</th>' for step in steps)
    rows = []
    for item in shown:
        at = dict(item.evolution)
        cells = "".join(
            f"<td>{embed(at[step], f'{item.name} at step {step}') if step in at else ''}</td>"
            for step in steps
        )
        rows.append(f'<tr><th scope="row">{escape(item.name)}</th>{cells}</tr>')
    return (
        "<p>The same noise and the same captions, sampled by the averaged weights as training went "
        'on.</p><div class="scroll"><table class="steps" '
        f'style="min-width:{90 + 84 * len(steps)}px"><thead><tr><th class="first"></th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _hues(items: Sequence[Item]) -> dict[str, int]:
    """Photographs in warm colours, clips in cool ones."""
    hues: dict[str, int] = {}
    for modality, first, width in (("image", -30, 105), ("video", 160, 125)):
        names = [item.name for item in items if (item.modality == "image") == (modality == "image")]
        for index, name in enumerate(names):
            hues[name] = round(first + width * index / max(1, len(names))) % 360
    return hues


def packing(report: Report) -> str:
    """Packs as strips of samples, and the attention mask of one of them."""
    if not report.packs:
        return '<p class="none">No packs were recorded.</p>'
    items, hues = {item.name: item for item in report.items}, _hues(report.items)
    rows, drawn = [], []
    for pack in report.packs:
        samples = [
            plots.PackedSample(
                name=name,
                modality="image" if items[name].modality == "image" else "clip",
                grid=items[name].grid,
                tokens=items[name].tokens,
                hue=hues[name],
            )
            for name in pack.names
        ]
        used = sum(sample.tokens for sample in samples)
        drawn.append(samples)
        rows.append(
            f'<div class="packrow"><small><b>{escape(pack.label)}</b><br>{used:,} of '
            f"{pack.capacity:,} tokens<br>{used / pack.capacity:.1%} full</small>"
            f"{plots.packing(samples, pack.capacity)}</div>"
        )
    total = sum(sample.tokens for samples in drawn for sample in samples)
    room = sum(pack.capacity for pack in report.packs)
    mixed = max(drawn, key=lambda samples: (len({s.modality for s in samples}), len(samples)))
    square = sum(sample.tokens for sample in mixed) ** 2
    inside = sum(sample.tokens**2 for sample in mixed)
    return (
        "<p>Photographs (warm colours) and clips (cool colours; the white lines part their latent "
        "frames) of any size and length lie end to end in one sequence. Nothing is padded; the "
        f"dashed end is what no further sample fitted into. These packs are {total / room:.1%} "
        f'full.</p><div class="scroll"><div class="packs">{"".join(rows)}</div></div>'
        f'<div class="side">{plots.attention_mask(mixed)}<p>Inside a pack every token attends to '
        "the tokens of its own sample only: the squares on the diagonal. That is "
        f"{inside / square:.0%} of the whole square, and the rest is never computed.</p></div>"
    )


def timings(report: Report, log: TrainingLog) -> str:
    """Where the time went, and the training's rates."""
    rates = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{escape(value)}</td></tr>'
        for name, value in throughput_rows(log)
    )
    spent = time_table(report.timings, report.timing_note)
    return (
        f'<div class="two"><div><h3>Where the time went</h3>{spent}</div>'
        f"<div><h3>Training</h3><table class='facts'>{rates}</table>"
        '<p class="note">MFU counts the FLOPs of the packed segments (sum of squared lengths in '
        "attention, backward twice the forward) against this machine's measured matmul rate.</p>"
        "</div></div>"
    )


def reproduce(report: Report) -> str:
    """Commands, machine, files, configuration."""
    return reproduction(report.commands, report.environment, report.files, report.config)


def attribution(report: Report) -> str:
    """Owners and terms of every medium."""
    rows = [
        (item.name, item.attribution, item.licence, item.url, "trained on") for item in report.items
    ]
    rows += [
        (
            str(record.get("name", record.get("path", ""))),
            str(record.get("attribution", "")),
            str(record.get("licence", "")),
            str(record.get("url", "")),
            "held out",
        )
        for record in report.unseen
    ]
    return media_table(rows)
