"""The demo's second page: all stages of a recipe, what was killed and resumed, and clips from given images."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from goku.demo.document import (
    banner,
    card,
    clock,
    document,
    embed,
    media_table,
    other_pages,
    reproduction,
    time_table,
)
from goku.demo.plots import Mark, Series, line_chart
from goku.demo.recipe_contents import RecipeReport, StageReport, frames
from goku.demo.training import smooth

__all__ = ["render"]


def render(report: RecipeReport) -> str:
    """The page as text."""
    return document(
        report.title,
        lead=_lead(report),
        top=_verdict(report),
        sections=[
            ("stages", "The stages", _stages(report)),
            ("loss", "Losses over all stages", _losses(report)),
            ("drawn", "What each stage draws", _drawn(report)),
            ("image-to-video", "From an image to a clip", _image_to_video(report)),
            ("timings", "Time", time_table(report.timings, report.timing_note)),
            (
                "reproduce",
                "How to reproduce",
                reproduction(report.commands, report.environment, report.files, report.config),
            ),
            ("media", "The media and their terms", _media(report)),
        ],
    )


def _lead(report: RecipeReport) -> str:
    """What was done, in one paragraph."""
    steps = sum(stage.steps for stage in report.stages)
    return (
        f'<p class="lead">One file holds all {len(report.stages)} stages of the training: text to image, images and '
        "clips together in three sizes, fine-tuning, image to video. Here they are gone through in "
        f"{steps:,} steps by a model of minutes, on a few real photographs and clips. It shows that the stages hang "
        f"together, not quality.</p>{other_pages(report.also)}"
    )


def _verdict(report: RecipeReport) -> str:
    """The criteria as cards, and what is told without being judged."""
    result = report.verdict
    missed = [c["label"].lower() for c in result["criteria"] if not c["passed"]]
    said = "Stages, kills, losses and given images, each with its number."
    cards = [
        card(c["value"], c["label"], c["text"], passed=c["passed"]) for c in result["criteria"]
    ]
    for row in result["first_frame"]:
        if not row["trained"]:
            value = f"{row['psnr'] - row['vae']:+.1f} dB".replace("-", "−")
            what = "First frame of an image never trained on"
            small = f"{row['name']}: {row['psnr']:.1f} dB, the VAE alone {row['vae']:.1f}"
            cards.append(card(value, what, small, passed=None, note="judged above"))
    told = said if not missed else f"{said} Missed: {'; '.join(missed)}."
    return f'{banner(result["passed"], told)}<div class="cards">{"".join(cards)}</div>'


def _stages(report: RecipeReport) -> str:
    """One row a stage."""
    rows = []
    for stage in report.stages:
        start = f"{stage.start}: {stage.carry}" if stage.start else "a fresh model"
        fixed = stage.log.fixed
        loss = f"{fixed[0][1]:.2f} → {fixed[-1][1]:.2f}" if fixed else "not taken"
        words = (stage.name, start, stage.mix, stage.sizes)
        numbers = (
            f"{stage.shift:g}",
            f"{stage.lr:g}",
            f"{stage.steps:,}",
            f"{stage.tokens:,}",
            clock(stage.seconds),
            loss,
        )
        rows.append(
            "<tr>"
            + f'<td style="white-space:nowrap"><b>{escape(words[0])}</b></td>'
            + "".join(f"<td>{escape(word)}</td>" for word in words[1:])
            + "".join(f'<td class="n">{escape(number)}</td>' for number in numbers)
            + "</tr>"
        )
    head = "".join(
        f"<th>{name}</th>"
        for name in (
            "stage", "starts from: what carries over", "draws", "size", "shift", "rate", "steps", "tokens", "time",
            "loss on fixed noise",
        )
    )  # fmt: skip
    vae = (
        f"<p>A VAE of the recipe's own was trained first, in {report.vae_psnr[-1][0]:,.0f} steps, on the media of all "
        f"stages: {report.vae_psnr[-1][1]:.1f} dB on its last crops.</p>"
        if report.vae_psnr
        else ""
    )
    return (
        f'{vae}<div class="scroll"><table class="facts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        "<p class='note'>Sizes are height × width (× frames), and say how many pixels at most: every item keeps its "
        "shape. Losses of different stages are on different sizes, so that they compare within a stage alone.</p>"
    )


def _losses(report: RecipeReport) -> str:
    """The loss of every step, and on fixed noise, on one axis, with where stages begin and where it was killed."""
    marks: list[Mark] = []
    offset, train, fixed = 0, [], []
    for index, stage in enumerate(report.stages):
        marks.append(Mark(x=offset, label=stage.name, boundary=True, level=index % 3))
        for kill in report.kills:
            if kill.stage == stage.name:
                marks.append(Mark(x=offset + kill.step, label="killed", level=3 + index % 2))
        points = [
            (offset + step["step"], float(step["loss"]))
            for step in stage.log.steps
            if step.get("loss") is not None
        ]
        train.append(points)
        fixed.append([(offset + step, loss) for step, loss in stage.log.fixed])
        offset += stage.steps
    steps = line_chart(
        "steps",
        [
            *(Series(label="train", points=points, colour=0, faint=True) for points in train),
            *(Series(label="train, smoothed", points=smooth(points), colour=0) for points in train),
        ],
        x_label="step, over all stages",
        y_label="loss of the step",
        marks=marks,
        log_option=True,
        x_range=(0.0, float(offset)),
    )
    noise = line_chart(
        "fixed",
        [Series(label="training media", points=points, colour=2, dots=True) for points in fixed],
        x_label="step, over all stages",
        y_label="loss on fixed noise",
        marks=marks,
        log_option=True,
        x_range=(0.0, float(offset)),
    )
    return (
        f'<div class="two"><div><h3>Training</h3>{steps}</div><div><h3>On fixed noise, by the averaged weights</h3>'
        f"{noise}</div></div><p>Grey lines are where a stage begins, red ones where the process was killed by SIGKILL "
        f"and started again. {escape(_kills(report))}</p>"
    )


def _kills(report: RecipeReport) -> str:
    """What the kills left, in words."""
    logs = {stage.name: stage.log for stage in report.stages}
    parts = []
    for kill in report.kills:
        if kill.next_step is not None:
            parts.append(f"After {kill.stage} had ended nothing was to be done again.")
            continue
        for died, resumed in logs[kill.stage].interruptions:
            parts.append(
                f"{kill.stage} had come to step {died:,} and went on from its checkpoint at {resumed:,}"
                f"{logs[kill.stage].replay_text()}."
            )
    return " ".join(parts)


def _drawn(report: RecipeReport) -> str:
    """Per stage: the training items beside what the stage's average draws for their captions."""
    rows = [_stage_row(stage) for stage in report.stages if stage.shown]
    if not rows:
        return '<p class="none">No samples were taken.</p>'
    return (
        "<p>From pure noise and the caption alone, with one seed in all stages, each at the size "
        f"that the stage trains.</p>{''.join(rows)}"
    )


