"""docs/compatibility.md equals what its generator makes of the tests' results."""

from __future__ import annotations

import importlib.util
import sys

from .texts import ROOT, read


def test_the_document_is_up_to_date():
    spec = importlib.util.spec_from_file_location("blockskip_compatibility", ROOT / "devtools" / "compatibility.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    assert read("docs/compatibility.md") == module.document(), "run devtools/compatibility.py"
