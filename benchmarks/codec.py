"""The codec's figures: size against entropy, speed, memory, and other coders beside it.

Run with `make bench-codec`. Everything is measured in this process, but for memory (each figure in
a process of its own) and NVIDIA FLARE (in an environment of its own under the cache folder, on the
same tensor).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from rich.console import Console
from rich.table import Table

from fedobd import (
    ClientSession,
    Codec,
    FedAvg,
    FedOBD,
    Payload,
    Report,
    RoundPlan,
    ServerSession,
    decompose,
    get_state,
)
from fedobd.codec import NNADQ, Float32, decode_levels, encode_levels, level_bits
from fedobd.data import ClientData, Examples
from fedobd.models import DenseNet40, use_batch_statistics
from fedobd.sessions import Broadcast
from fedobd.sessions._mean import WeightedMean
from fedobd.training import TrainingOptions, train_locally
from memory import made_upload, transformer

CACHE = Path(os.environ.get("FEDOBD_BENCH_CACHE", Path.home() / ".cache" / "fedobd-bench"))
RUNS = 5
SPEED_CASES = (("normal", 0.005, 1e-3), ("laplace", 0.003, 1e-2), ("student-t(3)", 0.003, 1e-2))
console = Console(width=130)


def median_seconds(function: Callable[[], object], runs: int = RUNS) -> float:
    """Return the median of several calls, after one that is not counted."""
    function()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def entropy_bytes(symbols: np.ndarray[Any, Any]) -> float:
    """Return the empirical zeroth-order entropy of all symbols, in bytes."""
    counts = np.bincount(symbols)
    shares = counts[counts > 0] / symbols.size
    return float(-(shares * np.log2(shares)).sum()) * symbols.size / 8


def draws(kind: str, scale: float, count: int) -> Float32:
    """Return made values, the same in every run."""
    generator = np.random.default_rng(0)
    if kind == "normal":
        values = generator.normal(0, scale, count)
    elif kind == "laplace":
        values = generator.laplace(0, scale, count)
    else:
        values = generator.standard_t(3, count) * scale
    return values.astype(np.float32)


def sizes(results: dict[str, Any]) -> None:
    """Print size against entropy for distributions, scales and β."""
    table = Table(title="Levels: bytes over entropy (bound: 1.005 H + 32 B + 1.5 B a level)")
    for name in ("elements", "data", "scale", "β", "s", "H bits", "real bits", "nominal", "/ H"):
        table.add_column(name, justify="right")
    table.add_column("bound")
    rows = []
    for count in (100_000, 1_000_000):
        for kind in ("normal", "laplace", "student-t(3)"):
            for scale in (0.005, 1.0):
                values = draws(kind, scale, count)
                for beta in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
                    rows.append(_size_row(f"{kind}", values, scale, beta))
    for name, values in trained_values():
        for beta in (1e-4, 1e-3, 1e-2):
            rows.append(_size_row(name, values, float(values.std()), beta))
    for row in rows:
        table.add_row(
            f"{row['elements']:,}", row["data"], f"{row['scale']:.3g}", f"{row['beta']:g}",
            str(row["s"]), f"{row['entropy_bits']:.3f}", f"{row['real_bits']:.3f}",
            str(row["nominal_bits"]), f"{row['over_entropy']:.4f}",
            "met" if row["met"] else "[red]missed[/red]",
        )  # fmt: skip
    console.print(table)
    results["sizes"] = rows


def _size_row(kind: str, values: Float32, scale: float, beta: float) -> dict[str, Any]:
    quantizer = NNADQ(beta)
    code = quantizer.measure(values, 32)
    levels = quantizer.quantize(values, code)
    entropy = entropy_bytes(levels.symbols)
    real = len(encode_levels([levels]))
    nominal = level_bits(code.num_levels)
    distinct = len(np.unique(levels.symbols))
    bound = 1.005 * entropy + 32 + 1.5 * distinct
    return {
        "elements": values.size,
        "data": kind,
        "scale": scale,
        "beta": beta,
        "s": code.num_levels,
        "entropy_bits": entropy * 8 / values.size,
        "real_bits": real * 8 / values.size,
        "nominal_bits": nominal,
        "over_entropy": real / entropy,
        "met": real <= bound and real * 8 <= nominal * values.size,
    }


def trained_densenet() -> tuple[torch.nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a DenseNet-40, its state before, and after two epochs on made images."""
    torch.manual_seed(0)
    model = DenseNet40()
    use_batch_statistics(model)
    start = get_state(model)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 3, 32, 32, generator=generator)
    targets = (inputs[:, 0].mean((1, 2)) > 0).long() + 2 * (inputs[:, 1, :16].mean((1, 2)) > 0)
    examples = Examples(inputs, targets)
    plan = RoundPlan(
        round=1, stage=1, cohort=(0,), epochs=2,
        schedule_start=0, schedule_epochs=2, run_start=0, run_epochs=2,
    )  # fmt: skip
    data = ClientData(examples, examples)
    train_locally(model, data, plan, 0, options=TrainingOptions(batch_size=64))
    return model, start, get_state(model)


