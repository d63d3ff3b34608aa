"""Writes the dashboards of `dashboards.py` as the files that Grafana reads: `python -m deploy.grafana`.

Grafana's own builders know its format, so that a field it does not have is a type error here.
"""

from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef

from deploy.grafana.dashboards import DASHBOARDS, Panel, Row

HERE = Path(__file__).parent
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH, HEIGHT = 8, 8  # three panels beside each other on Grafana's grid of 24


def written() -> dict[str, str]:
    """Return the file of each dashboard, by its name."""
    return {f"{name}.json": _dashboard(name, *described) for name, described in DASHBOARDS.items()}


def _dashboard(name: str, title: str, rows: tuple[Row, ...]) -> str:
    made = (
        dashboard.Dashboard(f"scaleout: {title}")
        .uid(f"scaleout-{name}")
        .tags(["scaleout"])
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for row in rows:
        made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            made.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _panel(panel: Panel) -> timeseries.Panel:
    drawn = (
        timeseries.Panel()
        .title(panel.title)
        .unit(panel.unit)
        .min(0)
        .datasource(SOURCE)
        .span(WIDTH)
        .height(HEIGHT)
        .legend(_legend())
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if panel.help:
        drawn.description(panel.help)
    for number, question in enumerate(panel.questions):
        asked = prometheus.Dataquery().expr(question.expression).legend_format(question.legend)
        drawn.with_target(asked.ref_id(chr(ord("A") + number)))
    return drawn


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .show_legend(show_legend=True)
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
    )


if __name__ == "__main__":
    for file, text in written().items():
        (HERE / file).write_text(text)
