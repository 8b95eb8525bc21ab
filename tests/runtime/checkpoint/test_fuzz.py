"""The fuzzer finds what is planted, and what it once found stays mended."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from goku_runtime.checkpoint import CheckpointError, index, tree
from goku_runtime.checkpoint.manifest import FileSum, Manifest

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
import fuzz
from parsers import PARSERS

# ---- planted


def unhashable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tag's value is looked up without a look at what it is."""
    real = tree.decode

    def decode(node: Any) -> Any:
        if isinstance(node, dict) and "$float" in node:
            _ = node["$float"] in {"nan": 0}
        return real(node)

    monkeypatch.setattr(tree, "decode", decode)


def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory by a number that stands in the file."""
    real = index.parse

    def parse(data: bytes, sizes: Any) -> Any:
        for size in re.findall(rb"\[(\d{8})", data):
            bytearray(int(size))
        return real(data, sizes)

    monkeypatch.setattr(index, "parse", parse)


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken is not what stands there."""
    real = Manifest.from_bytes

    def from_bytes(data: bytes, where: str) -> Manifest:
        found = real(data, where)
        files = {name: FileSum(f.size % 2**32, f.crc) for name, f in found.files.items()}
        return Manifest(files, found.created_ns, found.version)

    monkeypatch.setattr(Manifest, "from_bytes", from_bytes)


@pytest.mark.parametrize(
    ("name", "plant", "words"),
    [
        ("tree", unhashable, "TypeError: unhashable type"),
        ("index", greedy, r"AssertionError: \d{8} bytes for \d+"),
        ("manifest", forgetful, "AssertionError"),
    ],
)
def test_a_planted_fault_is_found(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    words: str,
) -> None:
    arguments = ["--blind", "--parser", name, "--seconds", "60", "--directory", str(tmp_path)]
    with monkeypatch.context() as patch:
        plant(patch)
        assert fuzz.main([*arguments, "--seed", "1"]) == 1
        assert re.search(words, capsys.readouterr().out)
        (path,) = (tmp_path / name).iterdir()
        assert fuzz.main([str(path)]) == 1
        assert fuzz.main(["--parser", name, str(path)]) == 1
    assert fuzz.main([str(path)]) == 0


def test_nothing_is_found_where_nothing_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert fuzz.main(["--blind", "--seconds", "3", "--directory", str(tmp_path)]) == 0
    counts = re.findall(r"(\w+): (\d+) inputs in 1 s, none read wrongly", capsys.readouterr().out)
    assert [name for name, _ in counts] == list(PARSERS)
    assert all(int(count) > 20 for _, count in counts), counts


def test_what_cannot_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert fuzz.main([str(tmp_path / "none")]) == 2
    for wrong in (["--seconds", "0"], ["--seconds", "nan"], ["--parser", "metadata"]):
        with pytest.raises(SystemExit) as caught:
            fuzz.main(wrong)
        assert caught.value.code == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    capsys.readouterr()
    assert fuzz.main(["--directory", str(tmp_path)]) == 2
    assert "CPython 3.11 to 3.13 on Linux x86_64" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    broken = tmp_path / "broken.py"
    broken.write_text("raise ImportError('no such fuzzer')\n")
    monkeypatch.setattr(fuzz, "WORKER", broken)
    assert fuzz.guided("tree", 1, 1, tmp_path / "inputs") == 2, "nothing was tried"
    assert "no such fuzzer" in capsys.readouterr().out


@pytest.mark.long
def test_atheris_finds_a_planted_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("atheris", reason="`make fuzz` installs it where it has a wheel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    arguments = ["--parser", "tree", "--directory", str(tmp_path / "inputs")]
    assert fuzz.main([*arguments, "--seconds", "5"]) == 0
    counted = re.search(r"tree: (\d+) inputs in 5 s, none", capsys.readouterr().out)
    assert counted
    assert int(counted[1]) > 500
    # Too deep for mutations that do not see which branches are reached.
    planted = tmp_path / "planted.py"
    planted.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import fuzz_atheris\n"
        "from goku_runtime.checkpoint import tree\n"
        "real = tree._check_names\n"
        "def check_names(node, *rest):\n"
        "    if isinstance(node, dict) and node.get('$tuple') == []:\n"
        "        raise KeyError('planted')\n"
        "    return real(node, *rest)\n"
        "tree._check_names = check_names\n"
        "fuzz_atheris.main(*sys.argv[1:])\n"
    )
    monkeypatch.setattr(fuzz, "WORKER", planted)
    assert fuzz.main([*arguments, "--seconds", "120"]) == 1
    said = capsys.readouterr().out
    assert "KeyError: 'planted'" in said
    kept = re.search(r"FOUND (\S+)", said)
    assert kept
    assert Path(kept[1]).is_file()


# ---- found


@pytest.mark.parametrize("name", PARSERS)
def test_the_golden_files_are_taken(name: str) -> None:
    seeds = PARSERS[name].seeds()
    assert seeds
    assert all(PARSERS[name].check(seed) for seed in seeds)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=200)
@given(random=st.randoms(use_true_random=False))
def test_mutations_are_taken_as_they_are_or_refused(name: str, random: Random) -> None:
    parser = PARSERS[name]
    parser.check(parser.mutated(random.choice(parser.seeds()), random))


@pytest.mark.parametrize("value", ["[]", "{}", "null", "[[]]", '{"nan": 0}'])
def test_a_float_that_is_no_string(value: str) -> None:
    with pytest.raises(CheckpointError, match=r"c is damaged: unknown tag '\$float'"):
        tree.parse_tree(b'{"a": {"$float": %s}}' % value.encode(), "c")


@pytest.mark.parametrize("leaf", ["0", '{"$tuple": [0, 0]}', "[0, 0]"])
def test_a_long_key_is_not_copied_for_each_node_below_it(leaf: str) -> None:
    """300 levels below a key of 100 KB: 30 MB of names, were there one for each."""
    key, opened, closed = "k" * 100_000, '{"":' * 300, "}" * 300
    assert PARSERS["tree"].check(f'{{"{key}":{opened}{leaf}{closed}}}'.encode())


KEYS = st.sampled_from(["", ".", "a", "b", ".a", "a.", "a.b", "$a", "[0]", 0, 1])
STATES: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([torch.zeros(2), 1, "x", (1, [2])]),
    lambda inner: st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.dictionaries(KEYS, STATES, max_size=3))
def test_every_name_that_is_written_is_read(state: dict[Any, Any]) -> None:
    """Empty keys and those with dots in them, too."""
    try:
        flat = tree.flatten(state)
    except ValueError as error:
        if "two tensors of the state have this name" not in str(error):
            raise
        assume(False)
    text = tree.to_json(flat.tree).encode()
    assert tree.parse_tree(text, "c") == json.loads(text)
    assert PARSERS["tree"].check(text)
