"""From what a run left behind to the sections of its report."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import yaml

from rarefy.report.chart import HeatMap, Line, LineChart, Section, Table, Unit
from rarefy.report.cost_chart import dense_flops, flops_over_time, sparse_flops, training_rows, training_share
from rarefy.report.heat import balance_map, topology_map
from rarefy.report.run_data import Run
from rarefy.report.scale import readable, scaled
from rarefy.report.series import Series

ADD_CSV = "Nothing was logged: keep CSVLogger among the loggers (it is there by default)."
ADD_LOG_SPARSITY = "add `LogSparsity: {}` to callbacks"
KEEP_RECORD = "keep RunRecord among the callbacks (it is there by default)"
DENSE = "The run is dense: it has no `sparsity` block."


def sections_of(run: Run) -> list[Section]:
    """Every section of a report, in order; one without data says what to turn on."""
    several = [processes_section(run)] if run.ranks else []
    return [
        loss_section(run),
        sparsity_section(run),
        topology_section(run),
        balance_section(run),
        cost_section(run),
        throughput_section(run),
        *several,
        parameter_section(run),
        facts_section(run),
    ]


def headlines(run: Run) -> Iterator[tuple[str, str]]:
    """The figures that matter most, each with its name."""
    step = last_step(run)
    total = run.record.get("total_steps")
    yield "step", f"{step:,}" + (f" of {total:,}" if total else "")
    for name, metric in (("training loss", "loss"), ("validation loss", "eval/loss")):
        if metric in run.metrics:
            yield name, readable(run.metrics[metric].last)
    if run.masks:
        yield "sparsity", readable(overall_sparsity(run), "percent")
    dense = dense_flops(run)
    sparse = sparse_flops(run)
    if dense and sparse is not None:
        yield "FLOPs against dense", readable(sparse / dense, "percent")
    name = _rate_name(run)
    if name is not None:
        yield _RATES[name], readable(round(float(np.median(run.metrics[name].mean))))


def last_step(run: Run) -> int:
    """The last step that anything tells of."""
    logged = [int(series.steps[-1]) for series in run.metrics.values()]
    return max([*logged, run.step or 0])


def overall_sparsity(run: Run) -> float:
    """The measured sparsity of all sparse parameters together."""
    size = sum(mask.size for mask in run.masks)
    return 1 - sum(mask.active for mask in run.masks) / max(size, 1)


def loss_section(run: Run) -> Section:
    """Training and validation loss, and the other results of the last validation."""
    lines = [Line("training", run.metrics["loss"])] if "loss" in run.metrics else []
    losses = [name for name in run.metrics if name.startswith("eval/") and name.endswith("loss")]
    lines += [Line(f"validation ({name})", run.metrics[name]) for name in losses]
    charts = [LineChart("loss", "Loss", lines)] if lines else []
    charts += [
        LineChart(key, title, [Line(title.lower(), run.metrics[name])])
        for key, title, name in (("lr", "Learning rate", "lr"), ("grad-norm", "Gradient norm", "grad_norm"))
        if name in run.metrics
    ]
    results = [
        (name, readable(series.last), f"{int(series.steps[-1]):,}")
        for name, series in run.metrics.items()
        if name.startswith("eval/")
    ]
    numeric = frozenset({1, 2})
    tables = [Table(("metric", "value", "step"), results, numeric, "Last validation")] if results else []
    missing = [] if lines else [ADD_CSV]
    if lines and not losses:
        missing = ["No validation: give fit.val_dataloader, and loop.eval_frequency if it is 0."]
    return Section("loss", "Loss", charts=charts, tables=tables, missing=missing)


def sparsity_section(run: Run) -> Section:
    """Target and actual sparsity over time."""
    names = {"target": "sparsity/target", "actual": "sparsity/actual"}
    if names["actual"] not in run.metrics:
        # What LogSparsity calls it, where RunRecord was taken out.
        names["actual"] = "sparsity/model/actual"
    lines = [
        Line(label, run.metrics[name], "steps", dashed=label == "target")
        for label, name in reversed(names.items())
        if name in run.metrics
    ]
    targets = run.of_parameters("target")
    several = [Line(pattern, series, "steps") for pattern, series in targets.items()]
    charts = [LineChart("sparsity", "Sparsity, all sparse parameters", lines, "percent")] if lines else []
    if len(several) > 1:
        charts.append(LineChart("targets", "Target of each algorithm", several, "percent"))
    missing = (
        [] if lines or run.is_dense else [f"No sparsity was logged: {KEEP_RECORD}, or {ADD_LOG_SPARSITY}."]
    )
    return Section("sparsity", "Sparsity", [DENSE] if run.is_dense else [], charts, missing=missing)


def topology_section(run: Run) -> Section:
    """How much of each parameter an update replaces, and how many positions were ever active."""
    title = "Topology change"
    if run.is_dense:
        return Section("topology", title, [DENSE])
    changes = topology_map(run)
    charts: list[LineChart | HeatMap] = [] if changes is None else [changes]
    if "sparsity/model/explored" in run.metrics:
        explored = Line("positions that were ever active", run.metrics["sparsity/model/explored"])
        charts.append(LineChart("explored", "Explored positions", [explored], "percent"))
    missing = []
    if changes is None:
        has_log = bool(charts or run.of_parameters("actual"))
        missing = (
            ["No topology was updated: the algorithm is static, or no update step has come."]
            if has_log
            else [f"Topology changes were not logged: {ADD_LOG_SPARSITY}."]
        )
    text = ["Share of each parameter's active connections that an update replaced by new ones."]
    return Section("topology", title, text if changes else [], charts, missing=missing)


def balance_section(run: Run) -> Section:
    """How connections are shared out among balanced groups, such as attention heads."""
    title = "Balance of groups"
    if run.is_dense:
        return Section("balance", title, [DENSE])
    found = balance_map(run)
    if found is not None:
        uneven = [mask.name for mask in run.masks if mask.groups and max(mask.groups) > min(mask.groups)]
        grouped = sum(bool(mask.groups) for mask in run.masks)
        told = f"{grouped} parameters have balanced groups; in each of them every group has equally many connections."
        if uneven:
            told = f"{len(uneven)} of {grouped} parameters are uneven: {', '.join(uneven[:5])}"
        return Section("balance", title, [told], [found])
    if not run.masks:
        return Section(
            "balance", title, missing=["There is no checkpoint yet, so there are no masks to look at."]
        )
    if not run.record:
        return Section("balance", title, missing=[f"The groups are not known: {KEEP_RECORD}."])
    hint = (
        "No parameter has groups: balance_out_groups or balance_in_groups in the sparsity block makes them."
    )
    return Section("balance", title, missing=[hint])


def cost_section(run: Run) -> Section:
    """Operations of a forward pass and of the training so far, and memory; inactive connections left out."""
    title = "FLOPs against dense"
    dense = dense_flops(run)
    sparse = sparse_flops(run)
    if dense is None:
        why = f"Operations were not counted: {KEEP_RECORD}. A model under torch.compile is not counted."
        return Section("cost", title, missing=[why])
    forward = run.record["forward"]
    unit = f"{forward['tokens']:,} tokens" if forward.get("tokens") else f"{forward['samples']:,} samples"
    text = [
        f"A forward pass over {unit}. A training step takes three times as much, and the dense gradient of updates. "
        "Inactive connections are left out, whichever way they are stored."
    ]
    rows = [("every weight dense", scaled(dense, "FLOP"), "100%")]
    if sparse is not None:
        rows.append(
            ("as of the newest checkpoint", scaled(sparse, "FLOP"), readable(sparse / dense, "percent"))
        )
    over_time = flops_over_time(run)
    charts = []
    missing = []
    if over_time is not None:
        lines = [Line("FLOPs, dense = 100%", over_time, "steps")]
        charts = [LineChart("flops", "FLOPs of a forward pass against dense", lines, "percent")]
    elif not run.is_dense:
        missing = [f"FLOPs over time need the sparsity of each parameter: {ADD_LOG_SPARSITY}."]
    share = training_share(run)
    if share is not None:
        lines = [Line("training so far, dense = 100%", share)]
        charts.append(LineChart("training-flops", "FLOPs of training against dense", lines, "percent"))
    tables = [Table(("forward pass", "operations", "against dense"), rows, frozenset({1, 2}))]
    if spent := training_rows(run):
        columns = ("training", "every weight dense", "sparse", "against dense")
        tables.append(Table(columns, spent, frozenset({1, 2, 3})))
    return Section("cost", title, text, charts, tables, missing)


_RATES = {"tokens_per_second": "tokens per second", "samples_per_second": "samples per second"}


def _rate_name(run: Run) -> str | None:
    return next((name for name in _RATES if name in run.metrics), None)


def throughput_section(run: Run) -> Section:
    """Speed over time, validation and checkpoints left out."""
    name = _rate_name(run)
    if name is None:
        return Section("throughput", "Throughput", missing=[ADD_CSV])
    series = run.metrics[name]
    chart = LineChart("throughput", _RATES[name].capitalize(), [Line(_RATES[name], series)])
    return Section(
        "throughput", "Throughput", [f"Median {readable(round(float(np.median(series.mean))))}."], [chart]
    )


_MOST_LINES = 8  # in one chart


def processes_section(run: Run) -> Section:
    """The speed of each of several processes, and what it waited for in the averages of gradients."""
    rates = {rank: own[name] for rank, own in run.ranks.items() for name in _RATES if name in own}
    chosen = [Line(f"rank {rank}", series) for rank, series in rates.items()][:_MOST_LINES]
    charts = [LineChart("ranks", "Throughput of each process", chosen)] if chosen else []
    rows = [
        (
            str(rank),
            _mean_of(rates.get(rank)),
            _mean_of(own.get("communication/share"), "percent"),
            _mean_of(own.get("communication/bytes")),
        )
        for rank, own in run.ranks.items()
    ]
    columns = ("rank", "samples or tokens per second", "time in communication", "bytes a step")
    text = [
        "Communication is that of all gradients under ddp, dense and sparse; what torch exchanges under fsdp2 is not "
        "in it, nor losses and checks of a few bytes. The process that waits least is the one that the others wait for."
    ]
    table = Table(columns, rows, frozenset({0, 1, 2, 3}), "Means over the run")
    return Section("ranks", "Processes", text, charts, [table])


def _mean_of(series: Series | None, unit: Unit = "number") -> str:
    """The mean of a metric over the log steps."""
    if series is None:
        return "–"
    # A point of a thinned series stands for several steps.
    mean = float(np.average(series.mean, weights=series.weight))
    return readable(mean if unit == "percent" else round(mean), unit)


def parameter_section(run: Run) -> Section:
    """The sparsity of each parameter in the end."""
    title = "Final sparsity of each parameter"
    if run.is_dense:
        return Section("parameters", title, [DENSE])
    if not run.masks:
        return Section(
            "parameters", title, missing=["There is no checkpoint yet, so there are no masks to look at."]
        )
    rows = [
        (
            mask.name,
            " × ".join(map(str, mask.shape)),
            str(run.sparse.get(mask.name, {}).get("algorithm", "")),
            readable(mask.sparsity, "percent"),
            f"{mask.active:,}",
            f"{mask.size:,}",
        )
        for mask in run.masks
    ]
    table = Table(("parameter", "shape", "algorithm", "sparsity", "active", "of"), rows, frozenset({3, 4, 5}))
    size = sum(mask.size for mask in run.masks)
    active = sum(mask.active for mask in run.masks)
    told = f"Step {run.step:,}: {len(rows)} parameters, {active:,} of {size:,} connections are active."
    return Section("parameters", title, [told], tables=[table])


def facts_section(run: Run) -> Section:
    """When, with what and from which configuration."""
    rows = [("model directory", str(run.folder)), ("last step", f"{last_step(run):,}")]
    if run.record.get("weights"):
        rows.append(("weights", f"{run.record['weights']:,}"))
    for number, session in enumerate(run.record.get("sessions", []), start=1):
        steps = f"from step {session['first_step']:,}"
        steps += f" to {session['last_step']:,}" if "last_step" in session else ", without an end"
        when = f"{session['started']} – {session.get('ended', '?')}"
        rows.append((f"session {number}", f"{steps} · {when}"))
        names = ("rarefy", "torch", "python", "machine", "device", "threads")
        rows.append(("", " · ".join(f"{name} {session[name]}" for name in names if name in session)))
    missing = [] if run.record else [f"Dates and versions were not recorded: {KEEP_RECORD}."]
    text = yaml.safe_dump(dict(run.params), sort_keys=False, allow_unicode=True) if run.params else ""
    if not run.params:
        missing.append("The configuration is in a checkpoint, and there is none yet.")
    return Section("facts", "The run", tables=[Table(("", ""), rows)], missing=missing, source=text)
