import subprocess
import sys
from pathlib import Path

import torch

from clean_transformer.parity.faults import inject
from clean_transformer.parity.faults.corruptions import with_result
from clean_transformer.parity.operations.check import first_wrong_operation
from clean_transformer.parity.operations.script import reproduction_script

from ..small import broken


def test_the_script_runs_by_itself(tmp_path: Path) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    with inject("linear-noncontiguous-weight"):
        finding = first_wrong_operation(torch.mm, x, x.T)
    assert finding is not None
    path = tmp_path / "mm.py"
    path.write_text(reproduction_script(finding))
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_keeps_dtype_layout_and_the_other_arguments() -> None:
    x = torch.randn(4, 9, 8, dtype=torch.bfloat16)[1:, 1:]
    with broken("add", with_result(lambda output: output + 3)):
        finding = first_wrong_operation(lambda: torch.add(x, x, alpha=2))
    assert finding is not None
    script = reproduction_script(finding)
    assert "tensor(torch.bfloat16, (3, 8, 8), (72, 8, 1), 80," in script
    assert "torch.ops.aten.add.Tensor(x0, x1, alpha=2)" in script
