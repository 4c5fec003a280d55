"""README.md of a run: a model card that the hub understands and people can use."""

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ldmcli.conditions import CONDITIONS
from ldmcli.core.console import clean, redact
from ldmcli.core.durations import duration_with_unit
from ldmcli.core.outputs import write_page
from ldmcli.reports import copying, run_report, run_view
from ldmcli.reports.charts import figure
from ldmcli.reports.evaluation_table import cells
from ldmcli.reports.run_report import last_name
from ldmcli.reports.run_view import RunView, read_run

NOTICE = "NOTICE"  # of a run folder: whose data were learned from, under which licences, in its owner's words
_MARKDOWN = re.compile(r"([\\`*_\[\]|#~])")


def write_card(run_dir: Path) -> Path:
    """Writes run_dir/README.md from what lies in the folder, and returns its path. Raises UsageError for a card that
    somebody wrote or changed by hand."""
    run = read_run(run_dir)
    parts = [
        _front_matter(run),
        f"# {_text(run.name)}",
        _summary(run),
        _picture(run),
        _use(run),
        _data(run),
        _metrics(run),
        _settings(run),
        _limits(run),
        _licences(run),
    ]
    write_page(run_dir / "README.md", "\n\n".join(part for part in parts if part) + "\n")
    return run_dir / "README.md"


def _text(value: object) -> str:
    """Text from anywhere as Markdown text on one line: no markup of its own, no secrets."""
    line = " ".join(redact(clean(value)).split())
    return _MARKDOWN.sub(r"\\\1", escape(line, quote=False))


def _code(value: object) -> str:
    """Text inside a code block of its own: nothing in it can end the block."""
    return redact(clean(value)).replace("```", "'''")


def _front_matter(run: RunView) -> str:
    tags = ["latent-diffusion", *([run.kind] if run.kind in run_report.KINDS else []), *_condition_tags(run)]
    tags += ["distilled"] if run_report.distillation(run) else []
    lines = ["license: other", "library_name: ldm", f"pipeline_tag: {_task(run)}", "tags:", *(f"- {t}" for t in tags)]
    return "\n".join(["---", *lines, "---"])


def _condition_tags(run: RunView) -> tuple[str, ...]:
    """The conditions of a diffusion model, as tags."""
    conditions = run.diffusion.condition.kinds if run.diffusion else ()
    return tuple(f"{condition}-conditional" for condition in conditions if condition.isidentifier())


def _task(run: RunView) -> str:
    if run.kind in ("autoencoder", "classifier"):
        return "image-to-image" if run.kind == "autoencoder" else "image-classification"
    tags = {CONDITIONS[name].pipeline_tag for name in run.conditions if name in CONDITIONS}
    return next((tag for tag in ("image-to-image", "text-to-image") if tag in tags), "unconditional-image-generation")


def _summary(run: RunView) -> str:
    state = run.state.get("state")
    unfinished = f" The training is not finished ({_text(state)})." if state != "finished" else ""
    size = run.stats.get("size")
    pixels = f" It works at {size[0]}×{size[1]} pixels." if size else ""
    few = run_report.distillation(run)
    distilled = f"\n\nDistilled: {_text(few)}. `--steps`, `--sampler` and `--guidance` are fixed." if few else ""
    return f"{_text(run_report.headline(run))}.{pixels}{unfinished}{distilled}"


def _picture(run: RunView) -> str:
    found = run_view.sample_files(run.path)
    if not found:
        return ""
    whats = {
        "autoencoder": "Held-out images above their reconstructions",
        "classifier": "Noisy latents of held-out images, decoded, with the class found",
    }
    what = whats.get(run.kind, "Samples of fixed seeds")
    step, path = found[0]
    return f"![{what}, step {step:,}](samples/{path.name})\n\n{what}, step {step:,}."


def _use(run: RunView) -> str:
    """Two lines of Python, and the command that does the same."""
    folder = json.dumps(clean(run.name), ensure_ascii=False)
    if run.kind == "autoencoder":
        call = f"model = ldmcli.load({folder})\nz = model.encode(images); pixels = model.decode(z)  # images: PIL"
        command = f"ldm reconstruct IMAGES --autoencoder {folder}"
    elif run.kind == "classifier":
        names = run.stats.get("class_names") or ["0"]
        shown = json.dumps(clean(str(names[0])), ensure_ascii=False)
        call = f"images = model.sample(classes=[{shown}], classifier={folder}, classifier_scale=3)"
        command = f"ldm sample --model RUN --classifier {folder} --classifier-scale 3 --class {shown}"
    else:
        arguments, option = _example(run)
        task = run.diffusion.task.name if run.diffusion else "generate"
        call = f"model = ldmcli.load({folder})\nimages = model.sample({arguments}seed=0)"
        command = {
            "sr": f"ldm upscale photo.png --model {folder}",
            "inpaint": f"ldm inpaint photo.png mask.png --model {folder}",
        }.get(task, f"ldm sample --model {folder}{option}")
    return f"## Use\n\n```python\nimport ldmcli\n\n{_code(call)}\n```\n\n```sh\n{_code(command)}\n```"


