"""Partitions: the laws that each of them keeps, and what the runs that use them have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedobd import UsageError
from fedobd.data import PartitionOptions, gather, partition
from fedobd.experiments import RunConfig, build_data, parse_config, run
from tests.data_helpers import (
    TINY,
    changes,
    image_folder,
    keep_offline,
    refusal,
    sentences,
    write_parquet,
)
from tests.test_runner import Interrupted, Stopper, results

pytestmark = pytest.mark.filterwarnings(
    "ignore:Specifying null_placement in SortOptions:FutureWarning",  # pyarrow of datasets
)

CLASSES, EACH, CLIENTS = 10, 60, 20

OPTIONS = {
    "iid": PartitionOptions(),
    "dirichlet": PartitionOptions(name="dirichlet", alpha=0.5),
    "dirichlet of much": PartitionOptions(name="dirichlet", alpha=100, min_examples=20),
    "shard": PartitionOptions(name="shard"),
    "shard of 5": PartitionOptions(name="shard", shards_per_client=5),
    "pathological": PartitionOptions(name="pathological"),
    "pathological of 4": PartitionOptions(name="pathological", classes_per_client=4),
    "natural": PartitionOptions(name="natural"),
}


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_offline(tmp_path, monkeypatch)


def targets_of(num_examples: int = CLASSES * EACH) -> torch.Tensor:
    """Return classes in random order, equally many of each."""
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(0))
    return (torch.arange(num_examples) % CLASSES)[order]


def shares_of(
    options: PartitionOptions,
    *,
    seed: int = 0,
    clients: int = CLIENTS,
    targets: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    targets = targets_of() if targets is None else targets
    owners = [f"writer {n * n % clients}" for n in range(len(targets))]
    if len(set(owners)) < clients:
        owners = [f"writer {n % clients}" for n in range(len(targets))]
    return partition(targets, clients, options, owners=owners, seed=seed)


def counts_of(shares: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Return how many examples of each class each client has, shape (clients, classes)."""
    return torch.stack([torch.bincount(targets[s], minlength=CLASSES) for s in shares])


GOLDEN: list[tuple[PartitionOptions, int, list[list[int]]]] = [
    (PartitionOptions(), 5, [[4, 6, 16, 7, 12, 18, 20, 17], [21, 5, 19, 13, 9, 14, 0, 23],
     [22, 15, 2, 10, 11, 3, 1, 8]]),
    (PartitionOptions(name="dirichlet", min_examples=2), 5, [[0, 1],
     [7, 4, 8, 10, 2, 3, 16, 11, 5, 19, 14, 13, 17], [12, 9, 18, 15, 23, 22, 6, 21, 20]]),
    # drawn anew until each of them has 6
    (PartitionOptions(name="dirichlet", alpha=0.2, min_examples=6), 0, [[11, 14, 8, 17, 1, 5, 2],
     [13, 4, 20, 7, 10, 16, 19], [9, 0, 22, 6, 15, 3, 21, 23, 12, 18]]),
    (PartitionOptions(name="shard"), 5, [[1, 4, 9, 6, 7, 3, 10, 0],
     [15, 21, 18, 11, 2, 12, 8, 5], [13, 20, 14, 19, 17, 22, 23, 16]]),
    (PartitionOptions(name="pathological"), 5, [[2, 5, 10, 7, 8, 4, 11, 1],
     [16, 22, 19, 9, 0, 13, 6, 3], [14, 18, 12, 20, 15, 23, 21, 17]]),
    (PartitionOptions(name="natural"), 5, [[17, 15, 3, 7, 5, 13, 1, 21, 11, 23, 19, 9],
     [12, 20, 8, 4, 0, 16], [18, 10, 6, 22, 2, 14]]),
]  # fmt: skip
"""Partitions of `GOLDEN_TARGETS` among three clients. Those of `dirichlet` and `natural` were made
by the partitioners of Flower Datasets 0.6, which every earlier record rests on."""
GOLDEN_TARGETS = torch.tensor([0, 2, 1] * 8)


@pytest.mark.parametrize(
    ("options", "seed", "wanted"), GOLDEN, ids=[options.name for options, _, _ in GOLDEN]
)
def test_partitions_stay_as_they_are(
    options: PartitionOptions, seed: int, wanted: list[list[int]]
) -> None:
    owners = ["b", "a", "c", "a"] * 6
    shares = partition(GOLDEN_TARGETS, 3, options, owners=owners, seed=seed)
    assert [share.tolist() for share in shares] == wanted


