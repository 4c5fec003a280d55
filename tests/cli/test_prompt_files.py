"""Prompt files as people write them, and prompts of any form on the command line."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from PIL import Image

from ldmcli.cli.prompts import PromptFile, read_prompts
from ldmcli.core.errors import InputError

TEXTS = {
    "lines": ("a cat\na dog\n", ["a cat", "a dog"]),
    "windows, a BOM, blanks": ("\ufeffa cat\r\n\r\n   \r\n a dog \r\n", ["a cat", "a dog"]),
    "old Macintosh, no end": ("a cat\ra dog", ["a cat", "a dog"]),
    "comments": ("# a head\na cat\n  # between\na # stays\n#\n", ["a cat", "a # stays"]),
    "quotes": (
        '"#1 dad"\n\'a cat\'\n“a dog”\n"say \\"hi\\""\n"a" and "b"\n"\n',
        ["#1 dad", "a cat", "a dog", 'say "hi"', '"a" and "b"', '"'],
    ),
    "dashes": ("-5 degrees\n--steps\n- a list\n", ["-5 degrees", "--steps", "- a list"]),
    "no JSON": ("{red|blue} ball\n[a cat]\n", ["{red|blue} ball", "[a cat]"]),
    "JSON lines": ('{"prompt": "a cat", "n": 2}\n{"text": "a\\ndog"}\n', ["a cat", "a cat", "a\ndog"]),
    "mixed": ('{"caption": "a cat"}\na dog\n', ["a cat", "a dog"]),
    "a JSON list": ('["a cat",\n {"prompt": "a dog", "n": 2}]', ["a cat", "a dog", "a dog"]),
    "an empty prompt": ('""\n{"prompt": ""}\n', ["", ""]),
    "separators that are no ends": ("a\u2028cat\x0bsits\n", ["a\u2028cat\x0bsits"]),
}


@pytest.mark.parametrize("what", TEXTS)
def test_prompts_are_read_as_people_write_them(what, tmp_path):
    text, prompts = TEXTS[what]
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    assert read_prompts(tmp_path / "prompts.txt") == PromptFile(tuple(prompts), ())


def test_classes_stand_beside_prompts_or_alone(tmp_path, capsys):
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "a", "class": "cat", "n": 2}\n{"text": "b", "label": 7}\n')
    assert read_prompts(file) == PromptFile(("a", "a", "b"), ("cat", "cat", "7"))
    file.write_text('{"class": "dog", "count": 2, "seed": 4, "id": 1}\n')
    assert read_prompts(file) == PromptFile((), ("dog", "dog"))
    assert "warning: " in (said := capsys.readouterr().err) and "not read: id, seed" in said


WRONG = {
    "nothing": ("\n# only this\n", "no prompt in it"),
    "latin 1": ("caf\xe9".encode("latin-1"), "not UTF-8 text (byte 3)"),
    "utf 16": ("a cat".encode("utf-16"), "save it as UTF-8"),
    "half an object": ('a cat\n{"prompt": "a"\n', "line 2: not JSON"),
    "no prompt": ('{"promt": "a"}\n', 'line 1: neither "prompt" nor "class"'),
    "a number": ('{"prompt": 4}\n', "line 1: the prompt is 4"),
    "none of it": ('{"prompt": "a", "n": 0}\n', "line 1: n is 0"),
    "half a picture": ('{"prompt": "a", "n": 1.5}\n', "n is 1.5"),
    "a list of classes": ('{"class": ["a"]}\n', "must be a name"),
    "a class for one": ('{"prompt": "a", "class": "cat"}\nb\n', "1 of 2 entries have no class"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_file_is_said_by_line(what, tmp_path):
    content, message = WRONG[what]
    (tmp_path / "prompts.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        read_prompts(tmp_path / "prompts.txt")
    assert message in str(error.value) and "prompts.txt" in str(error.value)


def test_stdin_is_a_file_and_may_be_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a cat\n# no\n")))
    assert read_prompts(Path("-")).prompts == ("a cat",)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="stdin is closed"):
        read_prompts(Path("-"))


# --- with a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(ae, tmp_path_factory):
    """A folder of models, each named after its conditions."""
    folder = tmp_path_factory.mktemp("prompts")
    for name in ("text", "class", "class+text"):
        ending = tiny.train_ldm(folder / name, ae, "--condition", name, "--set", "condition.text_length=6")
        assert ("captions have more than the 6 tokens" in ending.stderr) == ("text" in name)
    return folder


def drawn(run, out, *options, code=0):
    ending = tiny.ldm("sample", "--model", run, "--steps", 1, "--out", out, "--json", *options)
    assert ending.code == code, ending.stderr
    return ending if code else [json.loads(Image.open(path).text["ldm"]) for path in ending.json["images"]]


def test_prompts_of_any_form_come_whole_from_the_command_line(models, tmp_path):
    (tmp_path / "more.txt").write_text('{"prompt": "a star", "n": 2}\n')
    asked = ["-5 degrees", "--my_prompt", "#1", '"quoted"', "€ ’ 星"]
    options = [word for prompt in asked for word in ("--prompt", prompt)]
    found = drawn(models / "text", tmp_path / "out", *options, "--prompts", tmp_path / "more.txt")
    assert [facts["prompt"] for facts in found] == [*asked, "a star", "a star"]


def test_lines_with_classes_are_drawn_as_they_say(models, tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "a", "class": "star"}\n{"prompt": "b", "class": "circle", "n": 2}\n')
    found = drawn(models / "class+text", tmp_path / "both", "--prompts", file)
    assert [(one["prompt"], one["class"]) for one in found] == [("a", "star"), ("b", "circle"), ("b", "circle")]
    ending = drawn(models / "class+text", tmp_path / "bad", "--prompts", file, "--class", "star", code=2)
    assert "names classes itself" in ending.line
    file.write_text('{"class": "star"}\n')
    assert [one["class"] for one in drawn(models / "class", tmp_path / "class", "--prompts", file)] == ["star"]
    file.write_text("a star\n")
    assert (
        "--prompt: this model was trained without text"
        in drawn(models / "class", tmp_path / "wrong", "--prompts", file, code=2).line
    )


def test_prompts_that_are_cut_are_counted_and_the_first_is_shown(models, tmp_path):
    file, long = tmp_path / "prompts.txt", "a red star at the top of a very wide blue sky"
    file.write_text(f"a star\n{long}\n{long} again\n")
    ending = tiny.ldm("sample", "--model", models / "text", "--steps", 1, "--out", tmp_path / "out", "--prompts", file)
    lines = [line for line in ending.stderr.splitlines() if "and cut; the first" in line]
    assert len(lines) == 1 and lines[0].startswith("ldm: warning: 2 of 3 prompts are longer than the 6 tokens")
    assert long in lines[0] and "again" not in lines[0]
    assert (
        "and cut"
        not in tiny.ldm(
            "sample", "--model", models / "text", "--steps", 1, "--out", tmp_path / "short", "--prompt", "a red star at"
        ).stderr
    )  # six tokens with their ends
