import copy
import re

import pytest
import torch
from safetensors.torch import save_file
from widthbench.baselines.l1_norm import L1Norm

from widthbench import paths
from widthbench.data import splits
from widthbench.errors import DivergedError, UsageError
from widthbench.experiment import adaptation, bases, keys, protocol
from widthbench.experiment.bases import obtain_base
from widthbench.experiment.cell import Cell
from widthbench.experiment.keys import base_key, cell_key
from widthbench.experiment.protocol import run_cell
from widthbench.experiment.store import Store
from widthbench.networks import models, weights
from widthbench.paths import cache_dir
from widthbench.provenance import meaning, source_digest, versions
from widthbench.recipe import Recipe
from widthbench.technique import registry
from widthbench.technique.base import Outcome, Technique
from widthbench.training import resume
from widthbench.training.loop import fit
from widthbench.training.measuring import accuracy
from widthbench.width import keep

BASE, TUNE = Recipe(epochs=2, lr=0.05), Recipe(epochs=1, lr=0.01)


def cell(**changes):
    return Cell(
        **{
            "dataset": "digits",
            "model": "lenet_300_100",
            "size": 8,
            "technique": "l1-norm",
            "budget": "macs:0.5",
            "base": BASE,
            "finetune": TUNE,
            "device": "cpu",
            **changes,
        }
    )


@pytest.fixture
def store(fresh_cache):
    return Store()


def test_a_cell_leaves_a_complete_record(store):
    record = run_cell(cell(model="test_resnet", size=16), store)
    assert record.status == "done", record.trace
    assert [r.stage for r in record.rows] == ["resized", "recalibrated", "fine-tuned"]
    assert all(r.samples == 450 for r in record.rows)
    assert record.kept == pytest.approx(record.macs / record.base_macs)
    assert 0.45 < record.kept <= 0.5
    assert set(record.widths) == set(record.base_widths)
    assert all(record.widths[n] <= record.base_widths[n] for n in record.widths)
    assert record.spent["base"].epochs == 2
    assert record.spent["adaptation"].backward_macs == 2 * record.macs * 1077
    assert record.spent["adaptation"].forward_macs == record.macs * (1077 + 1024)
    p = record.provenance
    assert {
        "versions",
        "commit",
        "dirty",
        "hardware",
        "threads",
        "dtype",
        "seed",
        "dataset_digest",
        "base_digest",
    } <= set(p)
    assert len(p["dataset_digest"]) == len(p["base_digest"]) == 64


def test_a_rerun_is_bit_equal_apart_from_times_and_hosts(store, tmp_path, monkeypatch):
    first = run_cell(cell(), store)
    assert run_cell(cell(), store) == first
    monkeypatch.setenv("WIDTHBENCH_CACHE", str(tmp_path / "another"))
    again = run_cell(cell(), Store())
    assert again.stable() == first.stable()
    assert again != first


def test_stages_measure_what_they_say(store):
    record = run_cell(cell(), store)
    base = obtain_base(cell())
    technique = registry.create("l1-norm")
    resized = technique.apply(adaptation.task_of(cell(), base, technique)).resized
    assert accuracy(resized, base.data.test).top1 == record.row("resized").top1
    assert record.row("recalibrated").top1 == record.row("resized").top1  # no batch norm
    assert record.row("fine-tuned").top1 != record.row("resized").top1


def test_bases_are_shared_and_trained_once(store, monkeypatch):
    calls = []
    real = bases.fit
    for room in (bases, adaptation):
        monkeypatch.setattr(room, "fit", lambda *a, **k: calls.append(k["desc"]) or real(*a, **k))
    for budget in ("macs:0.5", "macs:0.25"):
        run_cell(cell(budget=budget), store)
    assert [c.split()[0] for c in calls] == ["base", "fine-tune", "fine-tune"]