# Laws


@pytest.mark.parametrize(
    ("name", "num_examples", "clients"),
    [
        *((name, CLASSES * EACH, CLIENTS) for name in sorted(OPTIONS)),
        ("iid", 607, 20),
        ("iid", 20, 20),
        ("iid", 5, 1),
        ("dirichlet", 607, 20),
        ("natural", 607, 20),
        ("pathological of 4", 607, 20),
        ("pathological of 4", 603, 3),
        ("pathological", 600, 5),
        ("shard", 607, 20),
        ("shard of 5", 618, 20),
    ],
)
def test_each_example_goes_to_one_client_and_each_client_has_some(
    name: str, num_examples: int, clients: int
) -> None:
    shares = shares_of(OPTIONS[name], clients=clients, targets=targets_of(num_examples))
    assert len(shares) == clients
    assert all(len(share) > 0 and share.dtype == torch.int64 for share in shares)
    assert torch.cat(shares).sort().values.tolist() == list(range(num_examples))


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_seed_decides(name: str) -> None:
    first = [share.tolist() for share in shares_of(OPTIONS[name], seed=3)]
    torch.manual_seed(7)  # no global random state
    assert [share.tolist() for share in shares_of(OPTIONS[name], seed=3)] == first
    other = [share.tolist() for share in shares_of(OPTIONS[name], seed=4)]
    assert other != first
    if name == "natural":
        assert [sorted(share) for share in other] == [sorted(share) for share in first]
    else:
        assert [sorted(share) for share in other] != [sorted(share) for share in first]


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_share_is_in_random_order(name: str) -> None:
    """Validation examples are its first ones, so that a sorted share would hold one class out."""
    targets = targets_of().sort().values
    for share in shares_of(OPTIONS[name], targets=targets):
        assert share.tolist() != sorted(share.tolist())
        assert share.tolist() != sorted(share.tolist(), reverse=True)
        held = targets[share]
        if len(set(held.tolist())) > 1 and len(held) >= 20:
            assert held.tolist() != sorted(held.tolist())


def test_iid_shares_differ_by_at_most_one_and_are_mixed() -> None:
    shares = shares_of(OPTIONS["iid"], clients=7, targets=targets_of(600))
    assert {len(share) for share in shares} == {85, 86}
    counts = counts_of(shares, targets_of(600))
    assert int(counts.min()) > 0


@pytest.mark.parametrize(("name", "most"), [("pathological", 2), ("pathological of 4", 4)])
def test_pathological_gives_so_many_classes(name: str, most: int) -> None:
    for seed in range(3):
        held = (counts_of(shares_of(OPTIONS[name], seed=seed), targets_of()) > 0).sum(dim=1)
        assert int(held.max()) == int(held.min()) == most


@pytest.mark.parametrize(("each", "clients"), [(1, 13), (2, 5), (3, 7), (4, 9), (10, 3)])
def test_pathological_gives_each_class_to_as_many_clients(each: int, clients: int) -> None:
    options = PartitionOptions(name="pathological", classes_per_client=each)
    for seed in range(5):
        held = counts_of(shares_of(options, seed=seed, clients=clients), targets_of()) > 0
        assert set(held.sum(dim=1).tolist()) == {each}
        by_class = held.sum(dim=0)
        assert int(by_class.max() - by_class.min()) <= 1


def test_shards_of_unequal_size_differ_by_at_most_one() -> None:
    targets = targets_of(618)
    shares = shares_of(OPTIONS["shard of 5"], targets=targets)
    assert {len(share) for share in shares} <= set(range(30, 36))
    assert int((counts_of(shares, targets) > 0).sum(dim=1).max()) <= 10


