"""64 concurrent clients, 2,000 requests: none is lost or answered twice, at the sampler's rate."""

from benchmarks import serving
from tests.support.paths import ROOT


def test_many_clients_get_their_own_replies_at_the_samplers_rate() -> None:
    figures = serving.measure(str(ROOT / "assets" / "teacher"), 2000, 64, 32, 400, repeats=2)
    assert figures["requests"] == 2000 and figures["same"] >= 1980
    assert figures["ratio"] >= 0.85, figures
