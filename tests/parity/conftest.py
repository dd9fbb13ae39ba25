"""Torchvision with a torch for which its operators are not built: transformers' video processors need it.

PyPI's wheel of torchvision is built for torch with CUDA. With torch for CPUs its library of operators does not load,
and it stops where it describes two of them. They are declared here, without a body; resizing is torch's own. It is in
a separate folder, see the Makefile: no other process that imports transformers is to meet it.
"""

import importlib.util
import pathlib
import sys

import torch

sys.path.append(str(pathlib.Path(sys.prefix) / "torchvision"))

if importlib.util.find_spec("torchvision"):  # where it is missing, tests of videos fail as they import what needs it
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        OPERATORS = torch.library.Library("torchvision", "DEF")  # declared for as long as it lives
        for name in ("nms", "qnms"):
            OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
