"""Templates of captions: what falls away with an empty column, and what is refused."""

import pytest

from ldmcli.core.caption_templates import Field, parse_template
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DataSettings

FOX = {"name": "fox", "colours": "orange", "kind": "", "words": "wild, fast", "count": "7"}


def filled(text: str, **other: str) -> str:
    template = parse_template(text)
    return template.filled([{**FOX, **other}[field.column] for field in template.fields])


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{name}", "fox"),
        ("{name}, {words:3}, {kind} style", "fox, wild, fast"),
        ("{kind}: {name}", "fox"),
        ("{kind}; {words}. {name}", "wild, fast. fox"),
        ("a {kind} {name}", "a fox"),
        ("{name} ({kind})", "fox"),
        ("{name} ({kind}).", "fox."),
        ("{name}, an emoji, {kind} style", "fox, an emoji"),
        ("an emoji, {kind} style", ""),
        ("{kind}", ""),
        ("an emoji", "an emoji"),
        ("at 3:30, {name}", "at 3:30, fox"),
        ("{{{name}}}", "{fox}"),
    ],
)
def test_an_empty_column_takes_its_piece_with_it(template, expected):
    assert filled(template) == expected


@pytest.mark.parametrize(
    "template, other, expected",
    [
        ("a {colours} {name}", {}, "an orange fox"),
        ("A {name}", {"name": "owl"}, "An owl"),
        ("a {kind} owl or {name}", {}, "an owl or fox"),
        ("a {name}", {"name": "unicorn"}, "a unicorn"),
        ("vitamin a in {name}", {}, "vitamin a in fox"),
        ("{name}, {words}", {"words": "a owl"}, "fox, a owl"),
    ],
)
def test_an_article_goes_by_what_follows_it_and_data_stay_as_they_are(template, other, expected):
    assert filled(template, **other) == expected


def test_fields_are_columns_with_how_many_of_a_list_are_taken():
    assert parse_template("a { file name }, {words:3}").fields == (Field("file name"), Field("words", 3))


@pytest.mark.parametrize(
    "template", ["{name", "name}", "{}", "{ }", "{name!r}", "{name:x}", "{name:0}", "{a:{b}}", "", " "]
)
def test_what_is_no_template_is_refused_by_the_settings(template):
    with pytest.raises(UsageError, match=r"^data\.captions: .*[^.]$") as caught:
        DataSettings(captions=("{name}", template))
    assert "\n" not in str(caught.value)
