"""Run cells on a Ray cluster, each as one task. The only module that knows of Ray.

A task runs its cell in a ``Worker``, as every engine does. Nodes share the cache (a folder that all
of them see) or a store at a URL (``WIDTHBENCH_STORE``). The base network of a group is trained by
the group's first cell; the others wait for that one, and controls for the cell that they are about.
What workers, nodes or the driver had finished when they were lost is in the cache.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from widthbench import cache, plugins
from widthbench.engines.worker import Worker, code_of, failure
from widthbench.errors import UsageError
from widthbench.experiment.limits import Limits
from widthbench.paths import cache_dir, data_dir, weights_dir
from widthbench.technique import registry

if TYPE_CHECKING:
    from widthbench.experiment.cell import Cell
    from widthbench.experiment.records import Record

TRIES = 5  # of a task whose worker or node is lost
AHEAD = 2  # tasks per core that are handed to Ray at a time


def run(
    cells: Sequence[Cell],
    *,
    done: Callable[[Record], None],
    limits: Mapping[str, Limits] | None = None,
    address: str | None = None,
    jobs: int | None = None,
    gpus: float | None = None,
) -> None:
    """Run cells as Ray tasks.

    Args:
        cells: What to run.
        done: Called in this process with each record as it is finished.
        limits: What a cell may take, by its identity; memory is also what Ray is asked to reserve.
        address: A running cluster ("auto": the one of this machine); one is started here, and ended
            afterwards, if None.
        jobs: Cores of a cluster that is started here; all if None.
        gpus: GPUs of each task, fractions allowed; if None, one where the cluster has any and the
            cell may use it.

    Raises:
        UsageError: If Ray is not installed, there is no cluster, no node has what a cell needs, a
            node does not see the cache or has other versions, or a cell makes no sense; what is
            finished is kept.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            f"--engine ray needs Ray: pip install 'widthbench[ray]' ({error})"
        ) from error
    from widthbench.experiment.keys import cell_key
    from widthbench.experiment.store import Store

    store, limits = Store(), limits or {}
    waiting: list[Cell] = []
    for cell in cells:
        record = store.get(cell_key(cell))
        if record is None:
            waiting.append(cell)
        else:
            done(record)
    if not waiting:
        return
    token = f"ray-{uuid.uuid4().hex}"
    cache.write_json(_token(token), {"token": token})
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, jobs)
    try:
        needs = {
            c.identity: _needs(ray, c, limits.get(c.identity, Limits()), gpus) for c in waiting
        }
        _require(ray, waiting, needs)
        _schedule(ray, waiting, needs, limits, token, done)
    finally:
        cache.drop(_token(token))
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str | None, jobs: int | None) -> None:
    names = {
        "WIDTHBENCH_CACHE": cache_dir(),
        "WIDTHBENCH_DATA": data_dir(),
        "WIDTHBENCH_WEIGHTS": weights_dir(),
    }
    env = {k: str(v.resolve()) for k, v in names.items()} | (
        {cache.STORE: url} if (url := cache.url()) else {}
    )
    if own := os.environ.get(plugins.PLUGINS):
        env[plugins.PLUGINS] = own
    options: dict[str, Any] = (
        {"num_cpus": jobs, "include_dashboard": False} if address is None else {}
    )
    try:
        ray.init(
            address or "local", runtime_env={"env_vars": env}, logging_level="warning", **options
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"no Ray cluster at '{address or 'local'}' ({str(error).splitlines()[0]}): start one"
            " (`ray start --head`), or leave --address out"
        ) from error


def _needs(ray: Any, cell: Cell, limits: Limits, gpus: float | None) -> dict[str, float]:
    """What a cell's task asks Ray for."""
    some = ray.cluster_resources().get("GPU", 0) > 0 or cell.device == "cuda"
    wanted = 0.0 if cell.device == "cpu" else gpus if gpus is not None else float(some)
    memory = {} if limits.memory_mib is None else {"memory": limits.memory_mib * 2**20}
    return {"CPU": float(cell.threads), **({"GPU": wanted} if wanted else {}), **memory}


def _require(ray: Any, cells: Sequence[Cell], needs: Mapping[str, Mapping[str, float]]) -> None:
    """A task that no node has room for would wait for ever."""
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    for cell in cells:
        need = needs[cell.identity]
        if not any(all(node.get(k, 0.0) >= v for k, v in need.items()) for node in nodes):
            text = ", ".join(
                f"{v / 2**30:.1f} GiB of memory" if k == "memory" else f"{v:g} {k}"
                for k, v in need.items()
            )
            raise UsageError(
                f"no node of the cluster has {text}, which {cell.id} needs: see threads, device and"
                " memory_limit"
            )


def _token(name: str) -> Path:
    return cache_dir() / "nodes" / f"{name}.json"


