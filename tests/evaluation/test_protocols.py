"""The paper's protocols: what each sets, when a result may carry its name, and what is refused."""

import dataclasses

import pytest
import tiny as commands
from measured import Autoencoder, Model, Rows, folder, pictures, tiny_extractor

from ldmcli.core.errors import InputError, UsageError
from ldmcli.evaluation import evaluate as module
from ldmcli.evaluation import references
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.metrics import METRICS, first_words
from ldmcli.evaluation.protocols import PROTOCOLS, Protocol
from ldmcli.evaluation.request import EvaluationRequest

# an override for every entry of a protocol that a test can afford
SMALL = {"n": 6, "steps": 1, "size": (16, 16)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_extractor(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(autouse=True)
def cheap(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "open_extractor", lambda name=None: tiny)
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(references, "open_reference", lambda settings, split: (Rows(pictures(12, 9)), 0))


@pytest.fixture(scope="module")
def plain_model(tiny_runs):
    return tiny_runs["plain"]


@pytest.fixture
def small(monkeypatch):
    """A protocol of 6 samples by the tiny extractor against 12 rows."""
    sets = {**PROTOCOLS["tab3-imagenet-g"].sets, **SMALL, "features": "tiny", "metrics": ("fid", "is")}
    one = dataclasses.replace(PROTOCOLS["tab3-imagenet-g"], sets=sets, rows=12, published={"fid": 3.6, "is": 247.67})
    monkeypatch.setitem(PROTOCOLS, "small", one)
    return one


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_sets_arguments_that_there_are_and_publishes_metrics_that_it_measures(name):
    protocol = PROTOCOLS[name]
    fields = {one.name for one in dataclasses.fields(EvaluationRequest)}
    assert set(protocol.sets) <= fields and (protocol.sets["n"] == "all" or protocol.sets["n"] > 1)
    words = first_words()
    measured = set(protocol.sets["metrics"])
    assert measured <= set(METRICS) and {words[key.partition("_")[0]] for key in protocol.published} == measured
    assert protocol.table.startswith("Tab. ")
    if protocol.subject == "model":
        assert {"steps", "sampler", "eta", "seed", "weights"} <= set(protocol.sets)


@pytest.mark.parametrize(
    "name, fid",
    [
        ("tab1-ffhq", 4.98),
        ("tab3-imagenet-g", 3.60),
        ("tab2-coco-g", 12.63),
        ("tab8-kl-f4", 0.27),
        ("tab7-places-big-ft", 1.5),
    ],
)
def test_published_numbers_are_those_of_the_paper(name, fid):
    assert PROTOCOLS[name].published["fid"] == fid


def test_a_result_by_the_protocol_carries_its_name_and_the_published_numbers(small, tmp_path):
    model = Model(("class",))
    model.class_names = ["one", "two", "three"]
    found = evaluate(model=model, data="made", protocol="small")
    stated = found["protocol"]
    assert (stated["name"], stated["differs"], stated["published"]["fid"]) == ("small", [], 3.6)
    assert found["n_generated"] == 6 and found["sampling"]["guidance"] == 1.5 and found["sampling"]["eta"] == 1
    assert model.calls[-1]["classes"] == [0, 1, 2, 0, 1, 2] and found["generated"]["classes"] == "each in turn"
    table = commands_describe(found)
    assert "published (Tab. 3 and 10" in table and "247.67" in table


def commands_describe(found):
    from ldmcli.reports.evaluation_table import describe

    return describe(found)


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"steps": 2}, "steps: 1 there, 2 here"),
        ({"guidance": 1.0}, "guidance: 1.5 there, 1.0 here"),
        ({"n": 5}, "n: 6 there, 5 here"),
        ({"metrics": ["fid"]}, "metrics: fid,is there, fid here"),
        ({"reference_count": 8}, "reference: about 12 rows there, 8 here"),
        ({"features": "effnet-lite0"}, "features: tiny there, effnet-lite0 here"),
        ({"seed": 3}, "seed: 0 there, 3 here"),
        ({"steps": 1, "n": 6, "metrics": ["is", "fid"]}, None),
    ],
)
def test_what_is_given_wins_and_takes_the_name_away(small, given, reason):
    model = Model(("class",))
    model.class_names = ["one", "two", "three"]
    found = evaluate(model=model, data="made", protocol="small", **given)
    stated = found["protocol"]
    assert (stated["name"] is None) == (reason is not None) and stated["asked"] == "small"
    assert reason is None or any(reason in text for text in stated["differs"])
    assert ("published (" in commands_describe(found)) == (reason is None)


