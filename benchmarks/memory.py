"""The codec's memory: streaming a large state, aggregating many uploads, a payload above 4 GiB.

`codec.py` runs each part in a process of its own: `memory.py stream 1100000000`, `memory.py
aggregate 200`, `memory.py huge`. Each prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

import torch

from fedobd import (
    Block,
    ClientSession,
    Codec,
    FedAvg,
    FedOBD,
    Header,
    ModelSchema,
    Payload,
    PayloadStream,
    Report,
    Role,
    Segment,
    ServerSession,
    TensorSpec,
    decompose,
    get_state,
)
from fedobd.blocks import segment_of
from fedobd.codec import NNADQ, Unquantized
from fedobd.models import TransformerClassifier
from fedobd.payload import Bytes, Kind, encode_payload
from fedobd.sessions._mean import WeightedMean


def transformer(parameters: int) -> torch.nn.Module:
    """Return a Transformer classifier of about so many parameters."""
    layers = max(1, (parameters - 5_120_000) // 1_315_072)
    return TransformerClassifier(
        vocab_size=20_000, d_model=256, nhead=8, dim_feedforward=2048, num_layers=layers
    )


def made_upload(
    schema: ModelSchema, start: dict[str, torch.Tensor], executor: Executor | None, seed: int = 0
) -> bytes:
    """Return an upload whose differences are normal with standard deviation 0.005."""
    method = FedOBD(codec=Codec(selection="none", downlink_quantizer="none"))
    server = ServerSession(method, schema, start, num_clients=1)
    server.begin_round()
    client = ClientSession(method, schema, client=0, executor=executor)
    client.receive(server.broadcast().data)
    generator = torch.Generator().manual_seed(seed)
    after = {
        name: value + 0.005 * torch.randn(value.shape, generator=generator)
        for name, value in start.items()
    }
    return client.upload(after, Report(num_examples=1, train_loss=0.0)).data


def warm_up() -> None:
    """Play a small round, so that all compiled code is loaded before memory is read."""
    model = torch.nn.Linear(8, 8)
    schema, start = decompose(model), get_state(model)
    mean = WeightedMean(schema, start, cohort_size=1, max_examples=1)
    payload = Payload.parse(made_upload(schema, start, None), schema)
    mean.accumulate(payload.blocks, 1, differences=True)
    mean.finish()


def peak_megabytes() -> float:
    """Return the largest memory that this process has had, in MB.

    Not from `getrusage`, whose figure a process inherits from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


