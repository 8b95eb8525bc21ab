"""The archive of a session: what is in it, that it is whole, and what is refused."""

import io
import os
import tarfile

import pytest

from bench import gpu_state

ROWS, TUNED = (
    "bench/results/step.jsonl",
    "kernels/goku_kernels/triton/configs/varlen_attention.json",
)
KEPT = {
    ROWS: '{"a": 1}\n',
    TUNED: '{"rows": []}\n',
    "bench/results/gpu_check.json": "{}",
    "bench/results/gpu_check.log": "== build\n",
    "bench/results/tune/varlen_attention.jsonl": '{"b": 2}\n',
    "bench/results/tune/varlen_attention.begun": '{"config": {}}',
}
LEFT = {
    "bench/results/README.md": "# Rows\n",
    "bench/results/.partial-0123456789abcdef": "{",
    "bench/step.py": "x = 1\n",
    "kernels/goku_kernels/triton/varlen_attention.py": "x = 1\n",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in (KEPT | LEFT).items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tree"


def read(root):
    return {p.relative_to(root).as_posix(): p.read_text() for p in root.rglob("*") if p.is_file()}


def test_it_holds_results_and_configurations_and_puts_them_back(tree, tmp_path):
    file = tmp_path / "out" / "state.tgz"
    begun = "bench/results/tune/varlen_attention.begun"
    os.utime(tree / begun, (1e9, 1e9))
    assert gpu_state.save(file, tree) == file.stat().st_size
    assert [p.name for p in file.parent.iterdir()] == ["state.tgz"]
    other = tmp_path / "other"
    (other / "bench/results/tune").mkdir(parents=True)
    (other / ROWS).write_text("older\n")
    (other / "bench/results/block.jsonl").write_text("mine\n")
    # Of a run that has ended since: it would be said to have ended the process once more.
    (other / "bench/results/tune/adaln_modulate.begun").write_text("{}")
    assert sorted(gpu_state.unpack(file, other)) == sorted(KEPT)
    assert read(other) == KEPT | {"bench/results/block.jsonl": "mine\n"}
    # When it showed its last sign of life decides whether it was only out of time.
    assert (other / begun).stat().st_mtime == 1e9
    with tarfile.open(file) as archive:  # plain tar does it too
        assert sorted(archive.getnames()) == sorted(KEPT)


def test_links_are_not_followed(tree, tmp_path):
    (tmp_path / "secret.json").write_text("secret")
    (tree / "bench/results/link.json").symlink_to(tmp_path / "secret.json")
    gpu_state.save(tmp_path / "state.tgz", tree)
    with tarfile.open(tmp_path / "state.tgz") as archive:
        assert "bench/results/link.json" not in archive.getnames()


def test_too_large_it_goes_without_logs_and_else_says_so(tree, tmp_path, monkeypatch):
    file = tmp_path / "state.tgz"
    gpu_state.save(file, tree)
    before = file.read_bytes()
    log = tree / "bench/results/gpu_check.log"
    log.write_bytes(os.urandom(50_000))
    monkeypatch.setattr(gpu_state, "MAX_BYTES", 20_000)
    gpu_state.save(file, tree)
    with tarfile.open(file) as archive:
        assert sorted(archive.getnames()) == sorted(n for n in KEPT if not n.endswith(".log"))
    without = file.read_bytes()
    assert without != before
    (tree / ROWS).write_bytes(os.urandom(50_000))
    with pytest.raises(ValueError, match=r"--state .*: allowed are 20000"):
        gpu_state.save(file, tree)
    assert file.read_bytes() == without


def test_a_place_that_is_none_is_refused(tree, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "state.tgz", tmp_path):
        with pytest.raises(ValueError, match=r"--state .* cannot be written"):
            gpu_state.save(place, tree)
    assert sorted(p.name for p in tmp_path.parent.glob(".partial-*")) == []


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


EVIL = [
    member("/etc/goku.json"),
    member("bench/results/../../../goku.json"),
    member("../bench/results/goku.json"),
    member("./bench/results/goku.json"),
    member("bench/results"),
    member("bench/step.py"),
    member("bench/results/run.py"),
    member("bench/results.json"),
    member("kernels/goku_kernels/triton/configs/new.jsonl"),
    member("bench/results/a.json", tarfile.SYMTYPE, "/etc/passwd"),
    member("bench/results/a.json", tarfile.LNKTYPE, "bench/step.py"),
    member("bench/results/a.json", tarfile.FIFOTYPE),
    member("bench/results/a.json", tarfile.DIRTYPE),
]


@pytest.mark.parametrize("evil", EVIL, ids=lambda info: f"{info.name} {info.type.decode()}")
def test_anything_else_is_refused_and_nothing_is_written(evil, tmp_path):
    file, root = tmp_path / "evil.tgz", tmp_path / "tree"
    root.mkdir()
    with tarfile.open(file, "w:gz") as archive:
        good = member(ROWS)
        good.size = 3
        archive.addfile(good, io.BytesIO(b"{}\n"))
        archive.addfile(evil)
    with pytest.raises(ValueError, match=r"evil.tgz holds '.*': allowed are plain files"):
        gpu_state.unpack(file, root)
    assert list(root.rglob("*")) == []


def test_no_archive_a_cut_one_and_a_bomb_are_refused(tree, tmp_path, monkeypatch):
    file, root = tmp_path / "state.tgz", tmp_path / "new"
    root.mkdir()
    gpu_state.save(file, tree)
    whole = file.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-20]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is no archive of --state"):
            gpu_state.unpack(file, root)
    with pytest.raises(ValueError, match="is no archive of --state"):
        gpu_state.unpack(tmp_path / "none.tgz", root)
    file.write_bytes(whole)
    monkeypatch.setattr(gpu_state, "MAX_UNPACKED_BYTES", 20)
    with pytest.raises(ValueError, match="more than 20 bytes"):
        gpu_state.unpack(file, root)
    assert list(root.rglob("*")) == []


def test_a_line_that_was_not_finished_is_cut(tmp_path):
    (tmp_path / "tune").mkdir()
    texts = {"a.jsonl": '{"a": 1}\n{"b', "tune/b.jsonl": "{", "c.jsonl": "{}\n", "d.json": "{"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    gpu_state.cut_unfinished(tmp_path)
    assert read(tmp_path) == texts | {"a.jsonl": '{"a": 1}\n', "tune/b.jsonl": ""}
