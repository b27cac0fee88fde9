"""The answer at a glance: techniques by budgets."""

from made import record

from widthbench.report.lines import lines, short_names
from widthbench.report.matrix import matrix

BUDGETS = ("macs:0.5", "macs:0.25")


def runs(technique, tops, budget="macs:0.5", **cell):
    """A technique on some base networks."""
    made = []
    for seed, top in enumerate(tops):
        one = record(technique, seed, top, budget, key=f"{technique}{cell}{budget}{seed}")
        made.append(one.model_copy(update={"cell": one.cell.model_copy(update=cell)}))
    return made


BEST, CLOSE, WORSE = (90, 91, 92, 93, 94), (91, 90, 92.5, 92, 94), (80, 81, 82, 83, 84)


def of(*some):
    return matrix(lines([r for group in some for r in group], ranked=True))


def test_the_best_is_bold_what_is_not_told_apart_is_marked_and_what_is_worse_is_not():
    made = of(runs("l1-norm", BEST), runs("nmf", CLOSE), runs("random-channels", WORSE))
    rows = {name: row[0] for name, row in zip(made.names, made.entries, strict=True)}
    assert made.names == ["l1-norm", "nmf", "random-channels"]
    assert rows["l1-norm"].markdown == "**92.00 ± 1.58**"
    assert rows["nmf"].markdown == "91.90 ± 1.52 ≈"
    assert rows["random-channels"].markdown == "82.00 ± 1.58"
    assert [row[0].plain[-1] for row in made.entries] == ["*", "≈", "8"]


def test_a_row_with_too_few_bases_is_neither_ranked_nor_best_and_leaves_the_others_their_ranks():
    runs_of_two = runs("autoslim", (97, 98))
    missing = [
        r.cell.model_copy(update={"technique": "autoslim"}) for r in runs("l1-norm", BEST)[2:]
    ]
    groups = [*runs("l1-norm", BEST), *runs("nmf", CLOSE), *runs_of_two]
    made = matrix(lines(groups, [*(r.cell for r in groups), *missing], ranked=True))
    rows = {name: row[0] for name, row in zip(made.names, made.entries, strict=True)}
    assert rows["l1-norm"].markdown == "**92.00 ± 1.58**"
    assert rows["nmf"].markdown == "91.90 ± 1.52 ≈"
    assert rows["autoslim"].markdown == "97.50 ± 0.71 (2 of 5 run)"


def test_controls_come_last_and_say_where_they_are_ahead():
    made = of(
        runs("l1-norm", BEST),
        runs("nmf", WORSE),
        runs("uniform-width", [95] * 5),
        runs("scratch", [70] * 5, of="nmf"),
    )
    assert made.names == ["l1-norm", "nmf", "uniform-width", "scratch:nmf"]
    assert made.controls == [False, False, True, True]
    assert [row[0].ahead for row in made.entries] == [False, False, True, False]
    text = made.markdown()
    assert "*uniform-width*" in text
    assert "95.00 ± 0.00 ↑" in text


def test_failed_runs_stand_beside_the_mean_of_the_others():
    failed = record("l1-norm", 1, status="failed", key="f")
    made = of([record("l1-norm", 0, 90.0), failed], [record("nmf", 0, status="failed", key="n")])
    assert [row[0].text for row in made.entries] == ["90.00 (1 of 2 failed)", "1 of 1 failed"]


def test_budgets_are_columns_and_what_was_left_out_is_empty():
    made = of(
        runs("l1-norm", BEST, "macs:0.5"),
        runs("l1-norm", WORSE, "macs:0.25"),
        runs("nmf", CLOSE, "macs:0.25"),
        [record("base", 0, 99.0, None)],
    )
    assert made.budgets == [*BUDGETS]
    table = dict(zip(made.names, made.entries, strict=True))
    assert table["nmf"][0] is None
    assert table["nmf"][1].best
    assert made.base == "Base: 99.00 % (1 network), 500 parameters, 50 MACs."
    assert made.sizes == ["500, 50", "500, 50"]


def test_there_is_no_matrix_of_a_base_alone():
    assert of([record("base", 0, 99.0, None)]) is None


def test_names_are_as_short_as_they_can_be():
    rows = lines(
        [
            *runs("l1-norm", [90]),
            *runs("l1-norm", [90], params={"allocation": "global"}),
            *runs("autoprune", [90], params={"epochs": 8, "mu": 0.1}),
            *runs("autoprune", [90], params={"epochs": 8, "mu": 0.2}),
            *runs("nmf", [90], params={"signed": True}),
            *runs("scratch", [90], of="nmf", params={"signed": True}),
        ]
    )
    assert short_names(rows) == {
        "l1-norm": "l1-norm",
        "l1-norm(allocation=global)": "l1-norm (allocation=global)",
        "autoprune(epochs=8,mu=0.1)": "autoprune (mu=0.1)",
        "autoprune(epochs=8,mu=0.2)": "autoprune (mu=0.2)",
        "nmf(signed=True)": "nmf",
        "scratch:nmf(signed=True)": "scratch:nmf",
    }