def _schedule(
    ray: Any,
    cells: Sequence[Cell],
    needs: Mapping[str, Mapping[str, float]],
    limits: Mapping[str, Limits],
    token: str,
    done: Callable[[Record], None],
) -> None:
    from widthbench.experiment.records import Record
    from widthbench.experiment.store import Store

    store = Store()
    task = ray.remote(_task)
    room = max(8, AHEAD * round(ray.cluster_resources().get("CPU", 1)))
    plan = _Plan(cells)
    running: dict[Any, Cell] = {}
    try:
        while running or plan:
            for cell in plan.ready(room - len(running)):
                need, mine = needs[cell.identity], limits.get(cell.identity, Limits())
                wants = {
                    "num_cpus": need["CPU"],
                    "num_gpus": need.get("GPU", 0),
                    "memory": need.get("memory"),
                }
                options = {
                    "name": cell.id,
                    "max_retries": TRIES,
                    "scheduling_strategy": "SPREAD",
                    **wants,
                }
                reference = task.options(**options).remote(
                    cell.model_dump_json(), asdict(mine), token
                )
                running[reference] = cell
            (reference, *_), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(reference)
            try:
                answer = json.loads(ray.get(reference))
            except ray.exceptions.RayError as error:  # lost more often than TRIES, or out of memory
                answer = {
                    "record": (
                        failure(cell, f"its Ray task was lost: {type(error).__name__}").model_dump(
                            mode="json"
                        )
                    )
                }
            if "error" in answer:
                raise UsageError(answer["error"])
            record = Record.model_validate(answer["record"])
            if answer.get("code"):
                _same_code(record, answer["node"], answer["code"])
            if store.get(record.key) is None:  # the node's cache is not this one
                store.put(record)
            plan.finish(cell)
            done(record)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _same_code(record: Record, node: str, code: str) -> None:
    """Refuse a record that a node's other packages, or other code, may have made: its key would
    hold something else here.

    Raises:
        UsageError: If versions or code differ; it names the node.
    """
    from widthbench.provenance import versions

    there = record.provenance.get("versions", {})
    other = [f"{k} {there.get(k)} (here {v})" for k, v in versions().items() if there.get(k) != v]
    if not other and code != code_of(record.cell):
        technique = record.cell.of or record.cell.technique
        other = [
            "code of widthbench"
            + ("" if registry.built_in(technique) else f" or of {registry.owner(technique)}")
        ]
    if other:
        raise UsageError(
            f"node {node} has another {', '.join(other)}; install the same on all nodes"
        )


class _Plan:
    """Which cells may run: a group's first one trains its base for the others, and controls come
    after what they are about.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._after: dict[str, list[Cell]] = {}  # by the identity of what they wait for
        self._ready: list[Cell] = []
        first: dict[str, Cell] = {}
        for cell in sorted(
            cells, key=lambda c: c.of is not None
        ):  # a control that is first would wait for what waits for it
            first.setdefault(cell.group, cell)
        known = {
            (c.group, c.technique, json.dumps(c.params, sort_keys=True), c.budget): c
            for c in cells
            if not c.of
        }
        for cell in cells:
            source = known.get(
                (cell.group, cell.of or "", json.dumps(cell.params, sort_keys=True), cell.budget)
            )
            for before in (source, first[cell.group]):  # a source itself comes after the first
                if before is not None and before is not cell:
                    self._after.setdefault(before.identity, []).append(cell)
                    break
            else:
                self._ready.append(cell)
        self._ready.reverse()
        self._left = len(cells)

    def __bool__(self) -> bool:
        return self._left > 0

    def ready(self, count: int) -> Iterator[Cell]:
        """Up to that many cells that may run now; each is given once."""
        for _ in range(min(count, len(self._ready))):
            self._left -= 1
            yield self._ready.pop()

    def finish(self, cell: Cell) -> None:
        """Release what waited for a cell."""
        self._ready += self._after.pop(cell.identity, [])[::-1]


# until a file that one node wrote must be seen by others: network file systems remember that there
# was none
SIGHT_S = 60.0
_worker: tuple[tuple[str | None, int], Worker] | None = (
    None  # of the Ray worker process that this is
)


def _task(text: str, limits: dict[str, Any], token: str) -> str:
    """One cell on some node; JSON in and out."""
    global _worker
    from widthbench.experiment.cell import Cell

    node = os.uname().nodename
    cell = Cell.model_validate_json(text)
    for _ in range(round(2 * SIGHT_S)):
        if cache.read_json(_token(token), "token") is not None:
            break
        time.sleep(0.5)
    else:
        where = os.environ.get(cache.STORE) or cache_dir()
        remedy = f"set WIDTHBENCH_CACHE to a folder that all nodes share, or {cache.STORE} to a URL"
        return json.dumps({"error": f"node {node} does not see {where}: {remedy}"})
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES"), cell.threads
    if _worker is None or _worker[0] != wanted:  # Ray has given this process another GPU
        if _worker is not None:
            _worker[1].close()
        _worker = wanted, Worker({"OMP_NUM_THREADS": str(cell.threads)})
    try:
        record = _worker[1].run(cell, Limits(**limits))
    except UsageError as error:
        return json.dumps({"error": str(error), "node": node})
    return json.dumps(
        {"record": record.model_dump(mode="json"), "node": node, "code": _worker[1].code}
    )