def trained_values() -> Iterator[tuple[str, Float32]]:
    """Yield all weights, and all differences, of a trained model as one tensor each."""
    _, start, trained = trained_densenet()
    flat = [torch.cat([state[n].reshape(-1) for n in start]).numpy() for state in (start, trained)]
    yield "trained weights", flat[1]
    yield "real differences", flat[1] - flat[0]


def speeds(results: dict[str, Any], executor: Executor) -> None:
    """Print encode and decode speed on one thread and two."""
    table = Table(title="Speed, GB/s of float32 input, 4 M elements, medians of 5")
    for name in ("data", "β", "bits", "threads", "quantize + encode", "decode + dequantize"):
        table.add_column(name, justify="right")
    rows = []
    count = 4 << 20
    for kind, scale, beta in (*SPEED_CASES, ("normal", 1.0, 1e-4)):
        values, quantizer = draws(kind, scale, count), NNADQ(beta)
        for threads, used in ((1, None), (2, executor)):
            encode = _encoder(quantizer, values, used)
            stream = memoryview(encode())
            code = quantizer.measure(values, 32)
            decode = _decoder(stream, values.size, code, used)
            row: dict[str, Any] = {
                "data": f"{kind} {scale:g}",
                "beta": beta,
                "bits": len(stream) * 8 / count,
                "threads": threads,
                "encode": values.nbytes / median_seconds(encode) / 1e9,
                "decode": values.nbytes / median_seconds(decode) / 1e9,
            }
            rows.append(row)
            table.add_row(
                row["data"], f"{beta:g}", f"{row['bits']:.2f}", str(threads),
                f"{row['encode']:.2f}", f"{row['decode']:.2f}",
            )  # fmt: skip
    console.print(table)
    results["speeds"] = rows


def _encoder(quantizer: NNADQ, values: Float32, executor: Executor | None) -> Callable[[], bytes]:
    def encode() -> bytes:
        code = quantizer.measure(values, 32)
        rows = torch.from_numpy(values).unsqueeze(0)
        return encode_levels(
            quantizer.quantize_all(rows, [code], lambda _: None, executor), executor
        )

    return encode


def _decoder(
    stream: memoryview, count: int, code: Any, executor: Executor | None
) -> Callable[[], object]:
    return lambda: decode_levels(stream, [(count, code)], executor)


def other_coders(results: dict[str, Any]) -> None:
    """Print other lossless coders on the same levels, and FLARE's quantizer on the same tensor."""
    table = Table(title="Other ways: the same 4 M levels, one thread (FLARE: its own quantizer)")
    for name in ("data", "coder", "bytes", "/ H", "in GB/s", "out GB/s"):
        table.add_column(name, justify="right")
    rows = []
    for kind, scale, beta in SPEED_CASES:
        values, quantizer = draws(kind, scale, 4 << 20), NNADQ(beta)
        code = quantizer.measure(values, 32)
        levels = quantizer.quantize(values, code)
        entropy = entropy_bytes(levels.symbols)
        narrow = levels.symbols.astype(np.uint8 if code.num_levels < 128 else np.uint16)
        coders: list[tuple[str, Callable[[], bytes], Callable[[bytes], object]]] = [
            ("rANS (ours)", partial(encode_levels, [levels]),
             partial(_decode_stream, code=code, count=values.size)),
        ]  # fmt: skip
        for level in (1, 3):
            coders.append(
                (f"zstandard {level}",
                 partial(zstandard.ZstdCompressor(level=level).compress, narrow.tobytes()),
                 zstandard.ZstdDecompressor().decompress)
            )  # fmt: skip
        coders += _pcodec(levels.symbols.astype(np.uint16))
        for name, encode, decode in coders:
            data = encode()
            row: dict[str, Any] = {
                "data": f"{kind} {scale:g}, β {beta:g}",
                "coder": name,
                "bytes": len(data),
                "over_entropy": len(data) / entropy,
                "encode": values.nbytes / median_seconds(encode) / 1e9,
                "decode": values.nbytes / median_seconds(partial(decode, data)) / 1e9,
            }
            rows.append(row)
            table.add_row(
                row["data"], name, f"{len(data):,}", f"{row['over_entropy']:.4f}",
                f"{row['encode']:.2f}", f"{row['decode']:.2f}",
            )  # fmt: skip
    console.print(table)
    results["coders"] = rows


