"""Hooks of prompts: a user's function is found, checked and called; what it breaks is said in one line."""

from __future__ import annotations

import sys

import pytest

from inference.hooks import (
    Expansion,
    HookFailedError,
    Hooks,
    PreparedPrompt,
    Refusal,
    load_expander,
    load_safety,
)
from inference.hooks.expanders import check_expander_name
from tokenloom_common.errors import UserError

MODULE = """
import collections
from inference.hooks import Expansion

calls = []

def upper(prompt):
    calls.append(prompt)
    return prompt.upper()

def noted(prompt):
    return Expansion(prompt + " in oil", "painted in oil")

def fails(prompt):
    return deeper(prompt)

def deeper(prompt):
    return {}["key"]

def leaves(prompt):
    raise SystemExit(3)

def number(prompt):
    return 7

def wrong_pair(prompt):
    return Expansion(None, 3)

def blank(prompt):
    return "  "

def two(prompt, style):
    return prompt

async def later(prompt):
    return prompt

something = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the working directory, which is not on the path: as for the installed command."""
    (tmp_path / "my_hooks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    yield tmp_path / "my_hooks.py"
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def line_of(path, text):
    return path.read_text().splitlines().index(text) + 1


def test_a_function_of_the_working_directory_expands(mine):
    assert load_expander("my_hooks:upper").expand("a cat") == Expansion("A CAT")
    assert load_expander("my_hooks:noted").expand("a cat") == Expansion("a cat in oil", "painted in oil")


def test_an_error_of_the_function_names_it_its_file_and_its_line(mine):
    line = line_of(mine, '    return {}["key"]')
    with pytest.raises(HookFailedError) as failed:
        load_expander("my_hooks:fails").expand("a cat")
    assert str(failed.value) == f"--expand my_hooks:fails: KeyError: 'key' ({mine}, line {line})"
    assert failed.value.exit_code == 1


def test_an_error_within_a_library_names_the_line_of_the_users_own_file(mine):
    mine.write_text('import json\n\ndef f(prompt):\n    return json.loads("{")\n')
    with pytest.raises(HookFailedError, match=r"JSONDecodeError: .* \(.*my_hooks.py, line 4\)"):
        load_expander("my_hooks:f").expand("a cat")


def test_a_function_that_exits_does_not_end_the_program(mine):
    with pytest.raises(HookFailedError, match="SystemExit: 3"):
        load_expander("my_hooks:leaves").expand("a cat")


@pytest.mark.parametrize(("name", "words"), [
    ("number", "must return text or an Expansion, returned int"),
    ("later", "must return text or an Expansion, returned coroutine"),
    ("wrong_pair", "returned an Expansion of NoneType and int; both must be text"),
    ("blank", "returned empty text")])
@pytest.mark.filterwarnings("ignore:coroutine")
def test_what_is_no_text_is_refused(mine, name, words):
    with pytest.raises(HookFailedError, match=f"--expand my_hooks:{name}: {words}"):
        load_expander(f"my_hooks:{name}").expand("a cat")


@pytest.mark.parametrize(("spec", "words"), [
    ("my_hooks:uper", "has no uper; did you mean 'upper'?"),
    ("my_hooks:something", "something in .*my_hooks.py is no function but int"),
    ("my_hooks:two", "must take one argument, the prompt .*'style'"),
    ("nowhere_at_all:f", "no module 'nowhere_at_all' in .* or among the installed packages"),
    ("my_hooks.more:f", "no module 'my_hooks.more'|my_hooks.more cannot be imported"),
    ("my_hooks:", "give module:function, such as my_prompts:expand"),
    (":f", "give module:function"), ("my hooks:f", "give module:function"), ("my_hooks:f:g", "give module:function"),
    ("json:no_such", "has no no_such"),
    ("concepts", "unknown; give known-concepts, or a function of your own as module:function"), ("", "unknown")])
def test_a_wrong_name_is_one_line(mine, spec, words):
    with pytest.raises(UserError, match=words) as refused:
        check_expander_name(spec)
    assert str(refused.value).startswith("--expand ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "words"), [
    ("def f(:\n", r"SyntaxError: .* \(.*my_broken.py, line 1\)"),
    ("import no_such_package\n", r"ModuleNotFoundError: No module named 'no_such_package' \(.*my_broken.py, line 1\)"),
    ("x = 1\ny = x / 0\n", r"ZeroDivisionError: division by zero \(.*my_broken.py, line 2\)"),
    ("import sys\nsys.exit('no')\n", r"SystemExit: no \(.*my_broken.py, line 2\)")])
def test_a_module_that_cannot_be_imported_says_where(mine, text, words):
    mine.with_name("my_broken.py").write_text(text)
    with pytest.raises(UserError, match=f"--expand my_broken:f: my_broken cannot be imported: {words}"):
        check_expander_name("my_broken:f")


def test_a_model_without_concepts_is_told_how_to_get_them():
    with pytest.raises(UserError, match=r"no concepts.json.*tokenloom data concepts DATA --out"):
        load_expander("known-concepts", object())


# ---- applied


class Upper:
    def expand(self, prompt):
        return Expansion(prompt.upper(), "in capitals")


