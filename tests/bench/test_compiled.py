"""Faults of compiled kernels and the page that names them, from made-up records."""

import json

import pytest

from bench import compiled, harness


def record(**change):
    given = {
        "operator": "varlen_attention", "case": "64 bfloat16 8:8 heads", "kernel": "forward_kernel",
        "chip": 90, "registers": 128, "spill_bytes": 0, "shared_bytes": 1024,
        "shared_limit": 232448, "threads": 128, "tensor_core": "HGMMA", "warp_specialized": False,
        "triton": "9.9.9",
    }  # fmt: skip
    return given | change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"spill_bytes": 16}, []),
        ({"spill_bytes": 17}, ["17 bytes spilled"]),
        ({"shared_bytes": 232449}, ["232449 bytes of shared memory"]),
        ({"tensor_core": "HMMA"}, ["matrix instructions HMMA instead of HGMMA"]),
        ({"chip": 80, "tensor_core": "HMMA"}, []),
        ({"chip": 100, "tensor_core": "UTCMMA"}, []),
        ({"chip": 100, "tensor_core": "none"}, ["matrix instructions none instead of UTCMMA"]),
        ({"kernel": "gradient_kv_kernel", "tensor_core": "none"}, ["matrix instructions none"]),
        ({"kernel": "gradient_q_kernel", "tensor_core": "none"}, ["matrix instructions none"]),
        ({"kernel": "delta_kernel", "tensor_core": "none"}, []),
        ({"operator": "adaln_modulate", "tensor_core": "none"}, []),
        ({"kernel": "specialised_forward_kernel", "warp_specialized": True}, []),
        ({"kernel": "specialised_forward_kernel"}, ["warps are not specialised"]),
        (
            {"kernel": "specialised_forward_kernel", "tensor_core": "HMMA", "spill_bytes": 99},
            ["99 bytes spilled", "matrix instructions", "warps are not"],
        ),
    ],
)
def test_faults_are_found_and_named(change, said):
    found = compiled.faults(record(**change))
    assert len(found) == len(said)
    assert all(f.startswith(words) for f, words in zip(found, said, strict=True))


def test_the_kernels_that_multiply_are_there():
    from goku_kernels.triton import varlen_attention as kernels

    assert all(hasattr(kernels, name) for name in compiled.MULTIPLY)


def test_the_page_begins_with_what_is_wrong_under_every_version(tmp_path):
    def write(version, *records):
        sources = ["bench/packs.py"]
        head = {"triton": version, "sources": sources,
                "sources_sha256": harness.source_hash(sources)}  # fmt: skip
        lines = "".join(json.dumps(line) + "\n" for line in (head, *records))
        (tmp_path / f"triton-{version}.jsonl").write_text(lines)

    write("1.0.0", record(spill_bytes=612), record(kernel="delta_kernel", tensor_core="none"))
    write("2.0.0", record(), record())
    page = compiled.render(tmp_path)
    top, tables = page.split("\n\n## Triton 1.0.0\n")
    assert (
        "- Triton 1.0.0: 2 kernels compiled, 1 with faults:\n  - sm_90, varlen_attention: " in top
    )
    assert "forward_kernel: 612 bytes spilled" in top
    assert top.endswith("- Triton 2.0.0: 2 kernels compiled, no fault")
    assert tables.count("| varlen_attention |") == 4
    assert "\n\n## Triton 2.0.0\n\n| operator |" in tables
