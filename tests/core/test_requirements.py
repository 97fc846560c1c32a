"""Requirements, the lock file and the image agree with each other, and name public places alone."""

import re
import tomllib

from helpers import ROOT

LOCK = tomllib.loads((ROOT / "uv.lock").read_text())


def requirements(name: str) -> dict[str, str]:
    """Package -> its bounds, of a requirements file."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement and not requirement.startswith("-"):
            package, bounds = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
            found[package.lower().replace("_", "-")] = bounds
    return found


def test_the_lock_file_is_that_of_the_requirements():
    """What `uv lock --check` compares: the names and the bounds. `uv lock` makes the file anew."""
    (project,) = [package for package in LOCK["package"] if package["name"] == "nanoforge"]
    wanted = requirements("requirements.txt")
    locked = {item["name"]: item.get("specifier", "") for item in project["metadata"]["requires-dist"]}
    assert locked.keys() == wanted.keys()
    for name, bounds in wanted.items():
        assert {*locked[name].split(",")} == {*bounds.split(",")}, name
    torch = [package for package in LOCK["package"] if package["name"] == "torch"]
    assert [f"=={package['version']}" for package in torch] == [wanted["torch"]]


def test_the_lock_file_names_pypi_alone():
    text = (ROOT / "uv.lock").read_text()
    assert {*re.findall(r"[a-z+]+://[^/\"]*", text)} == {"https://pypi.org", "https://files.pythonhosted.org"}
    assert not re.search(r'(path|directory|find-links) *= *"', text)


def test_no_package_is_required_twice():
    base, optional, dev = (requirements(f"requirements{part}.txt") for part in ("", "-optional", "-dev"))
    assert not base.keys() & (optional.keys() | dev.keys())
    for package in optional.keys() & dev.keys():
        assert optional[package] == dev[package], package
