"""The look of panels, queries and variables in both dashboards. Their content is in service.py and heads.py."""

from itertools import count

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    FieldColor,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
Panel = timeseries.Panel | stat.Panel | table.Panel | heatmap.Panel
Part = tuple[str, int, list[tuple[int, Panel]]]
"""A row of a dashboard: name, height of its panels, and panels with their widths, 24 per line."""
Steps = tuple[tuple[float | None, str], ...]
"""Colours by the value from which they apply; None: from the lowest."""


def dashboard(title: str, uid: str, description: str, variables: list[QueryVariable], rows: list[Part]) -> Dashboard:
    """A dashboard with a choice of data source and a link to the other dashboards."""
    others = DashboardLink("steervit").type(DashboardLinkType.DASHBOARDS).tags(["steervit"])
    board = Dashboard(title).uid(uid).description(description).tags(["steervit"])
    board.link(others.include_vars(True).keep_time(True)).tooltip(DashboardCursorSync.CROSSHAIR)
    board.time("now-1h", "now").refresh("30s").timezone("browser")
    board.with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
    for variable in variables:
        board.with_variable(variable)
    ids = count(1)
    for name, height, panels in rows:
        board.with_row(Row(name).id(next(ids)))
        for width, panel in panels:
            board.with_panel(panel.id(next(ids)).span(width).height(height).datasource(SOURCE))
    return board


def variable(name: str, label: str, query: str, description: str, every: bool = True) -> QueryVariable:
    """A variable. every: several values can be chosen, at first all; otherwise one."""
    query_variable = QueryVariable(name).label(label).description(description).datasource(SOURCE).query(query)
    query_variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    if every:
        query_variable.multi(True).include_all(True).all_value(".*").current(VariableOption(True, "All", "$__all"))
    return query_variable


def number(title: str, description: str, unit: str, expr: str, steps: Steps = ((None, "blue"),)) -> stat.Panel:
    """One number over the whole time range."""
    panel = stat.Panel().title(title).description(description).unit(unit).no_value("no data")
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).graph_mode(options.BigValueGraphMode.NONE)
    return panel.thresholds(_thresholds(steps)).with_target(_query(expr).instant().ref_id("A"))


def lines(
    title: str, description: str, unit: str, *queries: tuple[str, str], lowest: float | None = 0
) -> timeseries.Panel:
    """Lines over time. queries: expressions with their legends; lowest: where the axis starts."""
    panel = timeseries.Panel().title(title).description(description).unit(unit)
    if lowest is not None:
        panel.min(lowest)
    panel.line_width(1).fill_opacity(5).show_points(options.VisibilityMode.NEVER)
    panel.legend(_legend()).tooltip(_tooltip())
    for letter, (expr, legend) in zip("ABCDEF", queries, strict=False):
        panel.with_target(_query(expr).range().legend_format(legend).ref_id(letter))
    return panel


def stacked(panel: timeseries.Panel) -> timeseries.Panel:
    return panel.fill_opacity(40).stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))


def limits(panel: timeseries.Panel, *steps: tuple[float | None, str]) -> timeseries.Panel:
    """The panel with dashed lines at the steps."""
    style = common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED)
    return panel.thresholds(_thresholds(steps)).thresholds_style(style)


def over_time(title: str, description: str, unit: str, expr: str) -> heatmap.Panel:
    """A histogram over time. expr: its buckets, by le."""
    panel = heatmap.Panel().title(title).description(description).unit(unit).calculate(False)
    panel.y_axis(heatmap.YAxisConfig().unit(unit)).cell_values(heatmap.CellValues().unit("short"))
    return panel.with_target(_query(expr).range().legend_format("{{le}}").format(PromQueryFormat.HEATMAP).ref_id("A"))


def rows(
    title: str, description: str, unit: str, queries: tuple[str, ...], *steps: DataTransformerConfig
) -> table.Panel:
    """A table of the values at the end of the time range."""
    panel = table.Panel().title(title).description(description).unit(unit).cell_height(options.TableCellHeight.SM)
    for letter, expr in zip("ABCDEF", queries, strict=False):
        panel.with_target(_query(expr).instant().format(PromQueryFormat.TABLE).ref_id(letter))
    return panel.transformations(list(steps))


def matrix(title: str, description: str, expr: str) -> table.Panel:
    """Blocks x units, ordered by the label place, coloured from 0 to 1. (Grafana's heat map has time on its x axis.)"""
    as_numbers = [{"targetField": field, "destinationType": "number"} for field in ("block", "place")]
    panel = rows(
        title, description, "percentunit", (expr,),
        DataTransformerConfig("convertFieldType", options={"fields": {}, "conversions": as_numbers}),
        DataTransformerConfig("sortBy", options={"fields": {}, "sort": [{"field": "place"}]}),
        DataTransformerConfig("sortBy", options={"fields": {}, "sort": [{"field": "block"}]}),
        DataTransformerConfig(
            "groupingToMatrix",
            options={"rowField": "block", "columnField": "unit", "valueField": "Value", "emptyValue": "null"},
        ),
        _organized({"block\\unit": "block \\ unit"}, {}, {}),
    )  # fmt: skip
    panel.min(0).max(1).decimals(0).align(options.FieldTextAlignment.CENTER)
    panel.color_scheme(FieldColor().mode(FieldColorModeId.CONTINUOUS_BLUES))
    panel.cell_options(options.TableColoredBackgroundCellOptions(mode=options.TableCellBackgroundDisplayMode.BASIC))
    plain = {"unit": "none", "custom.cellOptions": {"type": "auto"}, "custom.width": 110}
    return override(panel, "block \\ unit", plain)


def override(panel: table.Panel, field: str, properties: dict[str, object]) -> table.Panel:
    """The panel with different properties for one field."""
    return panel.override_by_name(field, [DynamicConfigValue(*item) for item in properties.items()])


def coloured(panel: table.Panel, field: str, steps: Steps) -> table.Panel:
    """The panel with the cells of a field in the colours of the steps."""
    thresholds = {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in steps]}
    cells = {"type": "color-background", "mode": "basic"}
    return override(
        panel, field, {"thresholds": thresholds, "color": {"mode": "thresholds"}, "custom.cellOptions": cells}
    )


def columns(names: dict[str, str]) -> DataTransformerConfig:
    """Columns in this order, with these names, and without the time."""
    order = {field: index for index, field in enumerate(names)}
    return _organized(names, order, {"Time": True})


def merged() -> DataTransformerConfig:
    """Joins the tables of several queries."""
    return DataTransformerConfig("merge", options={})


def _organized(names: dict[str, str], order: dict[str, int], left_out: dict[str, bool]) -> DataTransformerConfig:
    return DataTransformerConfig(
        "organize", options={"renameByName": names, "indexByName": order, "excludeByName": left_out}
    )


def _query(expr: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).datasource(SOURCE)


def _thresholds(steps: Steps) -> ThresholdsConfig:
    made = [Threshold(value=value, color=colour) for value, colour in steps]
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(made)


def _legend() -> common.VizLegendOptions:
    legend = common.VizLegendOptions().show_legend(True).placement(options.LegendPlacement.BOTTOM)
    return legend.display_mode(options.LegendDisplayMode.TABLE).calcs(["mean", "lastNotNull"])


def _tooltip() -> common.VizTooltipOptions:
    return common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING)
