"""One test item per claim: it passes when the claim has a verdict, whatever that is; those that calibrate the suite must hold."""

import pytest

from widthbench import claims


def test_claim(claim: claims.Claim, calibrates: bool, evidence: claims.Evidence, record_property) -> None:
    judged = claims.judge(claim, evidence)
    verdict = claims.overall(judged)
    assert not (calibrates and verdict == "not reproduced"), "the suite itself is off: " + "; ".join(
        f"{j.row.what}: reported {j.row.reported}, measured {j.measured.mean}" for j in judged if j.measured
    )
    record_property("verdict", verdict)
    if verdict == "not run":
        pytest.skip(f"not run: needs {claim.needs}")
