"""Measures tiles on the GPU and writes its tuning file: ``python -m bench.gpu --stages tune``.

Works in sections: the tiles of one kernel, or of one shape of weights. Every candidate is a case of the run, so one
that faults affects only itself, and a candidate with a result in the folder is not measured again. DIR/tuned.json is
written after every section, from all results in the folder. Key tiles affect the numerics, so the file's digest is part
of the kernels' name, and nodes with other files refuse each other. Splits, and the parts and steps of products, keep
their values. A candidate that is wrong on any shape, or does not fit, is dropped. Serving reads the file and measures
nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any, NamedTuple

import torch

from bench import gpu_kernels
from bench.gpu_child import Context
from bench.gpu_kernels import Product
from bench.gpu_measure import Case, Device, Task, Work, measured
from bench.gpu_rows import Line, Rows, results
from bench.gpu_sizes import LLAMA_8B, TINY, Sizes
from engine.kernels.triton.tuning import GemmPlan, Tuning, parse

Data = dict[str, Any]
_DECODE = [{"block_n": n, "num_warps": w, "num_stages": s} for n in (32, 64, 128) for w in (4, 8) for s in (3, 5, 7)]
_PREFILL = [
    {"block_m": m, "block_n": n, "num_warps": w, "num_stages": s, "programs_per_processor": p}
    for m, w in ((64, 4), (128, 8))
    for n in (32, 64, 128)
    for s in (2, 3, 5)
    for p in (0, 2)
]
_STREAM = [
    {"max_block_m": m, "block_n": n, "num_warps": w, "num_stages": s}
    for m in (32, 64)
    for n in (32, 64, 128)
    for w in (4, 8)
    for s in (3, 5)
]
_GRID = [
    {"block_m": m, "block_n": n, "num_warps": w, "num_stages": s, "programs_per_processor": p}
    for m, n, w in ((64, 128, 4), (128, 128, 8), (128, 256, 8))
    for s in (3, 4)
    for p in (0, 1)
]
# Numbers of rows at which the ways to multiply are compared, and those that decide the tiles for few and for many rows.
_ROWS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
_FEW_ROWS, _MANY_ROWS = (1, 64), 2048


@dataclass(frozen=True, slots=True)
class Section:
    """The candidates for one part of the file; each is measured alone, whatever the other sections choose."""

    name: str
    change: Callable[[Data, Any], Data]
    candidates: Sequence[Any]
    works: Callable[[Tuning], Iterator[Work]]
    dtype: str

    def case(self, candidate: Any) -> str:
        return json.dumps(candidate, sort_keys=True)

    def tuned(self, data: Data, candidate: Any) -> Iterator[Work]:
        """The measurement of a candidate, without peers."""
        tuning = parse(self.change(data, candidate), "candidate")
        return (dataclasses.replace(work, peers={}) for work in self.works(tuning))

    def best(self, found: Mapping[str, Line]) -> Any:
        """The correct candidate with the least time over all shapes, each relative to the first candidate's; None if
        none is correct."""
        right = [(c, found[self.case(c)]["us_by_shape"]) for c in self.candidates if _is_right(found.get(self.case(c)))]
        if not right:
            return None
        _, first = right[0]
        return min(right, key=lambda one: sum(one[1][name] / first[name] for name in first))[0]


def _is_right(line: Line | None) -> bool:
    return line is not None and line["kind"] == "row" and line.get("is_right") is True


def with_tile(section: str, key: str) -> Callable[[Data, Any], Data]:
    return lambda data, tile: {**data, section: {**data[section], key: {**data[section].get(key, {}), **tile}}}


class Paths(NamedTuple):
    """Microseconds of each way to multiply so many rows."""

    rows: int
    stream: float
    grid: float
    vendor: float


def thresholds(measured: Sequence[Paths]) -> tuple[int, int | None]:
    """(grid_from_rows, vendor_from_rows): the size from which each is faster at all larger sizes. If the grid never
    is: a value beyond the largest size."""
    grid = _from(measured, lambda p: p.grid < p.stream)
    vendor = _from(measured, lambda p: p.vendor < min(p.stream, p.grid))
    return (measured[-1].rows + 1 if grid is None else grid), vendor


def _from(measured: Sequence[Paths], is_better: Callable[[Paths], bool]) -> int | None:
    better = list(itertools.takewhile(is_better, reversed(measured)))
    return better[-1].rows if better else None


def entry(plan: GemmPlan, num_processors: int) -> dict[str, Any]:
    """A plan in the file's format."""
    data = dataclasses.asdict(plan)
    num_programs = data["grid"].pop("num_programs")
    return {**data, "grid": {**data["grid"], "programs_per_processor": num_programs // num_processors}}


def with_plan(data: Data, change: Data, *, product: Product, sizes: Sizes) -> Data:
    """``data`` with parts of the plan of one shape of weights replaced."""
    key = f"{product.out}x{product.inner}"
    tuning = parse(data, "candidate")
    first = entry(tuning.gemm_plan(product.out, product.inner, sizes.dtype), tuning.num_processors)
    plan = data["gemm"].get(key, first)
    parts = {name: {**plan[name], **value} if isinstance(value, dict) else value for name, value in change.items()}
    return {**data, "gemm": {**data["gemm"], key: {**plan, **parts}}}


class Tuner:
    """The sections of one size on one device, in order of value; ``few`` shortens each."""

    def __init__(self, data: Data, sizes: Sizes, device: Device, few: int | None) -> None:
        self.base = data
        self._sizes = sizes
        self._device = device
        self._few = few
        self._products = gpu_kernels.products(sizes)

    def sections(self) -> Iterator[Section]:
        products = {product.name: product for product in self._products}
        yield self._attention("decode", _DECODE, gpu_kernels.decode_works)
        yield from (self._stream(products[name]) for name in ("gate and up", "down", "qkv", "output"))
        yield self._attention("prefill", _PREFILL, gpu_kernels.prefill_works)
        # Many rows of the head never occur.
        yield from (self._grid(products[name]) for name in ("gate and up", "down", "qkv", "output"))
        yield self._stream(products["head"])

    def sweeps(self, data: Data) -> Iterator[tuple[Product, list[tuple[int, Task]]]]:
        """For each shape of weights, with the chosen tiles: both ways and the vendor's at each number of rows."""
        few_rows = self._sizes.rows[: self._few] if self._few else _ROWS
        for product in self._products:
            tasks = []
            for rows in few_rows:
                run = partial(self._paths, data, product, rows)
                tiles = with_plan(data, {}, product=product, sizes=self._sizes)["gemm"][
                    f"{product.out}x{product.inner}"
                ]
                shape = f"{rows} rows, {json.dumps([tiles['stream'], tiles['grid']], sort_keys=True)}"
                tasks.append((rows, Task(f"tune {product.name}, rows", shape, run, self._sizes.dtype_name)))
            yield product, tasks

    def task(self, section: Section, candidate: Any) -> Task:
        run = partial(self._measured, section, candidate)
        return Task(f"tune {section.name}", section.case(candidate), run, section.dtype)

    def chosen(self, lines: Sequence[Line]) -> Data:
        """The file from all results; what was not measured keeps the architecture's defaults."""
        found: dict[str, dict[str, Line]] = {}
        for (stage, _), parts in results(lines).items():
            line = parts.get("check")
            if stage == "tune" and line is not None and line["kind"] == "row":
                found.setdefault(line["kernel"].removeprefix("tune "), {})[line["shape"]] = line
        data = self.base
        for section in self.sections():
            best = section.best(found.get(section.name, {}))
            data = data if best is None else section.change(data, best)
        for product, tasks in self.sweeps(data):
            swept = found.get(f"{product.name}, rows", {})
            rows = [(num, swept.get(task.shape)) for num, task in tasks]
            key = f"{product.out}x{product.inner}"
            if key in data["gemm"]:
                # A candidate sets the thresholds so that its own tile is measured; only a sweep finds the real ones.
                first = with_plan(self.base, {}, product=product, sizes=self._sizes)["gemm"][key]["grid_from_rows"]
                data = with_plan(data, {"grid_from_rows": first}, product=product, sizes=self._sizes)
            measured_rows = [Paths(num, **line["paths"]) for num, line in rows if line is not None and line["paths"]]
            if len(measured_rows) == len(tasks):
                grid_from, vendor_from = thresholds(measured_rows)
                change = {"grid_from_rows": grid_from, "vendor_from_rows": vendor_from}
                data = with_plan(data, change, product=product, sizes=self._sizes)
        return data

    def _attention(self, name: str, tiles: Sequence[Data], works: Callable[..., Iterator[Work]]) -> Section:
        sizes = self._sizes
        key = min((k for k in self.base[name] if int(k) >= sizes.shape.head_dim), key=int)
        first = self.base[name][key]
        return Section(
            name, with_tile(name, key), self._cut([first, *tiles]),
            lambda tuning: works(sizes, tuning, self._device, sizes.block_tokens[0]), sizes.dtype_name,
        )  # fmt: skip

    def _stream(self, product: Product) -> Section:
        candidates = [{"stream": tile, "grid_from_rows": self._few_rows[-1] + 1} for tile in ({}, *_STREAM)]
        return self._product(f"{product.name}, few rows", product, self._few_rows, candidates)

    def _grid(self, product: Product) -> Section:
        candidates = [{"grid": tile, "grid_from_rows": self._few_rows[-1] + 1} for tile in ({}, *_GRID)]
        rows = self._sizes.rows[1] if self._few else _MANY_ROWS
        return self._product(f"{product.name}, many rows", product, (rows,), candidates)

    @property
    def _few_rows(self) -> tuple[int, ...]:
        return self._sizes.rows[:1] if self._few else _FEW_ROWS

    def _product(self, name: str, product: Product, rows: tuple[int, ...], candidates: Sequence[Data]) -> Section:
        change = partial(with_plan, product=product, sizes=self._sizes)
        works = partial(self._gemm, product, rows)
        return Section(name, change, self._cut(candidates), works, self._sizes.dtype_name)

    def _gemm(self, product: Product, rows: tuple[int, ...], tuning: Tuning) -> Iterator[Work]:
        return gpu_kernels.gemm_works(dataclasses.replace(self._sizes, rows=rows), tuning, self._device, [product])

    def _cut(self, candidates: Sequence[Any]) -> list[Any]:
        return [*candidates][: self._few]

    def _measured(self, section: Section, candidate: Any) -> dict[str, Any]:
        us: dict[str, float] = {}
        for work in section.tuned(self.base, candidate):
            row = measured(work, self._device)
            if row["is_right"] is False:
                return {"is_right": False, "said": f"{work.shape}: error {row.get('error')}"}
            # Without a GPU nothing is timed, and the first candidate is kept.
            us[f"{work.kernel} {work.shape}"] = row.get("us", 1.0)
        return {"is_right": True, "us_by_shape": us, "said": ", ".join(f"{value:.1f}" for value in us.values()) + " us"}

    def _paths(self, data: Data, product: Product, rows: int) -> dict[str, Any]:
        us: dict[str, float] = {}
        for way, grid_from_rows in (("stream", rows + 1), ("grid", 1)):
            changed = with_plan(data, {"grid_from_rows": grid_from_rows}, product=product, sizes=self._sizes)
            for work in self._gemm(product, (rows,), parse(changed, "candidate")):
                # The bits of both ways were compared when their tiles were chosen.
                row = measured(dataclasses.replace(work, alone=None), self._device)
                us |= {way: row["us"], "vendor": row["cublas"]} if "us" in row else {}
        return {"is_right": True, "paths": us, "said": json.dumps(us)}


def on_gpu(gpu: str, capability: tuple[int, int], num_processors: int, device: Device) -> Tuner:
    base = _data("sm90.json" if capability >= (9, 0) else "sm80.json", gpu, num_processors, is_measured=True)
    # A few representative shapes: a candidate costs seconds.
    sizes = dataclasses.replace(
        LLAMA_8B, decode=((1, 4096), (64, 4096), (256, 1024)), prefill=((4, 4096),), chunked=((2048, 8192),)
    )
    return Tuner(base, sizes, device, None)


def tuner(context: Context) -> Tuner:
    device = context.device
    if device.is_gpu:
        has = torch.cuda.get_device_properties(0)
        return on_gpu(has.name, (has.major, has.minor), has.multi_processor_count, device)
    base = _data("interpreter.json", device.name, 1, is_measured=False)
    return Tuner(base, dataclasses.replace(TINY[1], block_tokens=(64,)), device, 2)


def _data(name: str, gpu: str, num_processors: int, *, is_measured: bool) -> Data:
    read: Data = json.loads((resources.files("engine.kernels.triton") / "tuned" / name).read_text())
    return {**read, "gpu": gpu, "is_measured": is_measured, "num_processors": num_processors}


def cases(context: Context) -> Iterator[Case]:
    tuning = tuner(context)
    for section in tuning.sections():
        yield from (tuning.task(section, candidate) for candidate in section.candidates)
        write(context.rows, tuning.chosen(context.rows.read()))
    for _, tasks in tuning.sweeps(tuning.chosen(context.rows.read())):
        yield from (task for _, task in tasks)
        write(context.rows, tuning.chosen(context.rows.read()))


def write(rows: Rows, data: Data) -> None:
    """Writes the file atomically, under the name that `tuning.load` looks for."""
    made = rows.folder / ".tuned.json"
    made.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(made, rows.folder / "tuned.json")