def resident_megabytes() -> float:
    """Return the memory that this process has now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def large_state(parameters: int) -> tuple[ModelSchema, dict[str, torch.Tensor]]:
    """Return a Llama-like bfloat16 state of about so many random values, without its modules."""
    width, hidden, vocabulary = 2048, 5632, 32_000
    layers = round((parameters - 2 * vocabulary * width) / (4 * width**2 + 3 * width * hidden))
    shapes = {"embed.weight": (vocabulary, width)}
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            shapes[f"layers.{layer}.{name}.weight"] = (width, width)
        for name in ("gate", "up"):
            shapes[f"layers.{layer}.{name}.weight"] = (hidden, width)
        shapes[f"layers.{layer}.down.weight"] = (width, hidden)
    shapes["head.weight"] = (vocabulary, width)

    specs = tuple(TensorSpec(n, s, torch.bfloat16, Role.PARAMETER) for n, s in shapes.items())
    groups: dict[str, list[int]] = {}
    for number, spec in enumerate(specs):
        groups.setdefault(spec.name.rsplit(".", 2)[0], []).append(number)
    blocks = tuple(
        Block(name, "made", (name,), tuple(Segment(n, 0, specs[n].num_elements) for n in numbers),
              sum(specs[n].num_elements for n in numbers))
        for name, numbers in groups.items()
    )  # fmt: skip
    state = {}
    for name, shape in shapes.items():
        state[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
    return ModelSchema(specs, blocks), state


def memory_of_streaming(parameters: int) -> None:
    """Encode a large state to a file and decode it from there; print what memory it took."""
    schema, state = large_state(parameters)
    block = max(b.num_parameters for b in schema.blocks)
    warm_up()
    base = resident_megabytes()
    header = Header(
        kind=Kind.BROADCAST, method=FedOBD.wire_id, round=1, stage=1,
        block_ids=tuple(range(len(schema.blocks))),
    )  # fmt: skip
    began = time.perf_counter()
    with tempfile.TemporaryFile() as file:
        payload = encode_payload(
            schema,
            header,
            lambda s: segment_of(state, schema.tensors[s.tensor], s),
            NNADQ(1e-3),
        )
        for chunk in payload.chunks:
            file.write(chunk)
        encoded = time.perf_counter() - began
        size = file.tell()
        above_encode = peak_megabytes() - base
        file.seek(0)
        began = time.perf_counter()
        checked = 0
        stream = PayloadStream(iter(lambda: file.read(1 << 20), b""), schema)
        for _, segments in stream.blocks():
            checked += sum(len(decoded.values) for decoded in segments)
        decoded_s = time.perf_counter() - began
    print(
        json.dumps(
            {
                "parameters": schema.num_parameters,
                "payload_bytes": size,
                "largest_block_mb": block * 4 / 1e6,
                "allowed_mb": 2 * block * 4 / 1e6 + 200,
                "encode_mb": above_encode,
                "decode_mb": peak_megabytes() - base,
                "encode_s": encoded,
                "decode_s": decoded_s,
                "decoded": checked,
            }
        )
    )


def beyond_four_gibibytes() -> None:
    """Stream a payload of more than 4 GiB from encoder to decoder; print its length."""
    count, parts = 1 << 28, 9
    values = torch.arange(count, dtype=torch.int32).remainder_(1000).to(torch.bfloat16)
    schema = ModelSchema(
        tuple(TensorSpec(f"w{i}", (count,), torch.bfloat16, Role.PARAMETER) for i in range(parts)),
        tuple(Block(f"b{i}", "made", (), (Segment(i, 0, count),), count) for i in range(parts)),
    )
    header = Header(
        kind=Kind.BROADCAST, method=FedAvg.wire_id, round=1, stage=1, block_ids=tuple(range(parts))
    )
    sent = 0

    def chunks() -> Iterator[Bytes]:
        nonlocal sent
        payload = encode_payload(schema, header, lambda segment: values, Unquantized())
        for chunk in payload.chunks:
            sent += memoryview(chunk).nbytes
            yield chunk

    equal = 0
    for _, segments in PayloadStream(chunks(), schema).blocks():
        equal += torch.equal(segments[0].values, values)
    print(json.dumps({"payload_bytes": sent, "blocks": parts, "blocks_equal": equal}))


def memory_of_aggregation(uploads: int) -> None:
    """Aggregate many uploads of a model of 20 M parameters; print what memory it took."""
    schema = decompose(transformer(20_000_000))
    generator = torch.Generator().manual_seed(0)
    start = {t.name: torch.randn(t.shape, generator=generator) * 0.02 for t in schema.tensors}
    upload = made_upload(schema, start, None)
    path = Path(tempfile.mkdtemp()) / "upload"
    path.write_bytes(upload)
    (path.parent / "schema.json").write_text(json.dumps(schema.to_json()))
    done = subprocess.run(
        [sys.executable, __file__, "fold", str(path), str(uploads)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout or done.stderr)


def aggregate(path: Path, uploads: int) -> None:
    """Fold one upload's bytes so many times, each as another client's, in a fresh process."""
    schema = ModelSchema.from_json(json.loads((path.parent / "schema.json").read_text()))
    warm_up()
    base = resident_megabytes()
    generator = torch.Generator().manual_seed(0)
    state = {t.name: torch.randn(t.shape, generator=generator) * 0.02 for t in schema.tensors}
    mean = WeightedMean(schema, state, cohort_size=uploads, max_examples=10**6)
    for client in range(uploads):
        payload = Payload.parse(path.read_bytes(), schema)
        mean.accumulate(payload.blocks, 100 + client, differences=True)
    mean.finish()
    model = schema.num_parameters * 4 / 1e6
    print(
        json.dumps(
            {
                "uploads": uploads,
                "model_mb": model,
                "peak_above_mb": peak_megabytes() - base,
                "times_model": (peak_megabytes() - base) / model,
            }
        )
    )


def main() -> None:
    """Run one part."""
    part, *words = sys.argv[1:]
    if part == "stream":
        memory_of_streaming(int(words[0]))
    elif part == "aggregate":
        memory_of_aggregation(int(words[0]))
    elif part == "fold":
        aggregate(Path(words[0]), int(words[1]))
    elif part == "huge":
        beyond_four_gibibytes()
    else:
        raise SystemExit(f"there is no part {part!r}")


if __name__ == "__main__":
    main()
