"""The package, and in a wheel `configs/` inside it, as `nvae/configs`."""

from pathlib import Path

from setuptools import find_packages, setup

GROUPS = [f"nvae.configs.{path.name}" for path in Path("configs").iterdir() if path.is_dir()]

setup(
    packages=[*find_packages(include=["nvae*"]), "nvae.configs", *GROUPS],
    package_dir={"nvae.configs": "configs"},
    package_data={"": ["*.yaml"], "nvae": ["py.typed", "ops/*.cu"]},
)
