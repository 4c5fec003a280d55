"""The report is one inert file that shows what the run folder says, whatever state the folder is in; so is the card."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from documents import document, estimate, floor

from ldmcli.core import config, files, runs
from ldmcli.data import shape_reading, shapes
from ldmcli.reports import charts
from ldmcli.reports.card import write_card
from ldmcli.reports.html import cut
from ldmcli.reports.report import write_demo_report, write_report
from ldmcli.sampling.contact_sheets import in_rows, save_grid

NASTY = '"><img src=x onerror=alert(1)><script>alert(2)</script>\x1b]0;title\x07\u202e</style>'


class Page(HTMLParser):
    """Tags with attributes, visible text, and whether tags close in order."""

    VOID = ("meta", "img")

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self.open, self.crossed = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or tag != self.open.pop():
            self.crossed.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def make_run(path, kind="diffusion", captions=(), log=(), **state):
    """A run folder as the trainer leaves it, two pictures a row of the preview."""
    run = runs.RunFolder(path)
    run.acquire()
    values = {"condition.kinds": ("text",)} if kind == "diffusion" else {}
    files.write_text(path / "config.toml", config.to_toml(config.resolve(kind, [("test", values)]).config))
    files.write_json(
        path / "stats.json", {"size": [8, 8], "latent_shape": [4, 2, 2], "preview": {"n": 1, "prompt": list(captions)}}
    )
    for line in log:
        run.log(**line)
    run.update(
        **{
            "kind": kind,
            "state": "running",
            "step": 7,
            "weights": "ema",
            "version": "0.1.0",
            "machine": {"system": "Linux", "cpu_count": 2},
            "parents": [],
            "data": {"source": "shapes", "split": "train", "rows": 90, "validation_rows": 10},
            **state,
        }
    )
    run.release()
    return path


def line(step, **values):
    return {
        "step": step,
        "images": step * 8,
        "loss_model": 1.0 / step,
        "images_per_s": 10.0,
        "lr_factor": 1.0,
        "trained_seconds": step * 2.0,
        "peak_memory_bytes": 1 << 20,
        **values,
    }


def preview(path, step, captions):
    pictures = [np.full((8, 8, 3), 40 * k, np.uint8) for k in range(len(captions))]
    save_grid(path / "samples" / f"step-{step:08d}.png", in_rows(pictures, 2))


def test_text_from_data_stays_text(tmp_path):
    run = make_run(
        tmp_path / "run",
        captions=[NASTY, "fine"],
        command=f"ldm {NASTY}",
        state=NASTY,
        reason=NASTY,
        data={"source": NASTY, "split": NASTY, "rows": 1, "validation_rows": 1},
        log=[line(s, **{f"loss_{NASTY}": 1.0 + s, "loss_x": 1.0}) for s in (1, 2)],
    )
    preview(run, 7, ["a", "b"])
    files.write_json(run / "eval-x.json", {NASTY: NASTY})
    html = write_report(run, {NASTY: [NASTY]}).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.named("script") and len(page.named("style")) == 1
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert all(attrs["src"].startswith("data:image/") for attrs in page.named("img"))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", html)
    assert "<script>alert(2)</script>" in "".join(page.text)  # shown, not run


def test_report_asks_nothing_of_a_network(tmp_path):
    run = make_run(tmp_path / "run", captions=["a", "b"], log=[line(1), line(2)])
    preview(run, 7, ["a", "b"])
    html = write_report(run).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'"data:image[^"]*"', "", html))
    policy = next(a["content"] for a in Page(html).named("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'") and "script-src" not in policy


def test_secrets_in_the_environment_never_reach_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    run = make_run(tmp_path / "run", command="ldm --set a=0123456789abcdef", reason="https://me:pass@host/x")
    html = write_report(run).read_text(encoding="utf-8")
    assert "0123456789abcdef" not in html and "me:pass" not in html and "&lt;WANDB_API_KEY&gt;" in html


@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
def test_report_of_a_run_that_has_just_begun_is_whole(tmp_path, kind):
    page = read(write_report(make_run(tmp_path / "run", kind)))
    assert "running" in page.text and not page.open and not page.crossed


def test_report_of_a_damaged_folder_is_whole(tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    for name, text in (("run.json", "{"), ("config.toml", "= ="), ("stats.json", "[]"), ("metrics.jsonl", '3\n{"a')):
        (run / name).write_text(text)
    (run / "samples" / "step-00000001.png").write_bytes(b"\x89PNG but cut")
    page = read(write_report(run))
    assert "unknown" in page.text and not page.open and not page.crossed


def test_a_step_that_was_not_a_number_is_left_out_of_curves_and_counted(tmp_path):
    log = [line(1), line(2, loss_model="nan"), line(3), {"step": 3, "event": "not applied: NaN or Inf"}]
    text = "".join(read(write_report(make_run(tmp_path / "run", log=log))).text)
    assert "step 1: 1" in text and "step 3: 0.3333" in text and "step 2:" not in text.split("Learning-rate")[0]
    assert "Updates not applied1" in text


def test_newest_preview_stands_first_with_what_it_was_told(tmp_path):
    captions = ["a red circle on a navy background", "told beside"]
    run = make_run(tmp_path / "run", captions=captions, log=[line(1), line(2)])
    for step in range(1, 31):
        preview(run, step, captions)
    page = read(write_report(run))
    alts = [attrs["alt"] for attrs in page.named("img")]
    assert alts == [*captions, *[f"preview of step {s}" for s in (24, 18, 13, 7, 1)]]


def test_key_figures_are_the_newest_of_the_log(tmp_path):
    log = [line(1), {"step": 1, "val/val_loss": 0.9}, line(2), {"step": 2, "val/val_loss": 0.25}]
    text = "".join(read(write_report(make_run(tmp_path / "run", log=log))).text)
    assert "Validation loss0.25n = 10" in text and "Training time4 s16 images seen" in text
    assert "Peak memory1.0 MiB" in text and "Throughput10 images/s" in text


def test_training_time_counts_the_steps_after_the_last_line_of_the_log(tmp_path):
    run = make_run(tmp_path / "run", log=[line(1), line(2)], trained_seconds=9.0)
    assert "Training time9 s" in "".join(read(write_report(run)).text)


def test_a_metric_that_carries_its_extractor_is_known(tmp_path):
    run = make_run(tmp_path / "run", "autoencoder", log=[line(1), {"step": 1, "val/fd_effnet_lite0": 12.5}])
    assert "Fréchet distance, effnet lite012.5" in "".join(read(write_report(run)).text)


def test_an_evaluation_stands_with_intervals_and_floors(tmp_path):
    """Of a document that was changed by hand the page shows what is left."""
    run = make_run(tmp_path / "run")
    worth = {"fd_tiny8": estimate(128.1, 136.9, floor=floor(61.2, 1.33, None))}
    found = document({"fd_tiny8": 132.44, "psnr": None}, labels={"fd_tiny8": "FD (tiny)"}, estimates=worth)
    files.write_json(run / "eval-whole.json", found)
    files.write_json(run / "eval-spoilt.json", found | {"estimates": {"fd_tiny8": {"floor": 1}}})
    page, card = write_report(run).read_text(encoding="utf-8"), write_card(run).read_text(encoding="utf-8")
    for text in ("FD (tiny)", "128.1 … 136.9", "61.2 ± 1.3", "95 % interval", "eval-spoilt"):
        assert text in page and text in re.sub(r"\\(.)", r"\1", card), text
    assert page.count("estimates · fd tiny8") == card.count("estimates · fd tiny8") == 1, "of the spoilt one"


def test_changed_settings_stand_out(tmp_path):
    page = read(write_report(make_run(tmp_path / "run")))
    changed = [k for k, (tag, attrs) in enumerate(page.tags) if tag == "tr" and attrs.get("class") == "changed"]
    assert len(changed) == 1 and "condition.kinds" in page.text


def test_places_on_the_disk_stay_out_of_the_report(tmp_path):
    parent = {"path": "/home/somebody/secret-place/my-ae", "sha256": "ab" * 32}
    data = {"source": "/home/somebody/photos", "split": "train", "rows": 2, "validation_rows": 1}
    html = write_report(make_run(tmp_path / "run", parents=[parent], data=data)).read_text(encoding="utf-8")
    assert "somebody" not in html and str(tmp_path) not in html and "my-ae, abababababababab" in html


# ---------------------------------------------------------------- the demo's


@pytest.fixture
def demo(tmp_path):
    """Two runs, 18 samples of which the second shows something else than asked."""
    folder = tmp_path / "demo"
    specs = [shapes.spec(i, split="validation") for i in range(18)]
    captions, pictures = [shapes.caption(s) for s in specs], [shapes.render(s, (64, 64)) for s in specs]
    right = shape_reading.score(pictures, captions)
    wrong = next(k for k in range(18) if specs[k].things[0].colour != specs[1].things[0].colour)
    pictures[1] = pictures[wrong]
    make_run(folder / "autoencoder", "autoencoder", log=[line(1), line(2)])
    make_run(folder / "diffusion", captions=captions, log=[line(1), line(2)])
    stats = json.loads((folder / "diffusion" / "stats.json").read_text()) | {"size": [64, 64]}
    files.write_json(folder / "diffusion" / "stats.json", stats)
    save_grid(folder / "samples.png", in_rows(pictures, 16))
    files.write_text(folder / "prompts.txt", "\n".join(captions) + "\n")
    summary = {
        **shape_reading.score(pictures, captions),
        "n": 18,
        "reconstructions": right,
        "real": right,
        "ae_psnr": 36.84,
        "fd": 38.25,
        "fd_protocol": "a protocol",
        "seconds": 471.3,
        "data": "shapes",
    }
    return folder, summary, captions


def test_demo_report_marks_what_is_not_as_asked(demo):
    folder, summary, captions = demo
    page = read(write_demo_report(folder, [folder / "autoencoder", folder / "diffusion"], summary))
    cards = [attrs["class"] for attrs in page.named("figure") if attrs["class"].startswith("card")]
    assert cards == ["card right", "card wrong", *["card right"] * 14]
    assert [a["title"] for a in page.named("img") if "title" in a] == captions


def test_demo_report_shows_its_figures_with_their_protocol(demo):
    folder, summary, _ = demo
    page = read(write_demo_report(folder, [folder / "autoencoder", folder / "diffusion"], summary))
    text = "".join(page.text)
    for shown in ("36.8 dB", "38.2", "a protocol", "7:51 min", "of 18 samples", "Autoencoder", "Diffusion model"):
        assert shown in text, shown
    assert "colour94.4 %100 %100 %" in text
    assert len(page.named("svg")) >= 4 and not page.open and not page.crossed


def test_demo_report_works_without_figures_and_pictures(tmp_path):
    page = read(write_demo_report(tmp_path, [tmp_path / "a", tmp_path / "b"], {}))
    assert not page.open and not page.crossed and not page.named("img")


# ---------------------------------------------------------------- the card


def card(path):
    """(front matter, the rest) of a run's card."""
    _, front, body = write_card(path).read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.parametrize("kind, task", [("diffusion", "text-to-image"), ("autoencoder", "image-to-image")])
