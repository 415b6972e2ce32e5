"""same_wheels.py CHECKOUT WHEEL OTHER: both wheels hold the same files, and all of the checkout's code and data."""

import sys
import zipfile
from pathlib import Path

LEFT_OUT = {f"gateway/demo/data/{size}/model.safetensors" for size in ("small", "large")}  # for vLLM's tests

checkout, *wheels = map(Path, sys.argv[1:])
first, second = ({item.filename: item.CRC for item in zipfile.ZipFile(wheel).infolist()} for wheel in wheels)
differing = {name for name, _ in first.items() ^ second.items() if "dist-info" not in name}
assert not differing, sorted(differing)
folders = [checkout / name for name in ("estimator", "gateway", "training")]
files = {str(path.relative_to(checkout)) for folder in folders for path in folder.rglob("*") if path.is_file()}
expected = {f"depo_gateway/{name}" for name in files - LEFT_OUT if "__pycache__" not in name}
expected |= {"depo_gateway/__init__.py", "depo_gateway/py.typed"}
packed = {name for name in first if name.startswith("depo_gateway/")}
assert packed == expected, sorted(packed ^ expected)
