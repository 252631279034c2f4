"""YAML as plain data: numbers, anchors, and every fault with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rarefy.yaml_files.yaml_file import MAX_BYTES, YamlError, load_file, load_text, parse_value

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(2000))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("6e-4", 6e-4),
        ("1E5", 1e5),
        ("-2e3", -2000.0),
        (".5e1", 5.0),
        ("1.", 1.0),
        ("12", 12),
        ("1_000", 1000),
        ("0", 0),
        ("0.5", 0.5),
        ('"010"', "010"),
        ('"2:4"', "2:4"),
        (".inf", float("inf")),
        ("e5", "e5"),
        ("1e", "1e"),
        ('"1e-4"', "1e-4"),
        ("true", True),
        ("~", None),
    ],
)
def test_scalars(text: str, value: object) -> None:
    read = load_text(f"key: {text}")["key"]
    assert read == value
    assert type(read) is type(value)


def test_anchors_merge_and_do_not_share() -> None:
    content = load_text("a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 3}")
    assert content == {"a": {"x": 1, "y": [2]}, "b": {"x": 1, "y": [2]}, "c": {"x": 3, "y": [2]}}
    content["a"]["y"].append(5)
    assert content["b"]["y"] == content["c"]["y"] == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key a is given twice"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n  <<: *a", "line 4: the key << is given twice"),
        ("a:\n  b: {c: 1, c: 2}", "line 2: the key c is given twice"),
        ("a: 1\nb: 010", "line 2: 010 is another number to some programs than to others (base 8 or 60); put"),
        ("pattern: 2:4", "line 1: 2:4 is another number to some programs than to others"),
        ("a: [12:30:00]", "line 1: 12:30:00 is another number to some programs"),
        ("a: 1:20.5", "line 1: 1:20.5 is another number to some programs"),
        ("a: -007", "line 1: -007 is another number to some programs"),
        ("a: 1\nb: [1", "line 2: while parsing a flow sequence, expected ',' or ']'"),
        ("a:\n\t- b", "line 2: is indented with a tab; use spaces"),
        ("a: 1\n  b: 2", "line 2: is indented by 2 spaces, deeper than line 1, which has a value already"),
        ("a:\n  b: 1\n c: 2", "line 3: is indented by 1 space, which fits no line above it (0 or 2 fit)"),
        ("a:\n  - x\n b: 1", "line 3: is indented by 1 space, which fits no line above it (0, 2 or 4 fit)"),
        ("  a: 1\n# note\nb: 2", "line 3: is indented by 0 spaces, which fits no line above it (0 or 2 fit)"),
        ("a: 1\n- b", "line 2: is a key beside list items, or a list item beside keys"),
        ("a: b: c", "line 1: has a second `: ` in its value"),
        ("a:\n  b:1\n  c: 2", "line 3: the line before it, line 2, needs a space after `b:`"),
        ("a: *attn*", 'line 1: a value that starts with * is an alias to YAML; put it in quotes: "*attn*"'),
        ("a: [*.weight]", 'put it in quotes: "*.weight"'),
        ("a: @x", 'line 1: a value cannot start with @; put it in quotes: "@x"'),
        ("a: 1\nb: *nope", "line 2: found undefined alias 'nope'"),
        ("a: &x 1\nb: &x 2", "line 2: found duplicate anchor 'x'"),
        ("a: &a [*a]", "line 1: the anchor &a contains itself"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]", "line 2: could not determine a constructor"),
        ("a: !secret x", "line 1: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "line 2: expected a single document"),
        ("a: 1\nb: 2024-99-99", "line 2: 2024-99-99 is not a value"),
        ("a: " + "1" * 5000, "line 1: 1111111111111111111111111111111111111111 is not a value"),
        ("? [1, 2]\n: 3", "line 1: while constructing a mapping, found unhashable key"),
        ("a: 1\nb: x\x00y", "line 2: holds the character 0x0000"),
        ("", "<text>: is empty"),
        ("# only a comment", "<text>: is empty"),
        ("- a", "<text>: holds a list"),
        ("just words", "<text>: holds a single value (just words)"),
        (BOMB, "line 6: expands to more than 100000 values"),
        (CHAIN, "line 49: is nested deeper than 50 levels"),
        ("a: " + "[" * 5000, "line 1: is nested deeper than 50 levels"),
        ("- " * 5000, "line 1: is nested deeper than 50 levels"),
    ],
)
def test_faults_are_one_line_with_the_line_number(text: str, message: str) -> None:
    with pytest.raises(YamlError) as caught:
        load_text(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_merge_does_not_repeat_a_key() -> None:
    assert load_text("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b}")["c"] == {"x": 2}


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9")
    assert load_file(path) == {"a": "é"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"a: 1\nb: \xff\xfe", "line 2: is not UTF-8 text"),
        ("a: 1".encode("utf-16"), "line 1: is not UTF-8 text"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "line 1: holds the character 0x007f"),
        (b"", "is empty"),
        (b"[" * (MAX_BYTES * 10), "holds 10.0 MB; a configuration has at most 1 MB"),
    ],
)
def test_files_that_are_no_yaml(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(raw)
    with pytest.raises(YamlError) as caught:
        load_file(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(YamlError, match=r"cannot be read: .*; give the path"):
            load_file(path)


def test_values_of_set() -> None:
    assert parse_value("{a: [1, 2]}") == {"a": [1, 2]}
    with pytest.raises(YamlError, match="--set, line 1"):
        parse_value("[1")