def _example(run: RunView) -> tuple[str, str]:
    """Values for a first sample: the argument in Python, the option of the command."""
    request = run.stats.get("preview") or {}
    conditions = [CONDITIONS[name] for name in run.conditions if name in CONDITIONS]
    call = "".join(one.example_call for one in conditions)
    option = "".join(one.example_option for one in conditions)
    if request.get("prompt"):
        text = json.dumps(" ".join(clean(request["prompt"][0]).split()), ensure_ascii=False)
        quoted = "'" + text[1:-1].replace("'", "'\\''") + "'"
        return f"prompt={text}, {call}", f" --prompt {quoted}{option}"
    if request.get("classes"):
        class_number = int(request["classes"][0])
        return f"classes=[{class_number}], {call}", f" --class {class_number}{option}"
    return call, option


def _data(run: RunView) -> str:
    data = run.state.get("data") or {}
    if not data:
        return ""
    counts = [
        f"{data[key]:,} {what}"
        for key, what in (("rows", "to train"), ("validation_rows", "to validate"))
        if isinstance(data.get(key), int)
    ]
    left_out = f", {len(data['left_out'])} left out as unusable" if data.get("left_out") else ""
    source = f"{_text(last_name(data.get('source')))}, split {_text(data.get('split'))}"
    lines = [f"{source}: {', '.join(counts)}{left_out}."]
    if captions := data.get("captions"):
        lines.append(
            f"Training captions are drawn from the templates {', '.join(f'“{_text(one)}”' for one in captions)}."
        )
    if data.get("fingerprint"):
        lines.append(f"Fingerprint of the training rows: `{_text(data['fingerprint'])}`.")
    return "## Data\n\n" + " ".join(lines)


def _metrics(run: RunView) -> str:
    """The newest validation with its protocol, then the evaluations that lie in the folder."""
    rows = [
        f"| {_text(name)} | {_text(value)} | {better} |"
        for name, value, better in (
            run_report.tile(key, value, "") for key, value in run_view.latest_metrics(run).items()
        )
    ]
    parts = []
    if rows:
        parts.append("\n".join(["| metric | value | |", "|---|---|---|", *rows]))
        parts.append(run_report.protocol_text(run))
    for name, found in run_view.evaluation_files(run).items():
        heads, numbers = cells(found)
        if numbers:
            parts.append("\n".join([f"### {_text(name)}", "", *_table(heads, numbers)]))
            found = run_report.beside_numbers(found)
        lines = _table(["", ""], run_report.flat(found))
        parts.append("\n".join(lines if numbers else [f"### {_text(name)}", "", *lines]))
    return "\n\n".join(["## Metrics", *(part for part in parts if part)]) if parts else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [f"| {' | '.join(map(_text, row))} |" for row in rows]
    return [f"| {' | '.join(map(_text, heads))} |", "|" + "---|" * len(heads), *lines]


def _settings(run: RunView) -> str:
    if run.config is None:
        return ""
    lines = [f"{path} = {value}" for path, value in run_report.changed_settings(run).items()]
    seconds = run.state.get("trained_seconds")
    took = f" Training took {duration_with_unit(seconds)}." if isinstance(seconds, int | float) else ""
    took += f" It began with the weights of {origin}." if (origin := run_report.begun_from(run)) else ""
    command = run.state.get("command")
    shown = f"\n\n```sh\n{_code(command)}\n```" if command else ""
    toml = _code("\n".join(lines))
    lead = f"`config.toml` holds the whole configuration; these settings differ from the defaults.{took}"
    return f"## Training\n\n{lead}\n\n```toml\n{toml}\n```{shown}"


def _limits(run: RunView) -> str:
    size = run.stats.get("size")
    lines = [
        "It knows what its training images show and nothing else; whatever is rare or one-sided in them is so here.",
        _repeats(run),
        "The licence of the training data decides what may be done with it; `license: other` stands for that"
        + (", and the licences are named below." if _notice(run) else "."),
    ]
    if size:
        lines.insert(0, f"Sizes other than {size[0]}×{size[1]} px are outside of what it was trained on.")
    psnr = run_view.latest_metrics(run).get("psnr")
    if psnr is not None:
        lines.insert(0, f"Reconstructions are not exact ({figure(psnr)} dB on validation): fine texture is lost first.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _notice(run: RunView) -> str:
    path = run.path / NOTICE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _licences(run: RunView) -> str:
    """The notice of a run folder that has one, as it stands there."""
    text = _notice(run)
    return f"## Licences\n\n```text\n{_code(text).rstrip()}\n```" if text else ""


def _repeats(run: RunView) -> str:
    """What is known of training images that come back."""
    text = copying.pairs_text(copying.kept(run))
    if text:
        return f"[Nearest training pictures](novelty.png): {_text(text)} Nobody has looked for bias."
    text = run_report.neighbours_text(run_view.neighbours(run))
    if not text:
        return "Nobody has checked whether it repeats training images, or looked for bias."
    return f"[Nearest training pictures](neighbours/neighbours.png): {_text(text)} Nobody has looked for bias."
