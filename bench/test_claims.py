"""One test item per claim of the source documents: it passes when the claim has a verdict, whatever that is."""

import pytest

from widthbench import claims


def test_claim(claim: claims.Claim, evidence: claims.Evidence, record_property) -> None:
    judged = claims.judge(claim, evidence)
    verdict = claims.overall(judged)
    record_property("verdict", verdict)
    if verdict == "not run":
        pytest.skip(f"not run: needs {claim.needs}")
    assert all(j.measured is not None for j in judged if j.verdict != "not run")