class NoCats:
    def check_prompt(self, prompt):
        return "a cat" if "cat" in prompt.lower() else None

    def check_images(self, images):
        return ["too dark" if image == "dark" else None for image in images]


def test_a_prompt_is_expanded_and_its_note_said():
    said = []
    hooks = Hooks(Upper(), say=said.append)
    assert hooks.prepare("a dog") == PreparedPrompt("a dog", "A DOG", "in capitals")
    assert hooks.prepare("a dog").drawn == "A DOG"
    assert said == ["in capitals"] * 2


def test_a_prompt_that_stays_the_same_has_no_revised_one():
    assert Hooks(Upper(), say=str).prepare("A DOG").revised is None
    assert Hooks().prepare("a dog") == PreparedPrompt("a dog")


def test_what_was_expanded_before_is_not_expanded_again():
    assert Hooks(Upper()).prepare("a dog", "the dog").drawn == "the dog"


def test_a_refused_prompt_is_not_expanded():
    class Never:
        def expand(self, prompt):
            raise AssertionError

    assert Hooks(Never(), NoCats()).prepare("a cat").refusal == "NoCats: a cat"


def test_what_a_prompt_becomes_is_checked_as_well():
    class Cat:
        def expand(self, prompt):
            return Expansion("a cat")

    for prepared in (Hooks(Cat(), NoCats()).prepare("a pet"), Hooks(None, NoCats()).prepare("a pet", "a cat")):
        assert prepared.drawn == "a cat"
        assert prepared.refusal == "NoCats: a cat"


def test_images_are_let_through_without_a_filter():
    assert Hooks().check_images(["dark", "light"]) == [None, None]
    assert Hooks(None, NoCats()).check_images(["dark", "light"]) == ["NoCats: too dark", None]
    assert Hooks(None, NoCats()).check_images([]) == []


def test_a_refusal_says_which_and_why():
    assert str(Refusal("a cat", "no cats")) == "'a cat': the prompt was refused (no cats)"
    assert str(Refusal("a" * 99, "dark", 7)) == f"'{'a' * 60}...': the picture of seed 7 was refused (dark)"


# ---- filters of users

FILTERS = """
class Good:
    def check_prompt(self, prompt):
        return "bad word" if "bad" in prompt else None
    def check_images(self, images):
        return [None] * len(images)

class Picky(Good):
    def check_images(self, images):
        return ["picky"] * len(images)

class Half:
    def check_prompt(self, prompt):
        return None

class Wrong(Good):
    def check_prompt(self, prompt):
        return False
    def check_images(self, images):
        return [True] * len(images)

class Short(Good):
    def check_images(self, images):
        return []

class Raises(Good):
    def check_images(self, images):
        raise OSError("the service is away")

def make(): return Good()
def nothing(): return None
def fails(): raise RuntimeError("no key")
"""


@pytest.fixture
def filters(mine):
    mine.with_name("my_filters.py").write_text(FILTERS)


def test_a_function_of_ones_own_makes_a_filter(filters):
    for name in ("make", "Good"):
        safety = load_safety([f"my_filters:{name}"])
        assert safety.check_prompt("a bad cat") == f"my_filters:{name}: bad word"
        assert safety.check_prompt("a cat") is None
        assert safety.check_images(["a", "b"]) == [None, None]


@pytest.mark.parametrize(("name", "kind", "words"), [
    ("Half", UserError, "must return an object with check_prompt and check_images, Half has no check_images"),
    ("nothing", UserError, "NoneType has no check_prompt"),
    ("fails", HookFailedError, r"RuntimeError: no key \(.*my_filters.py, line \d+\)"),
    ("no_such", UserError, "has no no_such")])
def test_what_is_no_filter_is_refused(filters, name, kind, words):
    with pytest.raises(kind, match=f"--safety my_filters:{name}: .*{words}|{words}"):
        load_safety([f"my_filters:{name}"])


@pytest.mark.parametrize(("name", "words"), [
    ("Wrong", "check_images must return text or None, returned bool"),
    ("Short", "must return a list of one value per image, returned 0 values for 2 images"),
    ("Raises", r"check_images: OSError: the service is away \(.*my_filters.py, line \d+\)")])
def test_a_filter_that_does_not_work_lets_nothing_through(filters, name, words):
    with pytest.raises(HookFailedError, match=words):
        load_safety([f"my_filters:{name}"]).check_images(["a", "b"])


def test_the_first_filter_that_refuses_says_why(filters):
    safety = load_safety(["words", "my_filters:make"])
    assert safety.check_prompt("bad porn") == "words: 'porn' is on the word list"
    assert safety.check_prompt("bad cat") == "my_filters:make: bad word"
    both = load_safety(["my_filters:Picky", "my_filters:Good"])
    assert both.check_images(["a"]) == ["my_filters:Picky: picky"]


def test_no_names_are_no_filter_and_wrong_ones_are_refused():
    assert load_safety([]) is None
    with pytest.raises(UserError, match="--safety 'wrods': unknown; give words or nsfw"):
        load_safety(["wrods"])
    with pytest.raises(UserError, match=r"--safety-words x\.txt: belongs to --safety words"):
        load_safety(["nsfw"], "x.txt")