def test_a_damaged_base_is_named_and_trained_again(store):
    first = obtain_base(cell())
    (path,) = (bases.cache_dir() / "bases").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="damaged base network .*digest"):
        again = obtain_base(cell())
    assert again.digest == first.digest
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"size": 9},
        {"base": Recipe(epochs=3, lr=0.05)},
        {"val": 0.3},
        {"threads": 2},
        {"model_args": {"widths": (9, 9)}},
    ],
)
def test_a_bases_key_holds_everything_that_it_depends_on(change):
    assert base_key(cell(**change)) != base_key(cell())
    assert cell_key(cell(**change)) != cell_key(cell())


def test_a_base_does_not_depend_on_what_comes_after_it():
    for change in (
        {"budget": "macs:0.25"},
        {"technique": "random-channels"},
        {"finetune": BASE},
        {"scope": "all"},
    ):
        assert base_key(cell(**change)) == base_key(cell())
        assert cell_key(cell(**change)) != cell_key(cell())


class Failing(Technique):
    """Raises."""

    id = "failing"
    access = "none"

    def decide(self, task, state):
        raise RuntimeError("out of ideas")


class Picky(Failing):
    """Skips."""

    def skip(self, task):
        return "no convolution"


class NotFinite(Failing):
    """Leaves NaN behind."""

    def decide(self, task, state):
        model = copy.deepcopy(task.model)
        with torch.no_grad():
            model.ip1.weight.fill_(torch.nan)
        return Outcome({n: keep(list(range(w))) for n, w in task.widths().items()}, model=model)


@pytest.fixture
def using(monkeypatch):
    def use(cls):
        monkeypatch.setattr(registry, "load", lambda name: cls)

    return use


def test_a_technique_that_raises_is_a_failed_record_and_is_tried_again(store, using):
    using(Failing)
    record = run_cell(cell(technique="failing"), store)
    assert (record.status, record.reason) == ("failed", "RuntimeError: out of ideas")
    assert "out of ideas" in record.trace
    assert store.get(record.key) is None
    assert store.failure(record.key) == record


def test_a_technique_that_skips_and_a_budget_below_the_floor_are_skipped_records(store, using):
    floor = run_cell(cell(budget="macs:0.0001"), store)
    assert floor.status == "skipped"
    assert "feasible floor" in floor.reason
    using(Picky)
    record = run_cell(cell(technique="failing"), store)
    assert (record.status, record.reason) == ("skipped", "failing: no convolution")


def test_a_network_that_is_not_finite_is_a_failed_record(store, using):
    using(NotFinite)
    record = run_cell(cell(technique="failing"), store)
    assert record.status == "failed"
    assert "non-finite" in record.reason


class Path(Failing):
    """Narrows the first group step by step."""

    def decide(self, task, state):
        widths = task.widths()
        full = {n: g.channels for n, g in task.groups.items()}
        plans = [{n: keep(list(range(w))) for n, w in step.items()} for step in (full, widths)]
        return Outcome(plans[-1], path=plans, series={"loss": [1.0]})


class Fresh(Failing):
    """Starts from new weights."""

    start = "fresh"

    def decide(self, task, state):
        Fresh.recipe = task.recipe
        with torch.no_grad():
            task.model(task.example_input)
        return Outcome({n: keep(list(range(w))) for n, w in task.widths().items()})


def test_a_path_of_plans_is_replayed_on_test(store, using):
    using(Path)
    assert run_cell(cell(technique="failing"), store).series == {"loss": [1.0]}
    record = run_cell(cell(technique="failing", curves=True), store)
    base = run_cell(cell(technique="base", budget=None), store)
    assert record.series["loss"] == [1.0]
    assert record.series["path.channels"] == [400, sum(record.widths.values())]
    assert record.series["path.top1"] == [base.row().top1, record.row("resized").top1]


def test_a_technique_that_starts_fresh_is_not_billed_for_the_base_nor_given_it(store, using):
    using(Fresh)
    record = run_cell(cell(technique="failing"), store)
    assert record.spent["base"].forward_macs == 0
    assert record.spent["decision"].forward_macs == record.base_macs
    assert record.row("resized").top1 < 40
    assert Fresh.recipe == BASE != TUNE


