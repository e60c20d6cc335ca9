"""Images: what becomes of pictures of every kind, and what is done to batches of them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from fedobd import RoundPlan, UsageError
from fedobd.blocks import get_state
from fedobd.data import (
    Augmentation,
    ClientData,
    Examples,
    ImageOptions,
    Normalization,
    Selection,
    gather,
)
from fedobd.experiments import build_data
from fedobd.training import TrainingOptions, train_locally, train_stacked
from tests.data_helpers import (
    image_folder,
    image_rows,
    keep_offline,
    load,
    pictures,
    png,
    write_parquet,
)
from tests.helpers import law
from tests.toy import config


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_offline(tmp_path, monkeypatch)


def wanted_values(
    images: np.ndarray[Any, Any], mean: np.ndarray[Any, Any], std: np.ndarray[Any, Any]
) -> torch.Tensor:
    """Return normalized images by their definition, computed in float64."""
    values = images.astype(np.float64) / 255
    return torch.from_numpy((values - mean[:, None, None]) / std[:, None, None])


# Normalization


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalization_is_that_of_float64(channels: int, channels_last: bool) -> None:
    images = pictures(50, side=6, channels=channels)
    images[:, 0] //= 4  # channels differ
    values = images.astype(np.float64) / 255
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3))
    stored = torch.from_numpy(images)
    made = Normalization.of(stored, ImageOptions(), channels_last=channels_last)
    assert made.mean == pytest.approx(tuple(mean), rel=1e-9)
    assert made.std == pytest.approx(tuple(std), rel=1e-9)
    other = pictures(7, side=6, channels=channels, seed=3)
    result = made(torch.from_numpy(other))
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result.double(), wanted_values(other, mean, std), rtol=1e-5, atol=2e-6
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=layout)
    whole = made(stored).double()
    torch.testing.assert_close(
        whole.mean((0, 2, 3)), torch.zeros(channels).double(), atol=1e-5, rtol=0
    )
    assert np.array_equal(stored.numpy(), images)  # left as they are


def test_images_of_one_colour_stay_finite() -> None:
    images = torch.full((4, 1, 3, 3), 7, dtype=torch.uint8)
    result = Normalization.of(images, ImageOptions())(images)
    assert bool(result.isfinite().all())
    assert float(result.abs().max()) < 1


def test_a_given_mean_and_deviation_are_used_alone_or_together(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    images = pictures(40)
    values = images.astype(np.float64) / 255
    mean, std = np.array([0.5, 0.25, 0.75]), np.array([0.2, 0.3, 0.4])
    own_mean, own_std = values.mean((0, 2, 3)), values.std((0, 2, 3))
    for options, used_mean, used_std in (
        (ImageOptions(mean=tuple(mean), std=tuple(std)), mean, std),
        (ImageOptions(mean=tuple(mean)), mean, own_std),
        (ImageOptions(std=tuple(std)), own_mean, std),
    ):
        loaded = load(folder, image=options)
        taken = gather(Selection(loaded.train, loaded.train_numbers, loaded.prepare))
        torch.testing.assert_close(
            taken.inputs.double(),
            wanted_values(images, used_mean, used_std),
            rtol=1e-5,
            atol=2e-6,
        )


def test_the_mean_is_that_of_the_training_images_for_the_test_images_too(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    dark, light = pictures(20) // 8, 255 - pictures(10, seed=1) // 8
    write_parquet(folder / "train.parquet", image_rows(dark, [0, 1] * 10))
    write_parquet(folder / "test.parquet", image_rows(light, [0, 1] * 5))
    loaded = load(folder)
    assert loaded.test is not None
    values = dark.astype(np.float64) / 255
    taken = loaded.prepare(loaded.test.take(torch.arange(10)).inputs)
    wanted = wanted_values(light, values.mean((0, 2, 3)), values.std((0, 2, 3)))
    torch.testing.assert_close(taken.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 0}, r"side is 0; allowed are numbers from 1"),
        ({"std": (0.2, 0.0, 0.2)}, r"std is \(0.2, 0.0, 0.2\); allowed are numbers above 0"),
        ({"std": (63.0, 62.0, 67.0)}, r"std is \(63.0, .*; allowed are numbers above 0, up to 1"),
        ({"mean": (125.0, 0.5)}, r"mean is \(125.0, 0.5\); allowed are numbers from 0 to 1"),
        ({"crop_padding": -1}, r"crop_padding is -1; allowed are numbers from 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ImageOptions(**options)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_mean_for_other_channels_is_refused(name: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    with pytest.raises(
        UsageError, match=rf"data.image.{name} has 1 values; the images have 3 channels"
    ):
        load(folder, image=replace(ImageOptions(), **{name: (0.5,)}))  # type: ignore[arg-type]


# Pictures


def encoded(picture: Image.Image, kind: str = "png") -> dict[str, Any]:
    stream = io.BytesIO()
    picture.save(stream, kind)
    return {"bytes": stream.getvalue(), "path": None}


def stored_images(folder: Path, rows: list[dict[str, Any]], **options: Any) -> torch.Tensor:
    write_parquet(folder / "train.parquet", {"img": rows, "label": [0] * len(rows)})
    return load(folder, image=ImageOptions(**options)).train.inputs


def test_colours_come_out_as_they_went_in(tmp_path: Path) -> None:
    images = pictures(5)
    stored = stored_images(tmp_path / "a", image_rows(images, [0] * 5)["img"])
    assert stored.dtype == torch.uint8
    assert np.array_equal(stored.numpy(), images)


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    images = pictures(5, channels=1)
    stored = stored_images(tmp_path / "a", image_rows(images, [0] * 5)["img"])
    assert np.array_equal(stored.numpy(), images)


def test_black_and_white_images_have_one_channel(tmp_path: Path) -> None:
    bits = pictures(1, channels=1)[0, 0] > 127
    stored = stored_images(tmp_path / "a", [encoded(Image.fromarray(bits))])
    assert np.array_equal(stored.numpy()[0, 0], bits * np.uint8(255))


def test_transparency_is_left_out(tmp_path: Path) -> None:
    images = pictures(5, channels=4)
    stored = stored_images(tmp_path / "a", image_rows(images, [0] * 5)["img"])
    assert np.array_equal(stored.numpy(), images[:, :3])


def test_palettes_and_grey_images_among_coloured_ones_get_three_channels(tmp_path: Path) -> None:
    colour, grey = pictures(1)[0], pictures(1, channels=1)[0]
    few = Image.fromarray(np.moveaxis(colour, 0, 2)).quantize(16)
    rows = [{"bytes": png(colour), "path": None}, {"bytes": png(grey), "path": None}, encoded(few)]
    stored = stored_images(tmp_path / "a", rows).numpy()
    assert np.array_equal(stored[0], colour)
    assert np.array_equal(stored[1], grey.repeat(3, 0))
    assert np.array_equal(stored[2], np.moveaxis(np.asarray(few.convert("RGB")), 2, 0))


def test_a_coloured_image_among_grey_ones_is_refused(tmp_path: Path) -> None:
    images = [*pictures(2, channels=1), *pictures(1)]
    message = r"the image of row 2 has colours \(mode 'RGB'\), those before it, or to train on"
    with pytest.raises(UsageError, match=message):
        stored_images(tmp_path / "a", image_rows(images, [0] * 3)["img"])


@pytest.mark.parametrize("train", [1, 3])
def test_test_images_are_of_the_kind_of_those_to_train_on(train: int, tmp_path: Path) -> None:
    images = pictures(2, channels=1)
    both = {"train": pictures(2, channels=train), "test": images}
    for split, held in both.items():
        write_parquet(tmp_path / "a" / f"{split}.parquet", image_rows(held, [0, 1]))
    test = load(tmp_path / "a").test
    assert test is not None
    assert np.array_equal(test.inputs.numpy(), images.repeat(train, 1))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(mode: str, tmp_path: Path) -> None:
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    wide = Image.fromarray(np.full((8, 8), 4000, kind))
    assert wide.mode == mode
    buffer = io.BytesIO()
    wide.save(buffer, "TIFF")
    with pytest.raises(UsageError, match=rf"row 1 has the mode '{mode}'; wanted 8 bits a channel"):
        stored_images(
            tmp_path / "a",
            [
                {"bytes": png(pictures(1, channels=1)[0]), "path": None},
                {"bytes": buffer.getvalue(), "path": None},
            ],
        )


@pytest.mark.parametrize("marked", [False, True], ids=["binary", "image feature"])
def test_images_as_plain_bytes_or_marked_as_images_are_the_same(
    marked: bool, tmp_path: Path
) -> None:
    import datasets

    images = pictures(6)
    columns = {"image": [png(pixels) for pixels in images], "label": [0, 1] * 3}
    made = datasets.Dataset.from_dict(columns)
    if marked:
        made = made.cast_column("image", datasets.Image())
    (tmp_path / "a").mkdir()
    made.to_parquet(tmp_path / "a" / "train.parquet")
    assert np.array_equal(load(tmp_path / "a").train.inputs.numpy(), images)


def test_side_brings_images_to_one_size_and_leaves_those_that_have_it(tmp_path: Path) -> None:
    large, small = pictures(1, side=12)[0], pictures(1, side=6)[0]
    rows = [{"bytes": png(pixels), "path": None} for pixels in (large, small)]
    stored = stored_images(tmp_path / "a", rows, side=6).numpy()
    assert stored.shape == (2, 3, 6, 6)
    assert np.array_equal(stored[1], small)
    # A shrunk image is a mean of what it was made of: near that of whole pixels.
    halves = large.reshape(3, 6, 2, 6, 2).mean((2, 4))
    assert np.abs(stored[0] - halves).mean() < 0.5 * np.abs(stored[0] - halves.mean()).mean()


# Augmentation


def legal(image: torch.Tensor, padding: int, flip: bool) -> list[torch.Tensor]:
    """Return all that augmentation may make of an image, found by cutting it out of a frame."""
    _, height, width = image.shape
    found = []
    for mirrored in (False, True) if flip else (False,):
        frame = torch.zeros(len(image), height + 2 * padding, width + 2 * padding)
        source = torch.flip(image, [2]) if mirrored else image
        frame[:, padding : padding + height, padding : padding + width] = source
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                found.append(frame[:, top : top + height, left : left + width])
    return found


def which(result: torch.Tensor, candidates: list[torch.Tensor]) -> int:
    matches = [n for n, candidate in enumerate(candidates) if torch.equal(result, candidate)]
    assert len(matches) == 1, "an output is none of the legal ones, or several"
    return matches[0]


@pytest.mark.parametrize(
    ("padding", "flip", "outcomes"), [(0, True, 2), (1, False, 9), (1, True, 18), (2, True, 50)]
)
def test_each_output_is_a_legal_one_and_all_of_them_occur(
    padding: int, flip: bool, outcomes: int
) -> None:
    image = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    augment = Augmentation(flip=flip, crop_padding=padding)
    copies = image.expand(20 * outcomes, -1, -1, -1)
    results = augment(copies, torch.Generator().manual_seed(1))
    candidates = legal(image, padding, flip)
    assert len(candidates) == outcomes
    counts = torch.bincount(
        torch.tensor([which(result, candidates) for result in results]), minlength=outcomes
    )
    assert int(counts.min()) >= 1
    # 20 are expected of each; 60 of 20 is 9 standard deviations off.
    assert int(counts.max()) < 60


@law(25)
@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_any_image_becomes_a_legal_one_of_its_own(
    count: int, channels: int, height: int, width: int, padding: int, flip: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, channels, height, width, generator=generator) + 0.5
    before = images.clone()
    results = Augmentation(flip=flip, crop_padding=padding)(images, generator)
    assert torch.equal(images, before)
    for image, result in zip(images, results, strict=True):
        assert any(torch.equal(result, other) for other in legal(image, padding, flip))


def test_images_of_a_batch_are_drawn_for_one_by_one() -> None:
    image = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(0))
    results = Augmentation(crop_padding=2)(
        image.expand(30, -1, -1, -1), torch.Generator().manual_seed(0)
    )
    candidates = legal(image, 2, False)
    assert len({which(result, candidates) for result in results}) > 10


def test_the_generator_determines_everything() -> None:
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    augment = Augmentation(flip=True, crop_padding=2)
    before = torch.random.get_rng_state()
    first = augment(images, torch.Generator().manual_seed(1))
    torch.manual_seed(99)
    after = torch.random.get_rng_state()
    assert torch.equal(augment(images, torch.Generator().manual_seed(1)), first)
    assert torch.equal(torch.random.get_rng_state(), after)
    torch.random.set_rng_state(before)
    assert not torch.equal(augment(images, torch.Generator().manual_seed(2)), first)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(augment(images, generator), first)
    assert not torch.equal(augment(images, generator), first)


def test_nothing_is_done_where_nothing_is_wanted() -> None:
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Augmentation()(images, torch.Generator().manual_seed(1)), images)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layout_and_type_stay(layout: torch.memory_format, dtype: torch.dtype) -> None:
    images = torch.randn(6, 3, 8, 8).to(dtype).contiguous(memory_format=layout)
    other = torch.contiguous_format if layout == torch.channels_last else torch.channels_last
    for augment in (Augmentation(flip=True), Augmentation(crop_padding=1), Augmentation()):
        result = augment(images, torch.Generator().manual_seed(1))
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=layout)
        assert not result.is_contiguous(memory_format=other)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_a_run_takes_images_in_the_layout_of_its_model(memory_format: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    built = build_data(
        config(data={"name": str(folder)}, model={"memory_format": memory_format})
    ).federated
    for examples in (built.clients[0].train, built.test):
        inputs = gather(examples).inputs
        assert inputs.dtype == torch.float32
        last = inputs.is_contiguous(memory_format=torch.channels_last)
        assert last == (memory_format == "channels_last")


# In training

PLAN = RoundPlan(
    round=1, stage=1, cohort=(0, 1, 2), epochs=2,
    schedule_start=0, schedule_epochs=2, run_start=0, run_epochs=2,
)  # fmt: skip
OPTIONS = TrainingOptions(batch_size=4, learning_rate=0.05)
SIZES = (11, 7, 8)  # batches of several lengths
SEEDS = (21, 22, 23)


class Recorder:
    """An augmentation that keeps what it made, by the seed of the client's generator."""

    def __init__(self) -> None:
        self.augment = Augmentation(flip=True, crop_padding=1)
        self.seen: dict[int, list[torch.Tensor]] = {}

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        result = self.augment(images, generator)
        self.seen.setdefault(generator.initial_seed(), []).append(result)
        return result


