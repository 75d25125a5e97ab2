"""A model that is trained in a blink, for runs whose numbers are looked at and not their use."""

import yaml

SMALL = """\
views: {image_size_px: 32, blur_kernel_px: 5}
model:
  backbone: test_resnet
  projector: {width: 16}
  local: {resize_px: 8, channels: 4, pool: 2}
"""
"""Lines of a pretraining file."""


def small_tree():
    """The same as a tree."""
    return yaml.safe_load(SMALL)
