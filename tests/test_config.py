"""Configuration: values become the declared type or a message that names them, and layers override in order."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal

import pytest
import yaml

from dfkd_cli import catalog
from dfkd_cli.cli.arguments import expand
from dfkd_cli.config import build, convert, defaults, dump_yaml, hints, option, parse_yaml, plain
from dfkd_cli.errors import ConfigError, did_you_mean
from dfkd_cli.options import Run
from dfkd_cli.settings import assignments, recipe_layer, resolve

FLOATS = tuple[float, ...]
NUMBERS = (
    (1, int, 1), ("1", int, 1), ("-3", int, -3), (2.0, int, 2), ("1e3", int, 1000),
    (1, float, 1.0), ("1e-3", float, 1e-3), ("-0.5", float, -0.5), (".5", float, 0.5), ("1E5", float, 1e5),
    ("7", int | None, 7), (None, int | None, None), ("none", int | None, None), ("Null", float | None, None),
)  # fmt: skip
OTHERS = (
    (True, bool, True), ("yes", bool, True), ("Off", bool, False), ("0", bool, False), (1, bool, True),
    (5, str, "5"), ("none", str, "none"), ("none", str | None, None), ("a b", str, "a b"),
    ("b", Literal["a", "b"], "b"), (False, Literal["off", "on"], "off"),
    ("off", Literal["off", "on"], "off"),
)  # fmt: skip
LISTS = (
    (1, FLOATS, (1.0,)), ("1", FLOATS, (1.0,)), (["1e-3", 2], FLOATS, (1e-3, 2.0)), ("1.0, -0.1", FLOATS, (1.0, -0.1)),
    ("1 2  3", FLOATS, (1.0, 2.0, 3.0)), ("[1, 2]", FLOATS, (1.0, 2.0)), ((1, 8, 9), tuple[int, int, int], (1, 8, 9)),
    (["a b", "c"], tuple[str, ...], ("a b", "c")), (None, FLOATS | None, None),
)  # fmt: skip


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "kind", "expected"), [*NUMBERS, *OTHERS, *LISTS])
def test_values_become_the_declared_type(value, kind, expected):
    made = convert(value, kind, "key")
    assert made == expected
    assert type(made) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("x", int, "'x' is not a whole number"),
        ("1.5", int, "'1.5' is not a whole number"),
        (True, int, "True is not a whole number"),
        ("x", float, "'x' is not a number"),
        ("nan", float, "not a number"),
        ("inf", float, "not a number"),
        (False, float, "False is not a number"),
        ("", float, "not a number"),
        ("maybe", bool, "'maybe' is not a yes or no"),
        (None, float, "needs a value"),
        ("none", float, "not a number"),
        ([1, 2], float, "needs one float"),
        ({"a": 1}, str, "needs one str"),
        ("c", Literal["a", "b"], "'c' is not a choice"),
        ([], FLOATS, "at least one value"),
        ("", FLOATS, "at least one value"),
        (["x"], FLOATS, "'x' is not a number"),
        ([[1]], FLOATS, "needs one float"),
        ((1, 2), tuple[int, int, int], "needs 3 values, got 2"),
    ],
)
def test_other_values_are_refused_by_name(value, kind, message):
    with pytest.raises(ConfigError, match=message) as caught:
        convert(value, kind, "some-key")
    assert caught.value.message.startswith("some-key: ")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("value", "kind"),
    [("[1, 2", FLOATS), (datetime.date(2020, 1, 1), float), (datetime.date(2020, 1, 1), int), (10**400, int)],
    ids=["list", "date as float", "date as int", "huge"],
)
def test_strange_values_are_refused_too(value, kind):
    with pytest.raises(ConfigError):
        convert(value, kind, "key")


@pytest.mark.parametrize("value", ["9007199254740993", 9007199254740993])
def test_large_whole_numbers_are_exact(value):
    assert convert(value, int, "seed") == 9007199254740993


def test_a_choice_that_looks_like_a_number():
    assert convert(32, Literal["32", "bf16"], "precision") == "32"


@dataclass(frozen=True, kw_only=True)
class Example:
    rate: float = option(0.5, "a rate", above=0, high=1)
    counts: tuple[int, ...] = option((1,), "counts", low=-2)
    name: str = option(help="a name")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0}, "rate: 0.0 is out of range, it must be above 0"),
        ({"rate": 1.01}, "at most 1"),
        ({"counts": [1, -3]}, "counts: -3 is out of range, it must be at least -2"),
        ({"rte": 1}, "rte: unknown key -- did you mean 'rate'?"),
        ({}, "name: needs a value -- give --name"),
    ],
)
def test_build_checks_ranges_keys_and_what_is_required(values, message):
    base = {} if not values else {"name": "x"}
    with pytest.raises(ConfigError) as caught:
        build(Example, base | values)
    assert message in str(caught.value)


def test_build_takes_the_bounds_that_belong_to_the_range():
    made = build(Example, {"rate": 1, "counts": "-2 5", "name": "x"})
    assert plain(made) == {"rate": 1.0, "counts": [-2, 5], "name": "x"}


def test_did_you_mean():
    assert did_you_mean("zksd", ["noise", "zskd"]) == "did you mean 'zskd'?"
    assert did_you_mean("qqqq", ["noise", "zskd"]) == "choose from: noise, zskd"
    assert did_you_mean("qqqq", ["noise", "zskd"], "there are two") == "there are two"
    assert did_you_mean("zksd", ["noise", "zskd"], "there are two") == "did you mean 'zskd'?"


# -- YAML --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "stands twice"),
        ("a:\n  b: 1\n  b: 2", "stands twice"),
        ("a: [1", "not readable as YAML"),
        ("a: !!python/object/apply:os.system [id]", "not readable as YAML"),
        ("- a", "mapping"),
        ("seed: 010", "010 would be read to base 8"),
        ("steps: 1:30", "1:30 would be read to base 60"),
        ("lr: 1:30.5", "base 60"),
        ("", "mapping"),
    ],
)
def test_bad_yaml(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml(text, "my.yaml")
    assert caught.value.message.startswith("my.yaml: ")
    assert "\n" not in caught.value.message


def test_numbers_that_begin_with_a_zero_are_numbers():
    assert parse_yaml("{a: 0, b: 0.5, c: -0.01, d: 00a, e: '010'}", "") == {
        "a": 0, "b": 0.5, "c": -0.01, "d": "00a", "e": "010",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["[a]: 1", "1: 2", "on: 2"])
def test_keys_that_are_no_words(text):
    with pytest.raises(ConfigError):
        resolve("train-teacher", [("my.yaml: ", parse_yaml(text, "my.yaml"))])


def test_yaml_round_trip_keeps_order_and_words():
    values = {"b": [1e-05, -1], "a": "off", "ü": None, "p": "32", "q": "1e-3"}
    assert list(parse_yaml(dump_yaml(values), "").items()) == list(values.items())


# -- layers ------------------------------------------------------------------------------------------------------------


def config_of(command: str, *layers: dict, choice: str = "method"):
    """The configuration of the first choice, from layers."""
    return resolve(command, [(f"layer {i}: ", layer) for i, layer in enumerate(layers)]).components[choice][0].config


@pytest.mark.parametrize("text", ["[response=2,at]", "response=2,at"])
def test_objectives_can_be_assigned_like_any_list(text):
    chosen = resolve("distill", [("--set ", {"objective": text})]).components["objective"]
    assert [component.entry.name for component in chosen] == ["response", "at"] and chosen[0].weight == 2


def test_no_text_has_a_nul_in_it():
    with pytest.raises(ConfigError, match="NUL"):
        resolve("distill", [("my.yaml: ", {"out": "a\0b"})])


def test_precedence():
    recipe, assigned, typed = {"method": "zskd", "iterations": 1, "lr": 2, "beta": [3]}, {"lr": "4", "beta": "5"}, {}
    default = defaults(type(config_of("synthesize", recipe)))["temperature"]
    typed = {"beta": ["6", "7"]}
    made = config_of("synthesize", recipe, assigned, typed)
    assert (made.temperature, made.iterations, made.lr, made.beta) == (default, 1, 4.0, (6.0, 7.0))


@pytest.mark.parametrize(
    ("layers", "length"),
    [
        (({"steps": 4}, {"epochs": 2}), (2, None)),
        (({"epochs": 2}, {"steps": 4}), (2, 4)),
        (({"epochs": 2, "steps": 4},), (2, 4)),
        (({"steps": 4}, {"epochs": 3}, {"steps": 5}), (3, 5)),
        (({"steps": 4}, {"lr": 1}), (100, 4)),
    ],
)
def test_the_length_that_is_said_last_counts(layers, length):
    inputs = resolve("train-teacher", [("", layer) for layer in layers]).inputs
    assert (inputs.epochs, inputs.steps) == length


@pytest.mark.parametrize(
    ("assigned", "typed", "steps"),
    [
        ({"steps": "10"}, {"epochs": 2}, None),
        ({"epochs": "2"}, {"steps": 10}, 10),
        ({"inputs.epochs": "2"}, {}, None),
        ({}, {"epochs": 2}, None),
    ],
)
def test_what_is_typed_comes_after_what_is_assigned(assigned, typed, steps):
    layers = [("my.yaml: ", {"steps": 4000}), ("--set ", assigned), ("--", typed)]
    inputs = resolve("train-teacher", layers).inputs
    assert (inputs.epochs, inputs.steps) == (2, steps)


def test_the_last_layer_that_names_a_method_chooses_it():
    chosen = resolve("synthesize", [("recipe: ", {"method": "noise"}), ("--", {"method": "zskd"})])
    assert chosen.method.entry.name == "zskd"


def test_keys_of_another_method_are_unknown():
    with pytest.raises(ConfigError) as caught:
        resolve("synthesize", [("my.yaml: ", {"method": "noise", "beta": [1]})])
    assert caught.value.message == "my.yaml: beta: unknown key"


@pytest.mark.parametrize(
    ("command", "layer", "closest"),
    [
        ("synthesize", {"method": "zskd", "temprature": 1}, "temperature"),
        ("synthesize", {"method": "zksd"}, "zskd"),
        ("distill", {"objective": "respons"}, "response"),
        ("distill", {"objective.response.temprature": 1}, "temperature"),
        ("distill", {"objective": {"response": {"temprature": 1}}}, "temperature"),
        ("train-teacher", {"epoch": 1}, "epochs"),
        ("train-teacher", {"run.sed": 1}, "seed"),
    ],
)
def test_unknown_names_bring_the_closest(command, layer, closest):
    with pytest.raises(ConfigError) as caught:
        resolve(command, [("--set ", layer)])
    assert caught.value.hint == f"did you mean {closest!r}?"


def test_a_seed_is_one_that_every_generator_takes():
    assert resolve("distill", [("--", {"seed": 2**63 - 1})]).run.seed == 2**63 - 1
    with pytest.raises(ConfigError, match="--seed"):
        resolve("distill", [("--", {"seed": "1e39"})])


def test_messages_name_the_layer():
    with pytest.raises(ConfigError, match=r"^my.yaml: lr: 'x' is not a number"):
        resolve("train-teacher", [("my.yaml: ", {"lr": "x"}), ("--", {"seed": "1"})])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (("my.yaml: ", {"epochs": 0}), "my.yaml: epochs: 0 is out of range"),
        (("--", {"batch_size": "x"}), "--batch-size: 'x' is not a whole number"),
        (("--", {"batch_size": "0"}), "--batch-size: 0 is out of range"),
    ],
)
def test_messages_name_the_flag_as_it_is_typed(layer, message):
    with pytest.raises(ConfigError) as caught:
        resolve("train-teacher", [layer])
    assert caught.value.message.startswith(message)


def test_a_key_reaches_every_section_and_a_path_one():
    short = resolve("distill", [("", {"temperature": 3})])
    assert short.components["objective"][0].config.temperature == 3
    both = {"objective.response.temperature": 4, "temperature": 3}
    for layer in (both, dict(reversed(both.items()))):
        assert config_of("distill", layer, choice="objective").temperature == 4
    assert config_of("distill", both, {"temperature": 5}, choice="objective").temperature == 5  # a later layer wins
    nested = {"objective": {"response": {"temperature": 6, "weight": 0.5}}}
    assert config_of("distill", nested, choice="objective").temperature == 6
    with pytest.raises(ConfigError):
        resolve("distill", [("", {"objective.absent.temperature": 4})])


def test_a_shared_key_reaches_the_inputs_and_the_method():
    settings = resolve("synthesize", [("", {"method": "zskd", "student": "lenet5-half", "seed": 7, "batch_size": 3})])
    assert (settings.inputs.student, settings.run.seed, settings.method.config.batch_size) == ("lenet5-half", 7, 3)


@pytest.mark.parametrize(
    ("objective", "weight"),
    [("response", 1.0), ("response=0.5", 0.5), (["response=2e-1"], 0.2), ({"response": 3}, 3.0),
     ({"response": {"weight": "4", "soft": 1}}, 4.0)],
)  # fmt: skip
def test_weights_of_objectives(objective, weight):
    (chosen,) = resolve("distill", [("", {"objective": objective})]).components["objective"]
    assert (chosen.entry.name, chosen.weight) == ("response", weight)


@pytest.mark.parametrize(
    ("recipe", "assigned", "typed", "weight"),
    [
        (2, None, "response=1", 1), (None, 2, "response=1", 1), (2, 3, "response=1", 1),
        (2, None, "response", 2), (None, 2, "response", 2), (2, 3, "response", 3), (2, 3, None, 3),
    ],
)  # fmt: skip
def test_the_weight_that_is_said_last_counts(recipe, assigned, typed, weight):
    said = (("my.yaml: ", recipe), ("--set ", assigned))
    layers = [(source, {} if value is None else {"objective.response.weight": value}) for source, value in said]
    (chosen,) = resolve("distill", [*layers, ("--", {"objective": [typed]} if typed else {})]).components["objective"]
    assert chosen.weight == weight


def test_a_weight_of_what_is_not_chosen_is_refused():
    typed = ("--", {"objective": ["response", "at"]})
    with pytest.raises(ConfigError, match=r"objective\.att\.weight: objective att is not chosen -- did you mean 'at'"):
        resolve("distill", [("--set ", {"objective.att.weight": 5}), typed])
    with pytest.raises(ConfigError, match=r"method\.offline\.weight: unknown key"):
        resolve("distill", [("--set ", {"method.offline.weight": 5})])


def test_a_bad_weight_is_refused():
    with pytest.raises(ConfigError, match="objective response: 'x' is not a number"):
        resolve("distill", [("", {"objective": ["response=x"]})])


@pytest.mark.parametrize("layer", [{"method": 3}, {"objective": 3}, {"method": ["offline", "supervised"]}])
def test_choices_of_the_wrong_kind_are_refused(layer):
    with pytest.raises(ConfigError):
        resolve("distill", [("", layer)])


def test_assignments_split_at_the_first_equals_sign():
    assert assignments(["a=b=c", "batch-size=3", "x="]) == {"a": "b=c", "batch_size": "3", "x": ""}
    for bad in ("a", "=b", ""):
        with pytest.raises(ConfigError, match="KEY=VALUE"):
            assignments([bad])


def test_a_path_may_go_through_a_name_with_dashes():
    layers = [("", {"method": "class-impressions"}), ("--set ", assignments(["method.class-impressions.lr=3"]))]
    assert resolve("synthesize", layers).method.config.lr == 3


@pytest.mark.parametrize("command", catalog.commands())
def test_written_settings_are_read_as_the_same(command):
    choices = [choice for choice in catalog.command(command).choices if choice.default is None]
    layer = {choice.flag: next(iter(catalog.entries(choice.package))) for choice in choices}
    seed = {} if "seed" in catalog.command(command).ignores else {"seed": 5}
    settings = resolve(command, [("", layer | seed)])
    text = dump_yaml(settings.plain())
    assert resolve(command, [("config.yaml: ", parse_yaml(text, "config.yaml"))]) == settings


def test_what_is_volatile_is_no_part_of_the_result():
    a, b = (resolve("distill", [("", layer)]) for layer in ({}, {"device": "cpu", "out": "x", "data_dir": "y"}))
    assert a.plain(volatile=False) == b.plain(volatile=False)
    assert a.plain() != b.plain()
    assert resolve("distill", [("", {"seed": 1})]).plain(volatile=False) != a.plain(volatile=False)


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_every_recipe_resolves():
    for path in catalog.recipes_directory().rglob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = resolve(values["command"], [recipe_layer(str(path), values["command"])])
        assert settings.command == path.relative_to(catalog.recipes_directory()).parts[0]
        assert values["about"]["summary"], path


def test_recipe_files(tmp_path):
    path = tmp_path / "mein rezept ü.yaml"
    path.write_text("command: distill\nabout: {summary: x}\nlr: 1e-3\n", encoding="utf-8")
    assert resolve("distill", [recipe_layer(str(path), "distill")]).inputs.lr == 1e-3
    with pytest.raises(ConfigError, match="a recipe for distill, not for train-teacher"):
        recipe_layer(str(path), "train-teacher")
    with pytest.raises(ConfigError, match="no recipe file"):
        recipe_layer(str(tmp_path / "absent.yaml"), "distill")
    with pytest.raises(ConfigError, match="unknown recipe"):
        recipe_layer("absent", "distill")
    path.write_text("command: compare\nabout: {publishd: {zskd: 98.77}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"about\.publishd: unknown key -- did you mean 'published'"):
        recipe_layer(str(path), "compare")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a readable recipe"):
        recipe_layer(str(path), "distill")


# -- list-valued flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--beta 1.0 0.1", "--beta=1.0 --beta=0.1"),
        ("--beta 0.5", "--beta=0.5"),
        ("--beta -1 -0.1 -1e-3 -.5", "--beta=-1 --beta=-0.1 --beta=-1e-3 --beta=-.5"),
        ("--beta=1", "--beta=1"),
        ("--beta=1 2", "--beta=1 --beta=2"),
        ("--beta 1 --beta 2", "--beta=1 --beta=2"),
        ("--beta 1 2 --lr -3 --mean 4 5", "--beta=1 --beta=2 --lr -3 --mean=4 --mean=5"),
        ("--beta 1 -q", "--beta=1 -q"),
        ("--beta", "--beta"),
        ("--beta --lr 1", "--beta --lr 1"),
        ("--set a=1 b=-2 --lr 3", "--set=a=1 --set=b=-2 --lr 3"),
        ("--set a=1 student/", "--set=a=1 student/"),
        ("--json --beta 1 -- --beta 2", "--json --beta=1 -- --beta 2"),
        ("evaluate student/ --lr 1", "evaluate student/ --lr 1"),
    ],
)
def test_lists_take_any_number_of_values(typed, expected):
    assert expand(typed.split(), {"--beta", "--mean"}) == expected.split()


def test_values_may_have_spaces():
    assert expand(["--transfer-set", "a b", "ü"], {"--transfer-set"}) == ["--transfer-set=a b", "--transfer-set=ü"]


PACKAGES = "synthesizers", "objectives", "regimes"
METHODS = [entry for package in PACKAGES for entry in catalog.entries(package).values()]


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_defaults_of_every_method_pass_their_own_checks(entry):
    made = build(entry.config, plain(entry.config()))
    assert made == entry.config()
    assert set(hints(entry.config)) == set(plain(made))
    for name, value in plain(made).items():
        assert convert(value, hints(entry.config)[name], name) == getattr(made, name), f"{name}: not of its own type"


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry.name)
def test_no_option_of_a_method_is_called_as_one_of_its_commands(entry):
    for command in catalog.commands().values():
        taken = {*hints(command.inputs), *hints(Run), *(choice.flag for choice in command.choices)}
        taken |= {"weight", "recipe", "set", "dry_run", "json", "quiet", "verbose", "debug", "help"}
        chosen = entry.package in [choice.package for choice in command.choices]
        assert not chosen or taken.isdisjoint(hints(entry.config)), f"dfkd {command.name} has them too"