def clients_with_images() -> list[ClientData]:
    generator = torch.Generator().manual_seed(0)
    none = Examples(torch.empty(0, 2, 5, 5), torch.empty(0))
    return [
        ClientData(
            Examples(
                torch.randn(size, 2, 5, 5, generator=generator, dtype=torch.float64),
                torch.randint(0, 3, (size,), generator=generator),
            ),
            none,
        )
        for size in SIZES
    ]


def small_model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)
    ).double()


def test_a_client_sees_the_same_images_alone_and_in_a_stack() -> None:
    clients, start = clients_with_images(), get_state(small_model())
    alone, together = Recorder(), Recorder()
    trained = []
    for client, seed in zip(clients, SEEDS, strict=True):
        model = small_model()
        train_locally(model, client, PLAN, seed, options=OPTIONS, augment=alone)
        trained.append(get_state(model))
    states, _ = train_stacked(
        small_model(), [start] * 3, clients, PLAN, SEEDS, options=OPTIONS, augment=together
    )
    assert set(alone.seen) == set(together.seen) == set(SEEDS)
    for seed in SEEDS:
        assert len(alone.seen[seed]) == len(together.seen[seed])
        for one, other in zip(alone.seen[seed], together.seen[seed], strict=True):
            assert torch.equal(one, other)
    for mine, stacked in zip(trained, states, strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(stacked[name], value, rtol=1e-5, atol=1e-6)


def test_augmentation_reaches_the_training_and_the_seed_decides() -> None:
    client = clients_with_images()[0]

    def trained(seed: int, augment: Augmentation | None) -> torch.Tensor:
        model = small_model()
        train_locally(model, client, PLAN, seed, options=OPTIONS, augment=augment)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    augment = Augmentation(flip=True, crop_padding=1)
    assert torch.equal(trained(1, augment), trained(1, augment))
    assert not torch.equal(trained(1, augment), trained(2, augment))
    assert not torch.equal(trained(1, augment), trained(1, None))