def _stage_row(stage: StageReport) -> str:
    figures = []
    for shown in stage.shown:
        figures.append(
            f"<figure>{embed(shown.training, shown.caption)}"
            f"<figcaption>training, VAE alone {shown.vae_psnr:.1f} dB</figcaption></figure>"
            f"<figure>{embed(shown.drawn, f'drawn: {shown.caption}')}"
            f"<figcaption><b>drawn</b>, {shown.psnr:.1f} dB</figcaption></figure>"
        )
    return (
        f'<article class="item"><div><h3>{escape(stage.name)}</h3>'
        f'<span class="tag">{escape(stage.sizes)}</span></div>'
        f'<div class="figures">{"".join(figures)}</div></article>'
    )


def _image_to_video(report: RecipeReport) -> str:
    """Per given image: it, the clip, its first and last frame, and the clip with the first frame held."""
    rows = []
    for given, plain, held in report.drawn:
        clip = frames(plain.path)
        parts: Sequence[tuple[str, str]] = (
            (embed(given.image, given.caption), f"given, VAE alone {plain.vae_psnr:.1f} dB"),
            (embed(plain.path, f"clip: {given.caption}"), "<b>the clip</b>"),
            (embed(clip[:1], "first frame"), f"first frame, {plain.psnr:.1f} dB to the given image"),
            (embed(clip[-1:], "last frame"), "last frame"),
            (embed(held.path, f"held: {given.caption}"), f"with --hold, first frame {held.psnr:.1f} dB"),
        )  # fmt: skip
        figures = "".join(
            f"<figure>{picture}<figcaption>{words}</figcaption></figure>"
            for picture, words in parts
        )
        use = "trained on" if given.trained else "never trained on"
        rows.append(
            f'<article class="item"><div><h3>{escape(given.name)}</h3>'
            f'<p class="said">“{escape(given.caption)}”</p><span class="tag">{use}</span></div>'
            f'<div class="figures">{figures}</div></article>'
        )
    return (
        "<p>The model is given an image and a caption, and draws a clip that begins with it. A VAE loses something of "
        "every image, and so does what is drawn in its latents: the PSNR of the first frame stands beside the VAE's "
        "own. With --hold the first latent frame is kept on its path to the given one, and the first frame is what "
        f"the VAE makes of the image.</p>{''.join(rows)}"
    )


def _media(report: RecipeReport) -> str:
    return media_table(
        (str(r["name"]), str(r["attribution"]), str(r["licence"]), str(r["url"]), use)
        for r, use in report.media
    )
