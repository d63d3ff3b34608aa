"""The names in an expression, of which other tests say that they exist."""

import pytest
from promql import metrics_of


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up == 0", {"up"}),
        ('sum by (le, job) (rate(a_bucket{le="0.1", b=~"c|d"}[5m])) / 2', {"a_bucket"}),
        (
            "slo:failed:ratio1h > 14.4 * 0.0001 and slo:failed:ratio5m > 1e-3",
            {"slo:failed:ratio1h", "slo:failed:ratio5m"},
        ),
        ("histogram_quantile(0.95, sum by (le) (rate(x_seconds_bucket[5m])))", {"x_seconds_bucket"}),
        ("sum by (instance) (a_b) / on (instance) c_d > bool 0.8", {"a_b", "c_d"}),
        ('max(a{x="b_c"} offset 5m) unless absent(d)', {"a", "d"}),
    ],
)
def test_an_expression_names_its_metrics(expression: str, names: set[str]) -> None:
    assert metrics_of(expression) == names
