"""The package, and in a wheel `configs/` inside it, as `nvae/configs`."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = [path for path in Path("configs").rglob("*") if path.is_dir()]
PACKAGES = ["nvae.configs", *(".".join(["nvae", *path.parts]) for path in FOLDERS)]

setup(
    packages=[*find_packages(include=["nvae*"]), *PACKAGES],
    package_dir={"nvae.configs": "configs"},
    package_data={"": ["*.yaml"], "nvae": ["py.typed", "ops/*.cu"]},
)