def _decode_stream(stream: bytes, *, code: Any, count: int) -> object:
    return decode_levels(memoryview(stream), [(count, code)])


def _pcodec(symbols: np.ndarray[Any, Any]) -> list[Any]:
    try:
        from pcodec import ChunkConfig, standalone
    except ImportError:
        console.print("pcodec is not installed: left out")
        return []
    config = ChunkConfig(compression_level=8)
    return [
        ("pcodec 8", lambda: standalone.simple_compress(symbols, config),
         lambda b: standalone.simple_decompress(b))
    ]  # fmt: skip


FLARE = """
import json, sys, time
import numpy as np, torch
torch.set_num_threads(2)
from nvflare.app_opt.pt.quantization.ada_quant import AdaQuantizer
values = torch.from_numpy(np.load(sys.argv[1]))
quantizer = AdaQuantizer(weight=float(sys.argv[2]))
seconds = []
for _ in range(4):
    began = time.perf_counter()
    quantized, state = quantizer.quantize(values)
    restored = quantizer.dequantized(quantized, state)
    seconds.append(time.perf_counter() - began)
made = state.get("compressed_tensor", quantized)
print(json.dumps({"seconds": sorted(seconds[1:])[1], "bytes": int(made.nbytes)}))
"""


def flare(results: dict[str, Any], executor: Executor) -> None:
    """Print the round trip of NVIDIA FLARE's adaptive quantizer beside ours, on one tensor."""
    values, quantizer = draws("normal", 0.005, 4 << 20), NNADQ(1e-3)
    encode = _encoder(quantizer, values, executor)
    stream = memoryview(encode())
    decode = _decoder(stream, values.size, quantizer.measure(values, 32), executor)
    ours = median_seconds(encode) + median_seconds(decode)
    python = _flare_environment()
    if python is None:
        return
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, values)
        file.flush()
        done = subprocess.run(
            [str(python), "-c", FLARE, file.name, "0.001"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        console.print(f"FLARE did not run: {done.stderr.strip().splitlines()[-1]}")
        return
    theirs = json.loads(done.stdout.splitlines()[-1])
    megabytes = values.nbytes / 1e6
    console.print(
        f"NVIDIA FLARE AdaQuantizer, round trip: {megabytes / theirs['seconds']:.0f} MB/s, "
        f"{theirs['bytes']:,} bytes; ours: {megabytes / ours:.0f} MB/s, {len(stream):,} bytes: "
        f"{theirs['seconds'] / ours:.1f} times as fast"
    )
    results["flare"] = {"theirs": theirs, "ours_seconds": ours, "ours_bytes": len(stream)}


def _flare_environment() -> Path | None:
    folder = CACHE / "nvflare"
    python = folder / "bin" / "python"
    constraints = Path(__file__).parent.parent / "constraints.txt"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    installed = subprocess.run(
        [str(python), "-c", "import nvflare, torch"], capture_output=True, check=False
    )
    if installed.returncode:
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "-c", str(constraints), "torch", "nvflare"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            console.print(f"FLARE cannot be installed: {done.stderr.strip().splitlines()[-1]}")
            return None
    return python


def uploads(results: dict[str, Any], executor: Executor) -> None:
    """Print whole uploads against the sum of their tensors' entropies."""
    table = Table(title="Whole uploads, every byte counted")
    for name in ("model", "parameters", "β", "λ", "bytes", "/ Σ H", "header", "buffers", "ms"):
        table.add_column(name, justify="right")
    rows = []
    model, start, trained = trained_densenet()
    for beta, rate in ((1e-4, 0.0), (1e-3, 0.0), (1e-2, 0.0), (1e-3, 0.3)):
        rows.append(_upload_row("DenseNet-40", model, start, trained, beta, rate, None))
    torch.manual_seed(0)
    large = transformer(20_000_000)
    before = get_state(large)
    after = {n: v + 0.005 * torch.randn_like(v) for n, v in before.items()}
    rows.append(_upload_row("Transformer", large, before, after, 1e-3, 0.0, executor))
    for row in rows:
        table.add_row(
            row["model"], f"{row['parameters']:,}", f"{row['beta']:g}", f"{row['rate']:g}",
            f"{row['bytes']:,}", f"{row['over_entropy']:.4f}", f"{row['header']:,}",
            f"{row['buffers']:,}", f"{row['ms']:.1f}",
        )  # fmt: skip
    console.print(table)
    results["uploads"] = rows


def _upload_row(
    name: str,
    model: torch.nn.Module,
    start: dict[str, torch.Tensor],
    trained: dict[str, torch.Tensor],
    beta: float,
    rate: float,
    executor: Executor | None,
) -> dict[str, Any]:
    schema = decompose(model)
    codec = Codec(
        uplink_weight=beta,
        dropout_rate=rate,
        selection="mbd" if rate else "none",
        downlink_quantizer="none",
    )
    method = FedOBD(codec=codec)
    server = ServerSession(method, schema, start, num_clients=1)
    server.begin_round()
    client = ClientSession(method, schema, client=0, executor=executor)
    client.receive(server.broadcast().data)
    report = Report(num_examples=1, train_loss=0.0)
    upload = client.upload(trained, report).data
    seconds = median_seconds(lambda: client.upload(trained, report).data)
    payload = Payload.parse(upload, schema)
    entropy = 0.0
    for _, segment, code in payload.codes():
        if code.num_levels:
            spec = schema.tensors[segment.tensor]
            part = slice(segment.start, segment.stop)
            values = trained[spec.name].reshape(-1)[part] - start[spec.name].reshape(-1)[part]
            entropy += entropy_bytes(NNADQ(beta).quantize(values.numpy(), code).symbols)
    return {
        "model": name,
        "parameters": schema.num_parameters,
        "beta": beta,
        "rate": rate,
        "bytes": len(upload),
        "over_entropy": len(upload) / entropy,
        "header": payload.num_bytes.header,
        "buffers": payload.num_bytes.buffers,
        "ms": seconds * 1e3,
    }


def folding(results: dict[str, Any], executor: Executor) -> None:
    """Print how fast an upload is folded into the running mean."""
    torch.manual_seed(0)
    model = transformer(20_000_000)
    schema = decompose(model)
    start = get_state(model)
    upload = made_upload(schema, start, executor)
    reference = {name: value.to(torch.float32) for name, value in start.items()}
    mean = WeightedMean(schema, reference, cohort_size=1000, max_examples=10**7)
    payload = Payload.parse(upload, schema)
    rows = {}
    for threads, used in ((1, None), (2, executor)):

        def fold(used: Executor | None = used) -> None:
            mean.accumulate(lambda: payload.blocks(used), 100, differences=True)

        rows[threads] = schema.num_parameters * 4 / median_seconds(fold) / 1e9
        console.print(
            f"fold an upload of {schema.num_parameters:,} parameters, {threads} thread(s): "
            f"{rows[threads]:.2f} GB/s of float32"
        )
    results["fold"] = rows


def memory(results: dict[str, Any]) -> None:
    """Print the memory figures, each from a process of its own."""
    parts = {
        "streaming": ["stream", "1100000000"],
        "aggregation": ["aggregate", "200"],
        "above 4 GiB": ["huge"],
    }
    for name, words in parts.items():
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("memory.py")), *words],
            capture_output=True,
            text=True,
            check=False,
        )
        console.print(f"{name}: {(done.stdout or done.stderr).strip()}", soft_wrap=True)
        results[name] = json.loads(done.stdout) if done.returncode == 0 else done.stderr


