"""Names the packages; everything else that a build needs to know is in pyproject.toml."""

from setuptools import find_packages, setup

# Top-level folders that install under the package, in wheels and editable installs alike.
MOVED = {"tvkernels.pipelines": "pipelines", "tvkernels.benchmarks": "benchmarks"}

packages = find_packages(include=["tvkernels", "tvkernels.*"])
for package, folder in MOVED.items():
    packages += [package, *(f"{package}.{name}" for name in find_packages(folder))]

setup(packages=packages, package_dir=MOVED)
