"""Given frames where packs, parameters or both are spread over processes: on real gloo processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from goku.model import PRESETS, GokuTransformer
from goku.parallelize import ActivationCheckpointing, ShardingConfig, check_policies
from goku_runtime.sharding_plan import plan

SCRIPT = Path(__file__).with_name("conditioning_processes.py")
GIVEN = replace(PRESETS["tiny-test"], condition="frames")


def test_a_pack_shared_by_two_processes(run_processes: Any) -> None:
    run_processes(2, SCRIPT, "a_shared_pack", "a_shared_batch")


def test_a_model_sharded_over_two_processes(run_processes: Any, free_port: Any) -> None:
    run_processes(2, SCRIPT, ("a_sharded_model", {"port": free_port()}), backend="none")


def test_what_takes_frames_is_a_unit_in_full_precision_where_it_is() -> None:
    for config in (GIVEN, PRESETS["tiny-test"]):
        check_policies(config, ShardingConfig(), ActivationCheckpointing())
        with torch.device("meta"):
            model = GokuTransformer(config)
        given = config.condition == "frames"
        units = plan(model, ShardingConfig().policy(torch.bfloat16, condition=given))
        dtypes = {unit.name: unit.gathered_dtype for unit in units}
        assert ("condition_embed" in dtypes) == given
        assert dtypes.get("condition_embed") is None  # as stored: float32
        assert dtypes["blocks.0"] == torch.bfloat16
        assert sum(len(unit.parameters) for unit in units) == len(list(model.parameters()))
        if not given:
            with pytest.raises(ValueError, match="'condition_embed', which matches no module"):
                plan(model, ShardingConfig().policy(torch.bfloat16, condition=True))