def test_front_matter_is_what_the_hub_reads(tmp_path, kind, task):
    front, _ = card(make_run(tmp_path / "run", kind))
    assert front["license"] == "other" and front["library_name"] == "ldm" and front["pipeline_tag"] == task
    assert {"latent-diffusion", kind} <= set(front["tags"])


def test_card_shows_use_picture_and_metrics_with_their_protocol(tmp_path):
    captions = ['a red "circle"', "b"]
    run = make_run(tmp_path / "run", captions=captions, log=[line(1), {"step": 1, "val/val_loss": 0.25}])
    preview(run, 7, captions)
    body = card(run)[1]
    (python,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    compile(python, "card", "exec")
    assert 'ldmcli.load("run")' in python and 'prompt="a red \\"circle\\""' in python
    assert "(samples/step-00000007.png)" in body and (run / "samples" / "step-00000007.png").is_file()
    assert "| Validation loss | 0.25 |" in body and "10 held-out latents" in body
    assert 'condition.kinds = ["text"]' in body and "not finished (running)" in body


def test_text_from_data_stays_text_in_the_card(tmp_path):
    nasty = "x](http://e) `a` | <script>\x1b[31m\n# head\n---\n```"
    run = make_run(
        tmp_path / nasty.replace("/", "").replace("\n", " "),
        captions=[nasty],
        command=nasty,
        state=nasty,
        data={"source": nasty, "split": nasty, "rows": 1, "validation_rows": 1},
    )
    front, body = card(run)
    assert front["license"] == "other" and "\x1b" not in body
    prose = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    assert body.count("```") == 8 and "<script>" not in prose
    assert not re.search(r"(?<!\\)\]\(http", prose) and not re.search(r"^# head", prose, re.MULTILINE)


def test_places_on_the_disk_stay_out_of_the_card(tmp_path):
    data = {"source": "/home/somebody/photos", "split": "train", "rows": 2, "validation_rows": 1}
    text = write_card(make_run(tmp_path / "run", data=data)).read_text(encoding="utf-8")
    assert "somebody" not in text and str(tmp_path) not in text and "photos, split train" in text


def test_card_of_an_empty_folder_is_whole(tmp_path):
    front, body = card(tmp_path)
    assert front["license"] == "other" and "## Limits" in body


# ---------------------------------------------------------------- charts


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (31.2, 36.8), (-3.0, 7.0), (5.0, 5.0), (0.0, 0.0), (1e-9, 3e-9)])
def test_ticks_are_few_and_cover_the_range(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 8
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])