class Recording(Failing):
    """Keeps what it was shown."""

    access = "labelled"

    def prepare(self, task):
        with torch.no_grad():
            task.model(task.example_input)
        return {"seen": torch.zeros(1)}

    def decide(self, task, state):
        Recording.seen = {
            n: torch.cat([x for x, _ in getattr(task, n).batches(100)]) for n in ("train", "val")
        }
        return Outcome({n: keep(list(range(w))) for n, w in task.widths().items()})


def test_a_technique_is_shown_train_and_val_and_nothing_of_test(store, using):
    using(Recording)
    record = run_cell(cell(technique="failing"), store)
    assert record.status == "done", record.trace
    split = splits.load("digits", 8)
    for name in ("train", "val"):
        assert torch.equal(
            Recording.seen[name], torch.cat([x for x, _ in getattr(split, name).batches(50)])
        )
    test = {x.numpy().tobytes() for x in torch.cat([x for x, _ in split.test.batches(50)])}
    shown = {x.numpy().tobytes() for part in Recording.seen.values() for x in part}
    assert len(test & shown) <= 2  # the set itself holds a few identical scans at 8 x 8
    assert (
        record.spent["decision"].forward_macs == record.base_macs
    )  # what prepare spent is on the bill


class Looks(Failing):
    """Asks for the budget too early."""

    def prepare(self, task):
        return {"widths": torch.tensor(list(task.widths().values()))}


class Talks(Failing):
    """Puts a tensor into its series."""

    def decide(self, task, state):
        return Outcome(
            {n: keep(list(range(w))) for n, w in task.widths().items()},
            series={"x": [torch.ones(2)]},
        )


@pytest.mark.parametrize(
    ("cls", "reason"), [(Looks, r"asks for the budget in prepare\(\)"), (Talks, "serialize")]
)
def test_a_plug_in_that_misbehaves_is_a_failed_record(store, using, cls, reason):
    using(cls)
    record = run_cell(cell(technique="failing"), store)
    assert record.status == "failed"
    assert re.search(reason, record.reason)


def test_keys_hold_the_techniques_source_and_the_harnesss(monkeypatch, using):
    key, base = cell_key(cell()), base_key(cell())
    monkeypatch.setattr(keys, "source_digest", lambda cls: "changed")
    assert cell_key(cell()) != key
    assert base_key(cell()) == base
    monkeypatch.setattr(keys, "code_digest", lambda *modules: "changed")
    assert base_key(cell()) != base


