"""Networks to start with; importing them registers the ResNets for small images with timm."""

from hatfn.models.papers import MLP, AlexNet
from hatfn.models.small_images import resnet18s, resnet34s, resnet50_small, small_image_resnet

__all__ = ["MLP", "AlexNet", "resnet18s", "resnet34s", "resnet50_small", "small_image_resnet"]