@pytest.mark.parametrize(("name", "shards"), [("shard", 2), ("shard of 5", 5)])
def test_shards_are_equal_and_of_few_classes(name: str, shards: int) -> None:
    shares = shares_of(OPTIONS[name])
    assert {len(share) for share in shares} == {CLASSES * EACH // CLIENTS}
    held = (counts_of(shares, targets_of()) > 0).sum(dim=1)
    assert int(held.max()) <= shards  # a shard lies within one class here
    assert int(held.max()) > 1


def test_dirichlet_is_the_more_unequal_the_smaller_alpha() -> None:
    def inequality(alpha: float) -> float:
        options = PartitionOptions(name="dirichlet", alpha=alpha, min_examples=1)
        counts = counts_of(shares_of(options, clients=10), targets_of()).double()
        parts = counts / counts.sum(dim=1, keepdim=True)
        return float((parts - 1 / CLASSES).abs().sum(dim=1).mean() / 2)

    small, middle, large = (inequality(alpha) for alpha in (0.05, 0.5, 1000))
    assert small > middle + 0.1
    assert middle > large + 0.1
    assert large < 0.1
    assert small > 0.6


def test_dirichlet_gives_no_client_less_than_is_wanted() -> None:
    options = PartitionOptions(name="dirichlet", alpha=0.5, min_examples=25)
    for seed in range(3):
        assert min(map(len, shares_of(options, seed=seed, clients=10))) >= 25


def test_natural_gives_each_its_own() -> None:
    targets = targets_of(60)
    owners = [("a", "b", "c")[n % 3] if n < 50 else "c" for n in range(60)]
    shares = partition(targets, 3, OPTIONS["natural"], owners=owners)
    held = [{owners[n] for n in share.tolist()} for share in shares]
    assert sorted(map(sorted, held)) == [["a"], ["b"], ["c"]]
    assert sorted(map(len, shares)) == [17, 17, 26]


# What is wrong


@pytest.mark.parametrize(
    ("name", "clients", "message"),
    [
        ("iid", 0, r"600 examples cannot be shared among 0 clients; allowed are 1 to 600"),
        ("iid", 601, r"600 examples cannot be shared among 601 clients; allowed are 1 to 600"),
        ("shard", 601, r"600 examples cannot be shared among 601 clients"),
        (
            "dirichlet",
            100,
            r"600 examples cannot be shared among 100 clients by 'dirichlet': in 11 "
            r"draws a client had fewer than min_examples = 10; use fewer clients",
        ),
        ("natural", 3, r"the examples are of 20 clients; federation.clients is 3"),
    ],
)
def test_more_than_can_be_had_is_refused(name: str, clients: int, message: str) -> None:
    owners = [n % 20 for n in range(600)]
    with pytest.raises(UsageError, match=message):
        partition(targets_of(), clients, OPTIONS[name], owners=owners)


@pytest.mark.parametrize(("clients", "each"), [(20, 11), (4, 2), (1, 9)])
def test_more_classes_a_client_than_there_are_or_too_few_for_all_are_refused(
    clients: int, each: int
) -> None:
    options = PartitionOptions(name="pathological", classes_per_client=each)
    with pytest.raises(
        UsageError,
        match=rf"600 examples cannot be shared among {clients} clients by 'pathological': {each} "
        rf"classes for each of them, and there are 10; allowed are {-(-10 // clients)} to 10$",
    ):
        shares_of(options, clients=clients)


def test_a_client_without_examples_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two clients that want the one example of class 0 cannot both have it."""
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    texts = {"text": sentences(10), "label": [0] + [1] * 9}
    write_parquet(tmp_path / "set" / "train.parquet", texts)
    write_parquet(tmp_path / "set" / "test.parquet", texts)
    settings = changes(
        data__name="./set",
        data__partition__name="pathological",
        data__partition__classes_per_client=1,
        federation__clients=4,
    )
    for seed in range(3):
        words = ("data", "partition", "tiny.toml", *settings, *changes(federation__seed=seed))
        assert refusal(capfd, *words) == (
            "10 examples cannot be shared among 4 clients by 'pathological': class 0 has 1 "
            "examples for 2 clients"
        )


def test_natural_needs_a_column() -> None:
    with pytest.raises(UsageError, match=r"partition 'natural' wants data.columns.client"):
        partition(targets_of(), 3, OPTIONS["natural"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 0.0}, r"alpha is 0.0; allowed are numbers above 0"),
        ({"alpha": float("nan")}, r"alpha is nan; allowed are numbers above 0"),
        ({"alpha": float("inf")}, r"alpha is inf; allowed are numbers above 0"),
        ({"min_examples": 0}, r"min_examples is 0; allowed are numbers from 1"),
        ({"shards_per_client": 0}, r"shards_per_client is 0; allowed are numbers from 1"),
        ({"classes_per_client": 0}, r"classes_per_client is 0; allowed are numbers from 1"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PartitionOptions(**values)


def test_more_shards_than_examples_are_refused() -> None:
    message = r"10 examples cannot be shared among 6 clients by 'shard'"
    with pytest.raises(UsageError, match=message):
        partition(torch.arange(10) % 3, 6, OPTIONS["shard"])


def test_an_example_of_nobody_is_refused() -> None:
    with pytest.raises(UsageError, match=r"example 2 is of no client"):
        partition(torch.arange(6) % 3, 3, OPTIONS["natural"], owners=["a", "b", None] * 2)


# In runs


def natural_texts(folder: Path) -> Path:
    """Write texts of three writers of unequal diligence."""
    columns = {
        "text": sentences(60),
        "label": [n % 2 for n in range(60)],
        "writer": [("ann", "bob", "cid")[n % 3] if n < 45 else "cid" for n in range(60)],
    }
    return write_parquet(folder / "texts.parquet", columns)


def test_natural_in_a_run_follows_the_rows_that_are_used(tmp_path: Path) -> None:
    file = natural_texts(tmp_path)
    built = build_data(
        parse_config(
            {
                "data": {
                    "name": str(file),
                    "columns": {"client": "writer"},
                    "partition": {"name": "natural"},
                    "splits": {"max_train": 50},
                    "text": {"min_count": 1, "length": 12},
                },
                "federation": {"clients": 3, "seed": 2},
            }
        )
    )
    assert built.vocabulary is not None
    number = {word: n for n, word in enumerate(built.vocabulary)}
    writers = [("ann", "bob", "cid")[n % 3] if n < 45 else "cid" for n in range(60)]
    known = {
        tuple(number[word] for word in text.split()): writer
        for text, writer in zip(sentences(60), writers, strict=True)
    }
    assert len(known) == 60
    writers_of_clients, total = [], 0
    for client in built.federated.clients:
        rows = gather(client.train).inputs.tolist() + gather(client.validation).inputs.tolist()
        total += len(rows)
        (writer,) = {known[tuple(row)] for row in rows}
        writers_of_clients.append(writer)
    assert sorted(writers_of_clients) == ["ann", "bob", "cid"]
    assert total == 40


def test_a_row_of_nobody_is_named_in_a_run(tmp_path: Path) -> None:
    columns = {"text": sentences(6), "label": [0, 1] * 3, "writer": [*"abab", None, "a"]}
    data = {"name": str(write_parquet(tmp_path / "a.parquet", columns))}
    config = small({**data, "columns": {"client": "writer"}, "partition": {"name": "natural"}})
    with pytest.raises(UsageError, match=r"row 4 of column 'writer' is empty; wanted the client"):
        build_data(config)


def small(data: dict[str, Any], **changes: Any) -> RunConfig:
    return parse_config(
        {
            "data": data,
            "model": {"name": "image-cnn", "options": {"width": 2}},
            "federation": {"clients": 3, "seed": 1},
            "training": {"learning_rate": 0.05, "batch_size": 8},
            "methods": {
                "fedobd": {
                    "stage_one_rounds": 2,
                    "stage_one_epochs": 1,
                    "stage_two_epochs": 1,
                    "cohort": 2,
                }
            },
            **changes,
        }
    )


def test_runs_on_images_are_the_same_with_workers_and_resumed(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", train=90, test=12, classes=3)
    config = small(
        {
            "name": str(folder),
            "image": {"flip": True, "crop_padding": 1},
            "partition": {"name": "dirichlet", "min_examples": 5},
        }
    )
    run(config, tmp_path / "a")
    run(config, tmp_path / "b", workers=2)
    assert results(tmp_path / "a") == results(tmp_path / "b")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "c", observer=Stopper(1))
    run(config, tmp_path / "c", resume=True)
    assert results(tmp_path / "a") == results(tmp_path / "c")


def test_a_run_on_texts_of_writers_is_the_same_when_it_is_resumed(tmp_path: Path) -> None:
    config = small(
        {
            "name": str(natural_texts(tmp_path)),
            "columns": {"client": "writer"},
            "text": {"min_count": 1, "length": 12},
            "partition": {"name": "natural"},
        },
        model={
            "name": "transformer",
            "options": {"d_model": 4, "nhead": 1, "dim_feedforward": 4, "num_layers": 1},
        },
        training={"loss": "binary-cross-entropy", "batch_size": 8, "learning_rate": 0.05},
    )
    run(config, tmp_path / "a")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "b", observer=Stopper(1))
    run(config, tmp_path / "b", resume=True)
    assert results(tmp_path / "a") == results(tmp_path / "b")