@pytest.mark.parametrize("low, high", [(0.012, 0.9), (1e-6, 3.0), (2.0, 50.0), (1.0, 1.0), (9e-5, 8e9)])
def test_log_ticks_are_few_and_cover_the_range(low, high):
    found = charts.log_ticks(low, high)
    assert found[0] <= low * 1.001 and found[-1] >= high * 0.999 and 2 <= len(found) <= 8


def test_axis_is_logarithmic_only_for_positive_values_of_a_wide_range():
    def label(values):
        return "logarithmic" in charts.line_chart("t", [charts.Series("a", list(enumerate(values)))])

    assert label([1.0, 50.0]) and not label([0.0, 50.0]) and not label([1.0, 5.0])


def test_a_single_step_is_no_curve_and_steps_are_whole_numbers():
    assert charts.line_chart("t", [charts.Series("a", [(7, 1.0)]), charts.Series("b", [(7, 2.0)])]) == ""
    drawn = charts.line_chart("t", [charts.Series("a", [(1, 1.0), (3, 2.0)])])
    below = [float(t) for t in re.findall(r'<text x="[^"]*" y="212"[^>]*>([^<]*)<', drawn)]
    assert below == [1, 2, 3]


def test_shares_are_drawn_from_zero():
    drawn = charts.line_chart("t", [charts.Series("a", [(1, 0.9), (3, 1.0)])], from_zero=True)
    assert 'text-anchor="end">0<' in drawn and "logarithmic" not in drawn


def test_a_long_series_is_thinned_by_means_and_keeps_its_end():
    points = [(step, float(step % 2)) for step in range(10_000)]
    found = charts.thinned(points, 100)
    assert len(found) == 100 and found[-1][0] == 9999 and all(value == 0.5 for _, value in found)
    assert len(charts.line_chart("t", [charts.Series("a", points)])) < 40_000


def test_smoothing_keeps_straight_lines_and_ends():
    straight = [(k, 3.0 * k) for k in range(50)]
    assert np.allclose(charts.smoothed(straight, 7), straight)
    powers = [(k, 2.0**k) for k in range(20)]
    assert np.allclose([v for _, v in charts.smoothed(powers, 4, log=True)], [v for _, v in powers])


def test_a_sheet_is_cut_into_the_pictures_it_was_made_of(tmp_path):
    from PIL import Image

    pictures = [np.full((6, 9, 3), 10 * k, np.uint8) for k in range(6)]
    save_grid(tmp_path / "sheet.png", in_rows(pictures, 3))
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert np.array_equal(np.stack([np.asarray(one) for one in cut(sheet, (6, 9))]), np.stack(pictures))
    assert cut(sheet, (7, 9)) == []