def test_so_is_that_of_a_module_named_as_its_package(tmp_path, monkeypatch):
    package = tmp_path / "twin_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "twin_plugin.py").write_text("from twin_plugin.helper import V\nclass T: pass\n")
    (package / "helper.py").write_text("V = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    from twin_plugin.twin_plugin import T

    before = source_digest(T)
    (package / "helper.py").write_text("V = 2\n")
    assert source_digest(T) != before


def test_a_class_without_a_source_is_named():
    made = type("Made", (), {"__module__": "builtins"})
    with pytest.raises(UsageError, match=r"builtins\.Made: its source cannot be found"):
        source_digest(made)


def test_a_plug_ins_source_is_its_whole_package(tmp_path, monkeypatch):
    package = tmp_path / "some_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("from some_plugin.helper import V\nclass T: pass\n")
    (package / "helper.py").write_text("V = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import some_plugin

    before = source_digest(some_plugin.T)
    (package / "helper.py").write_text("V = 2\n")
    assert source_digest(some_plugin.T) != before


def test_threads_are_pinned_and_given_back(store, monkeypatch):
    seen = []
    monkeypatch.setattr(
        protocol, "_compute", lambda *a: seen.append(torch.get_num_threads()) or 1 / 0
    )
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        run_cell(cell(threads=2), store)
    assert seen == [2]
    assert torch.get_num_threads() == before


def test_a_gpu_that_is_not_there_is_named(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="asks for device = 'cuda', but torch finds no GPU"):
        run_cell(cell(device="cuda"), store)


def test_an_interrupted_cell_leaves_nothing_and_a_rerun_does_the_rest(store, monkeypatch):
    run_cell(cell(), store)
    real = adaptation.adapt
    monkeypatch.setattr(protocol, "adapt", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    other = cell(budget="macs:0.25")
    with pytest.raises(KeyboardInterrupt):
        run_cell(other, store)
    assert store.get(cell_key(other)) is None
    monkeypatch.setattr(protocol, "adapt", real)
    assert store.get(cell_key(cell())).status == "done"
    assert run_cell(other, store).status == "done"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A weights folder with a trained LeNet-300-100 for digits, normalised with 0.5 and 0.5."""
    monkeypatch.setenv("WIDTHBENCH_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    split = splits.load("digits", 8, mean=(0.5,), std=(0.5,))
    model = models.create("lenet_300_100", classes=10, channels=1, size=8)
    fit(model, split.train, BASE, macs=1)
    save_file(model.state_dict(), tmp_path / "weights" / "public.safetensors")
    return accuracy(model, split.test).top1


def test_a_checkpoint_is_the_base_of_all_its_cells_and_says_so(store, published):
    where = {
        "checkpoint": "public",
        "mean": (0.5,),
        "std": (0.5,),
        "finetune": Recipe(epochs=0, lr=0.1),
    }
    base = run_cell(cell(technique="base", budget=None, **where), store)
    assert base.status == "done", base.trace
    assert base.row("base").top1 == published
    pruned = run_cell(cell(**where), store)
    assert [r.stage for r in pruned.rows] == ["resized", "recalibrated"]
    for record in (base, pruned):
        assert record.provenance["val_seen"] is True
        assert (
            record.provenance["checkpoint"]
            == record.provenance["base_digest"]
            == weights.digest(weights.find("public"))
        )
        assert record.spent["base"].forward_macs == 0


def test_another_file_under_the_same_name_is_another_base(store, published, tmp_path):
    one = cell(checkpoint="public", sha256=None)
    before = cell_key(one)
    save_file(
        models.create("lenet_300_100", classes=10, channels=1, size=8).state_dict(),
        tmp_path / "weights" / "public.safetensors",
    )
    assert cell_key(one) != before
    wrong = run_cell(cell(checkpoint="public", sha256="0" * 12), store)
    assert (wrong.status, "it is another file" in wrong.reason) == ("failed", True)


def test_scratch_of_a_checkpoint_trains_by_the_bases_recipe(store, published):
    record = run_cell(cell(technique="scratch", of="l1-norm", checkpoint="public"), store)
    assert record.status == "done", record.trace
    assert record.spent["adaptation"].epochs == pytest.approx(BASE.epochs + TUNE.epochs, abs=0.1)


def test_scratch_budget_can_be_held_to_a_multiple_of_its_sources_epochs(store):
    free, held = (
        run_cell(
            cell(technique="scratch-budget", of="l1-norm", budget="macs:0.25", longest=n), store
        )
        for n in (None, 2)
    )
    assert free.spent["adaptation"].epochs > 8
    assert held.spent["adaptation"].epochs == pytest.approx(
        2 * (BASE.epochs + TUNE.epochs), abs=0.1
    )


@pytest.mark.parametrize("technique", ["l1-norm", "uniform-width", "random-channels"])
def test_budgets_below_the_floor_are_run_at_it_where_the_suite_says_so(store, technique):
    small = {"technique": technique, "budget": "macs:0.0001", "base": BASE, "finetune": TUNE}
    if technique == "uniform-width":  # one neuron a layer learns nothing; a residual network does
        small |= {"model": "test_resnet", "size": 16}
    assert run_cell(cell(**small), store).status == "skipped"
    record = run_cell(cell(**small, floor=True), store)
    assert (record.status, record.floor) == ("done", True), record.reason
    assert set(record.widths.values()) == {1}
    assert record.met
    assert run_cell(cell(technique=technique, floor=True), store).floor is False


def test_nothing_held_out_trains_on_everything_and_leaves_val_scores_empty(store):
    record = run_cell(cell(technique="base", budget=None, val=0), store)
    row = record.row("base")
    assert (row.val_top1, row.val_loss) == (None, None)
    assert record.spent["base"].forward_macs == 2 * record.macs * 1347
    task = adaptation.task_of(cell(val=0), obtain_base(cell(val=0)), registry.create("l1-norm"))
    with pytest.raises(UsageError, match=r"holds nothing of 'digits' out \(val = 0\)"):
        next(task.val.batches(4))


def test_a_killed_cell_goes_on_where_its_training_stopped(store, monkeypatch):
    monkeypatch.setattr(resume, "STATE_EVERY_S", 0)
    one = cell(technique="base", budget=None, base=BASE.model_copy(update={"epochs": 4}))
    seen = []

    def progress(steps, /, *, desc):
        for epoch in steps:
            seen.append(epoch)
            if len(seen) == 3:
                raise KeyboardInterrupt
            yield epoch

    with pytest.raises(KeyboardInterrupt):
        run_cell(one, store, progress=progress)
    state = cache_dir() / "training" / f"{base_key(one)}.state"
    assert state.is_file()
    record = run_cell(one, store, progress=progress)
    assert seen == [0, 1, 2, 2, 3]
    assert not state.exists()
    assert record.spent["base"].epochs == 4


def test_cells_ask_for_deterministic_algorithms_and_leave_the_setting_as_it_was():
    with protocol.pinned(cell()):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with protocol.pinned(cell(deterministic=False)):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": (0.5,), "std": (0.5,)},
        {"deterministic": False},
        {"seed": 1},
        {"val": 0.1},
        {"threads": 2},
        {"size": 9},
        {"model_args": {"act_layer": "tanh"}},
        {"base": BASE.model_copy(update={"crop": 1})},
    ],
    ids=str,
)
def test_everything_that_a_base_depends_on_is_in_its_key(changes):
    assert base_key(cell(**changes)) != base_key(cell())


def test_seeding_and_image_decoding_are_in_the_keys(monkeypatch):
    assert "randomness.py" in keys.BASE_CODE
    before = base_key(cell())
    monkeypatch.setattr(keys, "versions", lambda: {"pillow": "0"})
    assert base_key(cell()) != before
    assert {"pillow", "timm", "torch", "torchvision"} <= set(versions())


def test_pretrained_networks_see_images_as_they_were_trained():
    plain, published = (
        bases.load_data(cell(model="lenet5", size=28, pretrained=p)).test for p in (False, True)
    )
    assert (published.mean, published.std) == ((0.5,), (0.5,))
    assert plain.mean != published.mean


def test_networks_that_differ_in_their_arguments_have_names_of_their_own():
    tanh = cell(model_args={"act_layer": "tanh"})
    assert tanh.id == "digits-lenet_300_100(act_layer=tanh)-l1-norm-macs:0.5-s0"
    assert tanh.group != cell().group


def test_val_alone_chooses_the_stopping_point():
    path = {
        "path.channels": [10, 8, 6, 4],
        "path.top1": [90, 50, 91, 92],
        "path.val_top1": [95.0, 94.75, 94.7, 20],
    }
    found = adaptation.stopping_point(path)
    assert found == {
        "stop.channels": [8],
        "stop.top1": [50],
        "stop.val_top1": [94.75],
        "stop.removed": [20.0],
    }
    dip = {**path, "path.val_top1": [95.0, 90, 94.8, 20]}  # the last such point, not the first drop
    assert adaptation.stopping_point(dip)["stop.channels"] == [6]
    assert adaptation.stopping_point({**path, "path.channels": [4, 6, 8, 10]}) == {}
    assert adaptation.stopping_point({**path, "path.val_top1": [None] * 4}) == {}
    assert adaptation.stopping_point({}) == {}


def test_a_base_that_diverges_is_trained_once_and_fails_all_its_cells(store, monkeypatch):
    trained = []
    real = bases.fit

    def counted(*args, **options):
        trained.append(options["desc"])
        return real(*args, **options)

    for room in (bases, adaptation):
        monkeypatch.setattr(room, "fit", counted)
    hot = BASE.model_copy(update={"lr": 1e6, "epochs": 1})
    for technique, budget in (
        ("base", None),
        ("l1-norm", "macs:0.5"),
        ("random-channels", "macs:0.5"),
    ):
        record = run_cell(cell(technique=technique, budget=budget, base=hot), store)
        assert record.status == "failed"
        assert record.reason.startswith("its base network: training diverged: ")
    assert len(trained) == 1


def test_what_is_finished_is_read_without_a_lock(store, monkeypatch):
    one = cell()
    record = run_cell(one, store)

    def refused(self, *args, **options):
        raise AssertionError("a lock was taken")

    monkeypatch.setattr(paths.Lock, "acquire", refused)
    assert run_cell(one, store) == record
    base = bases.obtain_base(one)
    assert base.digest == record.provenance["base_digest"]


def test_keys_hash_what_code_does_not_how_it_is_told(tmp_path):
    before = meaning(
        b'"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n       '
        b" return 1  # four\n"
    )
    assert meaning(b'class A:\n    "2"\n\n    def f(self):\n        return (1)\n') == before
    for other in (
        b"class A:\n    def f(self):\n        return 2\n",
        b"class A:\n    x = 'text'\n    def f(self):\n        return 1\n",
    ):
        assert meaning(other) != before
    assert meaning(b"def f(x):\n    return x\n") != meaning(b"def f(y):\n    return y\n")
    assert meaning(b"not python at all (") == b"not python at all ("
    assert meaning(b'def f():\n    """Only told."""\n') == meaning(
        b'def f():\n    """Told otherwise."""\n'
    )


@pytest.mark.parametrize(
    "text", ["macs:0.5", "macs:.5", "macs:0.50", "macs:5e-1", "macs:0.5:nearest"]
)
def test_equal_budgets_are_one_cell(text):
    assert cell(budget=text).identity == cell(budget="macs:0.5").identity
    assert cell(budget=text).id.endswith("-macs:0.5-s0")


def test_a_network_that_computes_more_in_a_batch_is_refused(store, using):
    class Hidden(L1Norm):
        """Answers batches by the whole network, and one sample by the small one."""

        def decide(self, task, state):
            outcome = super().decide(task, state)
            model, whole = copy.deepcopy(task.model), [copy.deepcopy(task.model)]
            model.register_forward_hook(
                lambda m, args, output: output if len(args[0]) == 1 else whole[0](args[0])
            )
            return Outcome(outcome.plan, model)

    using(Hidden)
    record = run_cell(cell(technique="failing"), store)
    assert record.status == "failed"
    assert "MACs for each of 64 samples" in record.reason


def test_outputs_that_are_not_finite_on_the_data_are_named(store, using):
    """A random input may pass where real ones overflow."""

    class Overflows(Failing):
        def decide(self, task, state):
            model = copy.deepcopy(task.model)
            with torch.no_grad():
                model.ip1.weight.mul_(1e38)
                model.ip2.weight.mul_(1e30)
            return Outcome({n: keep(list(range(w))) for n, w in task.widths().items()}, model=model)

    using(Overflows)
    record = run_cell(cell(technique="overflows"), store)
    assert record.status == "failed"
    assert "not finite" in record.reason or "non-finite" in record.reason
    broken = models.create("lenet_300_100", classes=10, channels=1, size=8)
    with torch.no_grad():
        broken.ip1.weight.fill_(torch.nan)
    with pytest.raises(
        DivergedError, match=r"outputs on test data are not finite \(stage 'resized': loss nan\)"
    ):
        adaptation.score(broken, bases.load_data(cell()), "resized")
