"""One test item per claim: it passes when the claim has a verdict, whatever that is; those that
calibrate the suite must hold.
"""

import pytest

from widthbench.claims import ledger


def test_claim(
    claim: ledger.Claim, calibrates: bool, evidence: ledger.Evidence, record_property
) -> None:
    judged = ledger.judge(claim, evidence)
    verdict = ledger.overall(judged)
    assert not (calibrates and verdict == "not reproduced"), (
        "the suite itself is off: "
        + "; ".join(
            f"{j.row.what}: reported {j.row.reported}, measured {j.measured.mean}"
            for j in judged
            if j.measured
        )
    )
    record_property("verdict", verdict)
    if verdict == "not run":
        pytest.skip(f"not run: needs {claim.needs}")
