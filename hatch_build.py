"""Build hook: compiles the CPU kernels into the wheel, which then is a wheel for this platform.

Where there is no compiler the wheel is built without them: it is pure Python and multiplies through torch.
"""

from __future__ import annotations

import os
import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelHook(BuildHookInterface):
    """Runs sparsekit/runtime/build.py before a wheel or an editable installation is made."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tag the wheel with this platform.

        Args:
            version: "standard" or "editable".
            build_data: Hatchling's settings of this build, changed in place.

        Raises:
            Exception: The compiler failed; set SPARSEKIT_BUILD_KERNELS=0 to build without kernels.
        """
        if self.target_name != "wheel" or os.environ.get("SPARSEKIT_BUILD_KERNELS") == "0":
            return
        path = Path(self.root) / "sparsekit" / "runtime" / "build.py"
        build = runpy.run_path(str(path), run_name="_sparsekit_build")
        if build["find_compiler"]() is None:
            self.app.display_warning("No C++ compiler: building sparsekit without its CPU kernels.")
            return
        library = build["build"]()
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(str(library.relative_to(self.root)))
