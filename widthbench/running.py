"""Suites from Python: run them, look at what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from widthbench import plugins as own
from widthbench.engines import local
from widthbench.errors import UsageError
from widthbench.experiment import suites
from widthbench.experiment.records import Record, read_records
from widthbench.experiment.store import Store
from widthbench.paths import published_dir
from widthbench.report import figures
from widthbench.report.build import build
from widthbench.report.lines import Line, blocks, lines
from widthbench.report.matrix import Matrix, base_of, matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Results(Sequence[Record]):
    """What was measured: records, as a table, as pictures.

    Args:
        records: The records.
        title: What they are of.
        ranked: Whether there are enough base networks to say which differences count.

    Example:
        >>> import widthbench
        >>> board = widthbench.load("digits")
        >>> sorted({r.cell.model for r in board})[:2]
        ['lenet5', 'lenet_300_100']
    """

    def __init__(self, records: Sequence[Record], title: str, *, ranked: bool = True) -> None:
        self.records, self.title, self.ranked = list(records), title, ranked

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, at: Any) -> Any:
        return self.records[at]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @property
    def failed(self) -> list[Record]:
        """Those of cells that raised, were ended, or diverged; ``reason`` and ``trace`` say why."""
        return [r for r in self.records if r.status == "failed"]

    def to_pandas(self) -> Any:
        """A ``DataFrame``: a row for each cell, accuracies in %, times in seconds.

        Raises:
            UsageError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UsageError("to_pandas: pandas is not there: pip install pandas") from error
        return pandas.DataFrame([_plain(r) for r in self.records])

    def plot(self, axis: str = "macs") -> Figure:
        """Error against "macs" or "params", a panel for each network.

        Raises:
            UsageError: If nothing is finished.
        """
        figure: Any = figures.drawn(self.records, axis, self.title)
        figure._repr_png_ = lambda: figures.png(figure)  # a notebook shows it
        return figure

    @cached_property
    def _lines(self) -> list[Line]:
        return lines(self.records, [r.cell for r in self.records], ranked=self.ranked)

    def to_markdown(self) -> str:
        """Techniques by budgets, a table for each network on a data set."""
        return self._tables("**{} on {}**", Matrix.markdown)

    def __str__(self) -> str:
        return self._tables("{} on {}", Matrix.plain)

    def _tables(self, heading: str, shown: Callable[[Matrix], str]) -> str:
        parts = []
        for (dataset, model), block in blocks(self._lines).items():
            table = matrix(block)
            parts += [heading.format(model, dataset), base_of(block), shown(table) if table else ""]
        return "\n\n".join(p for p in parts if p)

    def __repr__(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"<Results of {self.title}: {len(self)} cells{failed}>"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def run(
    suite: str | Path | Mapping[str, Any],
    *,
    only: str | Sequence[str] = (),
    jobs: int = 1,
    plugins: Sequence[str | Path] = (),
    results: str | Path | None = None,
    progress: bool = True,
) -> Results:
    """Run the cells of a suite that have no result yet.

    Finished cells are kept in the cache: what is run again is looked up.

    Args:
        suite: A suite's name, the path of a TOML file, or a mapping of what it would hold.
        only: Cells whose name is like one of these, with ``*``, or holds one; all if none.
        jobs: Worker processes.
        plugins: Python files with techniques or networks of your own.
        results: Where a leaderboard and figures go, as with ``widthbench run``; none if None.
        progress: Show a bar; in a notebook as a widget.

    Returns:
        The records of these cells.

    Raises:
        UsageError: If something in the suite does not work; it is named before anything runs.
    """
    own.use(plugins)
    if isinstance(suite, Mapping):
        chosen = suites.made(suite)
    else:
        chosen = suites.load(str(suite))
    patterns = [only] if isinstance(only, str) else list(only)
    cells = [c for c in chosen.cells() if suites.matches(c.id, patterns)]
    if not cells:
        raise UsageError(f"suite {chosen.name} has no cell whose name is like {patterns}")
    suites.check(chosen, cells)
    records: list[Record] = []
    with tqdm(total=len(cells), desc=chosen.name, disable=not progress) as bar:

        def done(record: Record) -> None:
            records.append(record)
            bar.update()
            failed = sum(r.status == "failed" for r in records)
            bar.set_postfix_str(record.cell.id + (f", {failed} failed" if failed else ""))

        local.run(cells, jobs=jobs, done=done, limits=suites.limits([chosen]))
    order = {c.identity: i for i, c in enumerate(cells)}
    records.sort(key=lambda r: order[r.cell.identity])
    if results is not None:
        build(chosen, Path(results), Store(), time_shapes=False, fresh=records)
    return Results(records, chosen.title or chosen.name, ranked=chosen.citable)


def load(what: str | Path) -> Results:
    """What was measured before.

    Args:
        what: A folder of results (``"results/digits"``), a file of records, or the name of a suite
            whose results are published.

    Raises:
        UsageError: If there is nothing.
    """
    given = Path(what)
    places = [given, given / "records.jsonl", published_dir() / given / "records.jsonl"]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UsageError(
            f"no results at {what}: name a folder with records.jsonl, or a published suite"
            " (`widthbench list suites`)"
        )
    return Results(read_records(path), path.parent.name)


def _plain(record: Record) -> dict[str, Any]:
    cell, last = record.cell, record.row()
    spent = record.spent
    hardware = record.provenance.get("hardware", {})
    return {
        "dataset": cell.dataset,
        "network": cell.network,
        "technique": cell.label,
        "control": cell.technique if cell.of else "",
        "budget": cell.budget,
        "seed": cell.seed,
        "status": record.status,
        "top1": last.top1 if last else None,
        "val_top1": last.val_top1 if last else None,
        "stage": last.stage if last else None,
        **{f"top1_{r.stage.replace('-', '_')}": r.top1 for r in record.rows[:-1]},
        "macs": record.macs,
        "params": record.params,
        "base_macs": record.base_macs,
        "base_params": record.base_params,
        "kept": record.kept,
        "decision_s": spent["decision"].seconds if "decision" in spent else None,
        "adaptation_s": spent["adaptation"].seconds if "adaptation" in spent else None,
        "device": hardware.get("gpu") or hardware.get("cpu"),
        "reason": record.reason,
        "key": record.key,
    }
