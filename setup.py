"""Package metadata comes from settings.ini, which nbdev reads too."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=("=",), interpolation=None)
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
readme = here / "README.md"

# what the commands look up by name: it travels with a wheel, as itm_nb/installed
BROUGHT = ("nbs/experiments/*.ipynb", "nbs/experiments/*.yaml", "nbs/experiments/sweeps/*.yaml",
           "nbs/experiments/folds/*.json", "figures/published.csv", "settings.ini")


class with_templates(build_py):
    "Build, then copy templates, sweeps, folds and published rows beside the modules"
    def run(self):
        super().run()
        if self.editable_mode:
            return
        for path in sorted(p for pattern in BROUGHT for p in here.glob(pattern)):
            to = Path(self.build_lib)/cfg["lib_path"]/"installed"/path.relative_to(here)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)


setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"], license="Apache-2.0", python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    include_package_data=True,
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "data": cfg["data_requirements"].split(),
                    "ray": cfg["ray_requirements"].split(), "app": cfg["app_requirements"].split(),
                    "docs": cfg["docs_requirements"].split(),
                    "track": cfg["track_requirements"].split()},
    cmdclass={"build_py": with_templates},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