def test_unknown_weights_take_the_name_away(small, tiny, monkeypatch):
    monkeypatch.setattr(type(tiny), "known", property(lambda self: False))
    model = Model(("class",))
    model.class_names = ["one"]
    found = evaluate(model=model, data="made", protocol="small")
    assert found["protocol"]["differs"] == ["features: tiny there, unknown weights here"]


def test_a_small_data_set_is_said_before_anything_is_drawn(small, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "small", dataclasses.replace(small, rows=1_281_167))
    model, said = Model(("class",)), []
    model.class_names = ["one"]
    monkeypatch.setattr(module.console, "warn", lambda text: said.append((text, len(model.calls))))
    evaluate(model=model, data="made", protocol="small")
    assert said == [("not the protocol small, so without its name: reference: about 1,281,167 rows there, 12 here", 0)]


@pytest.mark.parametrize(
    "subject, name, words",
    [
        ({"model": Model(())}, "tab3-imagenet", "conditioned on class; this one is on nothing"),
        ({"model": Model(("class",))}, "tab1-ffhq", "conditioned on nothing; this one is on class"),
        ({"model": Model(())}, "tab8-kl-f4", "measures an autoencoder"),
        ({"autoencoder": Autoencoder()}, "tab1-ffhq", "measures a model's samples"),
        ({"model": Model(())}, "tab99", "--protocol list"),
        ({"model": Model(("text",)), "balanced": True}, None, "--balanced"),
    ],
)
def test_protocols_of_something_else_are_refused(subject, name, words):
    with pytest.raises(UsageError, match=words):
        evaluate(**subject, data="made", protocol=name)


def test_more_rows_than_there_are_refused():
    with pytest.raises(InputError, match="12 rows, but --reference-count asks for 30000"):
        evaluate(model=Model(("text",)), data="made", protocol="tab2-coco", steps=1)
    with pytest.raises(InputError, match="12 images, but -n asks for 50000"):
        evaluate(autoencoder=Autoencoder(), data="made", protocol="tab8-kl-f4")


def test_rows_of_layouts_are_chosen_as_in_the_paper(monkeypatch):
    seen = []
    monkeypatch.setattr(
        references, "open_reference", lambda settings, split: seen.append(settings) or (Rows(pictures(3)), 0)
    )
    with pytest.raises(AttributeError, match="all_objects"):  # these rows have no boxes
        evaluate(model=Model(("layout",)), data="made", protocol="tab9-coco-ldm8")
    assert (seen[0].min_objects, seen[0].max_objects) == (2, 30)


def test_the_list_shows_every_protocol_with_what_was_published():
    ending = commands.ldm("eval-fid", "--protocol", "list")
    assert ending.code == 0 and all(name in ending.stdout for name in PROTOCOLS) and "20.03 ± 0.33" in ending.stdout
    listed = commands.ldm("eval-fid", "--protocol", "list", "--json").json
    assert listed["tab1-celebahq"]["sets"]["steps"] == 500 and listed["tab1-celebahq"]["published"]["fid"] == 5.11


def test_the_command_applies_a_protocol(small, monkeypatch, tmp_path, plain_model):
    sets = {**small.sets, "size": (20, 20), "metrics": ("fid",)}
    sets = {name: value for name, value in sets.items() if name not in ("balanced", "guidance")}
    one = Protocol(table="Tab. 0", subject="model", sets=sets, published={"fid": 1.25})
    monkeypatch.setitem(PROTOCOLS, "plain", one)
    words = ("eval-fid", "--model", plain_model, "--data", "made", "--protocol", "plain")
    ending = commands.ldm(*words, "--json")
    assert ending.code == 0, ending.stderr
    assert ending.json["protocol"]["name"] == "plain" and ending.json["n_generated"] == 6
    assert "1.25" in commands.ldm(*words).stdout
    other = commands.ldm(*words, "--steps", 2)
    assert "without its name: steps: 1 there, 2 here" in other.stderr and "1.25" not in other.stdout
    images = ("--images", folder(tmp_path / "a", pictures(4)), "--data", "made", "--protocol", "plain")
    assert "a model's samples" in commands.ldm("eval-fid", *images).line
