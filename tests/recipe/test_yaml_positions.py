"""The YAML subset: what is read, what is refused, and at which position."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.errors import RecipeReferenceError, RecipeSyntaxError, SparsekitError
from sparsekit.recipe.load import dump_yaml
from sparsekit.recipe.yaml_positions import MAX_BYTES, MAX_DEPTH, parse, read_file

QUOTE = "Put text that begins with * or & in quotes."
REFUSED = {
    "python tag": (
        b"a: !!python/object/apply:os.system [x]",
        "f:1:4: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed",
    ),
    "own tag on a mapping": (b"a: !x {b: 1}", "f:1:4: tag '!x' is not allowed"),
    "own tag on a list": (b"a: !x [b]", "f:1:4: tag '!x' is not allowed"),
    "bare tag": (b"a: ! x", "f:1:4: tag '!' is not allowed"),
    "tag on a key": (b"!x a: 1", "f:1:1: tag '!x' is not allowed"),
    "tag of the standard": (b"a: !!str 1", "f:1:4: tag 'tag:yaml.org,2002:str' is not allowed"),
    "anchor": (b"a: &x 1", f"f:1:4: anchors and aliases are not allowed. {QUOTE}"),
    "anchor on a mapping": (b"a: &x {b: 1}", "f:1:4: anchors and aliases"),
    "alias": (b"a: 1\nb: *x", "f:2:4: anchors and aliases"),
    "glob without quotes": (b"a: [*.mlp.*]", f"f:1:6: anchors and aliases are not allowed. {QUOTE}"),
    "duplicate key": (b"a: 1\nb: 2\na: 3", "f:3:1: key 'a' appears twice; first on line 1"),
    "nested duplicate key": (b"a: {b: 1, b: 2}", "f:1:11: key 'b' appears twice"),
    "quoted duplicate key": (b"a: 1\n'a': 2", "f:2:1: key 'a' appears twice"),
    "two documents": (b"a: 1\n---\nb: 2", "f:2:1: a second document begins here"),
    "directive": (b"%YAML 1.2\n---\na: 1", "f:1:1: YAML directives are not allowed"),
    "number as key": (b"1: 2", "f:1:1: a key must be text"),
    "null as key": (b"a: 1\n~: 2", "f:2:1: a key must be text"),
    "truth value as key": (b"true: 2", "f:1:1: a key must be text"),
    "list as key": (b"? [a]\n: b", "f:1:3: a key must be text"),
    "nan": (b"a: .nan", "f:1:4: .nan is not a finite number"),
    "infinity": (b"a: [-.inf]", "f:1:5: -.inf is not a finite number"),
    "overflow": (b"a: 1e999", "f:1:4: 1e999 is not a finite number"),
    "huge integer": (b"a: " + b"9" * 5000, "f:1:4: the number 999999999999... is too large"),
    "deep list": (b"a: " + b"[" * 50_000, "f:1:20: nested deeper than 16 levels"),
    "deep mapping": (b"{a: " * 17 + b"1" + b"}" * 17, "f:1:69: nested deeper than 16 levels"),
    "latin-1": (
        "a: 1\nb: caf\xe9".encode("latin-1"),
        "f:2:7: byte 0xe9 is not UTF-8. Save the file as UTF-8.",
    ),
    "utf-16": ("a: 1".encode("utf-16"), "f:1:1: byte 0xff is not UTF-8"),
    "half a character pair": (b'a: "\\ud800"', r"f:1:4: character '\ud800' is not allowed"),
    "escaped zero byte": (b'a: "\\0"', r"f:1:4: character '\x00' is not allowed"),
    "control character": (b"a: 1\nb: \x07", r"f:2:4: character '\x07' is not allowed"),
    "tab": (b"a:\n\tb: 1", "f:2:1: found character '\\t' that cannot start any token. Indent with spaces"),
    "colon in text": (b"a: b: c", "f:1:5: unexpected ':'. Check the indentation"),
    "open list": (b"a: [1", "f:1:6: expected ',' or ']'"),
    "open quote": (b"a: 'x", "f:1:6: found unexpected end of stream"),
    "empty": (b"", "f:1:1: the file is empty. Begin with: sparsekit: 1"),
    "only a comment": (b"# nothing\n", "f:2:1: the file is empty"),
    "list at the top": (b"- 1", "f:1:1: a recipe is a mapping of keys to values"),
    "text at the top": (b"wanda", "f:1:1: a recipe is a mapping of keys to values"),
    "too large": (b"#" * (MAX_BYTES + 1), "f: more than 256 KiB; a recipe is a short text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_recipes_do_not_need_is_refused_with_its_position(case: str) -> None:
    content, message = REFUSED[case]
    with pytest.raises(RecipeSyntaxError) as caught:
        parse(content, "f")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_alias_bomb_is_refused_at_once() -> None:
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))
    began = time.monotonic()
    with pytest.raises(RecipeSyntaxError, match="anchors and aliases"):
        parse(f"a0: &a0 [x]\n{levels}".encode(), "f")
    assert time.monotonic() - began < 1


def test_the_deepest_allowed_nesting_is_read() -> None:
    node = parse(b"a: " + b"[" * (MAX_DEPTH - 1) + b"1" + b"]" * (MAX_DEPTH - 1), "f")
    assert isinstance(node.data(), dict)


def test_byte_order_mark_and_crlf_are_read_and_do_not_shift_positions() -> None:
    node = parse(b"\xef\xbb\xbfa: 1\r\nb:\r\n  c: x\r\n", "f")
    assert node.data() == {"a": 1, "b": {"c": "x"}}
    inner = node.child("b")
    assert inner is not None
    leaf = inner.child("c")
    assert leaf is not None
    assert (str(leaf.key), str(leaf.mark)) == ("f:3:3", "f:3:6")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),  # 124 in YAML 1.1
        ("1e-3", 0.001),  # a text in YAML 1.1
        (".5", 0.5),
        ("1.", 1.0),
        ("-7", -7),
        ("no", "no"),  # false in YAML 1.1
        ("True", True),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("2024-01-01", "2024-01-01"),
        ("'0.5'", "0.5"),
        ("|\n  x\n  y\n", "x\ny\n"),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    node = parse(f"a: {text}".encode(), "f").data()
    assert isinstance(node, dict)
    assert node["a"] == value
    assert type(node["a"]) is type(value)


@given(st.binary(max_size=200) | st.text(alphabet="ab:-[]{}&*!|>'\"#% \n\t,?~.0", max_size=60).map(str.encode))
def test_any_bytes_are_data_or_one_line_with_a_position(content: bytes) -> None:
    try:
        data = parse(content, "f").data()
    except RecipeSyntaxError as error:
        refusal = str(error)
        assert (refusal[:2], refusal.count("\n")) == ("f:", 0)
    else:
        assert isinstance(data, dict)


_TEXT = st.text(max_size=12).filter(lambda text: all(c >= " " and not "\x7f" <= c <= "\x9f" for c in text)) | (
    st.sampled_from(["1e5", "2:4", "no", "null", "~", "", "0.5", ".inf", "*x", "&x", "- a", "a: b", "#", "1e999"])
)
_DATA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(_TEXT, _DATA, min_size=1, max_size=4))
def test_dumped_data_reads_back_equal_here_and_in_yaml_1_1(data: dict[str, object]) -> None:
    text = dump_yaml(data)
    assert parse(text.encode(), "f").data() == data
    assert yaml.safe_load(text) == data


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (
        tmp_path,
        tmp_path / "pipe.yaml",
        tmp_path / "absent.yaml",
        tmp_path / ("n" * 300),
        Path("a\0b"),
    ):
        with pytest.raises(SparsekitError) as caught:
            read_file(path)
        assert isinstance(caught.value, RecipeReferenceError)
        assert "\n" not in str(caught.value)