def lossless(results: dict[str, Any]) -> None:
    """Print what byte planes under zstandard save on plain float32 uploads of a trained model."""
    model, start, trained = trained_densenet()
    schema = decompose(model)
    rows = {}
    for flag in (False, True):
        method = FedAvg(lossless=flag, cohort=1)
        server = ServerSession(method, schema, start, num_clients=1)
        server.begin_round()
        broadcast = server.broadcast().data
        client = ClientSession(method, schema, client=0)
        client.receive(Broadcast.decode(broadcast, method, schema))
        rows[str(flag)] = len(client.upload(trained, Report(num_examples=1, train_loss=0)).data)
    saved = 1 - rows["True"] / rows["False"]
    console.print(
        f"lossless, FedAvg upload of a trained DenseNet-40: {rows['False']:,} to {rows['True']:,} "
        f"bytes ({100 * saved:.1f} % less)"
    )
    results["lossless"] = rows


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    results: dict[str, Any] = {"machine": platform.platform(), "cpus": os.cpu_count()}
    with ThreadPoolExecutor(2) as executor:
        speeds(results, executor)
        flare(results, executor)
        folding(results, executor)
        uploads(results, executor)
        other_coders(results)
        lossless(results)
        sizes(results)
        memory(results)
    if words.json:
        words.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
