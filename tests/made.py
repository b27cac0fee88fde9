"""Records and suites that were never run."""

from widthbench.experiment.cell import Cell
from widthbench.experiment.records import Record, Row
from widthbench.experiment.suites import Suite
from widthbench.recipe import Recipe, Spent

R = Recipe(epochs=10, lr=0.1)
WHERE = {
    "versions": {"torch": "2"},
    "hardware": {"cpu": "x"},
    "commit": "abc",
    "dirty": False,
    "when": "2026-01-01T00:00",
    "threads": 1,
}
# what every finished record has
DONE = {
    "status": "done",
    "rows": (Row(stage="resized", top1=50.0, loss=1.0, samples=10, val_top1=51.0, val_loss=1.1),),
    "macs": 50,
    "params": 500,
    "base_macs": 100,
    "base_params": 1000,
}


def record(technique="l1-norm", seed=0, top1=90.0, budget="macs:0.5", status="done", **changes):
    cell = Cell(
        dataset="digits",
        model="lenet5",
        size=20,
        technique=technique,
        budget=budget,
        seed=seed,
        base=R,
        finetune=R,
    )
    stages = ("base",) if technique == "base" else ("resized", "recalibrated", "fine-tuned")
    rows = tuple(
        Row(
            stage=s,
            top1=max(0.0, top1 - 10 * (len(stages) - 1 - i)),
            loss=1,
            samples=9,
            val_top1=1,
            val_loss=1,
        )
        for i, s in enumerate(stages)
    )
    spent = {
        "base": Spent(forward_macs=100, backward_macs=200),
        "decision": Spent(),
        "adaptation": Spent(forward_macs=30),
    }
    more = {
        "macs": 50,
        "params": 500,
        "base_macs": 100,
        "base_params": 1000,
        "access": "none",
        "spent": spent,
        "rows": rows,
    }
    if status != "done":
        more = {"reason": "it broke | badly"}
    return Record(
        **{
            "key": f"{technique}{seed}",
            "cell": cell,
            "status": status,
            "provenance": WHERE,
            **more,
            **changes,
        }
    )


def suite(**changes):
    return Suite(
        **{
            "name": "s",
            "datasets": ["digits"],
            "seeds": [0],
            "budgets": ["macs:0.5"],
            "techniques": ["l1-norm"],
            "models": [{"name": "lenet5", "size": 20}],
            "base": R,
            "finetune": R,
            **changes,
        }
    )
